"""A rule on sharded matrices: gradients to their owners, the rule there, updates back to where the masters lie."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalr.layout.exchange import Exchange, Field, run_of
from megalr.layout.layout import Fragment, Layout
from megalr.layout.placement import Unit, assign_owners, imbalance, least_imbalance
from megalr.layout.rectangles import Entry
from megalr.layout.rounds import Rounds
from megalr.layout.shard import Shard
from megalr.rules.base import Basis, Rule, Shape, State, tensor, tensors_of
from megalr.rules.states import Outline, check_finite, check_rule, check_updated, is_of_megalr, outline_of
from megalr.timing import span


@dataclass(frozen=True)
class Matrix:
    """One matrix that the rule updates.

    Attributes:
        name: the parameter's qualified name, with an index behind it for one matrix of a stack.
        shape: (m, n).
        rule: what updates it.
        owner: the rank that keeps its state; where every rank holds everything, the one that computes its basis.
        phase: when it refreshes; see :meth:`megalr.rules.base.Rule.phase`.
        buffer: the flat buffer that it lies in, on every rank.
        everywhere: every rank holds all of it, and runs the rule.
    """

    name: str
    shape: Shape
    rule: Rule
    owner: int
    phase: int
    buffer: int
    everywhere: bool


def matrix_shapes(layout: Layout) -> dict[str, Shape]:
    """The shapes of a layout's parameters, all of them matrices."""
    return {name: (shape[0], shape[1]) for name, shape in layout.shapes.items()}


def state_bytes(rule: Rule, shape: Shape) -> int:
    """Bytes of an m x n matrix's state, scalars left out."""
    return sum(t.numel() * t.element_size() for t in tensors_of(rule.init_state(shape, "meta")).values() if t.ndim)


