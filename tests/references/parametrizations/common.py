"""What the plain layers share: AdamW on what they train, momentum resets, and how a case of them is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from tests.equality import Case
from tests.references.common import Adam

Adams = dict[str, Adam]
ADAMW = {"lr": 5e-3, "weight_decay": 0.1, "embedding": {"lr": 1e-2}}
# What layers on the odd model's larger matrices have in common.
LAYERS = {"rank": 5, "target_modules": ["mlp_wide", "mlp_tall", "mlp_square", "mlp_experts_back"]}
REFACTORIZATION = {"interval": 5, "moments": "reset"}
RESET = {"interval": 4, "scope": "factors", "warmup_steps": 3}


class Plain(nn.Module):
    """A linear layer in place of one of megalr's; ``start`` holds what that one started with, by name.

    Attributes:
        type_name: what the JSON's "parametrization" calls it as "type"; empty for what is none of its own.
        trained: names of what it trains.
    """

    type_name: ClassVar[str] = ""
    trained: ClassVar[tuple[str, ...]] = ()

    def __init__(self, name: str, start: dict[str, Tensor], section: dict[str, Any]) -> None:
        super().__init__()
        self.name, self.section = name, section
        self.r = section["rank"]
        self.s = section.get("alpha", self.r) / self.r
        for key in self.trained:
            self.register_parameter(key, nn.Parameter(start[key].detach().clone()))
        self.register_parameter("bias", None if start.get("bias") is None else nn.Parameter(start["bias"].clone()))

    def dense(self) -> Tensor:
        """W, (m, n)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.dense().T
        return y if self.bias is None else y + self.bias

    def step(self, grads: dict[str, Tensor], adams: Adams, lr: float, decay: float, t: int) -> None:
        """Update number t (1, 2, ...) of what is trained: AdamW."""
        for key, g in grads.items():
            w = getattr(self, key)
            w -= lr * (adams[key].direction(g) + decay * w)

    def end_update(self, t: int, adams: Adams) -> bool | str:
        """What follows update t, here a momentum reset.

        Returns:
            Whether the learning rate of the factors warms up again; "all": everything else starts again, too.
        """
        every = self.section.get("restarts", {}).get("reset_every")
        if not every or t % every != 0:
            return False
        for key in self.trained:
            adams[key].reset()
        return True

    def exported(self) -> dict[str, Tensor]:
        return {"weight": self.dense()}


def case(
    section: Mapping[str, Any], rule: tuple[str, Mapping[str, Any]] = ("AdamW", {}), **megalr: Mapping[str, Any]
) -> Case:
    """Layers that are trained on the odd model, whose reference is tests/plain_factors.py.

    Args:
        section: the JSON's "parametrization".
        rule: what trains the factors and other matrices: its type, and settings beside :data:`ADAMW`.
        **megalr: "refactorization" and "momentum_reset", where there are any.
    """

    def plain(model: nn.Module, data: Sequence[Tensor], clip: float) -> dict[str, Tensor]:
        from tests.plain_factors import plain_factors

        restarts = {
            "refactorize_every": megalr.get("refactorization", {}).get("interval"),
            "reset_every": megalr.get("momentum_reset", {}).get("interval"),
            "warmup": megalr.get("momentum_reset", {}).get("warmup_steps"),
        }
        given = {**section, "restarts": {key: value for key, value in restarts.items() if value is not None}}
        return plain_factors(model, data, given, ADAMW, clip=clip, rule=None if rule[0] == "AdamW" else rule)

    return Case({"type": rule[0], "params": {**ADAMW, **rule[1]}}, {"parametrization": section, **megalr}, plain)
