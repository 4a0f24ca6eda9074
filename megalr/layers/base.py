"""What a parametrization is: how the weight of a linear layer is represented while it is trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalr.errors import UserError
from megalr.layers.tensor_parallel.split import Split
from megalr.schema import check_targets, require

NAME = "megalr_name"  # the attribute in which a replaced layer keeps its qualified name
# How a frozen weight of 16 bits takes what is added to it; see "merge_rounding" of the parametrizations that do.
MergeRounding = Literal["nearest", "stochastic", "remainder"]


@dataclass(frozen=True, kw_only=True)
class FullConfig:
    """The model as it is: every weight a dense matrix."""

    trains_factors: ClassVar[bool] = False
    not_refactorized: ClassVar[str] = "has none"
    not_reset: ClassVar[str] = ""
    not_by_rule: ClassVar[str] = ""
    not_dense: ClassVar[str] = ""

    type: Literal["full"] = "full"

    def form(self) -> dict[str, str | int | bool]:
        """See :meth:`Parametrization.form`."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Parametrization(ABC):
    """Another representation of every linear layer that ``target_modules`` names; the JSON's "parametrization".

    Attributes:
        type: its name in the JSON.
        rank: r, the inner dimension; at most min(m, n) of every targeted m x n layer.
        target_modules: substrings of the layers' qualified names; one of them must occur. A single string is a
            regular expression that has to match the whole name, as in transformers.
    """

    # The tensors of a layer, by last name, that make up its weight.
    parts: ClassVar[frozenset[str]]
    # Keys that a user of a kindred method may write, and what to write instead.
    instead: ClassVar[Mapping[str, str]] = {}
    # Whether its layers are FactorizedLinear, so that there is something for a rule, and for a reset of the factors.
    trains_factors: ClassVar[bool] = True
    # Why there is nothing to refactorize; empty where the layers have a pair B, A of which the product alone counts.
    not_refactorized: ClassVar[str] = ""
    # What to write instead of a momentum reset; empty where there can be one.
    not_reset: ClassVar[str] = ""
    # Why no rule but AdamW can train what stands in the weight's place; empty where one can.
    not_by_rule: ClassVar[str] = ""
    # Why no dense weight computes the same; empty where one does.
    not_dense: ClassVar[str] = ""

    type: str = ""
    rank: int = 128
    target_modules: tuple[str, ...] | str = ("attn", "mlp")

    def __post_init__(self) -> None:
        where = "megalr.parametrization"
        require(self.rank >= 1, f"{where}.rank is {self.rank}; write a whole number of at least 1")
        check_targets(self.target_modules, f"{where}.target_modules")

    def check(self, name: str, layer: nn.Linear) -> None:
        """Raise a UserError for a layer that cannot be represented so."""
        smaller = min(layer.out_features, layer.in_features)
        if self.rank > smaller:
            raise UserError(
                f"megalr.parametrization.rank is {self.rank}, but {name} is a {layer.out_features} x "
                f"{layer.in_features} matrix: write a rank of at most {smaller}, or leave it out of target_modules"
            )

    @abstractmethod
    def replace(self, layer: nn.Linear, *, seed: int, name: str) -> nn.Module:
        """The layer's replacement.

        Args:
            layer: real, or on the meta device, where nothing is initialized; what the replacement keeps of it is
                taken over, not copied.
            seed: the run's seed.
            name: the layer's qualified name; with the seed the key of any random number.
        """

    def connect(self, layers: Mapping[str, nn.Module]) -> None:  # noqa: B027  (most have nothing to share)
        """Let replaced layers, given by qualified name, know each other."""

    def cut(self, layer: nn.Module, split: Split) -> None:
        """Leave this tensor-parallel rank its part of a replaced layer, in place; without it there is no such part.

        Called on all ranks with the same whole layer, before anything is partitioned. Parameters stay the same objects
        (:meth:`Split.keep <megalr.layers.tensor_parallel.split.Split.keep>`), and what every rank still has whole gets
        the same gradient on all of them. From then on the layer maps x to its part of y, or its part of x to y.

        Args:
            layer: of those that :meth:`replace` makes.
            split: rows or columns of the weight, and between which ranks.

        Raises:
            NotImplementedError: such a layer cannot be cut.
        """
        raise NotImplementedError

    def share_inputs(self, layers: Sequence[nn.Module], group: dist.ProcessGroup) -> None:  # noqa: B027
        """Let layers that probably read the same x, such as q, k and v, send its gradient in one message.

        Args:
            layers: all of one parent that :meth:`cut` has split by rows.
            group: the tensor-parallel ranks.
        """

    @abstractmethod
    def weight(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The dense weight (m, n), multiplied and kept in fp32, from a layer's :attr:`parts` by last name."""

    def form(self) -> dict[str, str | int | bool]:
        """What decides what the optimizer's state looks like, beside the parameters' shapes."""
        return {}


class NoWeightError(UserError, AttributeError):
    """A layer without a dense weight was asked for it; an AttributeError as well, so that ``hasattr`` says False."""


class KeepsWeight(nn.Module):
    """A layer with a frozen W0 as its parameter ``weight``, beside which it trains something.

    Whoever computes with ``weight`` past the layer misses what is learned. But a model may also look at its dtype
    alone, so that reading is noted, not refused; :meth:`is_bypassed` tells the two apart.

    Attributes:
        was_called: whether the layer has computed anything in training; its ``forward`` notes it.
        was_read: whether anybody else has read ``weight`` in training.
    """

    was_called = False
    was_read = False

    def set_frozen_weight(self, weight: Tensor) -> None:
        """Take over a dense layer's parameter as W0."""
        self.register_parameter("weight", cast(nn.Parameter, weight.requires_grad_(False)))

    @property
    def frozen_weight(self) -> Tensor:
        """W0, (out_features, in_features), for the layer itself and for what merges into it."""
        return cast(Tensor, self._parameters["weight"])

    @property
    def weight(self) -> Tensor:
        """W0, for everybody else."""
        if "weight" not in self._parameters:  # torch asks before it registers the parameter
            raise AttributeError
        if self._is_training:
            self.was_read = True
        return self.frozen_weight

    def note_call(self) -> None:
        """To be called by ``forward``."""
        # Written without being read: torch.compile would trace again what reads something that changes.
        if self._is_training:
            self.was_called = True

    @property
    def is_bypassed(self) -> bool:
        """Whether the model seems to compute with W0 in the layer's place."""
        return self.was_read and not self.was_called

    @property
    def _is_training(self) -> bool:
        # What an evaluation does tells nothing: there a model may take another path.
        return self.training and torch.is_grad_enabled()


class FactorizedLinear(nn.Module):
    """A linear layer that trains something smaller than its weight.

    Attributes:
        factors: names of the parameters that it trains in the weight's place.
    """

    factors: ClassVar[tuple[str, ...]]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name != "weight":
                raise
            raise NoWeightError(
                f"{vars(self).get(NAME, 'a layer')} is a {type(self).__name__}, which has no `weight`, but the model "
                "reads it: leave it out of megalr.parametrization.target_modules"
            ) from error

    def buffers_changed(self) -> None:
        """Take note that another run's buffers have been written into this layer's."""


def kept_buffers(model: nn.Module) -> list[Tensor]:
    """What the model's factorized layers keep beside parameters, such as the places of trained values."""
    layers = [module for module in model.modules() if isinstance(module, FactorizedLinear)]
    return [buffer for layer in layers for buffer in layer.buffers(recurse=False)]


ParametrizationConfig = FullConfig | Parametrization