def papers_floats(rule: Rule, shape: Shape) -> int:
    """The same in floats of two bytes, as the papers count: fp32 as if it were bf16, what is quantized as it is."""
    tensors = [t for t in tensors_of(rule.init_state(shape, "meta")).values() if t.ndim]
    return sum(t.numel() if t.is_floating_point() else -(-t.numel() * t.element_size() // 2) for t in tensors)


def choose_owners(rules: Rule | Mapping[str, Rule], layout: Layout) -> list[int]:
    """The owner of each matrix of a layout, in the layout's order; a pure function of both arguments.

    By two costs, each normalized: the bytes to keep and the operations of an average update.

    Args:
        rules: one for all, or one for each parameter, by name.
        layout: of matrices.
    """
    shapes = matrix_shapes(layout)
    rule_of = _by_matrix(rules, layout)
    size = {name: rule_of[name].state_bytes(shape) for name, shape in shapes.items()}
    work = {name: rule_of[name].flops(shape) for name, shape in shapes.items()}
    total_size, total_work = max(1, sum(size.values())), max(1.0, sum(work.values()))
    units = assign_owners({(n,): size[n] / total_size + work[n] / total_work for n in shapes}, layout)
    return [unit.owner for unit in units]


def kept_bytes(rules: Rule | Mapping[str, Rule], layout: Layout, *, seed: int, replicated: bool) -> list[int]:
    """Bytes of state that each rank keeps after the first update; scalars left out.

    Args:
        rules: as in :func:`choose_owners`.
        layout: of matrices.
        seed: key of what rests.
        replicated: whether every rank runs the rules on all matrices, as at ZeRO stage 0; else their owners do.
    """
    rule_of = _by_matrix(rules, layout)
    resting = _resting(rule_of, 0, seed)
    kept = [0] * layout.world_size
    for (name, shape), owner in zip(matrix_shapes(layout).items(), choose_owners(rules, layout), strict=True):
        if name not in resting:
            for rank in range(layout.world_size) if replicated else (owner,):
                kept[rank] += state_bytes(rule_of[name], shape)
    return kept


class MatrixUpdater:
    """Runs rules on all matrices of a sharded model.

    - Where a matrix lies whole on one rank, that rank owns it and nothing is sent.
    - Where it is cut, its fragments of the gradient go to the owner, and the update's fragments back.
    - A matrix that its rule lets rest is left alone: nothing of it is sent or decayed, and its state is dropped.
    - Where every rank holds everything (ZeRO stage 0), every rank runs the rule, so that the state is whole
      everywhere, as DeepSpeed's checkpoints of that stage need it. Only bases are computed by one rank and sent, since
      singular vectors are not reproducible across machines.

    Attributes:
        matrices: all of them, in the model's order.
        states: of the matrices that this rank updates, by name.
        calls: matrix updates made by this rank since the start.
        exchange: what moves the data.
    """

    def __init__(
        self,
        rules: Mapping[str, Rule],
        shard: Shard,
        *,
        device: torch.device | None,
        bucket_bytes: int,
        seed: int,
    ) -> None:
        """
        Args:
            rules: of each parameter, by name; one of three dimensions is a stack of matrices, a vector a single row.
            shard: what lies where.
            device: where messages live; see :class:`megalr.layout.exchange.Exchange`.
            bucket_bytes: maximum temporary memory for communication.
            seed: random seed of bases.

        Raises:
            UserError: a rule keeps what checkpoints cannot hold; see :func:`megalr.rules.states.check_rule`.
        """
        self.calls = 0
        self._shard = shard
        self._seed = seed
        self._layout = shard.layout.matrices(rules)
        self.exchange = Exchange(
            self._layout,
            shard.rank,
            shard.group,
            device=device,
            replicas=shard.replicas,
            bucket_bytes=bucket_bytes,
        )
        self.matrices = self._owned(rules)
        self._by_name = {m.name: m for m in self.matrices}
        self._whole = {m.name for m in self.matrices if all(f.rank == m.owner for f in self._layout.of(m.name))}
        self.states: dict[str, State] = {}
        self._outlines: dict[str, Outline] = {}  # of the states, as they were made or loaded
        for rule, shape in {(id(m.rule), m.shape): (m.rule, m.shape) for m in self.matrices}.values():
            check_rule(rule, shape)

    def update(
        self,
        which: Sequence[int],
        gradients: Field,
        *,
        lr: float,
        weight_decay: float,
        updates: int,
        schedule: float = 1.0,
    ) -> None:
        """Update all matrices that lie in some of the flat buffers; collective.

        Args:
            which: the buffers, the same on every rank.
            gradients: flat, in the buffers' layout; those of other buffers are not read.
            lr, weight_decay: W -= lr (update + λ W).
            updates: made so far.
            schedule: the learning rate over that of the JSON.

        Raises:
            UserError: a rule has left a state that no checkpoint would give back; on the ranks that ran it.
        """
        masters = self._shard.buffers
        resting = self._resting(updates)
        for name in resting:
            self.states.pop(name, None)
        if weight_decay:
            self._decay(which, resting, 1 - lr * weight_decay)

        def apply(fragment: Fragment, update: Tensor) -> None:
            master = run_of(masters, fragment)
            master.add_(update.to(master.device), alpha=-lr)

        def compute(units: Sequence[Unit], whole: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
            names = [name for unit in units for name in unit.names]
            return {name: [self._run(name, whole.pop(name)[0], updates, schedule)] for name in names}

        cut, local = self._cut_and_local(which, resting)
        rounds = Rounds(self.exchange, cut, [gradients])
        for matrix, sent in zip(local, self._bases(local, gradients, updates), strict=True):
            (fragment,) = self._layout.on(matrix.name, self._shard.rank)
            grad, weight = (self._view(field, fragment, matrix.shape) for field in (gradients, masters))
            basis = self._begin(matrix, grad, sent, updates)
            matrix.rule.scheduled(schedule).apply(weight, grad, self._state(matrix), basis, lr=lr)
            self._check_updated(matrix)
        rounds.run(compute, [apply], like=masters[0])

    def reset(self, parameters: Iterable[str]) -> None:
        """Momentum reset of the matrices of some parameters; those of others are passed over."""
        chosen = set(parameters)
        for matrix in self.matrices:
            if matrix.name in self.states and _parameter(matrix.name) in chosen:
                matrix.rule.reset(self.states[matrix.name])

    def carry(self, parameter: str, turn: Tensor, *, left: bool) -> None:
        """Carry what this rank keeps of a matrix into other coordinates, where it is linear in the gradients.

        Args:
            parameter: the matrix's name.
            turn: what maps old gradients to new ones, from the left or from the right; square.
            left: which.
        """
        if parameter in self.states:
            state = self.states[parameter]
            for key in self._by_name[parameter].rule.linear_keys:
                old = tensor(state, key)
                old.copy_(turn.to(old) @ old if left else old @ turn.to(old))

    def numbers(self) -> dict[str, dict[str, float]]:
        """The numbers in the states of this rank's matrices: int, float and bool."""
        return {
            name: {key: value for key, value in state.items() if not isinstance(value, Tensor)}
            for name, state in self.states.items()
        }

    def entries(self) -> dict[str, Entry]:
        """The tensors in them."""
        return {
            f"rule/{name}/{key}": Entry.of(value)
            for name, state in self.states.items()
            for key, value in tensors_of(state).items()
        }

    def make_room(self, numbers: Mapping[str, Mapping[str, float]], saved: Mapping[str, Tensor]) -> None:
        """Prepare the states of exactly those matrices that are among all ranks' numbers; tensors are to be read into.

        Args:
            numbers: of :meth:`numbers`, of all ranks.
            saved: of rules that keep the same in another way, their tensors on the meta device, by the keys of
                :meth:`entries`; :meth:`convert` is due when they have been read. Empty for these rules' own.
        """
        device = self._shard.buffers[0].device
        mine = {m.name: m for m in self.matrices if self._keeps(m) and m.name in numbers}
        self.states = {
            name: dict(numbers[name]) if saved else m.rule.room(numbers[name], m.shape, device)
            for name, m in mine.items()
        }
        for entry, outline in saved.items():
            kind, _, place = entry.partition("/")
            name, _, key = place.rpartition("/")
            if kind == "rule" and name in mine:
                self.states[name][key] = torch.empty_like(outline, device=device)
        self._outlines = {name: outline_of(state) for name, state in self.states.items()}

    def convert(self) -> None:
        """Convert states that were read to the form that these rules keep."""
        for m in self.matrices:
            if m.name in self.states:
                self.states[m.name] = m.rule.convert(self.states[m.name], m.shape)
                self._outlines[m.name] = outline_of(self.states[m.name])

    @property
    def parameters(self) -> set[str]:
        """Names of those that it updates."""
        return {_parameter(m.name) for m in self.matrices}

    @property
    def rule_name(self) -> str:
        """Of all its rules, which are variants of one."""
        return self.matrices[0].rule.name

    def routes(self, parameters: Collection[str]) -> list[tuple[str, str, str, str, str, str]]:
        """Of each matrix of some parameters: name, shape, rule, rank, owner, bytes of state."""
        return [
            (
                m.name,
                " x ".join(map(str, m.shape)),
                m.rule.name,
                str(m.rule.rank_of(m.shape) or "-"),
                "all" if m.everywhere else str(m.owner),
                f"{m.rule.state_bytes(m.shape):,}",
            )
            for m in self.matrices
            if _parameter(m.name) in parameters
        ]

    def state_bytes(self, updates: int) -> int:
        """Bytes of the state that this rank keeps once so many updates, at least one, are made; scalars left out."""
        resting = self._resting(max(updates, 1) - 1)
        return sum(state_bytes(m.rule, m.shape) for m in self.matrices if self._keeps(m) and m.name not in resting)

    def balance(self) -> tuple[float, float] | None:
        """Bytes of state on the largest rank over the mean, and a bound that no choice of owners could beat.

        None where every rank keeps the same.
        """
        owned = [m for m in self.matrices if not m.everywhere]
        if not owned or self._layout.world_size == 1:
            return None
        units = [Unit((m.name,), m.owner, m.rule.state_bytes(m.shape)) for m in owned]
        return imbalance(units, self._layout), least_imbalance(units, self._layout)

    def _keeps(self, matrix: Matrix) -> bool:
        """Whether this rank keeps the matrix's state, and runs the rule on it."""
        return matrix.everywhere or matrix.owner == self._shard.rank

    def _owned(self, rules: Mapping[str, Rule]) -> list[Matrix]:
        shapes = matrix_shapes(self._layout)
        owners = choose_owners(rules, self._layout)
        matrices = []
        for index, ((name, shape), owner) in enumerate(zip(shapes.items(), owners, strict=True)):
            rule = rules[_parameter(name)]
            phase = rule.phase(index, len(shapes))
            everywhere = self._layout.is_replicated(name)
            matrices.append(Matrix(name, shape, rule, owner, phase, self._layout.of(name)[0].buffer, everywhere))
        return matrices

    def _resting(self, updates: int) -> frozenset[str]:
        """Names of the matrices that the update after so many others leaves alone; the same on every rank."""
        return _resting({m.name: m.rule for m in self.matrices}, updates, self._seed)

    def _decay(self, which: Sequence[int], resting: frozenset[str], factor: float) -> None:
        masters = self._shard.buffers
        if not resting:
            for buffer in which:
                masters[buffer].mul_(factor)
            return
        for matrix in self.matrices:
            if matrix.buffer in which and matrix.name not in resting:
                for fragment in self._layout.on(matrix.name, self._shard.rank):
                    run_of(masters, fragment).mul_(factor)

    def _cut_and_local(self, which: Sequence[int], resting: frozenset[str]) -> tuple[list[Unit], list[Matrix]]:
        """What has to be gathered, the same on every rank; and the matrices that this rank has whole and updates."""
        cut: list[Unit] = []
        local: list[Matrix] = []
        for matrix in self.matrices:
            if matrix.buffer not in which or matrix.name in resting:
                continue
            if not matrix.everywhere and matrix.name not in self._whole:
                cut.append(Unit((matrix.name,), matrix.owner))
            elif self._keeps(matrix):
                local.append(matrix)
        return cut, local

    def _bases(self, local: Sequence[Matrix], gradients: Field, updates: int) -> list[Basis | None]:
        """New bases of matrices that every rank holds; nothing where each has one owner, who computes its own."""
        bases: list[Basis | None] = [None] * len(local)
        due = [i for i, m in enumerate(local) if m.everywhere and self._refresh_due(m, updates)]
        for i in due:
            if local[i].owner == self._shard.rank:
                (fragment,) = self._layout.on(local[i].name, self._shard.rank)
                bases[i] = self._new_basis(local[i], self._view(gradients, fragment, local[i].shape), updates)
        for i in due:
            basis = bases[i]
            if basis is None:
                state = self._state(local[i])
                keys = local[i].rule.basis_keys_of(state, local[i].shape)
                basis = {key: torch.empty_like(tensor(state, key)) for key in keys}
                bases[i] = basis
            for key in sorted(basis):
                self.exchange.broadcast(basis[key], local[i].owner)
        return bases

    def _run(self, name: str, grad: Tensor, updates: int, schedule: float) -> Tensor:
        matrix = self._by_name[name]
        basis = self._begin(matrix, grad, None, updates)
        update = matrix.rule.scheduled(schedule).update(grad, self._state(matrix), basis)
        self._check_updated(matrix)
        return update

    def _check_updated(self, matrix: Matrix) -> None:
        """At every update: what comes late is lost as well, and a look at a few keys costs less than one operation."""
        check_updated(matrix.rule, matrix.name, self._outlines[matrix.name], self.states[matrix.name])

    def _begin(self, matrix: Matrix, grad: Tensor, sent: Basis | None, updates: int) -> Basis | None:
        """Count a call of the rule; compute the basis where one is due and none was sent."""
        self.calls += 1
        if sent is None and self._refresh_due(matrix, updates):
            return self._new_basis(matrix, grad, updates)
        return sent

    def _refresh_due(self, matrix: Matrix, updates: int) -> bool:
        return matrix.rule.refresh_due(self._state(matrix), updates, matrix.phase)

    def _new_basis(self, matrix: Matrix, grad: Tensor, updates: int) -> Basis:
        with span("refresh"):
            basis = matrix.rule.new_basis(grad, self._state(matrix), updates=updates, seed=self._seed, name=matrix.name)
        return {key: self.exchange.broadcast_replicas(basis[key].contiguous()) for key in sorted(basis)}

    def _state(self, matrix: Matrix) -> State:
        if matrix.name not in self.states:
            state = matrix.rule.init_state(matrix.shape, self._shard.buffers[0].device)
            if not is_of_megalr(matrix.rule):  # which begin with zeros
                check_finite(matrix.rule, state)
            self.states[matrix.name], self._outlines[matrix.name] = state, outline_of(state)
        return self.states[matrix.name]

    @staticmethod
    def _view(field: Field, fragment: Fragment, shape: Shape) -> Tensor:
        return run_of(field, fragment).view(shape)


def _by_matrix(rules: Rule | Mapping[str, Rule], layout: Layout) -> dict[str, Rule]:
    """The rule of each matrix: the one of all, or its parameter's."""
    return {name: rules if isinstance(rules, Rule) else rules[_parameter(name)] for name in layout.shapes}


def _resting(rule_of: Mapping[str, Rule], updates: int, seed: int) -> frozenset[str]:
    """The matrices that the update after so many others leaves alone; each rule is asked about all of its own."""
    rules = {id(rule): rule for rule in rule_of.values()}
    names = {key: [n for n, other in rule_of.items() if other is rule] for key, rule in rules.items()}
    return frozenset().union(*(rule.resting(names[key], updates, seed) for key, rule in rules.items()))


def _parameter(matrix: str) -> str:
    """The name of the parameter that a matrix is, or is one of the stack of."""
    return matrix.partition("[")[0]
