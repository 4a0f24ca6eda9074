"""How tensor-parallel ranks split one layer, by the rows or by the columns of its weight, and what they then send."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar, cast

import torch.distributed as dist
from torch import Tensor, nn

from megalr.hosts.tensor_parallel import mark_cut
from megalr.layers.tensor_parallel.messages import Gather, Sum, SumGradient

T = TypeVar("T", bound=nn.Module)


@dataclass(frozen=True)
class Split:
    """How the ranks of a group split a layer with a weight of m x n; as evenly as can be, larger parts first.

    Attributes:
        group: the tensor-parallel ranks.
        rows: True for rows of the weight, column-parallel in Megatron-LM's words: each rank reads all of x and computes
            its part of y. False for columns, row-parallel: each rank reads its part of x, and the results add up to y.
        gathered: with rows, every rank needs all of y, as from a head whose logits the loss reads whole.
    """

    group: dist.ProcessGroup
    rows: bool
    gathered: bool = False

    def sizes(self, whole: int) -> list[int]:
        """How many of so many rows or columns each rank has."""
        # AutoTP splits dense layers so, and the activations of both have to meet.
        ranks = dist.get_world_size(self.group)
        size, rest = divmod(whole, ranks)
        return [size + (rank < rest) for rank in range(ranks)]

    def part(self, whole: int) -> tuple[int, int]:
        """Where this rank's part of so many rows or columns begins, and how many it has."""
        sizes, rank = self.sizes(whole), dist.get_rank(self.group)
        return sum(sizes[:rank]), sizes[rank]

    def keep(self, layer: nn.Module, *names: str, dim: int | None = None) -> None:
        """Leave this rank its part of some of a layer's parameters, in place, and mark them as cut.

        What is not kept so every rank has whole, and has to get the same gradient on all of them.

        Args:
            layer: whole so far.
            names: of parameters; one that is None is passed over.
            dim: which dimension to cut; 0 for rows and 1 for columns unless given.
        """
        dim = (0 if self.rows else 1) if dim is None else dim
        for name in names:
            parameter = getattr(layer, name)
            if parameter is not None:
                whole = parameter.shape[dim]
                first, size = self.part(whole)
                parameter.data = parameter.data.narrow(dim, first, size).clone()
                mark_cut(parameter, dim, (first, whole))

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks, each of which has a term of it."""
        total: Tensor = Sum.apply(x, self.group)
        return total

    def sum_gradient(self, x: Tensor) -> Tensor:
        """x, which all ranks have and each uses for its part of y; so its gradient is the sum of theirs."""
        shared: Tensor = SumGradient.apply(x, self.group)
        return shared

    def output(self, part: Tensor, width: int) -> Tensor:
        """What a layer returns that is split by rows: this rank's part of y, or all of it where it is gathered.

        Args:
            part: (..., this rank's rows).
            width: m of the whole layer.
        """
        if not self.gathered:
            return part
        whole: Tensor = Gather.apply(part, self.sizes(width), self.group)
        return whole


def become(layer: nn.Module, split: Split, whole: type[nn.Module], by_rows: type[T], by_columns: type[T]) -> T:
    """Give a layer the class that computes with this rank's part; its parameters stay the same objects.

    Args:
        layer: modified in place.
        split: says which of the two classes.
        whole: the class that it has; another one, even one that derives from it, may compute something else.
        by_rows, by_columns: subclasses of it.

    Raises:
        NotImplementedError: it is of another class.
    """
    if type(layer) is not whole:
        raise NotImplementedError
    layer.__class__ = by_rows if split.rows else by_columns
    return cast(T, layer)
