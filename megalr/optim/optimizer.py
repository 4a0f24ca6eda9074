"""The optimizer that an engine steps: updates of its flat buffers, then the events that are due."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalr import hosts
from megalr.agreement import agree
from megalr.config.settings import MegalrConfig
from megalr.errors import UserError
from megalr.generation import next_generation
from megalr.hosts.base import Host
from megalr.layout.shard import Shard
from megalr.optim import engine_state
from megalr.optim.adamw import adamw
from megalr.optim.arrivals import Arrivals
from megalr.optim.clock import Clock
from megalr.optim.events.base import Event, LayerEvents, Step
from megalr.optim.events.momentum_reset import MomentumReset
from megalr.optim.events.refactorization import Refactorization
from megalr.optim.groups import ParameterGroup, check_settings
from megalr.optim.inspection import Inspection
from megalr.optim.model_check import ModelCheck
from megalr.optim.progress import Progress
from megalr.optim.sharded import Sharded
from megalr.optim.state import event_numbers
from megalr.timing import Stopwatch, span


class MegalrOptimizer(Inspection, torch.optim.Optimizer):
    """A rule on the matrices and AdamW on the rest, with events such as refactorization and momentum reset.

    It takes the place of a job's base optimizer: DeepSpeed, at any ZeRO stage, swaps the parameters for flat fp32
    buffers and calls :meth:`step` once for each, or once for all. What lies where is read on first use. Events come
    after the last buffer of an update, on the fp32 masters; the engine has clipped gradients before. Without an engine
    it is an ordinary ``torch.optim.Optimizer``.

    A parameter without a gradient counts as having a zero gradient, as ZeRO has it, so that every stage agrees.
    All ranks skip an update if a gradient is not finite on any of them, or if :meth:`skip_update` was called: weights,
    moments, bases and counts stay as they are. (DeepSpeed skips most of them itself, before it calls :meth:`step`.)

    Attributes:
        config: the settings.
        sections: what the JSON says of the method, to be kept with checkpoints.
        groups: the parameters as they were given.
        all_groups: torch's parameter groups; in :meth:`step` ZeRO shows one at a time in ``param_groups``.
        checks_model: whether :meth:`step` begins an update with :meth:`check_model`; else somebody has to call that.
        updates: updates made so far, skipped ones not counted.
        skipped: updates skipped so far in this process.
        stages: the ranks that have the other layers of the model, in a pipeline, whose updates are skipped together.
        last_events: what the last update ended with, in order: "refactorization", "momentum_reset", or "skipped".
        clocks: of the factors' moments, and of all others that AdamW keeps.
        events: everything done beside the updates, in order.
        layer_events: those of the replaced layers; None if they have none.
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        config: MegalrConfig,
        *,
        pairs: Sequence[tuple[str, str]] = (),
        events: LayerEvents | None = None,
        activations: LayerEvents | None = None,
        sections: Mapping[str, Any] | None = None,
        host: Host | None = None,
        model: nn.Module | None = None,
    ) -> None:
        """
        Args:
            groups: trainable parameters and their settings; see :func:`megalr.optim.groups.parameter_groups`.
            config: the events, and the maximum temporary memory for communication.
            pairs: qualified names of the low-rank factors, as (B, A).
            events: of the parametrization; see :func:`megalr.optim.events.registry.layer_events`.
            activations: of the compression of saved activations.
            sections: see the attribute.
            host: the engine that will step this optimizer; None: recognized by what it has made of the parameters.
            model: what is trained, to notice what is done to it; None: its parameters alone are watched.
        """
        self.config = config
        self.sections = dict(sections or {})
        self.groups = list(groups)
        self.updates = self.skipped = 0
        self.checks_model = True
        self.last_events: list[str] = []
        self.stages: dist.ProcessGroup | None = None
        self.clocks = {"factors": Clock(), "dense": Clock()}
        self.layer_events = events
        reset = None if config.momentum_reset is None else MomentumReset(config.momentum_reset)
        balance = Refactorization(config.refactorization, pairs, reset) if config.refactorization and pairs else None
        self.events: list[Event] = [each for each in (balance, reset, events, activations) if each is not None]
        self._balance = balance
        self._host, self._model = host, model
        self._sharded: Sharded | None = None
        self._loaded: engine_state.Loaded | None = None  # what waits for the parameters to be cut
        self._progress = Progress()
        self._arrivals = Arrivals([group.parameters for group in self.groups])
        self._are_loaded = False  # weights and masters, by the engine, since the last update
        self._to_agree: Mapping[str, str] = {}  # what all ranks are to have in common, until they have compared it
        named = [{"params": list(g.parameters.values()), "name": g.name, "by_rule": g.rule is not None} for g in groups]
        param_groups = [given | vars(group.settings) for given, group in zip(named, groups, strict=True)]
        # accelerate reads a learning rate from the defaults when the JSON has a schedule.
        super().__init__(param_groups, defaults={"lr": config.optimizer.lr})
        self.all_groups = self.param_groups
        hosts.watch(self)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters of the current groups; after the last buffer of this update, run the events due.

        Raises:
            UserError: what is done to the model since its engine was made would be undone; on all ranks alike. Or
                betas or eps of a rule's group were changed, which the rule does not read.
        """
        if closure is not None:
            raise NotImplementedError("MegalrOptimizer.step takes no closure")
        shard, progress = self.prepare(), self._progress
        if progress.is_dry_run(self.param_groups, shard):
            return  # it must not count, decay weights or run events
        if self._to_agree:
            agree(self._to_agree)
            self._to_agree = {}
        if progress.is_between:
            check_settings(self.groups, self.all_groups)
        if progress.is_between and self.checks_model:
            self.check_model(after_pass=True)
        progress.begin(self.all_groups, shard, self.exchange, self._arrivals, self.stages)
        index = {id(parameter): buffer for buffer, parameter in enumerate(shard.parameters)}
        for group in self.param_groups:
            # A parameter without a buffer is frozen.
            here = {index[id(p)]: p for p in group["params"] if id(p) in index}
            progress.add(here)
            if here and not progress.skipping:
                self._update(here, group)
        if progress.ends(shard):
            self._end_update()

    def skip_update(self) -> None:
        """Have the update whose :meth:`step` comes next be skipped, as for a gradient that is not finite.

        To be called on all ranks or none, after the last backward pass of the update.
        """
        self._progress.skip_asked = True

    def begin_update(self) -> None:
        """Forget what backward passes have left for an update that was skipped, and that it was to be.

        To be called before the first backward pass of an update where somebody else skips updates, as DeepSpeed does.
        """
        self._progress.skip_asked = False
        self._arrivals.forget()
        for event in self.events:
            event.forget_gradients()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, and what the backward passes that made them have left in layers.

        Args:
            set_to_none: as torch has it.
        """
        super().zero_grad(set_to_none)
        self.begin_update()

    @property
    def overflow(self) -> bool:
        """Whether the last update was skipped: DeepSpeed and accelerate ask this before they move a schedule on."""
        return self.last_events == ["skipped"]

    def agree_first(self, facts: Mapping[str, str]) -> None:
        """Have all ranks compare facts before the first update, which they all make together.

        Args:
            facts: see :func:`megalr.agreement.agree`, which raises a UserError in :meth:`step` where they differ.
        """
        self._to_agree = facts

    def forget_update(self) -> None:
        """Forget an update that has begun, or the gradients for one: another state is to be loaded."""
        self._progress.forget()
        self._loaded = None
        self.begin_update()

    def check_model(self, *, weights: bool = True, after_pass: bool = False) -> None:
        """Raise if something was done to the model that an update would undo or a checkpoint leave out. Collective.

        Args:
            weights: whether to compare the weights with the masters as well.
            after_pass: whether a forward pass of an update was made, which shows what the model computes with.

        Raises:
            UserError: see :mod:`megalr.optim.model_check`; on all ranks alike.
        """
        self.prepare()
        self._check.run(weights=weights, are_loaded=self._are_loaded, after_pass=after_pass)

    def prepare(self) -> Shard:
        """Read what lies where, choose owners; done once, on first use after the engine was made."""
        return self._prepared.shard

    def counts(self) -> dict[str, Any]:
        """The counts of updates, the same on all ranks."""
        return {"updates": self.updates, "clocks": {name: vars(clock).copy() for name, clock in self.clocks.items()}}

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict with a "megalr" entry: counts, and what else this rank keeps, by name."""
        own = engine_state.save(self, self._loaded, is_prepared=self._sharded is not None)
        return super().state_dict() | {"megalr": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, at the same stage and world size.

        The saved learning rates come back, since a schedule made them; betas, eps and weight decay stay as configured.
        """
        loaded = engine_state.load(self, state_dict)
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "megalr"})
        self.all_groups = self.param_groups
        for group, given in zip(self.param_groups, self.groups, strict=True):
            group.update({key: value for key, value in vars(given.settings).items() if key != "lr"})
        self._loaded, self._are_loaded = loaded, True
        next_generation()
        if self._sharded is not None:
            self._fill()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not to be called: a group has its role in the model, which :func:`megalr.build_optimizer` finds.

        Raises:
            UserError: the optimizer has been built.
        """
        if len(self.param_groups) == len(self.groups):
            raise UserError(
                "megalr's optimizer takes no parameters after it was built, and would not train them: make them "
                "parameters of the model, and build the optimizer then"
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        raise UserError(
            "megalr's optimizer cannot be copied or pickled, since it works on its model's own memory: for a copy of "
            "the model call megalr.build_optimizer, and load_state_dict with this optimizer's state_dict()"
        )

    def learning_rates(self) -> dict[str, float]:
        """The learning rate of each group at the next update, by the group's name, with the ramp after a restart."""
        return {group["name"]: self._learning_rate(group) for group in self.all_groups}

    def measure_exchange(self, stopwatch: Stopwatch | None) -> None:
        """Have a stopwatch add up, as "exchange", how long this rank waits for messages of whole-matrix work.

        Args:
            stopwatch: of somebody who reads it; None: nobody measures.
        """
        self._prepared.measure_exchange(stopwatch)

    def ensure_moments(self, parameters: Iterable[Tensor]) -> None:
        """Have AdamW's moments of what the engine hands to :meth:`step`; zeros where there were none."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}

    def moments(self, key: str) -> list[Tensor]:
        """First or second moments of all buffers, flat; empty where a buffer has none."""
        shard = self.prepare()
        states = [self.state.get(parameter, {}) for parameter in shard.parameters]
        return [s[key].view(-1) if key in s else b[:0] for s, b in zip(states, shard.buffers, strict=True)]

    @property
    def _prepared(self) -> Sharded:
        if self._sharded is None:
            hosts.watch(self)
            self._sharded = Sharded.read(self.groups, self.all_groups, self.config, self._host)
            if not self._sharded.shard.ordered:
                self._arrivals.stop()
            given = {name: p for group in self.groups for name, p in group.parameters.items()}
            self._check = ModelCheck(self._model, given, self._sharded.shard, self._sharded.exchange)
            if self._balance is not None:
                self._balance.matrices = self._sharded.matrices
            for event in self.events:
                event.attach(self._sharded.shard, self._sharded.exchange, self.moments)
            event_numbers(self)  # what no checkpoint could hold is refused before the first update
            self._fill()
        return self._sharded

    def _fill(self) -> None:
        """Take over what was loaded: an engine may load this state before its masters, by which the layout is read."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            engine_state.fill(self, loaded)

    def _update(self, here: dict[int, Tensor], group: dict[str, Any]) -> None:
        """Update some buffers, all of one group."""
        name, clock = clock_of(group["name"]), self.clocks[clock_of(group["name"])]
        step = Step(
            updates=self.updates,
            count=clock.count + 1,
            lr=self._learning_rate(group),
            **{key: group[key] for key in ("betas", "eps", "weight_decay")},
        )
        if group["by_rule"] and self.matrices is not None:
            self.matrices.update(
                sorted(here),
                self._prepared.flat_gradients(here),
                lr=step.lr,
                weight_decay=step.weight_decay,
                updates=step.updates,
                schedule=self._schedule(group["name"], step.lr),
            )
            return
        self.ensure_moments(here.values())
        if self.layer_events is not None and group["name"] == self.layer_events.group:
            self.layer_events.update(sorted(here), self._prepared.flat_gradients(here), step)
            return
        adamw(list(here.values()), self.state, step, reset=name in self._resets_due(self.updates + 1))

    def _learning_rate(self, group: Mapping[str, Any]) -> float:
        """A group's at the next update, with the ramp after a restart."""
        warmup = max((event.restart_warmup_steps for event in self.events), default=0)
        return float(group["lr"] * self.clocks[clock_of(group["name"])].ramp(warmup))

    def _schedule(self, group: str, lr: float) -> float:
        """A group's learning rate over that of the JSON."""
        given = next(each.settings.lr for each in self.groups if each.name == group)
        return lr / given if given else 1.0

    def _end_update(self) -> None:
        """Count what has been done, and run the events that are due."""
        if self._progress.skipping:
            self.skipped += 1
            self.begin_update()
            self.last_events = ["skipped"]
            return
        self.updates += 1
        self._are_loaded = False
        next_generation()
        for clock in self.clocks.values():
            clock.advance()
        zeroed = self._resets_due(self.updates)
        for name in zeroed:
            self.clocks[name].count = 0
        if self.matrices is not None:
            self.matrices.reset(n for g in self.groups if clock_of(g.name) in zeroed for n in g.parameters)
        for event in self.events:
            with span(event.name, shown=bool(event.name) and event.due(self.updates)):
                for name in event.restarts_due(self.updates):
                    self.clocks[name].since_reset = 0
                for buffer in event.end_update(self.updates):
                    self.prepare().publish(buffer)
        self.last_events = [event.name for event in self.events if event.name and event.due(self.updates)]

    def _resets_due(self, updates: int) -> set[str]:
        """The clocks whose moments become zero at the end of an update, which stores zeros right away."""
        return set().union(*(event.resets_due(updates) for event in self.events))


def clock_of(group: str) -> str:
    """The clock of a group of parameters."""
    return "factors" if group == "factors" else "dense"
