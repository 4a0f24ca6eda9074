"""FRUGAL: Adam on a part of the matrix, signs of the gradient on the rest, arXiv 2411.07837."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megalr.errors import UserError
from megalr.rules.adam_moments import adam_direction, adam_state
from megalr.rules.base import Basis, Shape, State, count, tensor
from megalr.rules.bases import Projector
from megalr.rules.checks import require_at_least
from megalr.rules.projected import Moments, ProjectedRule, factors_back, project, project_back
from megalr.seeding import generator


@dataclass(frozen=True, kw_only=True)
class FRUGAL(ProjectedRule):
    """update = P Adam(Pᵀ G) + σ sign(G - P Pᵀ G), and at a new P Adam's moments start from zero.

    P holds a random choice of G's columns ("columns"), or a basis of a subspace as GaLore's: its share of all columns,
    or of its side's dimensions, is the density. Source: arXiv 2411.07837, algorithm 1, with Adam and signSGD, and its
    code, whose defaults these are. State with columns: 2 m k + k for k = ⌊density · n⌋, at least 1; with a basis as
    GaLore's, of a rank that is rounded. A state keeps the k that it was made with.

    The paper's blockwise variant, in which whole matrices take turns, is left out; the ``badam`` rule has that choice
    of what is active, without the signs.

    Attributes:
        density: share of the columns, or of the dimensions of the projected side, that Adam updates.
        projector: "columns" for random columns; else how a basis is computed.
        state_free_scale: σ, the learning rate of the signs over Adam's.
        moments: what happens to the moments at a new P; "transport" and "transport_first" need a basis.
    """

    type_name: ClassVar[str] = "FRUGAL"
    name: ClassVar[str] = "frugal"
    default_eps: ClassVar[float] = 1e-8
    unused: ClassVar[frozenset[str]] = frozenset({"rank", "former_ranks"})

    density: float = 0.25
    projector: Projector | Literal["columns"] = "columns"  # type: ignore[assignment]
    state_free_scale: float = 1.0
    moments: Moments = "reset"
    eps: float = 1e-8
    rank: int = 1  # of no account
    former_ranks: bool = False  # as states without a version have them

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(0, state_free_scale=self.state_free_scale)
        if not 0 < self.density <= 1:
            raise UserError(f"optimizer.params.density is {self.density}; write a number in (0, 1]")
        if self.proj_type == "full":
            raise UserError('optimizer.params.proj_type is "full", which FRUGAL does not define; write "std"')
        if self._has_columns and self.moments not in ("reset", "keep"):
            given = f'optimizer.params.moments is "{self.moments}"'
            raise UserError(f'{given}, which needs a basis: write "reset" or "keep"')

    def form(self) -> dict[str, str | int | bool]:
        # A number that is not whole stands as text, so that all forms compare alike.
        form: dict[str, str | int | bool] = {"rule": self.name, "density": str(self.density)}
        form["columns"] = self._has_columns
        return form if self._has_columns else {**form, "proj_type": self.proj_type}

    def rank_of(self, shape: Shape) -> int:
        """k, or the rank."""
        if self.former_ranks:
            return max(1, round(self.density * (shape[1] if self._has_columns else min(shape))))
        if self._has_columns:
            return max(1, int(self.density * shape[1]))
        size = shape[0] if self.sides(shape) == ("left",) else shape[1]
        return min(max(1, round(self.density * size)), *shape)

    def basis_keys(self, shape: Shape) -> tuple[str, ...]:
        return ("columns",) if self._has_columns else super().basis_keys(shape)

    def room(self, numbers: Mapping[str, float], shape: Shape, device: torch.device | str) -> State:
        state = replace(self, former_ranks="version" not in numbers).init_state(shape, device)
        del state["version"]  # as the numbers have it
        return state | dict(numbers)

    def init_state(self, shape: Shape, device: torch.device | str = "cpu") -> State:
        if not self._has_columns:
            return {"version": 2, **super().init_state(shape, device)}
        columns = torch.zeros(self.rank_of(shape), dtype=torch.int32, device=device)
        adam = adam_state((shape[0], self.rank_of(shape)), device)
        return {"version": 2, "refreshes": 0, **adam, "columns": columns}

    def state_numel(self, shape: Shape) -> int:
        if not self._has_columns:
            return super().state_numel(shape)
        return (2 * shape[0] + 1) * self.rank_of(shape)

    def flops(self, shape: Shape) -> float:
        return 5.0 * self.state_numel(shape) if self._has_columns else super().flops(shape)

    def new_basis(self, grad: Tensor, state: State, *, updates: int, seed: int, name: str) -> Basis:
        if not self._has_columns:
            return super().new_basis(grad, state, updates=updates, seed=seed, name=name)
        drawn = torch.randperm(grad.shape[1], generator=generator(seed, name, "columns", count(state, "refreshes")))
        chosen = drawn[: tensor(state, "columns").numel()].sort().values
        return {"columns": chosen.to(torch.int32).to(grad.device)}

    def update(self, grad: Tensor, state: State, basis: Basis | None) -> Tensor:
        self.adopt(state, basis)
        if self._has_columns:
            columns = tensor(state, "columns").long()
            direction = adam_direction(grad[:, columns], state, self.betas, self.eps)
            update = grad.sign().mul_(self.state_free_scale)
            update[:, columns] = direction
            return update
        low = project(grad, state)
        rest = torch.addmm(grad, *factors_back(low, state), alpha=-1.0)
        return (
            rest.sign_()
            .mul_(self.state_free_scale)
            .add_(project_back(adam_direction(low, state, self.betas, self.eps), state))
        )

    @property
    def _has_columns(self) -> bool:
        return self.projector == "columns"
