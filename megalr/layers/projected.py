"""Projected layers: GaLore as W = W0 + R Qᵀ, with gradients and moments of rank r, arXiv 2403.03507.

Between two refreshes GaLore (arXiv 2403.03507) is plain Adam on R in W = W0 + R Qᵀ, with Q fixed. As a layer, R is an
ordinary parameter: its gradient, the reduction of it, its moments and its master are m x r, and any ZeRO stage cuts it
anywhere. W0 takes R Qᵀ when Q is refreshed; :mod:`megalr.optim.events.projected` does that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node, get_gradient_edge

from megalr.generation import generation
from megalr.layers.base import KeepsWeight, MergeRounding, Parametrization
from megalr.layers.tensor_parallel.messages import SharedInput
from megalr.layers.tensor_parallel.split import Split, become
from megalr.rules.bases import Projector, Side, random_basis
from megalr.rules.projected import Moments
from megalr.schema import require
from megalr.seeding import generator

Compute = Literal["auto", "low_rank", "rematerialized", "materialized"]
# Layers of one parent that read the same input, under the names that they have in the models of transformers.
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, kw_only=True)
class ProjectedConfig(Parametrization):
    """W = W0 + R Qᵀ in place of every linear layer that ``target_modules`` names; W0 and Q are frozen.

    Attributes:
        side: side of the basis. "input": Q is (n, r), W = W0 + R Qᵀ with R (m, r), and the backward pass needs x Q.
            "output": P is (m, r), W = W0 + P R with R (r, n), and the backward pass needs x. "std": the shorter side of
            each matrix, as GaLore.
        update_proj_gap: updates between two refreshes of a layer's basis.
        projector: how the basis is computed; see :func:`megalr.rules.bases.leading_basis`. "random" needs no gradient.
        random_from: number of updates after which refreshes draw random bases, as GoLore (arXiv 2410.11289). None:
            never.
        moments: what happens to R's moments at a refresh: "keep" leaves them, "reset" sets them and their count to
            zero, "transport" rotates them into the new basis, "transport_first" only the first one.
        stagger: refresh layers one after the other, spread over the gap; they start with random bases. False: refresh
            all at updates 0, gap, 2 gap, ..., as GaLore does.
        share_basis: let layers with the same input share one Q, computed from their stacked gradients, and save one
            x Q. None: share if the basis is on the input's side.
        compute: "low_rank" computes x W0ᵀ + (x Q) Rᵀ. "rematerialized" forms W0 + R Qᵀ for each pass and frees it.
            "auto" chooses the one with fewer operations for the number of tokens. "materialized" forms W0 + R Qᵀ once
            for both passes. It is the fastest for more than about r tokens, but keeps m x n more elements in between.
        merge_rounding: how W0 + R Qᵀ is rounded into a 16-bit W0: to "nearest", "stochastic", or to nearest with the
            "remainder" kept in 16 more bits, sharded over the ranks.
    """

    parts: ClassVar[frozenset[str]] = frozenset({"weight", "R", "basis"})
    trains_factors: ClassVar[bool] = False
    not_refactorized: ClassVar[str] = "has none"
    not_reset: ClassVar[str] = (
        'layers reset their moments themselves: remove "megalr.momentum_reset" and write "moments": "reset" in '
        '"megalr.parametrization"'
    )
    not_by_rule: ClassVar[str] = "a refresh carries over the moments of AdamW"
    instead: ClassVar[Mapping[str, str]] = {
        "proj_type": 'write "side": "std", "input" or "output"',
        "scale": "multiply optimizer.params.lr by GaLore's scale",
        "alpha": "R has the scale of the weight; choose optimizer.params.lr",
    }

    type: str = "projected"
    side: Literal["input", "std", "output"] = "input"
    update_proj_gap: int = 200
    projector: Projector = "svd"
    random_from: int | None = None
    moments: Moments = "keep"
    stagger: bool = True
    share_basis: bool | None = None
    compute: Compute = "auto"
    merge_rounding: MergeRounding = "nearest"

    def __post_init__(self) -> None:
        super().__post_init__()
        where, gap = "megalr.parametrization", self.update_proj_gap
        require(gap >= 1, f"{where}.update_proj_gap is {gap}; write a whole number of at least 1")
        require(
            self.random_from is None or self.random_from >= 0,
            f"{where}.random_from is {self.random_from}; write a number of updates",
        )
        require(
            not self.share_basis or self.side == "input",
            f'{where}.share_basis needs a basis of the input: write "side": "input", or "share_basis": false',
        )

    def side_of(self, shape: Sequence[int]) -> Side:
        """Which side of an m x n matrix the basis is on: "right" is the input's."""
        if self.side == "std":
            return "right" if shape[0] >= shape[1] else "left"
        return "right" if self.side == "input" else "left"

    @property
    def shares_basis(self) -> bool:
        """``share_basis``, decided."""
        return self.side == "input" if self.share_basis is None else self.share_basis

    def form(self) -> dict[str, str | int | bool]:
        """What decides what the optimizer's state looks like."""
        return {"parametrization": self.type, "rank": self.rank, "side": self.side, "share_basis": self.shares_basis}

    def replace(self, layer: nn.Linear, *, seed: int, name: str) -> ProjectedLinear:
        side = self.side_of(layer.weight.shape)
        size = layer.in_features if side == "right" else layer.out_features
        weight = layer.weight
        if weight.is_meta:
            basis = weight.new_empty(size, self.rank)
        else:
            basis = random_basis(size, self.rank, generator(seed, f"{name}.weight", side, 0), weight.device)
        new = ProjectedLinear(weight, basis.to(weight.dtype), layer.bias, side=side, compute=self.compute)
        return new.train(layer.training)

    def connect(self, layers: Mapping[str, nn.Module]) -> None:
        if not self.shares_basis:
            return
        by_name = {name: layer for name, layer in layers.items() if isinstance(layer, ProjectedLinear)}
        for name, first in by_name.items():
            parent, dot, last = name.rpartition(".")
            names = next((names for names in SAME_INPUT if last == names[0]), ())
            group = [by_name[f"{parent}{dot}{n}"] for n in names if f"{parent}{dot}{n}" in by_name]
            group = [layer for layer in group if layer.in_features == first.in_features]
            if len(group) > 1:
                latents = SharedLatent(len(group))
                for layer in group:
                    layer.basis, layer.latents = first.basis, latents

    def cut(self, layer: nn.Module, split: Split) -> None:
        become(layer, split, ProjectedLinear, ColumnParallelProjected, RowParallelProjected).keep(split)

    def share_inputs(self, layers: Sequence[nn.Module], group: dist.ProcessGroup) -> None:
        alike = [layer for layer in layers if isinstance(layer, ColumnParallelProjected)]
        inputs = SharedInput(len(alike), group)
        for layer in alike:
            layer.inputs = inputs

    def weight(self, parts: Mapping[str, Tensor]) -> Tensor:
        w, r, basis = (parts[key].to(torch.float32) for key in ("weight", "R", "basis"))
        right = self.side_of(w.shape) == "right"
        return torch.addmm(w, r, basis.T) if right else torch.addmm(w, basis, r)


