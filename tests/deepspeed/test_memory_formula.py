"""The memory formula equals what real DeepSpeed engines hold, byte for byte, on every rank."""

from __future__ import annotations

import pytest

from megalr.layers.registry import PARAMETRIZATIONS
from tests.deepspeed.measuring import Setting

pytestmark = pytest.mark.distributed
STAGES = (0, 1, 2, 3)
SETTINGS = [
    *(Setting(stage, "fp32", "fp32") for stage in STAGES),
    *(Setting(stage, "bf16", "bf16") for stage in STAGES),
    *(Setting(stage, "bf16", "fp32") for stage in STAGES[1:]),  # DeepSpeed has no such stage 0
]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_small_model(ranks, world):
    for rank, cases in enumerate(ranks(world).run("tests.deepspeed.measuring:small_model", SETTINGS)):
        assert list(cases) == SETTINGS
        for setting, counts in cases.items():
            assert counts.measured == counts.formula == counts.of_engine, f"rank {rank}, {setting}"


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_megalr_keeps_what_adamw_keeps(ranks, world, stage):
    for measured, computed in ranks(world).run("tests.deepspeed.measuring:with_megalr", stage):
        assert measured == computed


@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 2, 3])
def test_what_factorized_layers_keep_is_counted(ranks, stage, dtype):
    ours = {name for name, kind in PARAMETRIZATIONS.items() if kind.__module__.startswith("megalr.")}
    for kind in sorted(ours - {"full", "low_rank", "projected"}):  # these have tests of their own
        for measured, computed in ranks(2).run("tests.deepspeed.measuring:with_megalr", stage, kind, dtype):
            assert measured == computed, kind


# Each so that every layer is merged, or switched, in the first update.
MERGING = {
    "relora": {"merge_every": 1, "restart_warmup_steps": 0},
    "switchlora": {"switch_interval": 2, "frozen_steps": 1},
    "projected": {"update_proj_gap": 1, "stagger": False},
}


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("kind", MERGING)
def test_remainders_of_merged_weights_are_counted(ranks, kind, stage):
    for counts in ranks(3).run("tests.deepspeed.measuring:with_remainders", stage, kind, **MERGING[kind]):
        assert counts.measured == counts.formula == counts.of_engine


def test_60m_low_rank_at_stage_2(ranks):
    for counts in ranks(2).run("tests.deepspeed.measuring:sixty_million"):
        assert counts.measured == counts.formula == counts.of_engine
        # The 17 norms of 512 are a group of their own, and nothing needs padding.
        assert counts.measured.weights == 4 * 42_770_944
        assert counts.measured.masters + counts.measured.optimizer_state == 12 * 42_770_944 // 2
