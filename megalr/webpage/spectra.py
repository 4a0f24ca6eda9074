"""Singular values of some weights in a run's newest checkpoint, read without an engine, in bounded time and memory.

Of each kind of matrix inside the blocks of a model the first, the middle and the last block's are taken.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megalr.checkpoint.export.weights import Weights
from megalr.checkpoint.folders import listed
from megalr.checkpoint.format import itemsize
from megalr.checkpoint.manifest import Manifest, missing_or_cut
from megalr.errors import UserError, printable
from megalr.layers.base import FullConfig
from megalr.layers.low_rank import LowRankConfig

Floats = NDArray[np.float64]

LARGEST_EXACT = 2048  # of the smaller dimension: of larger matrices the leading values alone are computed
LARGEST = 1 << 27  # elements: larger matrices are left out
LEADING = 128  # values of a matrix that is too large for all
OVERSAMPLING, POWERS = 32, 3  # of the randomized decomposition
MOST_KINDS = 8  # such as q_proj, k_proj, ...
SECONDS = 60.0  # after which no further matrix is begun
# What torch and the readers raise at a checkpoint whose shapes do not fit together; a UserError is a ValueError.
FAILURES = (OSError, RuntimeError, KeyError, IndexError, ValueError, TypeError, MemoryError)

_BLOCK = re.compile(r"^(?P<before>(?:[^.]+\.)*?)(?P<index>\d+)\.(?P<after>.+)$")
_WANTED = re.compile(r"attn|attention|mlp|ffn|feed_forward|experts", re.IGNORECASE)


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one matrix.

    Attributes:
        block: the number of its block in the model.
        kind: its name in the block, such as "self_attn.q_proj".
        shape: (m, n).
        values: descending, float64; all min(m, n), or fewer where the rest is zero or was not computed.
        squares: the sum of the squares of all singular values.
        is_whole: whether all that are not zero are in ``values``.
    """

    block: int
    kind: str
    shape: tuple[int, int]
    values: Floats
    squares: float
    is_whole: bool

    @property
    def effective_rank(self) -> float | None:
        """exp of the entropy of the singular values divided by their sum (Roy and Vetterli, 2007); needs all."""
        return effective_rank(self.values) if self.is_whole else None

    @property
    def stable_rank(self) -> float:
        """The sum of the squared singular values divided by the largest square."""
        return self.squares / float(self.values[0]) ** 2 if len(self.values) and self.values[0] else 0.0


@dataclass
class Spectra:
    """What was found of a checkpoint.

    Attributes:
        checkpoint: the folder's name; empty without any.
        updates: that were made before it was written.
        found: ordered by kind, then by block.
        notes: sentences on what is missing, and why.
        sizes: bytes of the checkpoint's tensors, by kind of tensor, over all ranks.
    """

    checkpoint: str = ""
    updates: int = 0
    found: list[Spectrum] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sizes: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def read_spectra(run: Path) -> Spectra:
    """The spectra of a run's newest checkpoint whose files are all there.

    Damage inside a file is not looked for; ``python -m megalr.checkpoint verify`` does.

    Args:
        run: the run's folder.
    """
    spectra = Spectra()
    try:
        manifest = _newest(run / "checkpoints", spectra.notes)
        if manifest is None:
            return spectra
        spectra.checkpoint, spectra.updates = manifest.folder.name, manifest.updates
        spectra.sizes = _sizes(manifest)
        _fill(spectra, Weights(manifest))
    except FAILURES as error:
        spectra.notes.append(f"The spectra could not be computed: {printable(str(error))}")
    return spectra


def effective_rank(values: Floats) -> float:
    """exp(-sum p ln p), p being each value's share of the sum; between 1 and the number of values that are not 0."""
    total = float(values.sum())
    if not total:
        return 0.0
    shares = values[values > 0] / total
    return float(math.exp(-(shares * np.log(shares)).sum()))


def singular_values(matrix: Tensor) -> tuple[Floats, bool]:
    """Singular values in descending order.

    They are square roots of eigenvalues of the smaller Gram matrix in fp64, so that those below about 1e-8 of the
    largest are rounding.

    Args:
        matrix: (m, n), of any floating-point dtype.

    Returns:
        The values and True; the leading :data:`LEADING` and False if min(m, n) is above :data:`LARGEST_EXACT`.
    """
    if min(matrix.shape) > LARGEST_EXACT:
        return _leading(matrix.float()), False
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    eigenvalues = torch.linalg.eigvalsh(wide @ wide.T)
    return eigenvalues.clamp(min=0).sqrt().flip(0).numpy(), True


def product_values(b: Tensor, a: Tensor, scale: float) -> Floats:
    """The r singular values of scale * B @ A that can differ from zero, without forming the product.

    Args:
        b, a: (m, r) and (r, n).
        scale: a constant.
    """
    left, right = (torch.linalg.qr(each, mode="r").R for each in (b.double(), a.double().T))
    return abs(scale) * np.asarray(torch.linalg.svdvals(left @ right.T).numpy())


