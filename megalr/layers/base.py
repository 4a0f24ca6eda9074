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
#: How a sum is rounded into a frozen 16-bit weight: the key "merge_rounding".
MergeRounding = Literal["nearest", "stochastic", "remainder"]


@dataclass(frozen=True, kw_only=True)
class FullConfig:
    """The model as it is, with dense weights."""

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
    """A replacement of every linear layer that ``target_modules`` names; the JSON's "parametrization".

    A subclass is a frozen dataclass: its fields are the keys of the JSON. It has to define :attr:`parts`,
    :meth:`replace` and :meth:`weight`.

    Attributes:
        type: name of the parametrization in the JSON.
        rank: r, the inner dimension; at most min(m, n) of every targeted m x n layer.
        target_modules: substrings of qualified names; a layer is replaced if its name contains one of them. A single
            string is a regular expression that has to match the whole name, as in transformers.
    """

    #: Last names of the tensors of a layer that make up its weight.
    parts: ClassVar[frozenset[str]]
    #: Keys that other methods have and this one does not, with the advice that the error gives.
    instead: ClassVar[Mapping[str, str]] = {}
    #: Whether the layers are :class:`FactorizedLinear`, so that rules and resets of the factors apply.
    trains_factors: ClassVar[bool] = True
    #: Why refactorization does not apply; empty if only the product of the factors B and A matters.
    not_refactorized: ClassVar[str] = ""
    #: What to write instead of a momentum reset; empty if one is possible.
    not_reset: ClassVar[str] = ""
    #: Why only AdamW can train the layers; empty if rules can.
    not_by_rule: ClassVar[str] = ""
    #: Why no dense weight computes the same; empty if one does.
    not_dense: ClassVar[str] = ""

    type: str = ""
    rank: int = 128
    target_modules: tuple[str, ...] | str = ("attn", "mlp")

    def __post_init__(self) -> None:
        where = "megalr.parametrization"
        require(self.rank >= 1, f"{where}.rank is {self.rank}; write a whole number of at least 1")
        check_targets(self.target_modules, f"{where}.target_modules")

    def check(self, name: str, layer: nn.Linear) -> None:
        """Raise a UserError for a layer that cannot be replaced."""
        smaller = min(layer.out_features, layer.in_features)
        if self.rank > smaller:
            raise UserError(
                f"megalr.parametrization.rank is {self.rank}, but {name} is a {layer.out_features} x "
                f"{layer.in_features} matrix: write a rank of at most {smaller}, or leave it out of target_modules"
            )

    @abstractmethod
    def replace(self, layer: nn.Linear, *, seed: int, name: str) -> nn.Module:
        """Return the replacement of a layer.

        Args:
            layer: a layer with weights, or one on the meta device, where nothing is initialized. Take over tensors
                that the replacement keeps; do not copy them.
            seed: seed of the run.
            name: qualified name of the layer. Key random numbers by seed and name.
        """

    def connect(self, layers: Mapping[str, nn.Module]) -> None:  # noqa: B027  (most have nothing to share)
        """Connect replaced layers, given by qualified name, that share something."""

    def cut(self, layer: nn.Module, split: Split) -> None:
        """Keep the part of a replaced layer that belongs to this tensor-parallel rank, in place.

        It is called on all ranks with the same whole layer, before anything is partitioned. Parameters stay the same
        objects (:meth:`Split.keep <megalr.layers.tensor_parallel.split.Split.keep>`). A tensor that every rank keeps
        whole must get the same gradient on all ranks. Afterwards the layer maps x to its part of y, or its part of x
        to y.

        Args:
            layer: one that :meth:`replace` made.
            split: rows or columns of the weight, and the ranks that share them.

        Raises:
            NotImplementedError: layers of this type cannot be split between ranks.
        """
        raise NotImplementedError

    def share_inputs(self, layers: Sequence[nn.Module], group: dist.ProcessGroup) -> None:  # noqa: B027
        """Let layers with the same input, such as q, k and v, send its gradient in one message.

        Args:
            layers: all layers of one parent that :meth:`cut` has split by rows.
            group: the tensor-parallel ranks.
        """

    @abstractmethod
    def weight(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the dense weight (m, n), computed in fp32, from the :attr:`parts` of a layer by last name."""

    def form(self) -> dict[str, str | int | bool]:
        """Return the settings that decide the shapes of the optimizer's state, beside those of the parameters."""
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
    """Base class of linear layers that train something smaller than their weight.

    Attributes:
        factors: names of the parameters that are trained in place of the weight.
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
        """React to buffers that were loaded into this layer."""


def kept_buffers(model: nn.Module) -> list[Tensor]:
    """Return the buffers of the factorized layers of a model, such as the places of trained values."""
    layers = [module for module in model.modules() if isinstance(module, FactorizedLinear)]
    return [buffer for layer in layers for buffer in layer.buffers(recurse=False)]


ParametrizationConfig = FullConfig | Parametrization