class ProjectedLinear(KeepsWeight):
    """y = x (W0 + R Qᵀ)ᵀ + bias, or with W = W0 + P R, in place of ``nn.Linear``; of the weight R alone is trained.

    Attributes:
        weight: W0, (out_features, in_features), model dtype, frozen.
        R: (out_features, r) for a basis on the right, (r, in_features) for one on the left, model dtype.
        basis: Q, (in_features, r), or P, (out_features, r), orthonormal columns, model dtype, frozen. Layers of a
            group that reads the same input share one parameter.
        bias: (out_features,) or None.
        side: where the basis is.
        latents: what the group shares besides; None for a layer on its own.
        full_gradient: sum of the whole weight's gradient over the backward passes that add to R's, for a refresh;
            None if none is due.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        weight: Tensor,
        basis: Tensor,
        bias: nn.Parameter | None,
        *,
        side: Side,
        compute: Compute = "auto",
    ) -> None:
        """
        Args:
            weight: the dense layer's parameter; it becomes W0. R is trained if it was, and starts at zero.
            basis: see above.
            bias: the dense layer's.
            side: where the basis is.
            compute: see :class:`ProjectedConfig`.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.rank = basis.shape[1]
        self.side: Side = side
        self.compute = compute
        shape = (self.out_features, self.rank) if side == "right" else (self.rank, self.in_features)
        self.R = nn.Parameter(weight.new_zeros(shape), requires_grad=weight.requires_grad)
        self.set_frozen_weight(weight)
        self.basis = nn.Parameter(basis, requires_grad=False)
        self.register_parameter("bias", bias)
        self.latents: SharedLatent | None = None
        self.full_gradient: FullGradientSum | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x of shape (..., in_features)."""
        self.note_call()
        if torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
            x = x.to(torch.get_autocast_dtype(x.device.type))
            with torch.autocast(x.device.type, enabled=False):
                return self._output(x)
        return self._output(x)

    def _output(self, x: Tensor) -> Tensor:  # the layer in x's dtype
        return self._product(x, self.R, self.bias)

    def _product(self, x: Tensor, r: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + bias; the gradient goes to ``r``, which has to be this layer's R, perhaps by way of something."""
        materialize = self.materializes(x.numel() // self.in_features)
        y: Tensor = _Projected.apply(x, r, bias, self._latent(x, materialize), self, materialize)
        if self.full_gradient is not None and torch.is_grad_enabled() and self.R.requires_grad:
            y = _Collect.apply(y, x.detach(), self.full_gradient, get_gradient_edge(self.R).node)
        return y

    def materializes(self, tokens: int) -> bool:
        """Whether W is formed for an input of so many tokens.

        For each of the two passes that costs m·n·r operations. It saves (x Q) Rᵀ in the first, and (dy R) Qᵀ in the
        second: for each token (2 m + n)·r with Q, (m + 2 n)·r with P.
        """
        m, n = self.out_features, self.in_features
        saved = 2 * m + n if self.side == "right" else m + 2 * n
        if self.compute == "auto":
            return tokens * saved > 2 * m * n
        return self.compute != "low_rank"

    def materialized(self) -> Tensor:
        """W0 + R Qᵀ, or W0 + P R: (m, n), new."""
        left, right = (self.R, self.basis.T) if self.side == "right" else (self.basis, self.R)
        return torch.addmm(self.frozen_weight, left, right)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of this layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"basis={'input' if self.side == 'right' else 'output'}, bias={self.bias is not None}"
        )

    def _latent(self, x: Tensor, materialize: bool) -> Tensor | None:
        """x Q, (tokens, r), where it is needed: for y without W, and for R's gradient. No gradient flows through it."""
        if self.side == "left" or (materialize and not torch.is_grad_enabled()):
            return None
        if self.latents is None:
            return _latent(x, self.basis)
        return self.latents.of(x, self)


