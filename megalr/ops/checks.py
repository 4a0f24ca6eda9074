"""What the ops ask of their tensors: the twin of csrc/checks.h, with the same messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

STORAGE = (torch.float32, torch.bfloat16)


def check_lists(op: str, **lists: Sequence[Tensor]) -> None:
    """Lists of one length, tensors of one device, equal shapes at each index, contiguous, one storage dtype per list.

    Raises:
        ValueError: which tensor (list and index) is wrong, what it is and what to write.
    """
    (first, model), *_ = lists.items()
    for name, tensors in lists.items():
        if len(tensors) != len(model):
            fail(op, f"{name} has {len(tensors)} tensors and {first} {len(model)}; give one for each of {first}")
        for i, tensor in enumerate(tensors):
            what = f"{name}[{i}]"
            check_tensor(op, what, tensor, STORAGE, f"{first}[0]", model[0])
            if tensor.dtype != tensors[0].dtype:
                fail(
                    op, f"{what} is {_dtype(tensor)} and {name}[0] {_dtype(tensors[0])}; a list has one dtype: split it"
                )
            if tensor.shape != model[i].shape:
                fail(
                    op, f"{what} has shape {_shape(tensor)} and {first}[{i}] {_shape(model[i])}; they must be the same"
                )


def check_tensor(
    op: str, what: str, tensor: Tensor, dtypes: Sequence[torch.dtype], model_name: str, model: Tensor
) -> None:
    """One tensor: on the model's device, of one of the dtypes, dense and contiguous."""
    if tensor.device != model.device:
        where = f"{what} is on {tensor.device} and {model_name} on {model.device}"
        fail(op, f'{where}; all tensors of a call are on one device: write {what}.to("{model.device}")')
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        fail(op, f"{what} is {_dtype(tensor)}; it must be {allowed}: keep it as {what}.float()")
    if tensor.layout != torch.strided:
        fail(op, f"{what} is sparse; write {what}.to_dense()")
    if not tensor.is_contiguous():
        strides = f"shape {_shape(tensor)}, strides {list(tensor.stride())}"
        fail(op, f"{what} is not contiguous ({strides}); keep it as {what}.contiguous()")


def check_tensors(op: str, name: str, values: object) -> None:
    """A tensor, or a list of them and of nothing else."""
    for i, value in enumerate(values if isinstance(values, list | tuple) else [values]):
        if not isinstance(value, Tensor):
            what = f"{name}[{i}]" if isinstance(values, list | tuple) else name
            fail(op, f"{what} is {value if value is None else type(value).__name__}; it must be a tensor")


def check_apart(op: str, *, written: Mapping[str, Sequence[Tensor]], read: Mapping[str, Sequence[Tensor]]) -> None:
    """No tensor that is written shares memory with another of the call."""
    spans: list[tuple[int, int, int, bool, str]] = []
    for lists in (written, read):
        for name, tensors in lists.items():
            for i, tensor in enumerate(tensors):
                begin, bytes_ = tensor.data_ptr(), tensor.numel() * tensor.element_size()
                if bytes_:
                    spans.append((begin, len(spans), begin + bytes_, lists is written, f"{name}[{i}]"))
    # By address: of those before, what matters is the one that reaches furthest, of all and of the written ones.
    furthest = furthest_written = (0, "")
    for begin, _, end, is_written, what in sorted(spans):
        other = furthest if is_written else furthest_written
        if begin < other[0]:
            fail(op, f"{what} shares memory with {other[1]}, and one of them is written: write {what}.clone()")
        furthest = max(furthest, (end, what))
        if is_written:
            furthest_written = max(furthest_written, (end, what))


def check_steps(op: str, name: str, steps: Sequence[int], first: str, tensors: Sequence[Tensor]) -> None:
    """One count for each tensor, at least 1."""
    check_length(op, name, steps, first, tensors)
    for i, step in enumerate(steps):
        if step < 1:
            fail(op, f"{name}[{i}] is {step}; it counts this update too, so it is at least 1")


def check_bias(op: str, name: str, values: Sequence[float], first: str, tensors: Sequence[Tensor]) -> None:
    """One bias correction 1 - prod beta_t for each tensor, in (0, 1]."""
    check_length(op, name, values, first, tensors)
    for i, value in enumerate(values):
        if not 0 < value <= 1:
            fail(op, f"{name}[{i}] is {value:g}; it is 1 - prod beta_t over the updates, this one included, in (0, 1]")


def check_float(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    """fp32, all of them: what an op writes is as exact as what it computes."""
    for i, tensor in enumerate(tensors):
        if tensor.dtype != torch.float32:
            fail(op, f"{name}[{i}] is {_dtype(tensor)}; it must be float32: keep it as {name}[{i}].float()")


def check_length(op: str, name: str, values: Sequence[object], first: str, tensors: Sequence[Tensor]) -> None:
    """As many numbers as tensors."""
    if len(values) != len(tensors):
        fail(op, f"{name} has {len(values)} numbers and {first} {len(tensors)} tensors; give one for each of {first}")


def check_statistics(op: str, statistics: Tensor, first: str, tensors: Sequence[Tensor]) -> None:
    """(n, 3), fp32, with the tensors."""
    model = tensors[0] if tensors else statistics
    check_tensor(op, "statistics", statistics, (torch.float32,), f"{first}[0]", model)
    if statistics.dim() != 2 or statistics.shape[0] != len(tensors) or statistics.shape[1] != 3:
        fail(
            op, f"statistics has shape {_shape(statistics)}; it must be [{len(tensors)}, 3], a row for each of {first}"
        )


def fail(op: str, message: str) -> None:
    """Raise the ValueError of an op."""
    raise ValueError(f"megalr.{op}: {message}")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
