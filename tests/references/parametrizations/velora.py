"""VeLoRA, arXiv 2405.17991: dense layers that save their input compressed. The reference is tests/plain_velora.py."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from tests.equality import Case, rule_case
from tests.plain_training import plain_training
from tests.plain_velora import with_velora
from tests.references import REFERENCES

SECTION = {"type": "velora", "groups": 10, "scale": 0.7, "target_modules": ["mlp_tall", "mlp_square"]}


def compressed(rule: str) -> Case:
    """A rule on the matrices of the odd model, two of whose layers are compressed."""

    def plain(model: nn.Module, data: Sequence[Tensor], clip: float) -> dict[str, Tensor]:
        return plain_training(with_velora(model, SECTION), data, rule, dict(REFERENCES[rule].trained_with), clip=clip)

    dense = rule_case(rule)
    return Case(dense.optimizer, {**dense.megalr, "activations": SECTION}, plain)


CASES = {f"velora, {rule}": compressed(rule) for rule in ("AdamW", "GaLoreAdamW", "Muon")}
