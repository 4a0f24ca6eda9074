"""Factorized linear layers of which every tensor-parallel rank has a part.

Low-rank layers send their latent, r wide, once: column-parallel ones backward, row-parallel ones forward. Layers with a
weight of full rank send what dense ones do, x's gradient or y, and the gradient of the factor that all ranks have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from megalr.errors import UserError
from megalr.hosts.autotp import Cut
from megalr.hosts.tensor_parallel import mark_cut, mark_indices, mark_replaced
from megalr.layers.low_rank import LowRankLinear
from megalr.layers.projected import ProjectedLinear
from megalr.layers.replacement import replaced_layers
from megalr.layers.sltrain import SLTrainLinear, part_of_support, random_support
from megalr.layers.tensor_parallel.messages import Gather, SharedInput, SharedLatents, Sum, SumGradient

T = TypeVar("T", bound=nn.Module)


class ColumnParallel(nn.Module):
    """What layers that have rows of the weight have in common.

    Attributes:
        group: the tensor-parallel ranks.
        gathered_widths: of each rank's part of the output, where every rank is to have all of it, as of a head whose
            logits the loss reads whole; None where the part is what the next layer wants.
    """

    group: dist.ProcessGroup
    gathered_widths: list[int] | None = None

    def _delivered(self, part: Tensor) -> Tensor:
        """The output that others see."""
        if self.gathered_widths is None:
            return part
        whole: Tensor = Gather.apply(part, self.gathered_widths, self.group)
        return whole


class ColumnParallelLowRank(ColumnParallel, LowRankLinear):
    """Rows of B and of the bias, all of A: x whole, y in parts.

    Attributes:
        latents: of this layer and those that get the same x.
    """

    latents: SharedLatents

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (..., in_features); this rank's part of the output, or all of it."""
        return self._delivered(functional.linear(self.latents.of(self, x) * self.scale, self.B, self.bias))


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


class ColumnParallelSLTrain(ColumnParallel, CutSLTrain):
    """Rows of B, of S and of the bias, all of A: x whole, y in parts.

    Attributes:
        inputs: of this layer and those that get the same x.
    """

    inputs: SharedInput

    def _output(self, x: Tensor) -> Tensor:
        a: Tensor = SumGradient.apply(self.A, self.group)
        return self._delivered(self._product(self.inputs.of(self, x), self.B, a, self.bias))


class RowParallelSLTrain(CutSLTrain):
    """Columns of A and of S, all of B and of the bias: x in parts, y whole."""

    def _output(self, x: Tensor) -> Tensor:
        b: Tensor = SumGradient.apply(self.B, self.group)
        y: Tensor = Sum.apply(self._product(x, b, self.A, None), self.group)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class CutProjected(ProjectedLinear):
    """A part of a layer.

    Attributes:
        group: the tensor-parallel ranks.
    """

    group: dist.ProcessGroup


class ColumnParallelProjected(ColumnParallel, CutProjected):
    """Rows of W0, of the bias, and of R, or with a basis of the output of that: x whole, y in parts.

    Attributes:
        inputs: of this layer and those that get the same x.
    """

    inputs: SharedInput

    def _output(self, x: Tensor) -> Tensor:
        r: Tensor = self.R if self.side == "right" else SumGradient.apply(self.R, self.group)
        return self._delivered(self._product(self.inputs.of(self, x), r, self.bias))


class RowParallelProjected(CutProjected):
    """Columns of W0 and of R, or with a basis of the input rows of that; all of the bias: x in parts, y whole."""

    def _output(self, x: Tensor) -> Tensor:
        r: Tensor = self.R if self.side == "left" else SumGradient.apply(self.R, self.group)
        y: Tensor = Sum.apply(self._product(x, r, None), self.group)
        return y if self.bias is None else y + self.bias.to(y.dtype)


