"""Low-rank linear layers of which every tensor-parallel rank has a part."""

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
from megalr.parallel.latent import SharedLatents, Sum
from megalr.parallel.plan import Cut
from megalr.partition import mark_cut

T = TypeVar("T", bound=LowRankLinear)


class ColumnParallelLowRank(LowRankLinear):
    """Rows of B and of the bias, all of A: x whole, y in parts. Its latent's gradient is summed over the ranks.

    Attributes:
        latents: of this layer and those that get the same x.
    """

    latents: SharedLatents

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (..., in_features); this rank's part of the output."""
        return functional.linear(self.latents.of(self, x) * self.scale, self.B, self.bias)


class RowParallelLowRank(LowRankLinear):
    """Columns of A, all of B and of the bias: x in parts, y whole. Its latent is summed over the ranks.

    Attributes:
        group: the tensor-parallel ranks.
    """

    group: dist.ProcessGroup

    def forward(self, x: Tensor) -> Tensor:
        """Apply to this rank's part of x; (..., out_features)."""
        latent: Tensor = Sum.apply(functional.linear(x, self.A), self.group)
        return functional.linear(latent * self.scale, self.B, self.bias)


@torch.no_grad()
def cut_layers(model: nn.Module, cuts: Mapping[str, Cut], group: dist.ProcessGroup) -> None:
    """Leave this rank its part of every low-rank layer that is to be cut, in place.

    Parameters stay the same objects, with less in them. What every rank starts with has to be the same.

    Args:
        model: parametrized, not yet partitioned.
        cuts: by qualified name, see :func:`~megalr.parallel.plan.planned_cuts`; other layers are left whole.
        group: the tensor-parallel ranks.

    Raises:
        UserError: a layer is not of plain low-rank factors.
    """
    siblings: dict[str, list[ColumnParallelLowRank]] = {}
    for name, layer in replaced_layers(model).items():
        if name not in cuts:
            continue
        if type(layer) is not LowRankLinear:
            raise UserError(
                f'{name} is a {type(layer).__name__}, which cannot be cut between tensor-parallel ranks: write "type": '
                '"low_rank" or leave out megalr.parametrization'
            )
        if cuts[name] == "rows":
            _keep(layer, ("B", "bias"), 0, group)
            layer.out_features = len(layer.B)
            siblings.setdefault(name.rpartition(".")[0], []).append(_become(ColumnParallelLowRank, layer))
        else:
            _keep(layer, ("A",), 1, group)
            layer.in_features = layer.A.shape[1]
            _become(RowParallelLowRank, layer).group = group
    for layers in siblings.values():
        shared = SharedLatents(layers, group)
        for layer in layers:
            layer.latents = shared


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
