"""What megalr asks of an engine: the protocol that each file of this package answers for one engine.

:class:`Host` is asked about parameters, also before there is an engine: under ``zero.Init``, by layers, groups and
guards. :class:`RunningHost` is asked about one engine that runs: by checkpoints, guards, the memory formulas and the
training program. ``megalr.hosts`` has the functions that choose the host.

Code outside of this package may use the part of an engine object that every engine has or can be given, :data:`PUBLIC`,
and may call it to run the model. Everything else of an engine object is named in this package alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalr.layout.shard import Shard

# A group as it was given to the optimizer: the model's own parameters by qualified name, in order.
NamedGroup = Mapping[str, nn.Parameter]

# Attributes of an engine object that code outside of megalr.hosts may use; "megalr_guard" is put there by megalr.
PUBLIC = (
    "backward",
    "step",
    "train",
    "eval",
    "training",
    "module",
    "save_checkpoint",
    "load_checkpoint",
    "destroy",
    "megalr_guard",
)


@dataclass(frozen=True)
class Groups:
    """The groups of ranks that this rank belongs to.

    Attributes:
        data: ranks that read different data, and over which ZeRO cuts states; None for a single process.
        tensor: ranks that share each layer; None without tensor parallelism.
    """

    data: dist.ProcessGroup | None
    tensor: dist.ProcessGroup | None = None

    @property
    def data_size(self) -> int:
        """Number of data-parallel ranks."""
        return 1 if self.data is None else dist.get_world_size(self.data)

    @property
    def data_rank(self) -> int:
        """This rank among the data-parallel ranks."""
        return 0 if self.data is None else dist.get_rank(self.data)

    @property
    def tensor_size(self) -> int:
        """Number of tensor-parallel ranks."""
        return 1 if self.tensor is None else dist.get_world_size(self.tensor)

    @property
    def tensor_rank(self) -> int:
        """This rank among the tensor-parallel ranks."""
        return 0 if self.tensor is None else dist.get_rank(self.tensor)


@dataclass(frozen=True)
class EngineTensors:
    """The tensors that an engine keeps on this rank, as nested lists and dictionaries; None stands for no tensor.

    Attributes:
        weights: what the model computes with, with the parts and copies that the engine keeps beside.
        masters: fp32 copies of the weights.
        gradients: of the parameters, and what the engine accumulates in buffers of its own.
    """

    weights: Any
    masters: Any
    gradients: Any


class Host(ABC):
    """How an engine keeps parameters.

    What is not overridden describes an engine that leaves every parameter whole on every rank.
    """

    @abstractmethod
    def read(self, named_groups: Sequence[NamedGroup], param_groups: Sequence[dict[str, Any]]) -> tuple[Shard, Shard]:
        """Find out how the engine has cut the parameters; collective where tensor parallelism cuts some.

        Args:
            named_groups: the parameters of each group by qualified name, as they were when the optimizer was built.
            param_groups: the optimizer's groups now, with the engine's flat tensors (or the parameters) in "params".

        Returns:
            ``(local, whole)``: what this rank's data-parallel group holds, with this rank's parts of what tensor
            parallelism has cut, and what all ranks hold, with whole parameters; twice the same without tensor
            parallelism.

        Raises:
            RuntimeError: the engine's buffers do not hold what this reading says.
            UserError: the engine keeps something where it cannot be updated.
        """

    def recognizes(self, parameter: Tensor) -> bool:
        """Whether the parameter carries a mark of this engine."""
        return False

    def held(self, parameter: Tensor) -> list[tuple[int, Tensor]]:
        """What this rank holds of a parameter: (first element, flat view), the rank's own part first.

        A part may be empty. Where the whole parameter is there as well as the rank's part, it comes last.
        """
        return [(0, parameter.data.view(-1))]

    def copies(self, parameter: Tensor) -> list[tuple[int, Tensor]]:
        """Everything that has to be written where a parameter that is not trained changes: (first element, flat view).

        That is what :meth:`held` gives, and copies that the engine keeps beside to gather from.
        """
        return self.held(parameter)

    def write(self, parameter: Tensor, values: Tensor) -> None:
        """Write a parameter that is not trained, in every copy that this rank has of any of its elements.

        Args:
            parameter: of any host.
            values: of the parameter's logical shape, on any device, in any dtype; the same on every rank.
        """
        flat = values.reshape(-1)
        for start, view in self.copies(parameter):
            view.copy_(flat[start : start + view.numel()])

    def logical_shape(self, parameter: Tensor) -> tuple[int, ...]:
        """The shape of the parameter before any data-parallel rank had only a part of it."""
        return tuple(parameter.shape)

    def is_partitioned(self, parameter: Tensor) -> bool:
        """Whether the engine cuts the parameter over the data-parallel ranks; also while it is gathered."""
        return False

    def is_replicated(self, parameter: Tensor) -> bool:
        """Whether ``parameter.data`` is whole now, and should be the same on every data-parallel rank."""
        return True

    def gather(self, parameters: Iterable[Tensor]) -> AbstractContextManager[Any]:
        """A context in which ``.data`` of the parameters is whole on every rank, to be read; collective."""
        return nullcontext()

    def check(self, config: Mapping[str, Any], data_size: int) -> None:  # noqa: B027  (an engine without a JSON)
        """Raise a UserError for a configuration that the engine would refuse.

        Args:
            config: the JSON, without "auto".
            data_size: number of processes that have data of their own.
        """


class RunningHost(Host):
    """One engine that runs.

    Attributes:
        has_stages: whether ranks have different layers of the model, as pipeline stages have.
    """

    has_stages: bool = False

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The model."""

    @property
    @abstractmethod
    def optimizer(self) -> Any:
        """The optimizer that the engine was given, without the engine's wrapper."""

    @property
    @abstractmethod
    def schedule(self) -> Any:
        """The learning-rate schedule that the engine steps; None for none."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the model computes."""

    @property
    @abstractmethod
    def stage(self) -> int:
        """What is cut over the data-parallel ranks, as a ZeRO stage."""

    @property
    @abstractmethod
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """What the model computes in, and what gradients accumulate in."""

    @property
    @abstractmethod
    def persistence_threshold(self) -> int:
        """At stage 3, parameters of at most so many elements stay gathered."""

    @abstractmethod
    def groups(self) -> Groups:
        """The groups of ranks that this rank belongs to."""

    @abstractmethod
    def parameter_groups(self) -> list[list[Tensor]]:
        """The model's trained parameters, by group of the optimizer, in the engine's order."""

    @abstractmethod
    def ends_update(self) -> bool:
        """Whether the next ``engine.step()`` makes an update, to be asked before it."""

    @abstractmethod
    def progress(self) -> tuple[int, int]:
        """Micro-batches of the update under way that are made, and of how many.

        ``(0, n)`` between two updates, and where the user says when an update ends.
        """

    @property
    @abstractmethod
    def awaits_step(self) -> bool:
        """Whether a backward pass has been made since the engine's last step."""

    @abstractmethod
    def counters(self) -> dict[str, int]:
        """What the engine counts, as JSON; the same on every rank."""

    @abstractmethod
    def set_counters(self, counters: Mapping[str, int]) -> None:
        """Take what :meth:`counters` returned; the next micro-batch is the first of an update."""

    @abstractmethod
    def loss_scale(self) -> dict[str, Any]:
        """The state of fp16's loss scale, as JSON; empty without."""

    @abstractmethod
    def set_loss_scale(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`loss_scale` returned."""

    @abstractmethod
    def prepare_load(self) -> None:
        """Have parameters lie as in an update, before weights are written; collective."""

    @abstractmethod
    def publish(self, shard: Shard) -> None:
        """Copy all masters to the weights that the model computes with, on all ranks; collective.

        Args:
            shard: of the optimizer's, after the masters have been written.
        """

    @abstractmethod
    def refresh_rates(self) -> None:
        """Give the optimizer's groups the rates that the schedule, as configured now, has where it stands.

        A schedule that can only go on from rates that were saved stays as it is.
        """

    @abstractmethod
    def tensors(self) -> EngineTensors:
        """What the engine keeps on this rank, the optimizer's own state left out."""

    @abstractmethod
    def learning_rate(self) -> float:
        """Of the first group, at the next update."""

    @abstractmethod
    def gradient_norm(self) -> float | None:
        """Of the last update before clipping; None if the engine does not know it."""

    @abstractmethod
    def report(self, numbers: Mapping[str, float]) -> None:
        """Hand numbers to the engine's monitors, by name, against the sequences read so far."""

    @abstractmethod
    def report_alone(self, names: Collection[str]) -> None:
        """Have the engine itself hand its monitors no numbers by these names, which :meth:`report` then gives them."""

    @abstractmethod
    def go_on_reporting(self, headed: Callable[[str, int], Collection[str]]) -> None:
        """Have monitors go on after the sequences read so far, beyond which an interrupted run may have come.

        Args:
            headed: makes CSV files ready, where such are written: called with their folder and the sequences read so
                far, it returns the names of those that need no header, without ".csv".
        """
