"""How mature each feature is, by what evidence, as Markdown: ``python -m megalr.maturity > docs/maturity.md``.

The level of a rule or a parametrization follows from :data:`TRAINED` and from whether tensor parallelism cuts it; that
of anything else is written in :data:`FEATURES`, beside the tests that it rests on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megalr.formatting import markdown_table
from megalr.layers.base import Parametrization
from megalr.layers.registry import PARAMETRIZATIONS
from megalr.layers.tensor_parallel.cutting import types_that_are_cut
from megalr.rules.registry import RULES

Level = Literal["stable", "beta", "experimental"]
COLUMNS = ("feature", "level", "tests", "layouts", "CPU", "GPU")

# Methods that docs/benchmark.md has trained to a perplexity, as they are now. APOLLO is not among them: its limiter has
# been corrected since.
TRAINED = frozenset(
    ("AdamW", "FiraAdamW", "GaLoreAdamW", "Muon", "SCALE", "StableSPAM")
    + ("lora", "low_rank", "projected", "relora", "sltrain")
)
ALL = "stages 0-3, 1-4 processes"
GLOO = "gloo, fp32; bf16 spot checks"
SHARED = "2 and 4 tensor-parallel ranks"

HEAD = """# Maturity

This page says how well each feature is tested, and by which tests.

`python -m megalr.maturity > docs/maturity.md` writes this page from the list of methods and `megalr/maturity.py`.

Evidence decides the level of a feature, not its age:

- **stable**: tests cover every layout in its row (ZeRO stages, processes, tensor-parallel ranks). A method is stable if
  all of this holds:
  - After training, every weight equals that of a second, plain implementation, at ZeRO stages 0 to 3 on 1 to 4
    processes, and under tensor parallelism.
  - A resumed run equals an uninterrupted run.
  - The [benchmark](benchmark.md) has trained the method to a perplexity.
- **beta**: tests cover every layout in its row, but a part of that evidence is missing. The column "layouts" ends with
  the missing part.
- **experimental**: a real test needs a GPU, several machines, a queue or the network, which the tests do not have. A
  few features that have only one small test are experimental as well.

"Equals" means up to rounding in fp32. [Equivalence](equivalence.md) lists the relative errors of all weights. Without
tensor parallelism the largest is 2.6e-6 for rules, 3.2e-6 for projected layers, 1.0e-5 for low-rank factors and 2.5e-6
for other parametrizations. Under tensor parallelism it is 1.3e-5, and 1.8e-3 for Q-GaLore.

"GPU: not run" means that no test and no training has run on a GPU. This holds for every row, so all levels refer to
CPUs. "Emulated" means that the CUDA kernels compile, link and run in an emulation on the CPU. "gloo" is the CPU backend
of torch.distributed.

