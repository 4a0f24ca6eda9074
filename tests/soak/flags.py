"""Flags of every program: values that are none, flags that contradict each other, and files that are not there."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from tests.end_to_end.commands import PRETRAIN
from tests.processes import ROOT
from tests.soak.trial import Case
from tests.soak.workshop import BENCHMARK, COMPARE, EVALUATE, PLAN, SIZES, TRAIN

RUN = (*TRAIN, "--deepspeed", "good.json")
TOOL = ("-m", "megalr.checkpoint")
RECIPE = str(ROOT / "launchers" / "recipes" / "paper_tiny.yaml")
COMPARED = (COMPARE, "--recipe", RECIPE, "--output", "compared")
TOKENIZER = ("-m", "megalr.data.train_tokenizer", "text.txt", "--output", "new.json")

NO_NUMBER = ("x", "", "1.5", "0", "-1", "1e3", "NaN", "٣x", "0x10", "9" * 5000, "--", "1,000", " ")
# Words that are right but for a flag with a value from a list.
NUMBERS: dict[tuple[str, ...], tuple[str, ...]] = {
    RUN: (
        "--steps",
        "--batch-size",
        "--micro-batch-size",
        "--sequence-length",
        "--max-train-tokens",
        "--max-eval-tokens",
        "--eval-every",
        "--save-every",
        "--keep-checkpoints",
        "--log-every",
        "--profile",
    ),
    (EVALUATE, "export", "--sequence-length", "32"): ("--micro-batch-size", "--sequence-length", "--max-eval-tokens"),
    (PLAN, "--models", "small.json", "--ranks", "8"): ("--ranks", "--processes", "--stage"),
    COMPARED: ("--jobs", "--processes"),
    TOKENIZER: ("--vocabulary",),
    (BENCHMARK, "optimizer"): ("--steps",),
}
# The words, and what is named.
WRONG: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    ((*RUN, "--peak-tflops", "0"), ("--peak-tflops",)),
    ((*RUN, "--peak-tflops", "nan"), ("--peak-tflops",)),
    ((*RUN, "--peak-tflops", "1e999"), ("--peak-tflops",)),
    ((*RUN, "--seed", "x"), ("--seed",)),
    ((*RUN, "--seed", "1.5"), ("--seed",)),
    ((*RUN, "--seed", str(2**70)), ("seed",)),
    ((*RUN, "--seed", str(-(2**70))), ("seed",)),
    ((*RUN, "--seed"), ("--seed",)),
    ((*RUN, "--resume"), ("new",)),
    ((*RUN, "--resume", "--overwrite"), ("--resume",)),
    ((*RUN, "--step", "1"), ("--step",)),
    ((*RUN, "--stepz", "1"), ("--stepz",)),
    ((*RUN, "stray"), ("stray",)),
    ((*RUN, "--no-pack", "1"), ("1",)),
    ((*RUN, "--save-every", "5d"), ("5d",)),
    ((*RUN, "--save-every", "infs"), ("infs",)),
    ((*RUN, "--save-every", "nanm"), ("nanm",)),
    ((*RUN, "--save-every", "-1h"), ("-1h", "--save-every")),
    ((*RUN, "--save-every", "1e400h"), ("1e400h",)),
    ((*RUN, "--model", "nowhere"), ("nowhere",)),
    ((*RUN, "--model", ""), ("--model", "no model called")),
    ((*RUN, "--model", "text.txt"), ("text.txt",)),
    ((*RUN, "--model", "."), ("model",)),
    ((*RUN, "--dataset", "nowhere.txt"), ("nowhere.txt",)),
    ((*RUN, "--dataset", ""), ("dataset", "text")),
    ((*RUN, "--dataset"), ("--dataset",)),
    ((*RUN, "--dataset", "text.txt", "austen"), ("austen",)),
    ((*RUN, "--dataset", "*.parquet"), ("*.parquet",)),
    ((*RUN, "--dataset", "[text.txt"), ("[text.txt",)),
    ((*RUN, "--dataset", "nobody/nothing"), ("nobody/nothing",)),
    ((*RUN, "--dataset", "small.json"), ("small.json",)),
    ((*RUN, "--dataset", "/dev/zero"), ("/dev/zero",)),
    ((*RUN, "--dataset", "/proc/self/mem"), ("/proc/self/mem",)),
    ((*RUN, "--dataset-config", "en"), ("dataset-config", "dataset_config")),
    ((*RUN, "--eval-dataset", "text.txt"), ("text.txt",)),
    ((*RUN, "--eval-dataset", "nowhere.txt"), ("nowhere.txt",)),
    ((*RUN, "--eval-dataset", "/dev/null"), ("/dev/null",)),
    ((*RUN, "--text-column", "body"), ("text-column", "text_column")),
    ((*RUN, "--tokenizer", "nowhere.json"), ("nowhere.json",)),
    ((*RUN, "--tokenizer", "nobody/nothing"), ("nobody/nothing",)),
    ((*RUN, "--tokenizer", "text.txt"), ("text.txt",)),
    ((*RUN, "--tokenizer", "."), ("tokenizer",)),
    ((*RUN, "--tokenizer", ""), ("tokenizer",)),
    ((*RUN, "--sequence-length", "1"), ("sequence",)),
    ((*RUN, "--sequence-length", "65"), ("--sequence-length",)),
    ((*RUN, "--sequence-length", "1000000000"), ("--sequence-length",)),
    ((*RUN, "--batch-size", "3"), ("--batch-size",)),
    ((*RUN, "--micro-batch-size", "3"), ("micro", "sequences")),
    ((*RUN, "--output", "text.txt"), ("text.txt",)),
    ((*RUN, "--output", "text.txt/run"), ("text.txt",)),
    ((*RUN, "--output", ""), ("--output",)),
    ((*RUN, "--output", "/proc/run"), ("/proc/run",)),
    ((*RUN, "--output", "/dev/null"), ("/dev/null",)),
    ((*RUN, "--output", "x" * 300), ("--output", "x" * 300)),
    ((*RUN, "--export", "text.txt"), ("text.txt",)),
    ((*RUN, "--export", "."), ("--export",)),
    ((*RUN, "--export", ""), ("--export",)),
    ((*RUN, "--export", "/proc/model"), ("/proc/model",)),
    ((*RUN, "--export", "new"), ("--export",)),
    ((*RUN, "--export", "new/checkpoints"), ("--export",)),
    ((*RUN, "--deepspeed", ""), ("--deepspeed",)),
    ((*RUN, "--deepspeed", "nowhere.json"), ("nowhere.json",)),
    ((*RUN, "--deepspeed", "small.json"), ("small.json", "hidden_size", "model_type")),
    ((*RUN, "--local_rank", "x"), ("local_rank",)),
    ((str(PRETRAIN), *SIZES), ("--deepspeed",)),
    ((EVALUATE,), ("folder",)),
    ((EVALUATE, "nowhere"), ("nowhere",)),
    ((EVALUATE, ""), ("folder", "model")),
    ((EVALUATE, "text.txt"), ("text.txt",)),
    ((EVALUATE, "export", "run"), ("run",)),
    ((EVALUATE, "export", "--sequence-length", "32", "--dataset", "nowhere.txt"), ("nowhere.txt",)),
    ((EVALUATE, "export", "--sequence-length", "32", "--tokenizer", "nowhere.json"), ("nowhere.json",)),
    ((EVALUATE, "export", "--sequence-length", "65"), ("--sequence-length",)),
    ((EVALUATE, "export", "--sequence-length", "32", "--batch-size", "3"), ("--batch-size",)),
    (
        (EVALUATE, "export", "--sequence-length", "32", "--dataset", "text.txt", "--text-column", "body"),
        ("text-column", "text_column"),
    ),
    ((PLAN, "--models", "nowhere", "--ranks", "8"), ("nowhere",)),
    ((PLAN, "--models", "small.json"), ("rank",)),
    ((PLAN, "--models", "small.json", "--ranks", "8", "8"), ("rank",)),
    ((PLAN, "--models", "small.json", "--ranks", "33"), ("rank",)),
    ((PLAN, "--models", "small.json", "--ranks", "8", "--dtype", "fp8"), ("--dtype",)),
    ((PLAN, "--models", "small.json", "--ranks", "8", "--optimizers", "Adam"), ("--optimizers",)),
    ((PLAN, "--models", "small.json", "--ranks", "8", "--parametrizations", "x"), ("--parametrizations",)),
    ((PLAN, "--models", "small.json", "--ranks", "8", "--plugins", "nowhere.py"), ("nowhere.py",)),
    ((PLAN, "--models", "small.json", "--ranks", "8", "--plugins", "nowhere"), ("nowhere",)),
    ((PLAN, "--models", "small.json", "--ranks", "8", "--merge-rounding", "up"), ("--merge-rounding",)),
    ((COMPARE,), ("--recipe",)),
    ((COMPARE, "--recipe", "nowhere.yaml", "--output", "compared"), ("nowhere.yaml",)),
    ((COMPARE, "--recipe", ".", "--output", "compared"), ("recipe",)),
    ((*COMPARED, "--output", "text.txt"), ("text.txt",)),
    ((*COMPARED, "--output", "text.txt/x"), ("text.txt",)),
    ((*COMPARED, "--output", "/proc/x"), ("/proc/x",)),
    ((*COMPARED, "--eval-dataset", "text.txt"), ("--dataset",)),
    ((*COMPARED, "--dataset", "nowhere.txt"), ("nowhere.txt",)),
    ((*COMPARED, "--report"), ("compared",)),
    ((BENCHMARK,), ("benchmark",)),
    ((BENCHMARK, "nothing"), ("nothing",)),
    ((BENCHMARK, "optimizer", "--models", "nowhere"), ("nowhere",)),
    ((*TOKENIZER, "nowhere.txt"), ("nowhere.txt",)),
    ((*TOKENIZER, "small.json"), ("small.json",)),
    ((*TOKENIZER, "--output", "nowhere/new.json"), ("nowhere/new.json",)),
    ((*TOKENIZER, "--output", "."), ("--output",)),
    ((*TOKENIZER, "--vocabulary", "100"), ("--vocabulary",)),
    (TOKENIZER[:-2], ("--output",)),
    (TOOL, ("command",)),
    ((*TOOL, "nothing", "checkpoints"), ("nothing",)),
    ((*TOOL, "inspect"), ("dir",)),
    ((*TOOL, "inspect", "nowhere"), ("nowhere",)),
    ((*TOOL, "inspect", "text.txt"), ("text.txt",)),
    ((*TOOL, "inspect", ""), ("dir",)),
    ((*TOOL, "inspect", "export"), ("export",)),
    ((*TOOL, "verify", "nowhere"), ("nowhere",)),
    ((*TOOL, "verify", "export"), ("export",)),
    ((*TOOL, "verify", "checkpoints", "more"), ("more",)),
    ((*TOOL, "export", "run/checkpoints", "out"), ("--to",)),
    ((*TOOL, "export", "run/checkpoints", "out", "--to", "gguf"), ("gguf",)),
    ((*TOOL, "export", "run/checkpoints", "out", "--to", "hf", "--dense"), ("--dense",)),
    ((*TOOL, "export", "run/checkpoints", "out", "--to", "safetensors", "--tokenizer", "x"), ("--tokenizer",)),
    ((*TOOL, "export", "run/checkpoints", "out", "--to", "hf", "--tokenizer", "nowhere.json"), ("nowhere.json",)),
    ((*TOOL, "export", "run/checkpoints", "out", "--to", "hf", "--dtype", "int8"), ("--dtype",)),
    ((*TOOL, "export", "run/checkpoints", "out", "--to", "peft"), ("peft", "lora")),
    ((*TOOL, "export", "run/checkpoints", "text.txt", "--to", "hf"), ("text.txt",)),
    ((*TOOL, "export", "run/checkpoints", "text.txt", "--to", "hf", "--overwrite"), ("text.txt",)),
    ((*TOOL, "export", "run/checkpoints", "text.txt/out", "--to", "hf"), ("text.txt",)),
    ((*TOOL, "export", "run/checkpoints", ".", "--to", "hf"), ("folder", "--overwrite", "empty")),
    ((*TOOL, "export", "run/checkpoints", ".", "--to", "hf", "--overwrite"), ("export",)),
    ((*TOOL, "export", "run/checkpoints", "run", "--to", "hf", "--overwrite"), ("run",)),
    ((*TOOL, "export", "run/checkpoints", "run/checkpoints", "--to", "hf", "--overwrite"), ("checkpoints",)),
    ((*TOOL, "export", "run/checkpoints", "run/checkpoints/step1", "--to", "hf", "--overwrite"), ("checkpoint",)),
    ((*TOOL, "export", "run/checkpoints", "/proc/out", "--to", "hf"), ("/proc/out",)),
    ((*TOOL, "export", "checkpoints", "out", "--to", "hf"), ("checkpoint",)),
    ((*TOOL, "export", "nowhere", "out", "--to", "hf"), ("nowhere",)),
)


def wrong_flags(rng: Random) -> Iterator[Case]:
    """All of them."""
    for words, flags in NUMBERS.items():
        for flag in flags:
            for value in NO_NUMBER:
                if (flag, value) != ("--stage", "0"):
                    yield _case((*words, f"{flag}={value}"), (flag,))
    for words, names in WRONG:
        yield _case(words, names)
    del rng


def _case(words: tuple[str, ...], names: tuple[str, ...]) -> Case:
    needs = tuple(name for name in ("run", "export", "checkpoints") if any(name in word for word in words))
    about = " ".join(word[-60:] for word in words[-3:])
    return Case(about=about, words=words, names=names, needs=needs)
