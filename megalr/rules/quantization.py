"""Tensors kept in 8 and in 4 bits: block-wise dynamic codes for moments, uniform levels by group for bases.

A rule sees whole matrices, so that where blocks and groups begin depends on no layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalr.kept import kept

BLOCK = 256  # elements that share one scale of an 8-bit moment, as in bitsandbytes
GROUP = 256  # elements that share the scale and the zero of a 4-bit basis, as in Q-GaLore
LEVELS = 15  # of 4 bits, above the lowest
SMALLEST_STEP = 1e-5  # between the lowest and the highest entry of a group, as in Q-GaLore


def quantize_blocks(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """The nearest codes of block-wise dynamic quantization (arXiv 2110.02861).

    Args:
        values: fp32, of any shape; not negative unless signed.
        signed: which of the two code books.

    Returns:
        Codes, uint8, of the same shape; the largest magnitude of each block, fp32, (blocks,).
    """
    flat = _padded(values.reshape(-1), BLOCK)
    largest = flat.abs().amax(1)  # (blocks,)
    book = _code_book(signed, values.device)
    scaled = flat / torch.where(largest > 0, largest, 1.0)[:, None]
    codes = torch.bucketize(scaled, (book[1:] + book[:-1]) / 2).to(torch.uint8)
    return codes.view(-1)[: values.numel()].view(values.shape), largest


def dequantize_blocks(codes: Tensor, largest: Tensor, *, signed: bool) -> Tensor:
    """The fp32 values that :func:`quantize_blocks`'s results stand for; zeros where a block's largest is zero."""
    flat = _padded(_code_book(signed, codes.device)[codes.reshape(-1).int()], BLOCK)
    return (flat * largest[:, None]).view(-1)[: codes.numel()].view(codes.shape)


def blocks_of(numel: int) -> int:
    """How many blocks so many elements have."""
    return -(-numel // BLOCK)


def quantize_groups(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each entry as one of 16 levels between the lowest and the highest of its group, or zero, two to a byte.

    Q-GaLore leaves zero out where all entries of a group have one sign. Since zero has to be a level all the same, such
    a group loses what lies beyond: a basis of one entry, ±1, becomes ±1e-5 and trains nothing.

    Returns:
        Packed levels, uint8, (⌈elements / 2⌉,); the groups' steps, fp32; the level that is zero, uint8.
    """
    flat = values.reshape(-1)
    # The last group is filled up with its own last entry, which changes neither its lowest nor its highest.
    short = -flat.numel() % GROUP
    groups = torch.cat([flat, flat[-1:].expand(short)]).view(-1, GROUP)
    low, high = groups.amin(1, keepdim=True).clamp_(max=0), groups.amax(1, keepdim=True).clamp_(min=0)
    step = (high - low).clamp_(min=SMALLEST_STEP) / LEVELS
    zero = (-low / step).round_().clamp_(0, LEVELS)
    levels = ((groups / step).round_() + zero).clamp_(0, LEVELS).to(torch.uint8).view(-1)[: flat.numel()]
    pairs = torch.nn.functional.pad(levels, (0, levels.numel() % 2)).view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4), step.view(-1), zero.to(torch.uint8).view(-1)


def dequantize_groups(packed: Tensor, step: Tensor, zero: Tensor, shape: tuple[int, int]) -> Tensor:
    """The fp32 matrix that :func:`quantize_groups`'s results stand for."""
    numel = shape[0] * shape[1]
    levels = torch.stack((packed & LEVELS, packed >> 4), 1).view(-1)[:numel].float()
    groups = _padded(levels, GROUP)
    return ((groups - zero[:, None].float()) * step[:, None]).view(-1)[:numel].view(shape)


def groups_of(numel: int) -> int:
    """How many groups so many elements have."""
    return -(-numel // GROUP)


def _padded(flat: Tensor, size: int) -> Tensor:
    """Rows of ``size`` elements, the last one filled up with zeros."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % size)).view(-1, size)


@kept
def _code_book(signed: bool, device: torch.device) -> Tensor:
    """256 numbers in [-1, 1] or [0, 1], ascending: in each of seven decades twice as many as in the one below it.

    A decade [0.1, 1] · 10^-k is cut into equal cells, whose middles are codes; 0 and 1 are codes as well.
    """
    codes = [0.0, 1.0]
    for decade in range(7):
        cells = 2 ** (decade + (not signed))
        middles = [(0.1 + 0.9 * (cell + 0.5) / cells) * 10.0 ** (decade - 6) for cell in range(cells)]
        codes += middles + [-code for code in middles] * signed
    return torch.tensor(sorted(codes), dtype=torch.float32, device=device)