def _leading(matrix: Tensor) -> Floats:
    """By subspace iteration from a fixed start."""
    width = min(LEADING + OVERSAMPLING, *matrix.shape)
    start = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(POWERS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    return np.asarray(torch.linalg.svdvals((basis.T @ matrix).double())[:LEADING].numpy())


def _newest(directory: Path, notes: list[str]) -> Manifest | None:
    if not directory.is_dir():
        notes.append("The run has no checkpoint yet, so there is no spectrum.")
        return None
    for each in listed(directory):
        wrong = [each.wrong] if each.manifest is None else missing_or_cut(each.manifest)
        if each.manifest is not None and not wrong:
            return each.manifest
        notes.append(f"Checkpoint {printable(each.folder.name)} was passed over: {printable(wrong[0])}.")
    notes.append("The run has no checkpoint that can be read, so there is no spectrum.")
    return None


def _sizes(manifest: Manifest) -> dict[str, float]:
    sizes: dict[str, float] = {}
    for key, tensor in manifest.tensors.items():
        kind = key.partition("/")[0]
        sizes[kind] = sizes.get(kind, 0.0) + math.prod(tensor["shape"]) * itemsize(tensor["dtype"])
    return sizes


def _fill(spectra: Spectra, weights: Weights) -> None:
    """Compute the spectra of the chosen matrices, until the time is over."""
    layers = _layers(weights)
    chosen = list(_chosen(layers))
    if not chosen:
        spectra.notes.append("The checkpoint has no matrices in numbered blocks, so no spectrum is shown.")
    end, large, late, failed = time.monotonic() + SECONDS, [], 0, []
    for block, kind, layer in chosen:
        if time.monotonic() > end:
            late += 1
            continue
        try:
            one = _spectrum(weights, layer, layers[layer], block, kind)
        except FAILURES as error:
            failed.append(f"{printable(layer)}: {printable(str(error))}")
            continue
        if one is None:
            large.append(printable(layer))
        elif np.isfinite(one.values).all():
            spectra.found.append(one)
        else:
            failed.append(f"{printable(layer)} has values that are not finite")
    if large:
        spectra.notes.append(f"Left out, because of more than {LARGEST:,} elements: {', '.join(large[:6])}.")
    if late:
        spectra.notes.append(f"{late} further matrices were left out after {SECONDS:g} seconds.")
    for line in list(dict.fromkeys(failed))[:3]:
        spectra.notes.append(f"Left out: {line}.")


def _layers(weights: Weights) -> dict[str, bool]:
    """Layers with a matrix, and whether it is made of a parametrization's parts."""
    parts: dict[str, set[str]] = {}
    for name in weights:
        layer, _, last = name.rpartition(".")
        if layer:
            parts.setdefault(layer, set()).add(last)
    config = weights.parametrization
    replaced = frozenset() if isinstance(config, FullConfig) else config.parts
    found = {}
    for layer, names in parts.items():
        if replaced and replaced <= names:
            found[layer] = True
        elif "weight" in names and len(weights.shape(f"{layer}.weight")) == 2:
            found[layer] = False
    return found


def _chosen(layers: Mapping[str, bool]) -> Iterator[tuple[int, str, str]]:
    """Block, kind and name of each matrix to look at."""
    stacks: dict[str, dict[str, dict[int, str]]] = {}
    for layer in layers:
        match = _BLOCK.match(layer)
        if match and len(match["index"]) < 9:
            kinds = stacks.setdefault(match["before"], {})
            kinds.setdefault(match["after"], {})[int(match["index"])] = layer
    if not stacks:
        return
    kinds = max(stacks.values(), key=lambda kinds: sum(map(len, kinds.values())))
    wanted = [kind for kind in kinds if _WANTED.search(kind)] or list(kinds)
    for kind in wanted[:MOST_KINDS]:
        for block in _three(sorted(kinds[kind])):
            yield block, kind, kinds[kind][block]


def _three(blocks: Sequence[int]) -> list[int]:
    """The first, the middle and the last."""
    return sorted({blocks[0], blocks[len(blocks) // 2], blocks[-1]})


def _spectrum(weights: Weights, layer: str, replaced: bool, block: int, kind: str) -> Spectrum | None:
    """Of one layer; None if it is too large."""
    config = weights.parametrization
    if isinstance(config, FullConfig) or not replaced:
        if math.prod(weights.shape(f"{layer}.weight")) > LARGEST:
            return None
        return _of_dense(weights[f"{layer}.weight"], block, kind)
    if config.not_dense:
        raise UserError(f'a "{config.type}" layer has no single matrix: {config.not_dense}')
    names = {part: f"{layer}.{part}" for part in config.parts}
    shapes = [weights.shape(name) for name in names.values()]
    if type(config) is LowRankConfig:
        rank = min(min(shape) for shape in shapes)
        if sum(map(math.prod, shapes)) > LARGEST or rank > LARGEST_EXACT:
            return None
        b, a = weights[names["B"]], weights[names["A"]]
        values = product_values(b, a, config.scale)
        return Spectrum(block, kind, (b.shape[0], a.shape[1]), values, float((values**2).sum()), True)
    if _elements(shapes) > LARGEST:
        return None
    return _of_dense(config.weight({part: weights[name] for part, name in names.items()}), block, kind)


def _of_dense(matrix: Tensor, block: int, kind: str) -> Spectrum:
    if not torch.isfinite(matrix).all():
        raise UserError("its values are not all finite")
    values, is_whole = singular_values(matrix)
    squares = float((matrix.double() ** 2).sum())
    return Spectrum(block, kind, (matrix.shape[0], matrix.shape[1]), values, squares, is_whole)


def _elements(shapes: Sequence[tuple[int, ...]]) -> int:
    """How many elements a matrix has at most that is made of parts of these shapes."""
    longest = sorted(max(shape) for shape in shapes if len(shape) == 2)[-2:]
    return max(math.prod(longest), *map(math.prod, shapes))
