"""The optimizer that DeepSpeed steps: element-wise updates on the flat partition, then the events that are due."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megalr.config.settings import MegalrConfig
from megalr.errors import UserError
from megalr.hosts import read as read_shards
from megalr.hosts.base import Host
from megalr.layout.exchange import COPIES, Exchange, Item, buckets
from megalr.layout.placement import Unit
from megalr.layout.shard import Shard
from megalr.ops import low_rank_adam
from megalr.optim.clock import Clock
from megalr.optim.describe import routing_table
from megalr.optim.events.base import LayerEvents, Step
from megalr.optim.events.refactorization import OwnedPairs, refactorize_pairs
from megalr.optim.groups import ParameterGroup
from megalr.optim.matrices import MatrixUpdater
from megalr.rules.base import State


class MegalrOptimizer(torch.optim.Optimizer):
    """A rule on the matrices and AdamW on the rest, with weight refactorization and momentum reset of low-rank factors.

    It takes the place of a DeepSpeed job's base optimizer at any ZeRO stage: DeepSpeed swaps the parameters for flat
    fp32 buffers and calls :meth:`step` once for each, or once for all. What lies where is read on first use. The
    events come after the last buffer of an update, on the fp32 masters; gradients were clipped before, by DeepSpeed.
    Without DeepSpeed it is an ordinary ``torch.optim.Optimizer``.

    A parameter without a gradient counts as having a zero gradient, as ZeRO has it, so that every stage agrees.
    An update with a gradient that is not finite anywhere, on any rank, is skipped by all: weights, moments, bases and
    counts stay as they are. (DeepSpeed skips most of them itself, before it calls :meth:`step`.) So is one that
    :meth:`skip_update` was called for.

    Attributes:
        updates: updates made so far, skipped ones not counted.
        skipped: updates skipped so far in this process.
        last_events: what the last update ended with, in order: "refactorization", "momentum_reset", or "skipped".
        clocks: of the factors' moments, and of all others that AdamW keeps.
        matrices: what runs the rule, once :meth:`prepare` has been called; None without a rule.
        exchange: over all masters' ranks, once :meth:`prepare` has been called.
        updates_parts: whether tensor-parallel ranks run the rule each on what it has; known after :meth:`prepare`.
        all_events: what the layers have done beside the update.
        all_groups: torch's parameter groups; in :meth:`step` ZeRO shows one at a time in ``param_groups``.
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
    ) -> None:
        """
        Args:
            groups: trainable parameters and their settings; see :func:`megalr.optim.groups.parameter_groups`.
            config: the events, and the exchange's bound.
            pairs: qualified names of the low-rank factors, as (B, A).
            events: what the parametrization does beside; see :func:`megalr.optim.events.registry.layer_events`.
            activations: what the compression of saved activations does beside.
            sections: what the JSON says of the method, to be kept with checkpoints.
            host: the engine that will step this optimizer; None: recognized by what it has made of the parameters.
        """
        self.config = config
        self.sections = dict(sections or {})
        self.updates = 0
        self.skipped = 0
        self.updates_parts = False
        self.last_events: list[str] = []
        self.clocks = {"factors": Clock(), "dense": Clock()}
        self._groups = list(groups)
        self._pairs = list(pairs)
        self._shard: Shard | None = None
        self._host = host
        self.matrices: MatrixUpdater | None = None
        self._events = events
        self.all_events = [each for each in (events, activations) if each is not None]
        self._loaded: dict[str, Any] | None = None
        self._stepped: set[int] = set()
        self._skip_asked = False
        self._skipping = False
        self._began = False
        param_groups: list[dict[str, Any]] = [
            {
                "params": list(group.parameters.values()),
                "name": group.name,
                "by_rule": group.rule is not None,
                **vars(group.settings),
            }
            for group in groups
        ]
        # accelerate reads a learning rate from the defaults when the JSON has a schedule.
        super().__init__(param_groups, defaults={"lr": config.optimizer.lr})
        self.all_groups = self.param_groups

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters of the current groups; after the last buffer of this update, run the events due."""
        if closure is not None:
            raise NotImplementedError("MegalrOptimizer.step takes no closure")
        shard = self.prepare()
        if shard.dry_run and not self._began and self._has_only_zero_gradients():
            return  # the call that DeepSpeed makes to have states created must not count, decay weights or run events
        self._began = True
        if not self._stepped:
            self._skipping = self._skip_asked or not self._gradients_are_finite(shard)
        index = {id(parameter): buffer for buffer, parameter in enumerate(shard.parameters)}
        for group in self.param_groups:
            # A parameter without a buffer is frozen.
            here = {index[id(p)]: p for p in group["params"] if id(p) in index}
            self._stepped.update(here)
            if self._skipping or not here:
                continue
            if group["by_rule"]:
                self._update_matrices(here, group)
            elif self._events is not None and group["name"] == self._events.group:
                self._update_by_events(here, group)
            else:
                self._update(list(here.values()), group)
        if len(self._stepped) == len(shard.parameters):
            self._stepped.clear()
            self.last_events = self._end_update()

    def skip_update(self) -> None:
        """Have the update whose :meth:`step` comes next be skipped, as for a gradient that is not finite.

        To be called on all ranks or none, after the last backward pass of the update.
        """
        self._skip_asked = True

    def begin_update(self) -> None:
        """Forget what backward passes have left in layers for an update that was skipped, and that it was to be.

        To be called before the first backward pass of an update where somebody else skips updates, as DeepSpeed does;
        without it a refresh that meets such remains is put off by one update.
        """
        self._skip_asked = False
        for events in self.all_events:
            events.forget_gradients()

    def forget_update(self) -> None:
        """Forget an update that has begun, or the gradients for one: another state is to be loaded."""
        self._stepped.clear()
        self._skipping, self._began, self._loaded = False, True, None
        self.begin_update()

    def counts(self) -> dict[str, Any]:
        """The counts of updates, the same on all ranks."""
        return {"updates": self.updates, "clocks": {name: vars(clock).copy() for name, clock in self.clocks.items()}}

    def prepare(self) -> Shard:
        """Read what lies where, choose owners; done once, on first use after ``deepspeed.initialize``."""
        if self._shard is None:
            read = read_shards if self._host is None else self._host.read
            local, shard = read([group.parameters for group in self._groups], self.all_groups)
            device = shard.message_device()
            self.exchange = Exchange(shard.layout, shard.rank, shard.group, device=device, replicas=shard.replicas)
            self._owned_pairs = OwnedPairs.of(self._pairs, shard.layout)
            factors = {name for pair in self._pairs for name in pair}
            self._factor_buffers = sorted({f.buffer for f in shard.layout.fragments if f.name in factors})
            exact = self.config.tp_update == "exact"
            self.updates_parts = not exact and local is not shard
            rules = {n: g.rule for g in self._groups if g.rule for n in g.parameters if n in shard.layout.shapes}
            if rules:
                self.matrices = MatrixUpdater(
                    rules,
                    shard if exact else local,
                    device=device,
                    bucket_bytes=self.config.exchange_bucket_bytes,
                    seed=self.config.seed,
                )
            for events in self.all_events:
                events.attach(shard, self.exchange, self.moments)
            self._shard = shard
            self._load_matrices()
        return self._shard

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict with a "megalr" entry: the update count, the clocks, and this rank's matrices by name."""
        state = super().state_dict()
        state["megalr"] = {**self.counts(), "form": self.rule_form() | self.layer_form()}
        if self.matrices is not None:
            state["megalr"]["matrices"] = self.matrices.state_dict()
        elif self._loaded is not None:  # loaded, and no update since
            state["megalr"]["matrices"] = self._loaded
        state["megalr"] |= {events.key: events.state_dict() for events in self.all_events}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, at the same stage and world size.

        The saved learning rates come back, since a schedule made them; betas, eps and weight decay stay as configured.
        """
        if "megalr" not in state_dict:
            raise ValueError("this optimizer state was not written by megalr: it has no update counts")
        saved, form = state_dict["megalr"].get("form", {}), self.rule_form() | self.layer_form()
        if saved != form:  # the same on all ranks, so that none goes on alone
            raise UserError(
                f"the checkpoint was written with {words(saved)}, the configuration has {words(form)}: "
                "resume with the optimizer settings that it was written with"
            )
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "megalr"})
        self.all_groups = self.param_groups
        for group, given in zip(self.param_groups, self._groups, strict=True):
            group.update({key: value for key, value in vars(given.settings).items() if key != "lr"})
        self._loaded = state_dict["megalr"].get("matrices", {})
        self._load_matrices()
        for events in self.all_events:
            events.load_state_dict(state_dict["megalr"][events.key])
        self.updates = state_dict["megalr"]["updates"]
        self.clocks = {name: Clock(**values) for name, values in state_dict["megalr"]["clocks"].items()}

    def routing_table(self) -> str:
        """One line a parameter or matrix: shape, group, rule, its rank, learning rate, owner, bytes of state.

        The owner is the rank that runs the rule, refactorizes the factor or computes the projected layer's basis; what
        is element-wise has none. A last line says how evenly the rule's state is spread over the ranks.
        """
        shard = self.prepare()
        pairs = zip(self._owned_pairs.units, self._owned_pairs.owners, strict=True)
        looked_after: dict[str, tuple[int | None, int | None]] = {n: (None, rank) for u, rank in pairs for n in u.names}
        looked_after |= {} if self._events is None else self._events.routes()
        return routing_table(self._groups, shard.layout, looked_after, self.matrices)

    def summary(self) -> str:
        """One line for each rule: how many parameters or matrices it updates, and with how many elements."""
        shard = self.prepare()
        lines = []
        if self.matrices is not None:
            matrices = self.matrices.matrices
            ranks = sorted({rank for m in matrices if (rank := m.rule.rank_of(m.shape)) is not None})
            projected = f" projected to rank {'-'.join(map(str, sorted({ranks[0], ranks[-1]})))}" if ranks else ""
            size = sum(m.shape[0] * m.shape[1] for m in matrices)
            lines.append(f"{self.matrices.rule_name}: {len(matrices)} matrices with {size:,} elements{projected}")
        if self._events is not None and self._events.summary():
            lines.append(self._events.summary())
        owned = {n for g in self._groups if g.rule for n in g.parameters} if self.matrices else set()
        rest = [name for name in shard.layout.shapes if name not in owned]
        lines.append(f"adamw: {len(rest)} parameters with {sum(map(shard.layout.numel, rest)):,} elements")
        return "\n".join(lines)

    @property
    def matrix_states(self) -> dict[str, State]:
        """The rule's states of the matrices that this rank updates, by name; not copies."""
        return {} if self.matrices is None else self.matrices.states

    @property
    def matrix_state_bytes(self) -> int:
        """Bytes of what :attr:`matrix_states` holds, before the first update after it; scalars left out."""
        self.prepare()
        return 0 if self.matrices is None else self.matrices.state_bytes(self.updates)

    @property
    def matrix_parameters(self) -> list[nn.Parameter]:
        """The model's parameters that the rule updates."""
        return [p for group in self._groups if group.rule for p in group.parameters.values()]

    @property
    def remainders(self) -> dict[str, Tensor]:
        """What this rank keeps of frozen W0 beside the model's weights, by layer; not copies."""
        return {} if self._events is None else self._events.remainders

    @property
    def refreshes(self) -> int:
        """Refreshes of projected layers' bases, merges of ReLoRA's factors, ... since the start of the run."""
        return 0 if self._events is None else self._events.made

    @property
    def rule_calls(self) -> int:
        """Matrices that this rank has updated by the rule since the start of the process, once for each update."""
        return 0 if self.matrices is None else self.matrices.calls

    @property
    def bytes_moved(self) -> int:
        """Bytes that all ranks together have sent each other for whole-matrix work since the start of the process."""
        exchanges = [] if self._shard is None else [self.exchange]
        exchanges += [] if self.matrices is None else [self.matrices.exchange]
        return sum(exchange.bytes_moved for exchange in exchanges)

    def consolidate(self, owner: int = 0) -> dict[str, Tensor] | None:
        """All masters as whole tensors on the CPU of one rank, by qualified name; None on the others. Collective."""
        shard = self.prepare()
        units = [Unit((name,), 0.0) for name in shard.layout.shapes]
        owners = [owner] * len(units)
        limit = max(1, self.config.exchange_bucket_bytes // (COPIES * shard.buffers[0].element_size()))
        whole: dict[str, Tensor] = {}
        for bucket in buckets(units, owners, shard.layout, limit):
            items = [Item(units[i].names[0], owner) for i in bucket]
            gathered = self.exchange.gather(items, [shard.buffers])
            whole.update({name: tensors[0].cpu() for name, tensors in gathered.items()})
        return whole if shard.rank == owner else None

    def _has_only_zero_gradients(self) -> bool:
        grads = (p.grad for group in self.param_groups for p in group["params"] if p.grad is not None)
        return not any(grad.any() for grad in grads)

    def rule_form(self) -> dict[str, Any]:
        """What decides what the rule's state looks like, beside the parameters' shapes."""
        rule = self.config.optimizer.rule
        return self._with_extents({"rule": "adamw"} if rule is None else rule.form())

    def logical_form(self) -> dict[str, Any]:
        """The same but for how numbers are stored."""
        rule = self.config.optimizer.rule
        return self._with_extents({"rule": "adamw"} if rule is None else rule.logical_form())

    def layer_form(self) -> dict[str, Any]:
        """The same of what the layers keep."""
        form: dict[str, Any] = dict(self.config.parametrization.form())
        return form if self.config.activations is None else form | self.config.activations.form()

    def _with_extents(self, form: Mapping[str, Any]) -> dict[str, Any]:
        return {**form, **{key: True for key in ("head", "embeddings") if getattr(self.config.optimizer, key)}}

    def _load_matrices(self) -> None:
        """Hand over what was loaded, once the layout is known: DeepSpeed loads this state before its own masters."""
        if self._loaded is not None and self._shard is not None:
            if self.matrices is not None:
                self.matrices.load_state_dict(self._loaded)
            self._loaded = None

    def _gradients_are_finite(self, shard: Shard) -> bool:
        """Whether all gradients of this update are, on all ranks; answered by DeepSpeed where it looks at them."""
        if shard.unseen_gradients is None:
            return True
        own = [p.grad for group in self.all_groups for p in group["params"] if p.grad is not None]
        gradients = [grad for grad in own + shard.unseen_gradients() if grad.numel()]
        return self.exchange.all_true(_all_finite(gradients))

    def _update_matrices(self, here: dict[int, Tensor], group: dict[str, Any]) -> None:
        assert self.matrices is not None
        self.matrices.update(
            sorted(here),
            self._flat_gradients(here),
            lr=group["lr"] * self._ramp(_clock_of(group["name"])),
            weight_decay=group["weight_decay"],
            updates=self.updates,
        )

    def _update_by_events(self, here: dict[int, Tensor], group: dict[str, Any]) -> None:
        assert self._events is not None
        clock = _clock_of(group["name"])
        for parameter in here.values():
            self.moments_of(parameter)
        step = Step(
            updates=self.updates,
            count=self.clocks[clock].count + 1,
            lr=group["lr"] * self._ramp(clock),
            **{key: group[key] for key in ("betas", "eps", "weight_decay")},
        )
        self._events.update(sorted(here), self._flat_gradients(here), step)

    def _flat_gradients(self, here: dict[int, Tensor]) -> list[Tensor]:
        """The gradients of some buffers, flat, in the buffers' layout; nothing of the others."""
        gradients = [buffer[:0] for buffer in self.prepare().buffers]
        for buffer, parameter in here.items():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients[buffer] = grad.reshape(-1)
        return gradients

    def moments_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """AdamW's moments of what DeepSpeed hands to :meth:`step`; zeros if there were none."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state

    def _end_update(self) -> list[str]:
        """Count what has been done, and run the events that are due."""
        if self._skipping:
            self.skipped += 1
            self.begin_update()
            return ["skipped"]
        self.updates += 1
        for clock in self.clocks.values():
            clock.advance()
        return self._run_events()

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        clock = _clock_of(group["name"])
        states = [self.moments_of(parameter) for parameter in parameters]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        low_rank_adam(
            [parameter.data.view(-1) for parameter in parameters],
            [grad.reshape(-1) for grad in grads],
            [state["exp_avg"].view(-1) for state in states],
            [state["exp_avg_sq"].view(-1) for state in states],
            steps=[self.clocks[clock].count + 1] * len(parameters),
            lr=group["lr"] * self._ramp(clock),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            reset=clock in self._resets_due(self.updates + 1),
        )

    def _ramp(self, clock: str) -> float:
        """What a restart leaves of the learning rate at this update."""
        reset = self.config.momentum_reset
        if reset is None:
            return 1.0 if self._events is None else self.clocks[clock].ramp(self._events.restart_warmup_steps)
        return self.clocks[clock].ramp(reset.warmup_steps)

    def _resets_due(self, updates: int) -> set[str]:
        """The clocks whose moments become zero at the end of an update, which stores zeros right away."""
        refactorization, reset = self.config.refactorization, self.config.momentum_reset
        due = set()
        if refactorization and self._pairs and refactorization.moments == "reset":
            due |= {"factors"} if updates % refactorization.interval == 0 else set()
        if reset and updates % reset.interval == 0:
            due |= {"factors", "dense"} if reset.scope == "all" else {"factors"}
        return due if self._events is None else due | self._events.resets_due(updates)

    def _run_events(self) -> list[str]:
        """Refactorization and momentum reset, where due after this update."""
        events = []
        refactorization, reset = self.config.refactorization, self.config.momentum_reset
        zeroed = self._resets_due(self.updates)
        for name in zeroed:
            self.clocks[name].count = 0
        if self.matrices is not None:
            self.matrices.reset(n for g in self._groups if _clock_of(g.name) in zeroed for n in g.parameters)
        if refactorization and self._pairs and self.updates % refactorization.interval == 0:
            self._refactorize(transport=refactorization.moments == "transport" and "factors" not in zeroed)
            events.append("refactorization")
        if reset and self.updates % reset.interval == 0:
            for name in ("factors", "dense") if reset.scope == "all" else ("factors",):
                self.clocks[name].since_reset = 0
            events.append("momentum_reset")
        if self._events is not None:
            for name in self._events.restarts_due(self.updates):
                self.clocks[name].since_reset = 0
        for each in self.all_events:
            for buffer in each.end_update(self.updates):
                self.prepare().publish(buffer)
        return events

    def _refactorize(self, *, transport: bool) -> None:
        shard = self.prepare()
        moments = (self.moments("exp_avg"), self.moments("exp_avg_sq")) if transport else None
        bucket_bytes = self.config.exchange_bucket_bytes
        refactorize_pairs(self._owned_pairs, self.exchange, shard.buffers, moments, bucket_bytes)
        for buffer in self._factor_buffers:
            shard.publish(buffer)

    def moments(self, key: str) -> list[Tensor]:
        """First or second moments of all buffers, flat; empty where a buffer has none."""
        shard = self.prepare()
        states = [self.state.get(parameter, {}) for parameter in shard.parameters]
        return [s[key].view(-1) if key in s else b[:0] for s, b in zip(states, shard.buffers, strict=True)]


def _clock_of(group: str) -> str:
    return "factors" if group == "factors" else "dense"


def words(form: Mapping[str, Any]) -> str:
    """A form for the reader."""
    return ", ".join(f"{key} {value}" for key, value in form.items()) or "no rule"


def _all_finite(tensors: list[Tensor]) -> bool:
    """Whether all elements of all tensors, none of them empty, are finite."""
    # The 2-norm runs at the speed of memory, the maximum norm on a CPU at a twentieth of it; but squares can overflow.
    for order in (2.0, float("inf")):
        norms = torch._foreach_norm(tensors, order) if tensors else [torch.zeros(())]
        if torch.isfinite(torch.stack([norm.to(norms[0]) for norm in norms])).all():
            return True
    return False
