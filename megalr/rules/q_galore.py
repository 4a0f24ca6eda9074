"""Q-GaLore: GaLore with a 4-bit basis, 8-bit moments and refreshes only where they are needed, arXiv 2407.08296."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megalr.errors import UserError
from megalr.rules.adam_moments import adam_direction
from megalr.rules.base import Basis, Shape, State, count, tensor
from megalr.rules.checks import require_at_least, require_positive
from megalr.rules.projected import ProjectedRule, factors_back, project
from megalr.rules.quantization import blocks_of, groups_of, quantize_blocks
from megalr.rules.quantized_state import MOMENTS, fp32_basis, fp32_state, packed_basis


@dataclass(frozen=True, kw_only=True)
class QGaLore(ProjectedRule):
    """GaLore's update with a P of 16 levels, group by group, and moments in block-wise dynamic 8-bit codes.

    At every refresh the cosine between the leading vectors of the old and the new basis is noted. Once the last
    ``queue_size`` of them have a mean of at least ``cos_threshold``, this matrix's gap grows ``gamma_proj``-fold: a
    subspace that stays needs no decomposition. Source: arXiv 2407.08296 and its code, whose defaults these are.

    State, in bytes, for a basis of p = m r elements on the short side and q = n r of each moment: ⌈p / 2⌉ + 5 ⌈p / 256⌉
    and 2 (q + 4 ⌈q / 256⌉), against GaLore's 4 p + 8 q; four bytes more for each place of the queue. Moments of fewer
    than ``min_8bit_size`` elements stay in fp32, as in bitsandbytes.

    Left out are the paper's INT8 weights: ZeRO keeps fp32 masters, of which the model's weights are a cast. Against the
    code: the old leading vector is the dequantized basis's, so that nothing more has to be kept, and it has the sign
    by which the two agree, where the code takes the accident of a decomposition's sign; and the levels of a group
    always reach to zero, without which a matrix with one row or column would not train.

    Attributes:
        scale: α, the factor on the update.
        cos_threshold: mean cosine at which the gap grows.
        queue_size: number of cosines in that mean.
        gamma_proj: the factor by which the gap grows.
        min_8bit_size: minimum number of elements of a moment that is quantized.
    """

    type_name: ClassVar[str] = "QGaLoreAdamW"
    name: ClassVar[str] = "q_galore"
    default_lr: ClassVar[float] = 1e-2
    default_eps: ClassVar[float] = 1e-8  # bitsandbytes', with which the published runs were made
    former_defaults: ClassVar[Mapping[str, object]] = {"eps": 1e-6}
    unused: ClassVar[frozenset[str]] = frozenset({"moments"})

    scale: float = 0.25
    cos_threshold: float = 0.4
    queue_size: int = 5
    gamma_proj: float = 2.0
    min_8bit_size: int = 4096
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(scale=self.scale, queue_size=self.queue_size)
        require_at_least(1, gamma_proj=self.gamma_proj)
        require_at_least(-1, cos_threshold=self.cos_threshold)
        require_at_least(0, min_8bit_size=self.min_8bit_size)
        if self.proj_type == "full":
            raise UserError('optimizer.params.proj_type is "full", which Q-GaLore does not define; write "std"')

    def form(self) -> dict[str, str | int | bool]:
        return {**super().form(), "queue_size": self.queue_size, "min_8bit_size": self.min_8bit_size}

    def logical_form(self) -> dict[str, str | int | bool]:
        # What a subclass keeps beside is nothing to GaLore.
        return {**super().form(), "rule": "galore"} if self.name == QGaLore.name else self.form()

    def convert(self, state: State, shape: Shape) -> State:
        (side,) = self.sides(shape)
        own, plain = self.init_state(shape, tensor(state, side).device), fp32_state(self, state, shape)
        own |= {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        self._keep_moments(own, plain)
        packed = state if f"{side}_step" in state else packed_basis(side, tensor(plain, side))
        own |= {key: packed[key] for key in (side, f"{side}_step", f"{side}_zero")}
        if "cosines" in state:
            known = tensor(state, "cosines")[-self.queue_size :]
            tensor(own, "cosines")[-len(known) :] = known
        return own

    def basis_keys(self, shape: Shape) -> tuple[str, ...]:
        (side,) = self.sides(shape)
        return (side, f"{side}_step", f"{side}_zero", "cosines")

    def init_state(self, shape: Shape, device: torch.device | str = "cpu") -> State:
        (side,) = self.sides(shape)
        size, low = self._basis_shape(shape), self.low_shape(shape)
        elements, groups = size[0] * size[1], groups_of(size[0] * size[1])
        state: State = {"refreshes": 0, "gap": self.update_proj_gap, "step": 0}
        for key in MOMENTS:
            if self._quantizes(low):
                state[key] = torch.zeros(low, dtype=torch.uint8, device=device)
                state[f"{key}_max"] = torch.zeros(blocks_of(low[0] * low[1]), device=device)
            else:
                state[key] = torch.zeros(low, device=device)
        state[side] = torch.zeros(-(-elements // 2), dtype=torch.uint8, device=device)
        state[f"{side}_step"] = torch.zeros(groups, device=device)
        state[f"{side}_zero"] = torch.zeros(groups, dtype=torch.uint8, device=device)
        state["cosines"] = torch.zeros(self.queue_size, device=device)
        return state

    def state_numel(self, shape: Shape) -> int:
        size, low = self._basis_shape(shape), self.low_shape(shape)
        elements, entries = size[0] * size[1], low[0] * low[1]
        scales = blocks_of(entries) if self._quantizes(low) else 0
        return -(-elements // 2) + 2 * groups_of(elements) + 2 * (entries + scales) + self.queue_size

    def state_bytes(self, shape: Shape) -> int:
        size, low = self._basis_shape(shape), self.low_shape(shape)
        elements, entries = size[0] * size[1], low[0] * low[1]
        moment = entries + 4 * blocks_of(entries) if self._quantizes(low) else 4 * entries
        return -(-elements // 2) + 5 * groups_of(elements) + 2 * moment + 4 * self.queue_size

    def refresh_due(self, state: State, updates: int, phase: int) -> bool:
        return count(state, "refreshes") == 0 or updates % count(state, "gap") == phase

    def new_basis(self, grad: Tensor, state: State, *, updates: int, seed: int, name: str) -> Basis:
        shape = grad.shape[0], grad.shape[1]
        (side,) = self.sides(shape)
        refreshes = count(state, "refreshes")
        old = fp32_basis(self, state, shape, side)
        (new,) = super().new_basis(grad, {**state, side: old}, updates=updates, seed=seed, name=name).values()
        cosines = tensor(state, "cosines").clone()
        if refreshes:
            cosine = torch.nn.functional.cosine_similarity(old[:, 0], new[:, 0], dim=0)
            cosines = torch.cat([cosines[1:], cosine.view(1)])
        return {**packed_basis(side, new), "cosines": cosines}

    def adopt(self, state: State, basis: Basis | None) -> None:
        super().adopt(state, basis)
        # As many cosines as refreshes but the first; the host reads their mean at refreshes alone.
        full = basis is not None and count(state, "refreshes") > self.queue_size
        if full and tensor(state, "cosines").mean() >= self.cos_threshold:
            state["gap"] = int(count(state, "gap") * self.gamma_proj)

    def update(self, grad: Tensor, state: State, basis: Basis | None) -> Tensor:
        left, right = self._factors(grad, state, basis)
        return left @ right

    def apply(self, weight: Tensor, grad: Tensor, state: State, basis: Basis | None, *, lr: float) -> None:
        weight.addmm_(*self._factors(grad, state, basis), alpha=-lr)

    def _factors(self, grad: Tensor, state: State, basis: Basis | None) -> tuple[Tensor, Tensor]:
        """Two matrices whose product is the update; the moments are quantized again."""
        shape = grad.shape[0], grad.shape[1]
        self.adopt(state, basis)
        plain = fp32_state(self, state, shape)
        direction = adam_direction(project(grad, plain), plain, self.betas, self.eps, self.scale)
        state["step"] = count(plain, "step")
        self._keep_moments(state, plain)
        return factors_back(direction, plain)

    def _keep_moments(self, state: State, plain: State) -> None:
        """Write fp32 moments into a state, in place."""
        for key, signed in MOMENTS.items():
            values = tensor(plain, key)
            if self._quantizes((values.shape[0], values.shape[1])):
                values, largest = quantize_blocks(values, signed=signed)
                tensor(state, f"{key}_max").copy_(largest)
            tensor(state, key).copy_(values)

    def _basis_shape(self, shape: Shape) -> Shape:
        return shape[0] if self.sides(shape) == ("left",) else shape[1], self.rank_of(shape)

    def _quantizes(self, low: Shape) -> bool:
        return low[0] * low[1] >= self.min_8bit_size
