"""What megalr.hosts reads of DeepSpeed is there, and answers as megalr needs it.

A new release of DeepSpeed is admitted in setup.py once this passes with it. A failure names the attribute, the class
that has lost it, and the file of megalr/hosts/ that reads it.
"""

from __future__ import annotations

import contextlib
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalr.hosts import (
    autotp,
    deepspeed,
    deepspeed_gradients,
    deepspeed_monitors,
    deepspeed_pipeline,
    partial_gradients,
    tensor_parallel,
    zero_layouts,
)
from tests.deepspeed.harness import run_ranks
from tests.structure import tables

pytestmark = pytest.mark.distributed

PARTS = {zero_layouts.FLAT, zero_layouts.RECORD}
STAGES_1_AND_2 = {deepspeed.STAGES_1_AND_2, deepspeed.ACCUMULATING, *PARTS}
STAGE_3 = {deepspeed.STAGE_3, zero_layouts.CUT, zero_layouts.OFFLOAD}
# Whose attributes each engine shows.
ZERO: dict[str, set[str]] = {
    "stage 0": set(),
    "stage 1": STAGES_1_AND_2,
    "stage 2": STAGES_1_AND_2,
    "stage 3": STAGE_3,
    "stage 3, hpZ": STAGE_3,
    "stage 2, on the CPU": {*STAGES_1_AND_2, deepspeed_gradients.STAGE_2_ON_CPU},
    "stage 3, on the CPU": {*STAGE_3, deepspeed_gradients.STAGE_3_ON_CPU},
    "stage 0, bf16": {deepspeed.UNFUSED, "deepspeed.runtime.fp16.loss_scaler.LossScaleConfig"},
    "stage 1, bf16": {deepspeed.BF16, *PARTS},
    "stage 2, bf16": STAGES_1_AND_2,
}
EVERY = {deepspeed.ENGINE, "the configuration of an engine", "deepspeed.monitor.monitor.MonitorMaster"}
MPU = "the mpu that DeepSpeed was given"
AUTOTP = {tensor_parallel.CUT, tensor_parallel.MARK, tensor_parallel.CONVERSION, tensor_parallel.REPLACED, MPU}
PIPELINE = {deepspeed_pipeline.MODULE, deepspeed_pipeline.TOPOLOGY, MPU}
PIPELINE |= {deepspeed_pipeline.GRID, deepspeed_pipeline.TIED}
TRAINED = 2 * (6 * 6 + 6)


def kinds() -> set[str]:
    """Everybody whose attributes hosts/ reads."""
    return {kind for table in tables().values() for kind in table}


def without_an_engine() -> dict[str, Any]:
    """Those that can be looked at without an engine: modules, classes, what functions of DeepSpeed make."""
    from deepspeed.module_inject.autotp_config import AutoTPConfig, TPLayerSpec
    from deepspeed.moe.experts import Experts
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.csv_monitor import csvMonitor
    from deepspeed.monitor.tensorboard import TensorBoardMonitor
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    found: dict[str, Any] = {}
    for kind in kinds():
        with contextlib.suppress(ImportError):
            found[kind] = importlib.import_module(kind)
    found["deepspeed.zero"] = found["deepspeed"].zero
    config = importlib.import_module(autotp.CONFIG).get_tensor_parallel_config({"tensor_parallel": {"autotp_size": 2}})
    cut = torch.nn.Parameter(torch.zeros(2, 2))
    tensor_parallel.mark_cut(cut, 0)
    return found | {
        f"{autotp.CONFIG}.TPConfig": config,
        f"{autotp.PARTITION}.AutoTPConfig": AutoTPConfig(layer_specs=[]),
        f"{autotp.PARTITION}.PartitionType": importlib.import_module(autotp.PARTITION).PartitionType,
        autotp.SPEC: TPLayerSpec(patterns=[".*"]),
        autotp.CONVERTER: importlib.import_module(autotp.CONVERTER.rpartition(".")[0]).TPPlanConverter,
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": DynamicLossScaler(
            init_scale=2.0, scale_window=10, min_scale=1.0, delayed_shift=1, consecutive_hysteresis=False
        ),
        deepspeed_monitors.CSV: csvMonitor(get_monitor_config({}).csv_monitor),
        deepspeed_monitors.TENSORBOARD: TensorBoardMonitor(get_monitor_config({}).tensorboard),
        "a parameter of an expert": next(Experts(torch.nn.Linear(2, 2)).parameters()),
        tensor_parallel.MEGATRON: cut,
        partial_gradients.SUMMED: summed_by_autotp().weight,
    }


def summed_by_autotp() -> torch.nn.Linear:
    """A layer of whose weight AutoTP sums the gradient."""
    from deepspeed.module_inject.auto_tp import AutoTP
    from deepspeed.module_inject.autotp_config import AutoTPConfig, PartitionType, TPLayerSpec

    spec = TPLayerSpec(patterns=["weight$"], partition_type=PartitionType.SKIP, grad_allreduce=True)
    asked = {"partition_config": AutoTPConfig(layer_specs=[spec]), "mp_group": object(), "mp_size": 2}
    layer = torch.nn.Linear(2, 2)
    AutoTP.register_replicated_grad_hooks(SimpleNamespace(**asked, _get_model_type=lambda: None), layer)
    return layer