@torch.no_grad()
def cut_layers(model: nn.Module, cuts: Mapping[str, Cut], group: dist.ProcessGroup) -> None:
    """Leave this rank its part of every factorized layer that is to be cut, in place.

    Parameters stay the same objects, with less in them. What every rank starts with has to be the same.

    Args:
        model: parametrized, not yet partitioned.
        cuts: by qualified name, see :func:`~megalr.hosts.autotp.planned_cuts`; other layers are left whole.
        group: the tensor-parallel ranks.

    Raises:
        UserError: a layer is of a kind that cannot be cut.
    """
    siblings: dict[str, list[nn.Module]] = {}
    for name, layer in replaced_layers(model).items():
        if name not in cuts:
            continue
        rows = cuts[name] != "columns"
        outputs: Any = layer.out_features
        match layer:  # of these classes, not of others that derive from them
            case LowRankLinear() if type(layer) is LowRankLinear:
                _cut_low_rank(layer, rows, group)
            case SLTrainLinear() if type(layer) is SLTrainLinear:
                _cut_sltrain(layer, rows, group)
            case ProjectedLinear() if type(layer) is ProjectedLinear:
                _cut_projected(layer, rows, group)
            case _:
                raise UserError(
                    f"{name} is a {type(layer).__name__}, which cannot be cut between tensor-parallel ranks: write "
                    '"type": "low_rank", "sltrain" or "projected", or leave out megalr.parametrization'
                )
        if isinstance(layer, ColumnParallel):
            layer.group = group
            if cuts[name] == "gathered":
                layer.gathered_widths = _sizes(outputs, group)
            siblings.setdefault(name.rpartition(".")[0], []).append(layer)
    for layers in siblings.values():
        low_rank = [layer for layer in layers if isinstance(layer, ColumnParallelLowRank)]
        wide = [layer for layer in layers if isinstance(layer, ColumnParallelSLTrain | ColumnParallelProjected)]
        latents, inputs = SharedLatents(low_rank, group), SharedInput(len(wide), group)
        for layer in low_rank:
            layer.latents = latents
        for layer in wide:
            layer.inputs = inputs


def _cut_low_rank(layer: LowRankLinear, rows: bool, group: dist.ProcessGroup) -> None:
    _keep_factors(layer, rows, group)
    if rows:
        _become(ColumnParallelLowRank, layer)
    else:
        _become(RowParallelLowRank, layer).group = group


def _cut_sltrain(layer: SLTrainLinear, rows: bool, group: dist.ProcessGroup) -> None:
    cut: CutSLTrain = _become(ColumnParallelSLTrain if rows else RowParallelSLTrain, layer)
    cut.group = group
    cut.whole_shape, cut.whole_count = (layer.out_features, layer.in_features), layer.values.numel()
    dim = 0 if rows else 1
    cut.part = (dim, *_part(cut.whole_shape[dim], group))
    places, chosen = cut.choose()
    cut.values.data = cut.values.data[chosen.to(cut.values.device)]
    mark_cut(cut.values, 0)
    mark_indices(cut.values, chosen)
    cut.support = places.to(cut.support.device)
    _keep_factors(cut, rows, group)
    cut.draw_support()


def _cut_projected(layer: ProjectedLinear, rows: bool, group: dist.ProcessGroup) -> None:
    cut: CutProjected = _become(ColumnParallelProjected if rows else RowParallelProjected, layer)
    cut.group = group
    mark_replaced(cut)
    _keep(layer, ("weight", "bias") if rows else ("weight",), 0 if rows else 1, group)
    # Of R and the basis, the one on the side that is cut.
    if rows == (layer.side == "right"):
        _keep(layer, ("R",), 0 if rows else 1, group)
    else:
        _keep(layer, ("basis",), 0, group)
    layer.out_features, layer.in_features = layer.weight.shape


def _keep_factors(layer: LowRankLinear, rows: bool, group: dist.ProcessGroup) -> None:
    _keep(layer, ("B", "bias") if rows else ("A",), 0 if rows else 1, group)
    layer.out_features, layer.in_features = len(layer.B), layer.A.shape[1]


def _become(kind: type[T], layer: nn.Module) -> T:
    """The same layer with the same parameters, of another class."""
    layer.__class__ = kind
    return cast(T, layer)


def _keep(layer: nn.Module, names: tuple[str, ...], dim: int, group: dist.ProcessGroup) -> None:
    """This rank's share of some of a layer's parameters."""
    for name in names:
        parameter = getattr(layer, name)
        if parameter is not None:
            whole = parameter.shape[dim]
            first, size = _part(whole, group)
            parameter.data = parameter.data.narrow(dim, first, size).clone()
            mark_cut(parameter, dim, (first, whole))


def _part(whole: int, group: dist.ProcessGroup) -> tuple[int, int]:
    """Where this rank's part begins, and how much it is."""
    sizes, rank = _sizes(whole, group), dist.get_rank(group)
    return sum(sizes[:rank]), sizes[rank]


def _sizes(whole: int, group: dist.ProcessGroup) -> list[int]:
    """How much each rank has.

    As evenly as can be, larger parts first: AutoTP does the same, and activations of both have to meet.
    """
    ranks = dist.get_world_size(group)
    size, rest = divmod(whole, ranks)
    return [size + (rank < rest) for rank in range(ranks)]
