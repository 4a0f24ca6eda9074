"""SLTrain: W = s B A + S with a sparse S, arXiv 2406.02214.

S has trained values at a fixed random set of places, a share of 3 % of them, which lets W have full rank. Both passes
form W, use it and let go of it: a product with a matrix of 3 % non-zeros is slower than one with the whole matrix on
anything that has matrix units, and about as fast on a CPU, while s B A + S costs r/T of the product with T tokens. The
values' gradient is (dyᵀ x) at their places; the published code forms all m x n of it, here no more than an eighth
exists at once. Saved for the backward pass is x alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megalr.errors import UserError
from megalr.hosts.tensor_parallel import mark_cut, mark_indices
from megalr.layers.low_rank import (
    LowRankLinear,
    ScaledParametrization,
    keep_factors,
    normal_,
    root_mean_square,
    uniform_,
    variance_matched_,
)
from megalr.layers.tensor_parallel.messages import SharedInput
from megalr.layers.tensor_parallel.split import Split, become
from megalr.schema import require
from megalr.seeding import seed_for

BLOCK = 2**20  # elements of the full gradient that exist at once, at most
BLOCKS = 8  # into so many, at least, are the rows cut
KEY_BITS, KEY_PARTS = 16, 4  # a key in parts that survive being cast to any floating-point type of 32 bits


@dataclass(frozen=True, kw_only=True)
class SLTrainConfig(ScaledParametrization):
    """W = (alpha / rank) B A + S in place of every linear layer that ``target_modules`` names.

    Refactorization rewrites B, A and leaves S alone; a momentum reset of the factors takes the values in.

    Attributes:
        density: the share of W's elements that have a value in S.
        init: "kaiming_uniform" is the published start: B = 0; A and the values are U(-1/sqrt(n), 1/sqrt(n)). W then
            has the variance of a dense layer times ``density``. "variance_matched" gives W the dense layer's variance,
            of which S has the share ``density``.
    """

    parts: ClassVar[frozenset[str]] = frozenset({"B", "A", "values", "support_key"})

    type: str = "sltrain"
    density: float = 0.03
    init: Literal["kaiming_uniform", "variance_matched"] = "kaiming_uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 < self.density < 1,
            f"megalr.parametrization.density is {self.density}; write a share above 0 and below 1, e.g. 0.03",
        )

    def check(self, name: str, layer: nn.Linear) -> None:
        super().check(name, layer)
        if layer.out_features * layer.in_features >= 2**31:
            raise UserError(
                f"{name} is a {layer.out_features} x {layer.in_features} matrix, too large for indices of 32 bits: "
                "leave it out of target_modules"
            )

    def replace(self, layer: nn.Linear, *, seed: int, name: str) -> SLTrainLinear:
        weight = layer.weight
        new = SLTrainLinear(
            layer.in_features,
            layer.out_features,
            self.rank,
            density=self.density,
            support_seed=seed_for(seed, name, "support"),
            scale=self.scale,
            bias=layer.bias,
            device=weight.device,
            dtype=weight.dtype,
        ).train(layer.training)
        if weight.is_meta:
            return new
        if self.init == "variance_matched":
            dense_std = root_mean_square(weight, name)
            variance_matched_(new, dense_std * math.sqrt(1 - self.density), seed, name)
            normal_(new.values, dense_std, seed, f"{name}.values")
        else:
            bound = 1 / math.sqrt(layer.in_features)
            nn.init.zeros_(new.B)
            uniform_(new.A, bound, seed, f"{name}.A")
            uniform_(new.values, bound, seed, f"{name}.values")
        return new

    def cut(self, layer: nn.Module, split: Split) -> None:
        become(layer, split, SLTrainLinear, ColumnParallelSLTrain, RowParallelSLTrain).keep(split)

    def share_inputs(self, layers: Sequence[nn.Module], group: dist.ProcessGroup) -> None:
        alike = [layer for layer in layers if isinstance(layer, ColumnParallelSLTrain)]
        inputs = SharedInput(len(alike), group)
        for layer in alike:
            layer.inputs = inputs

    def weight(self, parts: Mapping[str, Tensor]) -> Tensor:
        product = self.product(parts)
        values = parts["values"].to(torch.float32)
        support = random_support(product.shape, values.numel(), _seed_in(parts["support_key"]))
        product.view(-1).index_add_(0, support.to(product.device), values)
        return product


class SLTrainLinear(LowRankLinear):
    """y = x (s B A + S)ᵀ + bias, in place of ``nn.Linear``.

    Attributes:
        B, A, bias, scale: as those of :class:`~megalr.layers.low_rank.LowRankLinear`.
        values: (k,), model dtype, what S has at its places, in their order; k is the density's share of m n.
        support: (k,), int32, the places in the flattened weight, ascending. Not in checkpoints: ``support_key`` is.
        support_key: int32, the seed that the places are drawn with, in parts.
    """

    factors: ClassVar[tuple[str, ...]] = ("B", "A", "values")

    support: Tensor
    support_key: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        density: float,
        support_seed: int,
        scale: float = 1.0,
        bias: nn.Parameter | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, scale=scale, bias=bias, device=device, dtype=dtype)
        count = max(1, round(density * in_features * out_features))
        self.values = nn.Parameter(torch.empty(count, device=device, dtype=dtype))
        self.register_buffer("support", torch.empty(count, dtype=torch.int32, device=device), persistent=False)
        self.register_buffer("support_key", torch.empty(KEY_PARTS, dtype=torch.int32, device=device))
        self._rows = self._rows_of_a_block()
        self._bounds: list[int] = []
        if self.values.is_meta:  # an outline, whose blocks have the shapes of the layer's
            blocks = -(-out_features // self._rows)
            self._bounds = [count * block // blocks for block in range(blocks + 1)]
        else:
            self.support_key.copy_(_parts_of(support_seed))
            self.draw_support()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x of shape (..., in_features)."""
        if torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
            x = x.to(torch.get_autocast_dtype(x.device.type))
            with torch.autocast(x.device.type, enabled=False):
                return self._output(x)
        return self._output(x)

    def _output(self, x: Tensor) -> Tensor:  # the layer in x's dtype
        return self._product(x, self.B, self.A, self.bias)

    def _product(self, x: Tensor, b: Tensor, a: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + bias; gradients go to ``b`` and ``a``, which have to be this layer's, perhaps by way of others."""
        y: Tensor = _SparsePlusLowRank.apply(x, b, a, self.values, bias, self)
        return y

    def materialized(self, dtype: torch.dtype) -> Tensor:
        """s B A + S: (m, n), new, without a gradient."""
        with torch.no_grad():
            weight = (self.B.to(dtype) * self.scale) @ self.A.to(dtype)
            weight.view(-1).index_add_(0, self.support, self.values.to(dtype))
        return weight

    def at_support(self, left: Tensor, right: Tensor) -> Tensor:
        """leftᵀ right, (m, n), at the places of the values alone; a block of rows at a time.

        Args:
            left: (tokens, m).
            right: (tokens, n).
        """
        found = torch.empty(self.support.numel(), dtype=left.dtype, device=left.device)
        for block, (first, last) in enumerate(zip(self._bounds, self._bounds[1:], strict=False)):
            begin = block * self._rows
            rows = left[:, begin : begin + self._rows].T @ right
            torch.index_select(
                rows.view(-1), 0, self.support[first:last] - begin * self.in_features, out=found[first:last]
            )
        return found

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of this layer."""
        return f"{super().extra_repr()}, values={self.values.numel()}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        before = self.support_key.clone()
        super()._load_from_state_dict(*args, **kwargs)
        if not torch.equal(before, self.support_key):  # the checkpoint of a run with another seed
            self.draw_support()

    def buffers_changed(self) -> None:
        self.draw_support()

    def draw_support(self) -> None:
        """Find the places again that the key stands for."""
        self.support.copy_(self._places())
        self._rows = self._rows_of_a_block()
        starts = torch.arange(0, self.out_features + self._rows, self._rows).clamp_(max=self.out_features)
        self._bounds = torch.searchsorted(self.support.cpu(), (starts * self.in_features).int()).tolist()

    def _rows_of_a_block(self) -> int:
        return max(1, min(BLOCK // self.in_features, -(-self.out_features // BLOCKS)))

    def _places(self) -> Tensor:
        """The places that the key stands for."""
        return random_support((self.out_features, self.in_features), self.support.numel(), self.support_seed)

    @property
    def support_seed(self) -> int:
        """What the places are drawn with."""
        return _seed_in(self.support_key)


class CutSLTrain(SLTrainLinear):
    """A part of a layer, whose places are those of the whole layer that lie in it.

    Attributes:
        split: between which ranks.
        width: of the whole output.
        whole_shape, whole_count: of the weight, and of all values.
        part: the dimension that is cut, the first row or column, and how many there are.
    """

    split: Split
    width: int
    whole_shape: tuple[int, int]
    whole_count: int
    part: tuple[int, int, int]

    def keep(self, split: Split) -> None:
        """Drop what other ranks have."""
        self.whole_shape, self.whole_count = (self.out_features, self.in_features), self.values.numel()
        dim = 0 if split.rows else 1
        self.part = (dim, *split.part(self.whole_shape[dim]))
        places, chosen = self.choose()
        self.values.data = self.values.data[chosen.to(self.values.device)]
        mark_cut(self.values, 0)
        mark_indices(self.values, chosen)
        self.support = places.to(self.support.device)
        keep_factors(self, split)
        self.draw_support()

    def _places(self) -> Tensor:
        return self.choose()[0]

    def choose(self) -> tuple[Tensor, Tensor]:
        """See :func:`part_of_support`."""
        places = random_support(self.whole_shape, self.whole_count, self.support_seed)
        return part_of_support(places, self.whole_shape[1], *self.part)


class ColumnParallelSLTrain(CutSLTrain):
    """Rows of B, of S and of the bias, all of A: x whole, y in parts.

    Attributes:
        inputs: of this layer and those that get the same x.
    """

    inputs: SharedInput

    def _output(self, x: Tensor) -> Tensor:
        a = self.split.sum_gradient(self.A)
        return self.split.output(self._product(self.inputs.of(self, x), self.B, a, self.bias), self.width)


class RowParallelSLTrain(CutSLTrain):
    """Columns of A and of S, all of B and of the bias: x in parts, y whole."""

    def _output(self, x: Tensor) -> Tensor:
        b = self.split.sum_gradient(self.B)
        y = self.split.sum(self._product(x, b, self.A, None))
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _SparsePlusLowRank(torch.autograd.Function):
    """The layer's two passes. The weights are read from the layer, not saved: ZeRO-3 takes them away in between."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, b: Tensor, a: Tensor, values: Tensor, bias: Tensor | None, layer: SLTrainLinear
    ) -> Tensor:
        ctx.layer, ctx.bias_dtype = layer, None if bias is None else bias.dtype
        ctx.save_for_backward(x)
        return nn.functional.linear(x, layer.materialized(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer: SLTrainLinear = ctx.layer
        (x,) = ctx.saved_tensors
        dtype, scale = x.dtype, layer.scale
        flat, dy = x.reshape(-1, layer.in_features), grads[0].reshape(-1, layer.out_features)
        dx = db = da = dvalues = dbias = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ layer.materialized(dtype)).view(x.shape)
        if ctx.needs_input_grad[1]:
            db = (dy.T @ (flat @ layer.A.to(dtype).T * scale)).to(layer.B.dtype)  # (m, r)
        if ctx.needs_input_grad[2]:
            da = ((dy @ layer.B.to(dtype) * scale).T @ flat).to(layer.A.dtype)  # (r, n)
        if ctx.needs_input_grad[3]:
            dvalues = layer.at_support(dy, flat).to(layer.values.dtype)
        if ctx.needs_input_grad[4]:
            dbias = dy.sum(0).to(ctx.bias_dtype)
        return dx, db, da, dvalues, dbias, None


def random_support(shape: torch.Size | tuple[int, int], count: int, seed: int) -> Tensor:
    """So many places of an m x n matrix, int32, ascending; every set of places is as likely as any other."""
    numbers = torch.Generator().manual_seed(seed)
    found = torch.empty(0, dtype=torch.int64)
    # Drawing the few places with repetition is much faster than permuting all m n.
    while found.numel() < count:
        found = torch.cat([found, torch.randint(math.prod(shape), (count,), generator=numbers)]).unique()
    kept = torch.randperm(found.numel(), generator=numbers)[:count]
    return found[kept].sort().values.to(torch.int32)


def part_of_support(places: Tensor, columns: int, dim: int, first: int, size: int) -> tuple[Tensor, Tensor]:
    """The places of a matrix that lie in some of its rows (``dim`` 0) or columns (1).

    Args:
        places: ascending, in the flattened matrix.
        columns: of the matrix.
        dim, first, size: which part.

    Returns:
        The places in the flattened part, ascending, int32; and which of all places they are, int64.
    """
    row, column = places.long() // columns, places.long() % columns
    index = row if dim == 0 else column
    chosen = ((index >= first) & (index < first + size)).nonzero().flatten()
    row, column = row[chosen], column[chosen]
    inside = (row - first) * columns + column if dim == 0 else row * size + column - first
    return inside.to(torch.int32), chosen


def _parts_of(seed: int) -> Tensor:
    return torch.tensor([(seed >> KEY_BITS * i) % 2**KEY_BITS for i in range(KEY_PARTS)], dtype=torch.int32)


def _seed_in(key: Tensor) -> int:
    return sum(int(part) << KEY_BITS * i for i, part in enumerate(key.tolist()))