class CutProjected(ProjectedLinear):
    """A part of a layer.

    Attributes:
        split: between which ranks.
        width: of the whole output.
    """

    split: Split
    width: int

    def keep(self, split: Split) -> None:
        """Drop what other ranks have."""
        self.split, self.width = split, self.out_features
        split.keep(self, *(("weight", "bias") if split.rows else ("weight",)))
        # Of R and the basis, the one on the side that is cut.
        if split.rows == (self.side == "right"):
            split.keep(self, "R")
        else:
            split.keep(self, "basis", dim=0)
        self.out_features, self.in_features = self.frozen_weight.shape


class ColumnParallelProjected(CutProjected):
    """Rows of W0, of the bias, and of R, or with a basis of the output of that: x whole, y in parts.

    Attributes:
        inputs: of this layer and those that get the same x.
    """

    inputs: SharedInput

    def _output(self, x: Tensor) -> Tensor:
        r = self.R if self.side == "right" else self.split.sum_gradient(self.R)
        return self.split.output(self._product(self.inputs.of(self, x), r, self.bias), self.width)


class RowParallelProjected(CutProjected):
    """Columns of W0 and of R, or with a basis of the input rows of that; all of the bias: x in parts, y whole."""

    def _output(self, x: Tensor) -> Tensor:
        r = self.R if self.side == "left" else self.split.sum_gradient(self.R)
        y = self.split.sum(self._product(x, r, None))
        return y if self.bias is None else y + self.bias.to(y.dtype)


class SharedLatent:
    """x Q of layers that read the same x: computed by the first of them, let go of after the last."""

    def __init__(self, members: int) -> None:
        """
        Args:
            members: how many layers there are.
        """
        self._members = members
        self._served: set[int] = set()
        self._key: tuple[Any, ...] = ()
        # x itself is held, too: nothing else can lie at its address meanwhile, so the key cannot be mistaken.
        self._held: tuple[Tensor, Tensor] | None = None

    def of(self, x: Tensor, layer: ProjectedLinear) -> Tensor:
        """x Q for one of the layers; under DeepSpeed each gets a view of x of its own."""
        if x.is_inference():  # without a version, which would tell that x was written to
            return _latent(x, layer.basis)
        key = (x.data_ptr(), x._version, x.shape, x.stride(), x.dtype, generation())
        if self._held is None or self._key != key or id(layer) in self._served:
            self._key, self._served = key, set()
            self._held = (x.detach(), _latent(x, layer.basis))
        latent = self._held[1]
        self._served.add(id(layer))
        if len(self._served) == self._members:
            self._held = None
        return latent


