"""Factorized linear layers of which every tensor-parallel rank has a part.

Low-rank layers send their latent, r wide, once: column-parallel ones backward, row-parallel ones forward. Layers with a
weight of full rank send what dense ones do, x's gradient or y, and the gradient of the factor that all ranks have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from megalr.errors import UserError
from megalr.layers.low_rank import LowRankLinear
from megalr.layers.parametrize import replaced_layers
from megalr.layers.sltrain import SLTrainLinear, part_of_support, random_support
from megalr.parallel.messages import SharedInput, SharedLatents, Sum, SumGradient
from megalr.parallel.plan import Cut
from megalr.partition import mark_cut, mark_places

T = TypeVar("T", bound=LowRankLinear)


class ColumnParallelLowRank(LowRankLinear):
    """Rows of B and of the bias, all of A: x whole, y in parts.

    Attributes:
        latents: of this layer and those that get the same x.
    """

    latents: SharedLatents

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (..., in_features); this rank's part of the output."""
        return functional.linear(self.latents.of(self, x) * self.scale, self.B, self.bias)


class RowParallelLowRank(LowRankLinear):
    """Columns of A, all of B and of the bias: x in parts, y whole.

    Attributes:
        group: the tensor-parallel ranks.
    """

    group: dist.ProcessGroup

    def forward(self, x: Tensor) -> Tensor:
        """Apply to this rank's part of x; (..., out_features)."""
        latent: Tensor = Sum.apply(functional.linear(x, self.A), self.group)
        return functional.linear(latent * self.scale, self.B, self.bias)


class CutSLTrain(SLTrainLinear):
    """A part of a layer, whose places are those of the whole layer that lie in it.

    Attributes:
        whole_shape, whole_count: of the weight, and of all values.
        part: the dimension that is cut, the first row or column, and how many there are.
        group: the tensor-parallel ranks.
    """

    whole_shape: tuple[int, int]
    whole_count: int
    part: tuple[int, int, int]
    group: dist.ProcessGroup

    def _places(self) -> Tensor:
        return self.choose()[0]

    def choose(self) -> tuple[Tensor, Tensor]:
        """See :func:`~megalr.layers.sltrain.part_of_support`."""
        places = random_support(self.whole_shape, self.whole_count, self.support_seed)
        return part_of_support(places, self.whole_shape[1], *self.part)


class ColumnParallelSLTrain(CutSLTrain):
    """Rows of B, of S and of the bias, all of A: x whole, y in parts.

    Attributes:
        inputs: of this layer and those that get the same x.
    """

    inputs: SharedInput

    def _output(self, x: Tensor) -> Tensor:
        a: Tensor = SumGradient.apply(self.A, self.group)
        return self._product(self.inputs.of(self, x), self.B, a, self.bias)


class RowParallelSLTrain(CutSLTrain):
    """Columns of A and of S, all of B and of the bias: x in parts, y whole."""

    def _output(self, x: Tensor) -> Tensor:
        b: Tensor = SumGradient.apply(self.B, self.group)
        y: Tensor = Sum.apply(self._product(x, b, self.A, None), self.group)
        return y if self.bias is None else y + self.bias.to(y.dtype)


@torch.no_grad()
def cut_layers(model: nn.Module, cuts: Mapping[str, Cut], group: dist.ProcessGroup) -> None:
    """Leave this rank its part of every factorized layer that is to be cut, in place.

    Parameters stay the same objects, with less in them. What every rank starts with has to be the same.

    Args:
        model: parametrized, not yet partitioned.
        cuts: by qualified name, see :func:`~megalr.parallel.plan.planned_cuts`; other layers are left whole.
        group: the tensor-parallel ranks.

    Raises:
        UserError: a layer is of a kind that cannot be cut.
    """
    siblings: dict[str, list[LowRankLinear]] = {}
    for name, layer in replaced_layers(model).items():
        if name not in cuts:
            continue
        if type(layer) not in (LowRankLinear, SLTrainLinear):
            raise UserError(
                f'{name} is a {type(layer).__name__}, which cannot be cut between tensor-parallel ranks: write "type": '
                '"low_rank" or "sltrain", or leave out megalr.parametrization'
            )
        assert isinstance(layer, LowRankLinear)
        rows = cuts[name] == "rows"
        if isinstance(layer, SLTrainLinear):
            _keep_values(layer, rows, group)
        _keep(layer, ("B", "bias") if rows else ("A",), 0 if rows else 1, group)
        layer.out_features, layer.in_features = len(layer.B), layer.A.shape[1]
        if rows:
            siblings.setdefault(name.rpartition(".")[0], []).append(layer)
        elif not isinstance(layer, SLTrainLinear):
            _become(RowParallelLowRank, layer).group = group
        if isinstance(layer, CutSLTrain):
            layer.group = group
            layer._draw_support()
    for layers in siblings.values():
        low_rank = [layer for layer in layers if not isinstance(layer, SLTrainLinear)]
        latents, inputs = SharedLatents(low_rank, group), SharedInput(len(layers) - len(low_rank), group)
        for layer in low_rank:
            _become(ColumnParallelLowRank, layer).latents = latents
        for layer in layers:
            if isinstance(layer, ColumnParallelSLTrain):
                layer.inputs = inputs


def _keep_values(layer: SLTrainLinear, rows: bool, group: dist.ProcessGroup) -> None:
    """The values of this rank's rows or columns, and where they are; before the factors are cut."""
    whole_shape, whole_count = (layer.out_features, layer.in_features), layer.values.numel()
    dim = 0 if rows else 1
    sizes = [len(part) for part in torch.arange(whole_shape[dim]).tensor_split(dist.get_world_size(group))]
    me = dist.get_rank(group)
    cut: CutSLTrain = _become(ColumnParallelSLTrain if rows else RowParallelSLTrain, layer)
    cut.whole_shape, cut.whole_count, cut.part = whole_shape, whole_count, (dim, sum(sizes[:me]), sizes[me])
    places, chosen = cut.choose()
    cut.values.data = cut.values.data[chosen.to(cut.values.device)]
    cut.support = places.to(cut.support.device)
    mark_cut(cut.values, 0)
    mark_places(cut.values, chosen)


def _become(kind: type[T], layer: LowRankLinear) -> T:
    """The same layer with the same parameters, of another class."""
    layer.__class__ = kind
    return cast(T, layer)


def _keep(layer: nn.Module, names: tuple[str, ...], dim: int, group: dist.ProcessGroup) -> None:
    """This rank's share of some of a layer's parameters."""
    for name in names:
        parameter = getattr(layer, name)
        if parameter is not None:
            # As evenly as can be, larger parts first: AutoTP does the same, and activations of both have to meet.
            own = parameter.data.tensor_split(dist.get_world_size(group), dim=dim)[dist.get_rank(group)]
            parameter.data = own.clone()
            mark_cut(parameter, dim)
