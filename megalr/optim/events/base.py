"""What a parametrization has the optimizer do beside its update: refreshes, merges, switches of factors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from megalr.layout.exchange import Exchange, Field
from megalr.layout.rectangles import Entry
from megalr.layout.shard import Shard
from megalr.optim.frozen_weights import Merging

# Gives the flat buffers of "exp_avg" or "exp_avg_sq", in the masters' layout.
Moments = Callable[[str], Field]


@dataclass(frozen=True, kw_only=True)
class Step:
    """What AdamW does at one update, to all of a group.

    Attributes:
        updates: made before.
        count: of this one since the moments were zero, for the bias correction.
        lr, betas, eps, weight_decay: AdamW's; the ramp is in the learning rate.
    """

    updates: int
    count: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


class LayerEvents(ABC):
    """The events of a model's replaced layers; one object for all of them.

    The optimizer calls :meth:`attach` once, then for each update :meth:`update` for flat buffers of its
    :attr:`group`, and :meth:`end_update` when all buffers have been stepped. A skipped update calls neither.
    What it returns from :meth:`resets_due` and :meth:`restarts_due` are clocks: "factors", "dense" or both.

    Attributes:
        key: of its state in the optimizer's.
        group: the group of parameters that it updates itself; empty where AdamW does that.
        restart_warmup_steps: length of the learning rate's ramp after what :meth:`restarts_due` names.
        remainders: what this rank keeps of frozen weights beside the model's, by layer; see
            :class:`~megalr.optim.frozen_weights.Merging`.
        merging: what keeps them, where frozen weights are merged into.
    """

    key: ClassVar[str] = "layers"
    group: ClassVar[str] = ""

    restart_warmup_steps: int = 0
    remainders: dict[str, Tensor]
    merging: Merging

    @property
    def made(self) -> int:
        """Events since the start of the run."""
        return 0

    def attach(self, shard: Shard, exchange: Exchange, moments: Moments) -> None:
        """Take note of what lies where, once it is known.

        Args:
            shard: the masters.
            exchange: over their ranks.
            moments: this rank's.
        """
        self._shard, self._exchange, self._moments = shard, exchange, moments

    def update(self, which: Sequence[int], gradients: Field, step: Step) -> None:
        """Update what lies in some of the flat buffers, all of :attr:`group`; collective.

        Args:
            which: the buffers, the same on every rank.
            gradients: flat, in the buffers' layout; may be modified.
            step: of AdamW.
        """
        raise NotImplementedError(f"{type(self).__name__} updates nothing itself")

    def resets_due(self, updates: int) -> set[str]:
        """The clocks whose moments become zero at the end of an update, counted from 1."""
        return set()

    def restarts_due(self, updates: int) -> set[str]:
        """The clocks whose learning rate warms up again after an update, counted from 1."""
        return set()

    @abstractmethod
    def end_update(self, updates: int) -> list[int]:
        """Make what is due after an update; collective.

        Args:
            updates: made so far, this one included.

        Returns:
            The flat buffers that have changed.
        """

    def forget_gradients(self) -> None:  # noqa: B027  (most keep none)
        """Drop what backward passes have left in the layers for an update that was skipped."""

    def routes(self) -> dict[str, tuple[int, int | None]]:
        """Of each parameter that it looks after: its rank r, and the process that owns it, if one does."""
        return {}

    def summary(self) -> str:
        """A line on what there is; empty where the rest says it."""
        return ""

    @abstractmethod
    def numbers(self) -> dict[str, Any]:
        """Counts, as JSON has them; the same on every rank."""

    @abstractmethod
    def load_numbers(self, numbers: Mapping[str, Any]) -> None:
        """Take over what :meth:`numbers` gave, or a dictionary that has it among others."""

    def merged(self) -> Mapping[str, Tensor]:
        """The frozen weights that :attr:`remainders` belong to, by layer."""
        return {}

    def entries(self) -> dict[str, Entry]:
        """What this rank keeps beside the model's weights and the moments, in rectangles of logical tensors."""
        return {f"remainders/{name}": self.merging.remainder(name, weight) for name, weight in self._with_remainder()}

    def make_room(self, saved: Collection[str]) -> None:
        """Have exactly those of its tensors whose keys are among some of :meth:`entries`, to be read into."""
        self.remainders.clear()
        for name, weight in self.merged().items():
            if f"remainders/{name}" in saved:
                self.merging.make_room(name, weight)

    def settle(self) -> None:
        """Go on with what was read since :meth:`make_room`."""
        for name, weight in self._with_remainder():
            self.merging.settle(name, weight)

    def state_dict(self) -> dict[str, Any]:
        """Counts, and what this rank keeps of frozen weights: plain numbers and tensors, by name."""
        return self.numbers() | {"remainders": dict(self.remainders)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, at the same stage and world size."""
        self.load_numbers(state)
        self.remainders.clear()
        self.remainders.update(state.get("remainders", {}))

    def _with_remainder(self) -> list[tuple[str, Tensor]]:
        return [(name, weight) for name, weight in self.merged().items() if name in self.remainders]
