"""Leave each tensor-parallel rank its part of a model's replaced layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from megalr.errors import UserError
from megalr.hosts.autotp import Cut
from megalr.hosts.tensor_parallel import mark_replaced
from megalr.layers.base import FullConfig, Parametrization, ParametrizationConfig
from megalr.layers.registry import PARAMETRIZATIONS
from megalr.layers.replacement import replaced_layers
from megalr.layers.tensor_parallel.split import Split


@torch.no_grad()
def cut_layers(
    model: nn.Module, config: ParametrizationConfig, cuts: Mapping[str, Cut], group: dist.ProcessGroup
) -> None:
    """Leave this rank its part of every replaced layer that is to be cut, in place.

    Parameters stay the same objects, with less in them. All ranks must start with the same model.

    Args:
        model: parametrized, not yet partitioned.
        config: the parametrization, which says how its layers are cut.
        cuts: by qualified name, see :func:`~megalr.hosts.autotp.planned_cuts`; other layers are left whole.
        group: the tensor-parallel ranks.

    Raises:
        UserError: the parametrization does not say how a layer is cut.
    """
    siblings: dict[str, list[nn.Module]] = {}
    for name, layer in replaced_layers(model).items():
        if name not in cuts:
            continue
        split = Split(group, rows=cuts[name] != "columns", gathered=cuts[name] == "gathered")
        try:
            _cut(layer, config, split)
        except NotImplementedError as error:
            raise UserError(
                f"{name} is a {type(layer).__name__}, which cannot be cut between tensor-parallel ranks: write "
                f'"type": {_one_of(types_that_are_cut())}, or leave out megalr.parametrization; a parametrization of '
                "your own needs a method `cut`, see megalr.layers.base.Parametrization"
            ) from error
        mark_replaced(layer)
        if split.rows:
            siblings.setdefault(name.rpartition(".")[0], []).append(layer)
    if isinstance(config, Parametrization):
        for layers in siblings.values():
            config.share_inputs(layers, group)


def types_that_are_cut() -> list[str]:
    """The names of the parametrizations that say how their layers are cut."""
    known = {name: kind for name, kind in PARAMETRIZATIONS.items() if issubclass(kind, Parametrization)}
    return [name for name, kind in known.items() if kind.cut is not Parametrization.cut]


def _cut(layer: nn.Module, config: ParametrizationConfig, split: Split) -> None:
    if isinstance(config, FullConfig):  # then it is not what has made the layer
        raise NotImplementedError
    config.cut(layer, split)


def _one_of(names: list[str]) -> str:
    *others, last = [f'"{name}"' for name in names]
    return f"{', '.join(others)} or {last}" if others else last
