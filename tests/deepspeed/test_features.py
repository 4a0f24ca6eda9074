"""Keys of DeepSpeed's JSON and methods of its engine that work, against plain PyTorch, and those that are refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from tests.covering import slow_but
from tests.deepspeed.harness import RankPool
from tests.deepspeed.test_training import reference_weights, relative_errors
from tests.deepspeed.training import ADAMW
from tests.equality import CLIPPING

pytestmark = pytest.mark.distributed
WORKER = "tests.deepspeed.featuring"
EXACT, ROUNDED = 1e-4, 0.1  # largest relative error of a weight; where bf16 rounds


def zero(stage: int, **section: Any) -> dict[str, Any]:
    """The changes of a configuration."""
    return {"zero_optimization": {"stage": stage, **section}}


def bf16(**changes: Any) -> dict[str, Any]:
    """The same, computing in bf16."""
    return {"bf16": {"enabled": True}, **changes}


# The sum of both ranks' gradients is twice their mean, which AdamW with twice the epsilon does not notice.
SUMMED = {
    "gradient_allreduce_op": "sum",
    "gradient_clipping": 2 * CLIPPING,
    "optimizer": {"type": "AdamW", "params": {**ADAMW, "eps": 2e-8}},
}
# What leaves the process as it was: stage, accumulation, changes.
KEYS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "no reduce_scatter, stage 1": (1, 1, zero(1, reduce_scatter=False)),
    "no reduce_scatter, stage 3": (3, 4, zero(3, reduce_scatter=False)),
    "prescaled, stage 0": (0, 1, {"prescale_gradients": True}),
    "prescaled, stage 2": (2, 1, {"prescale_gradients": True, **zero(2, reduce_scatter=False)}),
    "predivided, stage 0": (0, 4, {"gradient_predivide_factor": 3.0}),
    "predivided, stage 1": (1, 1, {"gradient_predivide_factor": 2.0}),
    "predivided, stage 2": (2, 4, {"gradient_predivide_factor": 3.0, **zero(2, reduce_scatter=False)}),
    "summed, stage 0": (0, 1, SUMMED),
    "summed, stage 1": (1, 4, SUMMED),
    "summed, stage 2": (2, 4, SUMMED),
    "sent in bf16, stage 1": (1, 1, {"communication_data_type": "bf16"}),
    "sent in bf16, stage 3": (3, 1, {"communication_data_type": "bf16"}),
    "the caller's updates, stage 0": (0, 4, {"managed_gradient_accumulation": False}),
    "the caller's updates, stage 2": (2, 4, {"managed_gradient_accumulation": False}),
    "the caller's updates, stage 3": (3, 4, {"managed_gradient_accumulation": False}),
    "rank by rank": (2, 1, zero(2, use_multi_rank_bucket_allreduce=False, allgather_partitions=False)),
    "small gathers": (1, 4, zero(1, allgather_bucket_size=100, ignore_unused_parameters=False)),
    "overlapped, stage 1": (1, 4, zero(1, overlap_comm=True)),
    "overlapped, stage 2": (2, 4, zero(2, overlap_comm=True)),
    "not overlapped, stage 3": (3, 4, zero(3, overlap_comm=False, contiguous_gradients=False)),
    "without a norm": (2, 1, {"gradient_clipping": 0, **zero(2, compute_grad_norm=False)}),
    "round robin, aligned": (2, 4, zero(2, round_robin_gradients=True, parameter_alignment=True)),
    "sub-groups": (3, 4, zero(3, sub_group_size=150, save_muon_momentum_buffer_in_memory=True)),
    "cpu_offload": (2, 1, zero(2, cpu_offload=True)),
    "all on the CPU": (3, 4, zero(3, offload_param={"device": "cpu"}, offload_optimizer={"device": "cpu"})),
    "no prefetch": (
        3,
        1,
        zero(3, stage3_prefetch_bucket_size=0, stage3_max_live_parameters=0, stage3_max_reuse_distance=0),
    ),
    "some persistent": (
        3,
        4,
        zero(3, stage3_param_persistence_threshold=1000, stage3_model_persistence_threshold=5000),
    ),
    "all-reduced parameters": (3, 4, zero(3, stage3_use_all_reduce_for_fetch_params=True)),
    "one parameter after the other": (3, 1, zero(3, stage3_allgather_sequential=True)),
    "leaves": (3, 4, zero(3, leaf_module={"classes": ["LlamaMLP"]}, memory_efficient_linear=False)),
    "modules as they are": (
        3,
        4,
        zero(3, override_module_apply=False, enable_sanity_checks=True, log_trace_cache_warnings=True),
    ),
    "bf16, fp32 gradients": (1, 4, bf16(data_types={"grad_accum_dtype": "fp32"})),
    "bf16, at once": (
        1,
        4,
        {"bf16": {"enabled": True, "immediate_grad_update": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    ),
    "bf16, sent in fp32": (3, 1, bf16(communication_data_type="fp32")),
    "bf16, buffers in fp32": (2, 1, bf16(data_types={"buffer_dtype": "fp32", "keep_in_fp32_modules": []})),
}
# What DeepSpeed keeps for the life of a process.
LASTING: dict[str, tuple[int, int, dict[str, Any]]] = {
    "autocast, stage 0": (0, 1, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
    "autocast, stage 2": (2, 4, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
    "autocast, stage 3": (3, 1, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
    "what is measured": (
        2,
        4,
        {
            "wall_clock_breakdown": True,
            "memory_breakdown": True,
            "timers": {"throughput": {"enabled": True}},
            "flops_profiler": {"enabled": True, "profile_step": 2},
            "comms_logger": {"enabled": True},
        },
    ),
    "what changes nothing": (
        2,
        1,
        {
            "dump_state": True,
            "log_level": "warning",
            "disable_python_gc": True,
            "disable_allgather": True,
            "vocabulary_size": 61,
            "dataloader_drop_last": True,
            "aio": {"block_size": 1048576},
            "checkpoint": {"tag_validation": "Fail"},
            "activation_checkpointing": {"partition_activations": True},
        },
    ),
}
BASE = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "steps_per_print",
    "zero_optimization.stage",
    "zero_optimization.reduce_bucket_size",
)
DAILY = ["prescaled, stage 2", "summed, stage 1", "the caller's updates, stage 2", "rank by rank", "bf16, at once"]


@pytest.fixture(scope="module")
def own_ranks() -> Iterator[RankPool]:
    """Two processes that nobody else uses."""
    with RankPool(2) as pool:
        yield pool


def check(pool: RankPool, stage: int, accumulation: int, changes: dict[str, Any]) -> None:
    got = pool.run(f"{WORKER}:train", stage, accumulation, changes)[0]
    errors = relative_errors(got, reference_weights())
    worst = max(errors, key=errors.get)
    assert errors[worst] < (ROUNDED if "bf" in str(changes) else EXACT), worst


@pytest.mark.parametrize("case", slow_but(KEYS, DAILY))
def test_trains_as_one_plain_process(ranks, case):
    check(ranks(2), *KEYS[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", LASTING)
def test_what_lasts_trains_as_one_plain_process(own_ranks, case):
    check(own_ranks, *LASTING[case])


# The experts of both ranks, by micro-batch.
DIFFERENT, UNEQUAL, SWAPPED = [[(0,), (1,)]], [[(0, 1), (0,)]], [[(0, 1), (1, 0)]]
BY_TURNS, IN_TURN = [[(0,), (1,)], [(1,), (0,)]], [[(0,), (0,)], [(1,), (1,)]]
NAMED = "ranks have used different parameters: mixture.experts.0.weight"
ORDER = "ranks have used parameters in another order"
SELDOM = "not every backward pass of an update has reached mixture.experts.0.weight"
# Stage, experts, more settings, how the run ends early.
ROUTES: dict[str, tuple[int, Any, dict[str, Any], str]] = {
    "different, stage 0": (0, DIFFERENT, {}, ""),
    "different, stage 1": (1, DIFFERENT, {}, ""),
    "more on one rank, stage 1": (1, UNEQUAL, {}, ""),
    "in another order, stage 1": (1, SWAPPED, {}, ""),
    "by turns, stage 1": (1, BY_TURNS, {}, ""),
    "on the CPU, stage 1": (1, UNEQUAL, {"offload_optimizer": {"device": "cpu"}}, ""),
    "bf16 and fp32, stage 1": (1, DIFFERENT, {"bf16": True}, ""),
    "different, overlapped, stage 1": (1, DIFFERENT, {"overlap_comm": True}, NAMED),
    "one after the other, overlapped, stage 1": (1, IN_TURN, {"overlap_comm": True}, SELDOM),
    "different, stage 2": (2, DIFFERENT, {}, NAMED),
    "in another order, stage 2": (2, SWAPPED, {}, ORDER),
    "by turns, stage 2": (2, BY_TURNS, {}, ORDER),
    "one after the other, stage 2": (2, IN_TURN, {}, ""),
    "different, stage 3": (3, DIFFERENT, {}, ""),
    "more on one rank, stage 3": (3, UNEQUAL, {}, ""),
    "by turns, stage 3": (3, BY_TURNS, {}, ""),
}
DAILY_ROUTES = [
    "more on one rank, stage 1",
    "by turns, stage 1",
    "one after the other, overlapped, stage 1",
    "different, stage 2",
    "in another order, stage 2",
    "one after the other, stage 2",
    "different, stage 3",
]


@pytest.mark.parametrize("case", slow_but(ROUTES, DAILY_ROUTES))
def test_ranks_that_use_different_parameters(ranks, case):
    stage, routes, options, words = ROUTES[case]
    results = ranks(2).run(f"{WORKER}:route", stage, routes, **options)
    check_answers(results, words, 1e-2 if "bf16" in options else 1e-6)


def check_answers(results, words, bound):
    """All ranks have raised what begins with the words, or, without any, trained what one process trains."""
    assert all(message.startswith(words) and bool(message) == bool(words) for _, message in results)
    assert words or results[0][0] < bound


# The second update leaves out an expert, or uses it in one of two passes only; all ranks the same.
ALL, WITHOUT, LAST, FIRST = (
    [[one, one], [two, two]] for one, two in [[(0, 1)] * 2, [(1,)] * 2, [(1,), (0, 1)], [(0, 1), (1,)]]
)
ON_CPU = {"offload_optimizer": {"device": "cpu"}}
LEFT_OUT: dict[str, tuple[int, Any, dict[str, Any], str]] = {
    f"{when}, {where}, stage {stage}": (stage, routes, options, SELDOM if refused else "")
    for when, routes in {"in no pass": WITHOUT, "in the last pass": LAST, "in the first pass": FIRST}.items()
    for where, options in {"on the device": {}, "on the CPU": ON_CPU}.items()
    for stage in (1, 2, 3)
    for refused in [(stage, where) == (2, "on the CPU") and when != "in no pass"]
}
DAILY_LEFT_OUT = [
    "in no pass, on the CPU, stage 2",
    "in the first pass, on the CPU, stage 2",
    "in the last pass, on the device, stage 3",
    "in no pass, on the device, stage 3",
    "in the first pass, on the CPU, stage 3",
]


@pytest.mark.parametrize("case", slow_but(LEFT_OUT, DAILY_LEFT_OUT))
def test_an_old_gradient_is_not_used_again(ranks, case):
    stage, routes, options, words = LEFT_OUT[case]
    results = ranks(2).run(f"{WORKER}:route", stage, ALL, routes, leaf_module={}, **options)
    check_answers(results, words, 1e-6)


@pytest.mark.parametrize("stage", slow_but((0, 1, 2, 3), [2, 3]))
def test_two_backward_passes_of_a_micro_batch(ranks, stage):
    refused = stage in (1, 2)
    for said in ranks(2).run(f"{WORKER}:twice", stage, 2):
        assert said.startswith("engine.backward was called twice" if refused else "1 update")
    assert ranks(2).run(f"{WORKER}:twice", stage, 1) == ["1 update"] * 2
    assert ranks(2).run(f"{WORKER}:twice", stage, 2, managed_gradient_accumulation=False) == ["1 update"] * 2


@pytest.mark.parametrize("stage", slow_but((0, 1, 2, 3), [1, 2, 3]))
def test_batches_of_another_size(ranks, stage, tmp_path):
    for error, messages in ranks(2).run(f"{WORKER}:resize", stage, str(tmp_path)):
        assert error is None or error < 1e-6
        for method in ("set_train_batch_size", "set_train_micro_batch_size", "load_checkpoint"):
            called = f"engine.{method} was called after"
            waits = (
                f"{called} 0 of 3 micro-batches of an update, and after a backward pass that waits for its step: call"
            )
            assert waits in messages and f"{called} 1 of 3 micro-batches of an update: call it between" in messages
        assert "has begun: 0 of its 3 micro-batches are made, and a backward pass waits for its step. Load" in messages
        assert "an update has begun: 1 of its 3 micro-batches are made. Load" in messages


HOW = {"the module": {"load_module_only": True}, "no states": {"load_optimizer_states": False}}


@pytest.mark.parametrize(
    ("stage", "dtype", "how"),
    slow_but(
        itertools.product((0, 1, 2, 3), ("fp32", "bf16"), HOW),
        [(0, "bf16", "no states"), (3, "fp32", "the module"), (3, "bf16", "no states")],
    ),
)
def test_weights_alone_are_loaded(ranks, stage, dtype, how, tmp_path):
    call = (f"{WORKER}:weights_alone", stage, dtype == "bf16", str(tmp_path), HOW[how])
    older, newer, stepped = ranks(2).run(*call)[0]
    rounding = {"fp32": 1e-7, "bf16": 4e-3}[dtype]
    assert older < rounding and stepped < rounding and newer > 0.1


@pytest.mark.parametrize("as_callable", slow_but((False, True), [False]))
def test_an_engine_with_another_json_is_refused(ranks, as_callable):
    changes = {"zero_optimization": {"elastic_checkpoint": True}}
    for words in ranks(2).run(f"{WORKER}:another_json", changes, as_callable=as_callable):
        assert words.startswith("zero_optimization.elastic_checkpoint is true, which megalr refuses: ")