def test_modules_and_classes_have_what_is_read():
    from tests.deepspeed.contract import missing

    assert [line for kind, thing in without_an_engine().items() for line in missing(kind, thing)] == []


def test_everybody_is_looked_at():
    met = {*EVERY, "a schedule of DeepSpeed's", *AUTOTP, *PIPELINE}.union(*ZERO.values(), without_an_engine())
    assert sorted(kinds() - met) == []


def test_marks_mean_what_megalr_takes_them_for():
    from deepspeed.moe.experts import Experts
    from deepspeed.runtime.utils import is_model_parallel_parameter

    part, copy = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2, 2))
    tensor_parallel.mark_cut(part, 0)
    assert is_model_parallel_parameter(part) and not is_model_parallel_parameter(copy)
    assert not any(deepspeed.DeepSpeed().is_replicated(p) for p in Experts(torch.nn.Linear(2, 2)).parameters())
    assert not hasattr(summed_by_autotp().bias, partial_gradients.REGISTERED)


@pytest.mark.parametrize("name", ZERO)
def test_an_engine_has_what_is_read(ranks, name, tmp_path):
    call = ("tests.deepspeed.contract:zero", name, str(tmp_path))
    # DeepSpeed keeps hpZ's groups for the life of a process, and every later engine in it takes them over.
    answers = run_ranks(call[0], 2, *call[1:]) if "hpZ" in name else ranks(2).run(*call)
    assert answers[0].missing == answers[1].missing == []
    expected = {*EVERY, "a schedule of DeepSpeed's", *ZERO[name]}
    assert expected <= answers[0].met | answers[1].met
    stage, bf16 = int(name[len("stage ")]), "bf16" in name
    dtype = torch.bfloat16 if bf16 else torch.float32
    for facts in (answer.facts for answer in answers):
        assert facts["class"] == "DeepSpeedEngine" and facts["optimizer"] == "MegalrOptimizer"
        assert facts["stage"] == stage and facts["groups"] == (2, 1)
        assert facts["dtypes"] == (dtype, torch.float32 if bf16 and stage else dtype)
        assert facts["threshold"] == (0 if stage == 3 else 100_000)
        assert facts["trained"] == facts["in model"] == TRAINED
        assert 0 < facts["rate"] <= 1e-3
        assert facts["before"] == ((0, 2), False)
        assert facts["between"] == ((1, 2), True)
        assert facts["after"] == ((0, 2), False)
        assert facts["counters"] == {"global_steps": 1, "global_samples": 8, "skipped_steps": 0}
        assert facts["loss scale"] == {}
        if name == "stage 0":  # in fp32, where torch clips
            assert facts["gradient norm"] is None
        else:
            assert facts["gradient norm"] > 0
        assert all(held == whole for held, whole in facts["held"].values())
        assert facts["written"] == (False, True)
        assert facts["loaded"] == (False, True)
        assert facts["published"]
        assert facts["files"][0] > 0 and facts["files"][1] == []
        assert facts["set counters"] == ({"global_steps": 5, "global_samples": 3, "skipped_steps": 1}, (0, 2))
    (written,) = answers[0].facts["report"]
    assert written.splitlines()[-1] == "8,7.0"


def test_tensor_parallel_layers_have_what_is_read(ranks, tmp_path):
    for answer in ranks(2).run("tests.deepspeed.contract:autotp", str(tmp_path)):
        assert answer.missing == []
        assert {*EVERY, *AUTOTP, deepspeed.STAGES_1_AND_2} <= answer.met
        assert answer.facts["groups"] == (1, 2)
        assert answer.facts["cuts"] == {"q_proj": 0, "k_proj": 0, "o_proj": 1}
        assert answer.facts["classes"] == ("ColumnParallelProjected", "LinearLayer")


def test_a_pipeline_has_what_is_read(ranks, tmp_path):
    for answer in ranks(2).run("tests.deepspeed.contract:pipeline", str(tmp_path)):
        assert answer.missing == []
        assert {*EVERY, *PIPELINE} <= answer.met
        assert answer.facts["class"] == "DeepSpeedPipeline" and answer.facts["groups"] == (1, 1)
        assert answer.facts["trained"] == answer.facts["in model"]
        assert answer.facts["counters"]["global_steps"] == 1 and answer.facts["ends update"]
        assert answer.facts["files"][0] > 0 and answer.facts["files"][1] == []


def test_a_line_for_what_is_missing():
    from tests.deepspeed.contract import missing

    class Engine:
        """Without anything."""

    lines = missing(deepspeed.ENGINE, Engine())
    assert any("has no micro_steps (" in line and "which megalr/hosts/deepspeed.py reads" in line for line in lines)
