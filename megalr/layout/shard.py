"""One rank's side of a layout: its flat buffers, and what the engine that made them has to be asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megalr.layout.layout import Layout


@dataclass(frozen=True)
class Twin:
    """Elements of a trained parameter that this rank has twice.

    Attributes:
        name: the parameter's.
        weight: as the model computes with them; a flat view.
        master: the same elements of the masters; a flat view.
    """

    name: str
    weight: Tensor
    master: Tensor


@dataclass(frozen=True)
class Shard:
    """This rank's side of a layout.

    Attributes:
        layout: what lies where on every rank.
        buffers: this rank's flat master tensors (1-D views), in the layout's order.
        parameters: for each buffer, the tensor that DeepSpeed hands to ``step()``.
        rank: this process's rank in ``group``.
        group: the data-parallel group, None for a single process.
        publish: copies one buffer's masters into the low-precision weights that the model computes with, as
            DeepSpeed does after ``step()``; needed for a buffer that was changed after its own ``step()``.
        unseen_gradients: the gradients of this update that DeepSpeed has not yet handed to ``step()``, while the first
            call of the update runs. None: DeepSpeed makes no call at all when a gradient is not finite.
        ordered: gradients are added up in the order in which they come, which has to be the same on every rank.
        every_pass: the last backward pass of an update adds up the gradients of what it has reached, and no others.
        dry_run: DeepSpeed's wrapper calls ``step()`` once, with zero gradients, while it is being built.
        replicated: every data-parallel rank has all of what it trains (stage 0).
        replicas: ranks outside ``layout`` that have the same as this one and do the same with it, if there are any.
        is_first_copy, is_first_replica: of those in ``layout`` that have the same of what is not trained, whether this
            is the first tensor-parallel and the first data-parallel rank.
        twins: all that this rank holds both as a weight and as a master, where it lies now. Between two updates each
            weight is its master in the model's dtype. Empty where the masters are the weights.
    """

    layout: Layout
    buffers: list[Tensor]
    parameters: list[Tensor]
    rank: int
    group: dist.ProcessGroup | None
    publish: Callable[[int], None]
    unseen_gradients: Callable[[], list[Tensor]] | None = None
    ordered: bool = False
    every_pass: bool = False
    dry_run: bool = False
    replicated: bool = False
    replicas: dist.ProcessGroup | None = None
    is_first_copy: bool = True
    is_first_replica: bool | None = None
    twins: Callable[[], Sequence[Twin]] = tuple

    def __post_init__(self) -> None:
        if self.is_first_replica is None:
            object.__setattr__(self, "is_first_replica", self.rank == 0)

    def message_device(self) -> torch.device:
        """Where messages have to lie: with the buffers, unless these are offloaded and NCCL wants them on a GPU."""
        device = self.buffers[0].device
        if device.type == "cpu" and self.group is not None and dist.get_backend(self.group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return device
