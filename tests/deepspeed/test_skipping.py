"""A gradient that is not finite: the update is skipped on all ranks, by DeepSpeed or by us, and nothing has changed.

tests/world has every rule at every stage; here is once a stage and class of DeepSpeed's who skips.
"""

from __future__ import annotations

import pytest

from tests.covering import slow_but
from tests.references import REFERENCES

pytestmark = pytest.mark.distributed
POISON = "tests.deepspeed.rule_training:poison"
CASES = [
    (s, *case) for s in range(4) for case in ((None, "mlp_tall.weight"), (1, "mlp_tall.weight"), (1, "norm.weight"))
]
# Who skips: DeepSpeed calls no step() where it has looked at the gradients itself.
OURS = {"fp32": {0: 1, 1: 0, 2: 0, 3: 0}, "bf16": {0: 0, 1: 0, 2: 0, 3: 0}, "bf16, unchecked": {0: 0, 1: 1, 2: 1, 3: 0}}
PRECISION = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "bf16, unchecked": {"bf16": {"enabled": True, "check_grad_overflow": False}},
}


@pytest.mark.parametrize(
    ("precision", "stage", "rank", "where"),
    slow_but(
        [(precision, *case) for precision in PRECISION for case in CASES],
        [
            *(("fp32", stage, 1, "mlp_tall.weight") for stage in range(4)),
            *(("bf16", stage, 1, "norm.weight") for stage in range(4)),
            *(("bf16, unchecked", stage, 1, "norm.weight") for stage in (1, 2)),
            ("bf16, unchecked", 3, None, "mlp_tall.weight"),
        ],
    ),
)
def test_infinite_gradient_changes_nothing(ranks, precision, stage, rank, where):
    results = ranks(2).run(POISON, stage, "GaLoreAdamW", where, rank, **PRECISION[precision])
    for changed, still, skipped in results:
        assert changed == []
        assert still == []  # and the next update moves every master
        assert skipped == OURS[precision][stage]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("optimizer", REFERENCES)
def test_every_rule_survives_a_gradient_that_is_no_number(ranks, optimizer, stage):
    for changed, still, _ in ranks(3).run(POISON, stage, optimizer, "mlp_tall.weight", 2, float("nan")):
        assert changed == []
        assert still == [] or REFERENCES[optimizer].rests  # a rank may hold nothing of what is active


def test_in_the_last_group_and_without_clipping(ranks):
    """DeepSpeed steps group by group: the first must not move before the last has been looked at."""
    results = ranks(2).run(
        POISON,
        2,
        "GaLoreAdamW",
        "norm.weight",
        0,
        gradient_clipping=0.0,
        zero_optimization={"stage": 2, "compute_grad_norm": False},
    )
    assert [(changed, still, skipped) for changed, still, skipped in results] == [([], [], 1)] * 2
