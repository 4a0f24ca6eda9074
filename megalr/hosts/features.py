"""Every key of DeepSpeed's JSON, and whether it works with megalr.

The table decides: a key that it has as refused is refused, and a key that it lacks is unknown. A key that works names
the test that shows it. ``megalr/features.py`` makes docs/deepspeed.md of it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from megalr.errors import UserError
from megalr.schema import Json, nearest, resembles, slip

logger = logging.getLogger(__name__)

VERSION = "0.19.8"
COMMENTS = ("_", "#", "//", "comment")  # how keys begin that nobody reads, and that stay
OURS = ("megalr",)
DEPRECATED = "stage3_"  # what DeepSpeed takes with and without
OPEN = ("hybrid_engine", "expert_parallel", "compile")  # the table has one key of each; DeepSpeed knows the others
ALIKE, ALIKE_SECTION = 0.8, 0.7  # how similar an unknown key may be to a known one, as schema.resembles measures it
UNSET = (None, False, "auto")  # values with which a feature is not in use

TRAINS = "tests/deepspeed/test_features.py::test_trains_as_one_plain_process"
CONTRACT = "tests/deepspeed/test_contract.py::test_an_engine_has_what_is_read"
WAYS = "tests/deepspeed/test_ways_in.py::test_the_three_ways_train_the_same_weights"
OFFLOADED = "tests/deepspeed/test_ways_in.py::test_trainer_with_the_optimizer_on_the_cpu_keeps_the_rule"
RULES = "tests/deepspeed/test_rules.py::test_equals_one_plain_process"
SCHEDULED = "tests/deepspeed/test_ways_in.py::test_trainer_with_a_schedule_of_deepspeed"
MONITORS = "tests/unit/test_training_monitors.py::test_all_monitors_get_the_same_names_and_numbers"
UNCHECKED = "tests/deepspeed/test_guards.py::test_a_bad_update_never_was"
TENSOR = "tests/deepspeed/test_tensor_parallel.py::test_equals_one_process"

GPU = "needs a GPU"
LAUNCHED = "used only by DeepSpeed's command line"
NVME = "used only for NVMe, which is refused"
ON_NVME = 'megalr cannot update what lies there: write "cpu" or leave it out'
ADAM_ONLY = "DeepSpeed does this for its own Adam on the CPU alone, and megalr's moments and masters are fp32"


@dataclass(frozen=True)
class Feature:
    """Keys of the JSON that belong together.

    Attributes:
        keys: their paths, with dots between.
        status: whether they work with megalr.
        says: of what is refused, why, and what to write; otherwise what to know.
        test: of what works, the test that shows it.
        off: values with which what is refused is not in use.
        example: of what is refused, a value that is.
    """

    keys: tuple[str, ...]
    status: Literal["works", "refused", "untested"]
    says: str = ""
    test: str = ""
    off: tuple[Any, ...] = UNSET
    example: Any = True


def works(keys: str, test: str, says: str = "") -> Feature:
    """Keys, with spaces between, that a test shows."""
    return Feature(tuple(keys.split()), "works", says, test)


def untested(keys: str, says: str = "") -> Feature:
    """Keys that nothing is known against."""
    return Feature(tuple(keys.split()), "untested", says)


def refused(keys: str, says: str, example: Any = True, off: tuple[Any, ...] = UNSET) -> Feature:
    """Keys that end a run before anything is built, and any with which they do not."""
    return Feature(tuple(keys.split()), "refused", says, off=off, example=example)


def within(section: str, *features: Feature) -> Iterator[Feature]:
    """Features whose keys are those of a section."""
    for each in features:
        keys = tuple(f"{section}.{key}" for key in each.keys)
        yield Feature(keys, each.status, each.says, each.test, each.off, each.example)


FEATURES: tuple[Feature, ...] = (
    works("train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps", TRAINS),
    works("optimizer", WAYS),
    works("scheduler", SCHEDULED),
    works("zero_allow_untested_optimizer zero_force_ds_cpu_optimizer", OFFLOADED),
    works("gradient_clipping", RULES, "1.0 unless it is given"),
    works("managed_gradient_accumulation", TRAINS, "false: each `engine.step()` ends an update"),
    works("gradient_allreduce_op", TRAINS, '"sum": at stages 0 to 2'),
    works("prescale_gradients gradient_predivide_factor", TRAINS, "at stage 2 with `reduce_scatter` false; not at 3"),
    works("communication_data_type", TRAINS),
    works("disable_allgather", TRAINS, "without effect in DeepSpeed"),
    works("dataloader_drop_last steps_per_print dump_state log_level disable_python_gc vocabulary_size", TRAINS),
    works("wall_clock_breakdown memory_breakdown timers", TRAINS),
    works("tensor_parallel", TENSOR),
    works("zero_optimization", TRAINS),
    *within(
        "zero_optimization",
        works("stage", TRAINS),
        works("contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce", TRAINS),
        works("allgather_partitions allgather_bucket_size", TRAINS),
        works("overlap_comm", TRAINS, "at stage 1 every backward pass of an update has to reach the same parameters"),
        works("compute_grad_norm", TRAINS, "false: with `gradient_clipping` 0 alone"),
        works("sub_group_size round_robin_gradients parameter_alignment ignore_unused_parameters", TRAINS),
        works("offload_param offload_optimizer cpu_offload", TRAINS),
        works("stage3_prefetch_bucket_size stage3_max_live_parameters stage3_max_reuse_distance", TRAINS),
        works("stage3_param_persistence_threshold stage3_model_persistence_threshold", TRAINS),
        works("stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential", TRAINS),
        works("memory_efficient_linear override_module_apply leaf_module", TRAINS),
        works("enable_sanity_checks log_trace_cache_warnings save_muon_momentum_buffer_in_memory", TRAINS),
        works("zero_hpz_partition_size", CONTRACT, "the copies follow frozen weights through merges and loads"),
        untested(
            "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save",
            "used only to save a model",
        ),
        untested("load_from_fp32_weights pipeline_loading_checkpoint", "used only by `engine.load_checkpoint`"),
        untested("stage3_module_granularity_threshold", "fails in DeepSpeed on a CPU"),
        untested("cpu_offload_param cpu_offload_use_pin_memory", "old names"),
        untested("zero_quantized_gradients", GPU),
        refused(
            "zero_quantized_weights zero_quantized_nontrainable_weights",
            "merges and exports would take the quantized copies for the weights: remove it",
        ),
        refused("zenflow", "ZenFlow updates some parameters with an Adam of its own: remove it", {"topk_ratio": 0.1}),
        refused(
            "elastic_checkpoint",
            "its checkpoints leave out what is not Adam's: remove it; megalr.save_checkpoint and "
            "megalr.load_checkpoint go to any number of processes",
        ),
        refused("legacy_stage1", "DeepSpeed has removed it: remove the line"),
        refused(
            "mics_shard_size mics_hierarchical_params_gather zeropp_loco_param",
            "DeepSpeed has removed it: remove the line",
            1,
            off=(),
        ),
    ),
    *within(
        "zero_optimization.offload_optimizer",
        works("device", TRAINS),
        refused("device", ON_NVME, "nvme", ("cpu", "none", *UNSET)),
        refused("ratio", f"{ADAM_ONLY}: write 1.0, or remove it", 0.3, (*UNSET, 1)),
        refused("super_offload", f"{ADAM_ONLY}: remove it"),
        untested("pin_memory", GPU),
        untested("nvme_path buffer_count pipeline_read pipeline_write fast_init", NVME),
        untested("cpuadam_cores_perc", "used only by SuperOffload, which is refused"),
    ),
    *within(
        "zero_optimization.offload_param",
        works("device", TRAINS),
        refused("device", ON_NVME, "nvme", ("cpu", "none", *UNSET)),
        untested("pin_memory", GPU),
        untested("nvme_path buffer_count buffer_size max_in_cpu", NVME),
    ),
    works("bf16", TRAINS),
    *within(
        "bf16",
        works("enabled immediate_grad_update", TRAINS),
        works("check_grad_overflow", UNCHECKED, "megalr looks at gradients itself"),
        refused("bf16_master_weights_and_grads bf16_optimizer_states", f"{ADAM_ONLY}: remove it"),
    ),
    refused("bfloat16", 'an old name: write "bf16"', {"enabled": True}, (*UNSET, {"enabled": False})),
    untested("fp16", GPU),
    *within(
        "fp16",
        untested("enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis", GPU),
        untested("consecutive_hysteresis min_loss_scale", GPU),
        refused("fp16_master_weights_and_grads", f"{ADAM_ONLY}: remove it"),
    ),
    works("torch_autocast", TRAINS),
    *within(
        "torch_autocast",
        works("enabled dtype", TRAINS, "weights and masters stay fp32"),
        untested("lower_precision_safe_modules"),
    ),
    works("data_types", TRAINS),
    *within(
        "data_types",
        works("grad_accum_dtype buffer_dtype keep_in_fp32_modules", TRAINS),
        untested("param_dtype", "DeepSpeed takes what bf16 or fp16 says and nothing else"),
    ),
    works("activation_checkpointing", TRAINS),
    *within(
        "activation_checkpointing",
        works("partition_activations", TRAINS, "in use where the model calls `deepspeed.checkpointing`"),
        untested("number_checkpoints contiguous_memory_optimization synchronize_checkpoint_boundary"),
        untested("profile cpu_checkpointing"),
    ),
    works("checkpoint", TRAINS),
    *within(
        "checkpoint",
        works("tag_validation", TRAINS),
        refused(
            "load_universal",
            "universal checkpoints hold what is Adam's alone: remove it; megalr.save_checkpoint and "
            "megalr.load_checkpoint go to any ZeRO stage and number of processes",
        ),
        untested("use_node_local_storage parallel_write checkpoint_serialization writer"),
    ),
    works("csv_monitor", CONTRACT),
    works("tensorboard wandb comet", MONITORS, "the test replaces W&B and Comet by stand-ins"),
    works("flops_profiler", TRAINS),
    *within(
        "flops_profiler",
        works("enabled profile_step", TRAINS),
        untested("recompute_fwd_factor module_depth top_modules detailed output_file"),
    ),
    works("comms_logger", TRAINS),
    *within("comms_logger", works("enabled", TRAINS), untested("prof_all prof_ops verbose debug")),
    works("aio", TRAINS, NVME),
    *within(
        "aio",
        works("block_size", TRAINS),
        untested("queue_depth intra_op_parallelism single_submit overlap_events use_gds", NVME),
        untested("thread_count", "an old name, which Lightning writes; used only for NVMe, which is refused"),
    ),
    refused("hybrid_engine.enabled", "it puts layers for inference into the model: remove it"),
    untested("hybrid_engine"),
    refused(
        "expert_parallel.enabled", "ranks would have experts of their own, which megalr takes for copies: remove it"
    ),
    untested("expert_parallel use_data_before_expert_parallelism"),
    refused(
        "compile.offload_opt_states", "it moves the moments of Adam, as DeepSpeed keeps them, to the CPU: remove it"
    ),
    untested("compile", GPU),
    untested("data_efficiency", "works on batches and layers, which megalr does not touch"),
    untested("pipeline", "used only by pipeline engines"),
    untested("sequence_parallel_size data_parallel_size seq_parallel_communication_data_type", "used only by Ulysses"),
    untested("autotuning", LAUNCHED),
    untested("weight_quantization inference", "used only for inference"),
    untested("datastates_ckpt", "writes DeepSpeed's own checkpoints"),
    untested("msamp", "accelerate's key for MS-AMP"),
    refused(
        "nebula compression_training amp quantize_training sparse_gradients eigenvalue sparse_attention elasticity "
        "graph_harvesting curriculum_learning progressive_layer_drop",
        "DeepSpeed has removed it: remove the section",
        {},
        off=(),
    ),
)


def refuse_features(content: Json) -> None:
    """Refuse by name what megalr cannot do, and unknown keys.

    Args:
        content: the whole JSON.

    Raises:
        UserError: names the key, its value, and what to write.
    """
    for feature in FEATURES:
        for key in feature.keys if feature.status == "refused" else ():
            is_there, value = _at(content, key)
            if is_there and value not in feature.off:
                written = json.dumps(value, default=str)
                raise UserError(f"{key} is {written[:60]}, which megalr refuses: {feature.says}")
    refuse_unknown(content)


def refuse_unknown(content: Json) -> None:
    """Refuse keys that DeepSpeed does not know, and would leave out without a word.

    Beside the sections, where training programs of others keep keys of their own, a key is refused if it resembles a
    known one or asks for something to be enabled. Of others a warning is given, once.

    Args:
        content: the whole JSON.

    Raises:
        UserError: names the key, and the one that may be meant.
    """
    for section in ("", *sections()):
        given = content if not section else _at(content, section)[1]
        known = children(section)
        unknown = [key for key in given if key not in known] if isinstance(given, Mapping) else []
        for key in (key for key in unknown if not str(key).startswith(COMMENTS)):
            if section or len(unknown) == len(given) or _may_be_meant(str(key), given[key], known):
                where = section or "the JSON"
                hint = nearest(str(key), known).partition(" valid: ")[0].rstrip(";")
                raise UserError(f'{where} has no key "{key}"{hint} (docs/deepspeed.md has all of DeepSpeed {VERSION})')
            _mention(str(key))


def sections() -> list[str]:
    """The paths of objects whose keys the table has."""
    paths = {key.rpartition(".")[0]: None for feature in FEATURES for key in feature.keys}
    return [path for path in paths if path not in ("", *OPEN)]


def children(section: str) -> dict[str, None]:
    """The keys of a section, "" for those of the JSON, with and without the prefix that DeepSpeed takes either way."""
    dotted = f"{section}." if section else ""
    paths = [key for feature in FEATURES for key in feature.keys]
    names = [path[len(dotted) :] for path in paths if path.startswith(dotted) and path != section]
    own = dict.fromkeys(name.partition(".")[0] for name in names)
    return own | {name.removeprefix(DEPRECATED): None for name in own} | dict.fromkeys(() if section else OURS)


def _may_be_meant(key: str, value: Any, known: Iterable[str]) -> bool:
    """Whether an unknown key is a known one in other letters, or a section that is to do something."""
    if slip(key, known) or (isinstance(value, Mapping) and value.get("enabled") not in UNSET):
        return True
    return resembles(key, known, ALIKE_SECTION if isinstance(value, Mapping) else ALIKE)


@cache
def _mention(key: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        logger.warning('the JSON\'s "%s" is a key of neither megalr nor DeepSpeed %s: nobody reads it', key, VERSION)


def _at(content: Json, path: str) -> tuple[bool, Any]:
    """Whether there is something at a dotted path, and what."""
    value: Any = content
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return False, None
        value = value[key]
    return True, value
