"""A gradient that is not finite: the update is skipped on all ranks, and nothing has changed by it."""

from __future__ import annotations

import itertools

import pytest

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


@pytest.mark.parametrize("precision", PRECISION)
@pytest.mark.parametrize(("stage", "rank", "where"), CASES)
def test_infinite_gradient_changes_nothing(ranks, stage, rank, where, precision):
    results = ranks(2).run(POISON, stage, "GaLoreAdamW", where, rank, **PRECISION[precision])
    for changed, still, skipped in results:
        assert changed == []
        assert still == []  # and the next update moves every master
        assert skipped == OURS[precision][stage]


# Each rule whose state is of a form of its own, at one stage; at the others in the slow selection.
FORMS = [
    "AdamW",
    "LDAdamW",
    "OnlineSubspaceDescent",
    "Muon",
    "StableSPAM",
    "SPAM",
    "SCALE",
    "AdamMini",
    "CAME",
    "FRUGAL",
    "BAdam",
    "QGaLoreAdamW",
    "AdaRankGrad",
]


@pytest.mark.parametrize(
    ("optimizer", "stage"),
    [
        *(("FiraAdamW", stage) for stage in (0, 2, 3)),
        *(
            pytest.param(rule, stage, marks=() if stage == (0, 2, 3)[i % 3] else pytest.mark.slow)
            for (i, rule), stage in itertools.product(enumerate(FORMS), (0, 2, 3))
        ),
    ],
)
def test_every_rule_survives_a_gradient_that_is_no_number(ranks, optimizer, stage):
    for changed, still, _ in ranks(3).run(POISON, stage, optimizer, "mlp_tall.weight", 2, float("nan")):
        assert changed == []
        assert still == [] or optimizer == "BAdam"  # a rank may hold nothing of the active block


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
