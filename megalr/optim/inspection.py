"""What can be asked of the optimizer beside its work: what it holds, tables for the start of a run, counts."""

from __future__ import annotations

from torch import Tensor, nn

from megalr.config.settings import MegalrConfig
from megalr.layout.exchange import Exchange
from megalr.layout.rounds import gather_at
from megalr.optim import describe
from megalr.optim.events.base import Event, LayerEvents
from megalr.optim.groups import ParameterGroup
from megalr.optim.matrices import MatrixUpdater
from megalr.optim.sharded import Sharded
from megalr.rules.base import State


class Inspection:
    """Reads, changes nothing. What needs to know what lies where prepares the optimizer."""

    config: MegalrConfig
    groups: list[ParameterGroup]
    events: list[Event]
    layer_events: LayerEvents | None
    updates: int
    _sharded: Sharded | None

    @property
    def _prepared(self) -> Sharded:
        raise NotImplementedError

    @property
    def exchange(self) -> Exchange:
        """What moves data between all masters' ranks."""
        return self._prepared.exchange

    @property
    def matrices(self) -> MatrixUpdater | None:
        """What runs the rule; None without one."""
        return self._prepared.matrices

    @property
    def updates_parts(self) -> bool:
        """Whether tensor-parallel ranks run the rule each on what it has."""
        return self._prepared.updates_parts

    def consolidate(self, owner: int = 0) -> dict[str, Tensor] | None:
        """All masters as whole tensors on the CPU of one rank, by qualified name; None on the others. Collective."""
        return gather_at(owner, self.exchange, self._prepared.shard.buffers)

    def routing_table(self) -> str:
        """See :func:`megalr.optim.describe.routing_table`."""
        return describe.routing_table(self.groups, self._prepared.shard.layout, self.events, self.matrices)

    def summary(self) -> str:
        """See :func:`megalr.optim.describe.summary`."""
        layout, kind = self._prepared.shard.layout, self.config.parametrization.type
        return describe.summary(self.groups, layout, self.events, self.matrices, kind)

    @property
    def matrix_parameters(self) -> list[nn.Parameter]:
        """The model's parameters that the rule updates."""
        return [p for group in self.groups if group.rule for p in group.parameters.values()]

    @property
    def matrix_states(self) -> dict[str, State]:
        """The rule's states of the matrices that this rank updates, by name; not copies."""
        return {} if self.matrices is None else self.matrices.states

    @property
    def matrix_state_bytes(self) -> int:
        """Bytes of what :attr:`matrix_states` holds, before the first update after it; scalars left out."""
        return 0 if self.matrices is None else self.matrices.state_bytes(self.updates)

    @property
    def remainders(self) -> dict[str, Tensor]:
        """What this rank keeps of frozen W0 beside the model's weights, by layer; not copies."""
        return {} if self.layer_events is None else self.layer_events.remainders

    @property
    def refreshes(self) -> int:
        """Refreshes of projected layers' bases, merges of ReLoRA's factors, ... since the start of the run."""
        return 0 if self.layer_events is None else self.layer_events.made

    @property
    def rule_calls(self) -> int:
        """Matrices that this rank has updated by the rule since the start of the process, once for each update."""
        return 0 if self._sharded is None or self._sharded.matrices is None else self._sharded.matrices.calls

    @property
    def bytes_moved(self) -> int:
        """Bytes that all ranks together have sent each other for whole-matrix work since the start of the process."""
        return 0 if self._sharded is None else self._sharded.bytes_moved