`make test` runs a selection of the layouts in each row, and `make test-all` runs all of them.
"""


@dataclass(frozen=True, kw_only=True)
class Feature:
    """A row: what is no rule and no parametrization.

    Attributes:
        part: the heading that it stands under.
        name: in words.
        level: see :data:`HEAD`.
        tests: paths below tests/, or of single tests in there.
        layouts: where the tests hold it, and for a beta feature what is missing.
        cpu, gpu: what it has run on there.
    """

    part: str
    name: str
    level: Level
    tests: tuple[str, ...]
    layouts: str
    cpu: str = "gloo"
    gpu: str = "not run"


def _feature(part: str, name: str, level: Level, tests: str, layouts: str, cpu: str = "gloo") -> Feature:
    return Feature(part=part, name=name, level=level, tests=tuple(tests.split()), layouts=layouts, cpu=cpu)


WAYS, TRAINING, LAYERS = "Ways in", "Engine and precision", "Events and activations"
CHECKPOINTS, RUNS, MACHINES = "Checkpoints and exports", "Runs and tools", "Machines and kernels"
FEATURES: tuple[Feature, ...] = (
    _feature(WAYS, "`megalr.initialize`", "stable", "deepspeed/test_ways_in.py", "stages 0-3, 2 processes", GLOO),
    _feature(
        WAYS,
        "`deepspeed.initialize` with `megalr.build_optimizer`",
        "stable",
        "deepspeed/test_ways_in.py",
        "stages 0-3, 2 processes; under tensor parallelism only rules",
        GLOO,
    ),
    _feature(
        WAYS,
        "transformers' Trainer",
        "beta",
        "deepspeed/test_ways_in.py",
        "stages 0-3, 2 processes; guards see only gradients",
    ),
    _feature(
        WAYS,
        "`PipelineModule`",
        "beta",
        "deepspeed/test_pipeline.py",
        "stages 0 and 1, 2 x 2 ranks, GaLore and Muon; parametrizations untested, no guards, no megalr checkpoints",
    ),
    _feature(
        WAYS,
        "`torch.compile`",
        "experimental",
        "deepspeed/test_checkpoint_jobs.py::test_compiled_and_plain_runs_go_on_from_each_other",
        "checkpoints between compiled and plain runs",
    ),
    _feature(TRAINING, "fp32", "stable", "world/test_rules.py deepspeed/test_rules.py", ALL),
    _feature(
        TRAINING,
        "bf16",
        "beta",
        "deepspeed/test_rules.py::test_bf16 deepspeed/test_pretraining.py::test_bf16_stays_close",
        "stages 0-3, at stage 1 also with fp32 accumulation; compared with fp32 runs, not with a reference",
    ),
    _feature(TRAINING, "fp16", "experimental", "", "none: it needs a GPU", "not run"),
    _feature(
        TRAINING,
        "gradient accumulation, clipping",
        "stable",
        "world/test_rules.py deepspeed/test_rules.py::test_clipping_acts_on_gradients_not_on_updates",
        ALL,
    ),
    _feature(
        TRAINING,
        "optimizer and parameters on the CPU (`offload_optimizer`, `offload_param`)",
        "beta",
        "deepspeed/test_features.py::test_trains_as_one_plain_process",
        "stages 1-3; on a CPU, where host and device have the same memory",
    ),
    _feature(
        TRAINING,
        "tensor parallelism by AutoTP",
        "beta",
        "deepspeed/test_tensor_parallel.py",
        f"stages 0-3, {SHARED}; only spot checks of accumulation and bf16",
    ),
    _feature(
        TRAINING,
        "tensor parallelism by `mpu`",
        "beta",
        "deepspeed/test_tensor_parallel.py::test_groups_of_the_users_own deepspeed/test_partial_gradients.py",
        "stages 0-3, 2 tensor-parallel ranks; not with Megatron-LM itself",
    ),
    _feature(
        TRAINING,
        '`"tp_update": "local"`',
        "experimental",
        "deepspeed/test_tensor_parallel.py::test_a_local_update_is_another_method_and_sends_nothing",
        "one layout",
    ),
    _feature(
        LAYERS, "refactorization", "stable", "deepspeed/test_training.py kernels/test_refactorize_op.py", ALL, GLOO
    ),
    _feature(
        LAYERS, "momentum reset", "stable", "deepspeed/test_training.py world/test_parametrizations.py", ALL, GLOO
    ),
    _feature(
        LAYERS,
        "`merge_rounding` other than `nearest`",
        "beta",
        "world/test_parametrizations.py::test_merges_into_bf16_stay_close_and_resume_bitwise",
        "stages 0-3; `remainder` not under tensor parallelism",
    ),
    _feature(
        LAYERS,
        "VeLoRA's compressed activations",
        "beta",
        "deepspeed/test_velora.py",
        f"{ALL}; not under tensor parallelism, not trained in the benchmark",
    ),
    _feature(
        LAYERS,
        "rules and layers of your own",
        "stable",
        "unit/test_plugins.py deepspeed/test_plugins.py world/test_cutting.py",
        "stages 0-3, 2 and 3 processes",
    ),
    _feature(
        LAYERS,
        "losses and gradients that are not finite: the update is skipped",
        "stable",
        "world/test_skipping.py deepspeed/test_guards.py",
        "stages 0-3, every rule",
        GLOO,
    ),
    _feature(LAYERS, "guard against spikes", "stable", "deepspeed/test_guards.py", "stages 0-3"),
    _feature(
        LAYERS,
        "comparison of replicas (`check_replicas_every`)",
        "beta",
        "deepspeed/test_guards.py::test_a_flipped_bit_is_named",
        "stages 0-3; on GPUs tensor-parallel copies may differ by rounding",
    ),
    _feature(
        LAYERS,
        "changes of the model are refused; `adopt_weights`",
        "stable",
        "deepspeed/test_modified_models.py world/test_modified_models.py",
        "stages 0-3",
        GLOO,
    ),
    _feature(
        CHECKPOINTS,
        "save and load at the same layout, bit for bit",
        "stable",
        "deepspeed/test_checkpoints.py::test_at_the_same_layout_every_bit_is_the_same",
        "stages 0-3",
        GLOO,
    ),
    _feature(
        CHECKPOINTS,
        "load at another layout",
        "stable",
        "deepspeed/test_checkpoints.py::test_moves_to_another_layout",
        "stages 0-3, other processes, other tensor-parallel sizes",
        GLOO,
    ),
    _feature(
        CHECKPOINTS,
        "asynchronous saves; saves that are killed; full disks",
        "stable",
        "deepspeed/test_crashes.py",
        "2 and 3 processes, one file system",
    ),
    _feature(
        CHECKPOINTS,
        "damaged or hostile checkpoints",
        "stable",
        "unit/test_any_manifest.py deepspeed/test_checkpoint_tool.py",
        "any",
    ),
    _feature(
        CHECKPOINTS,
        "`inspect`, `verify`, `export`",
        "stable",
        "deepspeed/test_checkpoint_tool.py",
        "any",
        "one process",
    ),
    _feature(
        CHECKPOINTS,
        "checkpoints of version 0.1",
        "stable",
        "deepspeed/test_old_checkpoints.py",
        "as 0.1 wrote them",
    ),
    _feature(
        CHECKPOINTS,
        "DeepSpeed's own checkpoints, `zero_to_fp32.py`",
        "beta",
        "deepspeed/test_checkpoint_jobs.py::test_deepspeed_converts_its_own_checkpoints",
        "only the layout that saved them; tensor-parallel parts are not joined",
    ),
    _feature(
        RUNS,
        "`launchers/pretrain.py`, `evaluate.py`",
        "stable",
        "end_to_end/test_pretrain.py deepspeed/test_pretraining.py",
        "stages 0-3, 1-3 processes",
    ),
    _feature(
        RUNS,
        "signals, resuming, killed runs",
        "stable",
        "end_to_end/test_resume.py end_to_end/test_killed.py",
        "`python`, `deepspeed`, `torchrun`",
    ),
    _feature(RUNS, "comparison of methods", "stable", "unit/test_comparison_training.py", "one process per run"),
    _feature(RUNS, "memory planning", "stable", "deepspeed/test_memory_formula.py", "stages 0-3", "byte for byte"),
    _feature(RUNS, "local texts and tokenizers", "stable", "unit/test_data_text.py unit/test_data_cache.py", "any"),
    _feature(
        RUNS,
        "texts and tokenizers of the hub",
        "experimental",
        "unit/test_data_hub.py",
        "stand-in for the hub",
        "no network",
    ),
    _feature(
        RUNS,
        "TensorBoard, CSV",
        "stable",
        "end_to_end/test_pretrain.py::test_tensorboard_gets_the_same_numbers",
        "2 processes",
    ),
    _feature(
        RUNS, "Weights & Biases, Comet", "beta", "unit/test_training_monitors.py", "offline; not with their servers"
    ),
    _feature(
        RUNS,
        "TFLOP/s, MFU, times and memory in the metrics",
        "beta",
        "unit/test_training_flops.py unit/test_training_meter.py",
        "counts: every parametrization; times and memory: only on CPUs",
    ),
    _feature(RUNS, "`--profile`", "beta", "unit/test_training_profiling.py", "rank 0; only on CPUs"),
    _feature(
        RUNS, "`megalr report`", "stable", "unit/test_webpage.py unit/test_webpage_browser.py", "any run", "Chromium"
    ),
    _feature(
        RUNS,
        "the wheel and the `megalr` command",
        "stable",
        "installed/test_wheel.py unit/test_commands.py",
        "Linux, Python 3.11; without a compiler, without a writable home",
    ),
    _feature(
        RUNS,
        "`megalr evaluate --tasks` (lm_eval)",
        "experimental",
        "unit/test_harness.py",
        "lm_eval 0.4.13, one process",
    ),
    _feature(MACHINES, "compiled ops on the CPU", "stable", "kernels/test_elementwise.py", "any", "x86, AVX2, AVX-512"),
    Feature(
        part=MACHINES,
        name="CUDA kernels",
        level="experimental",
        tests=("kernels/test_emulation.py", "kernels/test_check_cuda.py"),
        layouts="one device",
        cpu="emulated",
        gpu="not run: `make test-gpu`",
    ),
    _feature(
        MACHINES,
        "several nodes",
        "experimental",
        "deepspeed/test_pretraining.py::test_nodes_with_another_text_or_other_flags_are_named",
        "two launchers on one machine",
    ),
    _feature(MACHINES, "MPI, SLURM", "experimental", "", "none: not tried", "not run"),
)


def page() -> str:
    """The Markdown of docs/maturity.md, without its last line break."""
    names = dict.fromkeys(feature.part for feature in FEATURES)
    parts = [HEAD, "## Rules\n", _table(_rules()), "", "## Parametrizations\n", _table(_parametrizations()), ""]
    for name in names:
        rows = [_row(feature) for feature in FEATURES if feature.part == name]
        parts += [f"## {name}\n", _table(rows), ""]
    return "\n".join(parts[:-1])


def level_of(method: str, *, cut: bool) -> Level:
    """The level of a method that tests hold at every ZeRO stage.

    Args:
        method: its type in the JSON.
        cut: whether tensor parallelism has it.
    """
    return "stable" if method in TRAINED and cut else "beta"


def _rules() -> list[Sequence[str]]:
    tests = ("world/test_rules.py", "deepspeed/test_rules.py", "deepspeed/test_tensor_parallel.py")
    ours = [name for name, rule in RULES.items() if rule is None or rule.__module__.startswith("megalr.")]
    return [_method(name, tests, cut=True) for name in ours]


def _parametrizations() -> list[Sequence[str]]:
    cut = types_that_are_cut()
    under_deepspeed = {"low_rank": "training", "projected": "projected"}
    rows = []
    for name, kind in PARAMETRIZATIONS.items():
        if not issubclass(kind, Parametrization) or not kind.__module__.startswith("megalr."):
            continue
        tests = ["world/test_parametrizations.py", f"deepspeed/test_{under_deepspeed.get(name, 'factors')}.py"]
        tests += ["deepspeed/test_tensor_parallel.py"] if name in cut else []
        rows.append(_method(name, tuple(tests), cut=name in cut))
    return rows


def _method(name: str, tests: tuple[str, ...], *, cut: bool) -> Sequence[str]:
    missing = ["no tensor parallelism"] * (not cut) + ["not trained in the benchmark"] * (name not in TRAINED)
    layouts = f"{ALL}, {SHARED}" if cut else ALL
    layouts = "; ".join([layouts, *missing])
    level = level_of(name, cut=cut)
    return _row(Feature(part="", name=f"`{name}`", level=level, tests=tests, layouts=layouts, cpu=GLOO))


def _row(feature: Feature) -> Sequence[str]:
    tests = ", ".join(f"`tests/{test}`" for test in feature.tests) or "none"
    return feature.name, feature.level, tests, feature.layouts, feature.cpu, feature.gpu


def _table(rows: Sequence[Sequence[str]]) -> str:
    return markdown_table(COLUMNS, rows, numbers=False)


def main() -> int:
    """Print the page."""
    print(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
