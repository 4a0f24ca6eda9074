"""Skip bad updates, count them, and stop after too many."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalr.errors import GuardError, UserError
from megalr.guards.losses import LossWindow
from megalr.guards.replicas import compare_replicas, find_replicas, in_words
from megalr.hosts import host_of
from megalr.hosts.deepspeed_pipeline import UNGUARDED
from megalr.optim.groups import check_names
from megalr.optim.optimizer import MegalrOptimizer

GRADIENT = "gradient is not finite"
_SHOWN_LOSSES = 5  # in the message of a run that is stopped


def attach_guard(engine: Any) -> Guard:
    """Guard an engine as the "guards" section of its optimizer's configuration says.

    The guard wraps the engine's ``backward`` and ``step``; losses have to go through ``engine.backward``.
    ``megalr.initialize`` calls this. A job that calls ``deepspeed.initialize`` can call it right afterwards.

    Args:
        engine: the engine of ``deepspeed.initialize``, with a :class:`~megalr.optim.MegalrOptimizer`. It gets an
            attribute ``megalr_guard``.

    Returns:
        The guard.

    Raises:
        UserError: the engine is a pipeline's, or its optimizer was built for another module.
    """
    host = host_of(engine)
    if host.has_stages:
        raise UserError(UNGUARDED)
    check_names(host.optimizer.groups, host.module)
    guard = Guard(engine)
    engine.backward, engine.step, engine.megalr_guard = guard.backward, guard.step, guard
    return guard


class Guard:
    """Skips bad updates of an engine. All ranks decide alike, by one small sum for each update.

    An update is skipped if its loss is not finite on any rank, or is a spike. Weights, moments, bases and counts then
    stay as they are, bit for bit, as for a gradient that is not finite.

    Attributes:
        config: the settings.
        skipped: number of skipped updates, by this guard, the optimizer or DeepSpeed.
        skipped_in_a_row: number of updates skipped since the last one that was made.
        last_reason: why the last skipped update was skipped; None before the first.
        loss: mean loss of the last update over ranks and micro-batches, finite or not; None if no loss went through
            ``engine.backward``.
    """

    def __init__(self, engine: Any) -> None:
        """
        Args:
            engine: see :func:`attach_guard`, which is what to call.
        """
        self._host = host_of(engine)
        self._optimizer: MegalrOptimizer = self._host.optimizer
        self._optimizer.checks_model = False  # done here, before the engine has begun its step
        self.config = self._optimizer.config.guards
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.last_reason: str | None = None
        self.loss: float | None = None
        self._window = LossWindow(self.config.window, self.config.spike_deviations)
        self._asked: str | None = None  # why to skip the update under way
        self._losses: list[Tensor] = []  # of this update's micro-batches on this rank, not looked at before its end
        self._recent: deque[float] = deque(maxlen=_SHOWN_LOSSES)
        self._engine_backward, self._engine_step = engine.backward, engine.step

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the engine's ``backward``, and remember the loss.

        Raises:
            UserError: on all ranks: the set of trained parameters has changed since the engine was made.
        """
        if not self._losses:  # before gradients meet: ranks that train different ones would wait for each other
            self._optimizer.check_model(weights=False, after_pass=True)
        self._losses.append(loss.detach())
        return self._engine_backward(loss, *args, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the engine's ``step``. At the end of an update, decide first whether to skip it; collective then.

        Raises:
            UserError: on all ranks, before the step: the step would undo a change of the model. Correct that, and
                call this again.
            GuardError: on all ranks, after the step: too many consecutive updates were skipped, or ranks differ.
        """
        if not self._host.ends_update():
            return self._engine_step(*args, **kwargs)
        optimizer = self._optimizer
        optimizer.check_model(after_pass=True)
        objection = self._objection()
        if self._asked is not None:
            objection, self._asked = self._asked, None
        if objection is not None:
            optimizer.skip_update()
        before = optimizer.updates
        result = self._engine_step(*args, **kwargs)
        if optimizer.updates > before:
            self._accept()
        else:
            optimizer.last_events = ["skipped"]
            self._count_skipped(objection or GRADIENT)
        return result

    def skip(self, reason: str) -> None:
        """Skip the current update for a reason of your own. Call it on all ranks or on none.

        Args:
            reason: the reason for the log, such as "loss is nan" or "batch is empty".
        """
        self._asked = reason

    def check_replicas(self) -> None:
        """Compare, bit for bit, what all ranks should hold alike. Collective.

        This covers the parameters of the model, frozen ones included, its persistent buffers and the counts of updates.
        At ZeRO stage 3 it covers only the parameters that DeepSpeed keeps gathered.

        Raises:
            GuardError: on all ranks, naming the ranks that differ from the majority, or from rank 0 without a majority.
        """
        optimizer = self._optimizer
        counts = {**optimizer.counts(), "skipped": self.skipped}
        replicas = find_replicas(self._host.module, counts)
        found = compare_replicas(replicas, self._host.device)
        if found:
            others = "the majority" if 2 * len(found) < dist.get_world_size() else "rank 0"
            raise GuardError(
                f"ranks do not hold the same any more after update {optimizer.updates}; compared with {others}, these "
                f"differ:\n{in_words(found, len(replicas))}\n"
                "A fault of memory or network does that, or code that changes weights on some ranks only. Go on from a "
                "checkpoint that was written before; checkpoints of these ranks mix what they hold"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the guard as JSON values, the same on all ranks."""
        return {
            "losses": self._window.state(),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "last_reason": self.last_reason,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of :meth:`state_dict`. The settings stay."""
        self._window.load(state["losses"])
        self.skipped = state["skipped"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.last_reason = state["last_reason"]

    def _objection(self) -> str | None:
        """Why to skip the update that all backward passes have been made for; the same on all ranks."""
        losses = [loss.reshape(()).double() for loss in self._losses]
        self._losses.clear()
        device = self._host.device
        own = torch.stack(losses).to(device) if losses else torch.zeros(0, dtype=torch.float64, device=device)
        sums = torch.stack([own.sum(), (~torch.isfinite(own)).sum().double(), torch.full_like(own.sum(), len(losses))])
        if dist.get_world_size() > 1:
            dist.all_reduce(sums)  # tensor-parallel ranks, which have the same losses, count alike
        total, not_finite, count = sums.tolist()
        self.loss = total / count if count else None
        if self.loss is None:
            return None
        self._recent.append(self.loss)
        return f"loss is {self.loss}" if not_finite else self._window.objection(self.loss)

    def _accept(self) -> None:
        self.skipped_in_a_row = 0
        if self.loss is not None:
            self._window.accept(self.loss)
        every = self.config.check_replicas_every
        if every and self._optimizer.updates % every == 0:
            self.check_replicas()

    def _count_skipped(self, reason: str) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.last_reason = reason
        if self.skipped_in_a_row <= self.config.max_skipped:
            return
        losses = ", ".join(f"{loss:.4g}" for loss in self._recent)
        raise GuardError(
            f"{self.skipped_in_a_row} updates in a row were skipped, more than megalr.guards.max_skipped = "
            f"{self.config.max_skipped}; the last because its {reason}{f' (last losses: {losses})' if losses else ''}. "
            "Weights and optimizer are those of the last update that was made. Lower the learning rate "
            "(optimizer.params), look at the data of these updates, or allow more: a higher max_skipped, with a guard "
            "against spikes a higher spike_deviations or null"
        )