@torch.no_grad()
def _latent(x: Tensor, basis: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]) @ basis.to(x.dtype)


class _Projected(torch.autograd.Function):
    """The layer's two passes. The weights are read from the layer, not saved: ZeRO-3 takes them away in between."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        r: Tensor,
        bias: Tensor | None,
        latent: Tensor | None,
        layer: ProjectedLinear,
        materialize: bool,
    ) -> Tensor:
        flat, dtype = x.reshape(-1, layer.in_features), x.dtype  # the weights' own, but under autocast
        saved = [x if latent is None else latent]
        if materialize:
            weight = layer.materialized().to(dtype)
            y = flat @ weight.T
            saved += [weight] * (layer.compute == "materialized")
        elif latent is not None:
            y = (flat @ layer.frozen_weight.to(dtype).T).addmm_(latent, r.to(dtype).T)
        else:
            y = (flat @ layer.frozen_weight.to(dtype).T).addmm_(flat @ r.to(dtype).T, layer.basis.to(dtype).T)
        if bias is not None:
            y += bias.to(dtype)
        ctx.layer, ctx.materialize, ctx.shape = layer, materialize, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(*saved)
        return y.view(*x.shape[:-1], layer.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer: ProjectedLinear = ctx.layer
        dy = grads[0].reshape(-1, layer.out_features)
        kept, *weights = ctx.saved_tensors
        dtype, right = kept.dtype, layer.side == "right"
        dx = dr = dbias = None
        low = None if right else dy @ layer.basis.to(dtype)  # (tokens, r)
        if ctx.needs_input_grad[0]:
            if ctx.materialize:
                dx = dy @ (weights[0] if weights else layer.materialized().to(dtype))
            elif low is None:
                dx = (dy @ layer.frozen_weight.to(dtype)).addmm_(dy @ layer.R.to(dtype), layer.basis.to(dtype).T)
            else:
                dx = (dy @ layer.frozen_weight.to(dtype)).addmm_(low, layer.R.to(dtype))
            dx = dx.view(ctx.shape)
        if ctx.needs_input_grad[1]:
            dr = (dy.T @ kept if low is None else low.T @ kept.reshape(-1, layer.in_features)).to(layer.R.dtype)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0).to(ctx.bias_dtype)
        return dx, dr, dbias, None, None, None


class FullGradientSum:
    """The gradient of a whole weight, summed over backward passes.

    Attributes:
        value: (out_features, in_features), fp32; None before the first pass.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def add(self, dy: Tensor, x: Tensor) -> None:
        """Add dyᵀ x for dy (tokens, out_features) and x (tokens, in_features)."""
        if self.value is None:
            self.value = (dy.T @ x).float()
        elif self.value.dtype == dy.dtype:
            self.value.addmm_(dy.T, x)
        else:
            self.value += dy.T @ x


class _Collect(torch.autograd.Function):
    """Hands on y, and adds dyᵀ x to a sum when dy comes by on its way to R's gradient.

    ``torch.autograd.grad`` for something else, as for a penalty or a saliency map, comes by as well; R's gradient knows
    nothing of it, so the sum may not either.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, total: FullGradientSum, accumulator: Node) -> Tensor:
        ctx.total, ctx.accumulator = total, accumulator  # what adds to R.grad in this graph
        ctx.save_for_backward(x)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if _accumulates(ctx.accumulator):
            (x,) = ctx.saved_tensors
            ctx.total.add(grads[0].reshape(-1, grads[0].shape[-1]), x.reshape(-1, x.shape[-1]))
        return grads[0], None, None, None


def _accumulates(accumulator: Node) -> bool:
    """Whether the backward pass that is under way will add to the gradient of an accumulator's leaf."""
    try:
        return torch._C._will_engine_execute_node(accumulator)
    except RuntimeError:  # torch's answer where ``torch.autograd.grad`` returns the leaf's gradient and adds it nowhere
        return False
