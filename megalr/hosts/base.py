"""What megalr asks of an engine: the protocol that each file of this package answers for one engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from megalr.layout.shard import Shard

# A group as it was given to the optimizer: the model's own parameters by qualified name, in order.
NamedGroup = Mapping[str, nn.Parameter]


class Host(ABC):
    """An engine that steps the optimizer."""

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
        """
