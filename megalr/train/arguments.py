"""The command line of the pretraining launcher."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megalr import resources
from megalr.errors import UserError
from megalr.flags import PlainParser, nonempty, positive, positive_float
from megalr.train.profiling import WARM_UP

DEFAULT_STEPS = 400
DEFAULT_BATCH_SIZE = 12  # sequences a step; 1, 2, 3 and 4 processes share them evenly
LARGEST_DEFAULT_MICRO_BATCH = 16  # sequences of 256 tokens; their logits take 2 GB at a vocabulary of 32,000
_SECONDS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Interval:
    """How far apart two of a kind are: so many updates, or so many seconds of a clock."""

    updates: int | None = None
    seconds: float | None = None

    def is_over(self, updates: int, seconds: float) -> bool:
        """Whether it ends with update number ``updates``, so many seconds after the last end."""
        if self.updates is not None:
            return updates % self.updates == 0
        return self.seconds is not None and seconds >= self.seconds


@dataclass(frozen=True, kw_only=True)
class PretrainArguments:
    """What the user asked for. None means: not said, so the JSON or a default decides.

    Attributes are the flags of ``megalr pretrain``; their meaning is in the help texts below.
    """

    deepspeed: str
    model: str | None = None
    activation_checkpointing: bool = False
    dataset: tuple[str, ...] = ("austen",)
    dataset_config: str | None = None
    eval_dataset: tuple[str, ...] | None = None
    tokenizer: str | None = None
    text_column: str = "text"
    sequence_length: int = 256
    pack: bool = True
    max_train_tokens: int | None = None
    max_eval_tokens: int | None = None
    test_half: bool = False
    steps: int | None = None
    batch_size: int | None = None
    micro_batch_size: int | None = None
    seed: int | None = None
    eval_every: int | None = None
    save_every: Interval = Interval(updates=1000)
    keep_checkpoints: int | None = None
    log_every: int = 1
    peak_tflops: float | None = None
    profile: int = 0
    galore_compatible_eval: bool = False
    output: str | None = None
    resume: bool = False
    overwrite: bool = False
    export: str | None = None
    verbose: bool = False


def parse_arguments(argv: Sequence[str]) -> PretrainArguments:
    """Read the flags.

    Args:
        argv: the command line without the program's name.

    Raises:
        UserError: an unknown flag, a missing or a bad value. ``--help`` prints and exits with code 0.
    """
    values = vars(_parser().parse_args(argv))
    del values["local_rank"]
    for key in ("dataset", "eval_dataset"):
        values[key] = None if values[key] is None else tuple(values[key])
    arguments = PretrainArguments(**values)
    if arguments.resume and arguments.overwrite:
        raise UserError("--resume continues a run and --overwrite deletes it: give one of them")
    return arguments


def interval(text: str) -> Interval:
    """An argparse type: ``500`` updates, or ``90s``, ``30m``, ``2h`` of time."""
    unit = _SECONDS.get(text[-1:])
    try:
        found = Interval(updates=int(text)) if unit is None else Interval(seconds=float(text[:-1]) * unit)
    except ValueError:
        found = Interval()
    if not 0 < (found.updates or found.seconds or 0) < math.inf:
        raise argparse.ArgumentTypeError(
            f"{text} is neither a number of updates, such as 500, nor a time, such as 90s, 30m or 2h"
        )
    return found


def _config(text: str) -> str:
    return str(resources.find(nonempty(text), "ds_configs"))


def _parser() -> argparse.ArgumentParser:
    parser = PlainParser(
        prog="pretrain.py",
        description="Pretrain a LLaMA with a low-rank or projected optimizer under DeepSpeed ZeRO.",
        epilog="Start it with `deepspeed`, `torchrun` or plain `python` (one process).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--deepspeed",
        "--deepspeed_config",
        type=_config,
        required=True,
        metavar="JSON",
        help="the DeepSpeed configuration: a path, or the name of a shipped one, e.g. zero2_lowrank.json",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="show what DeepSpeed and transformers log, and which parameter gets which settings",
    )
    _add_model(parser.add_argument_group("model"))
    add_text(parser.add_argument_group("text"))
    _add_training(parser.add_argument_group("training"))
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        type=nonempty,
        metavar="NAME",
        help="a shipped shape (tiny, 9m, 60m, 130m, 350m, 1b, 7b) or the path of such a JSON (default: tiny, "
        "with a GPU 60m)",
    )
    group.add_argument(
        "--activation-checkpointing",
        action="store_true",
        help="compute activations again in the backward pass instead of keeping them",
    )


def add_text(group: argparse._ArgumentGroup) -> None:
    """The flags that choose the text; ``parse_text`` reads them."""
    group.add_argument(
        "--dataset",
        type=nonempty,
        nargs="+",
        default=["austen"],
        metavar="TEXT",
        help="austen (six novels that come along), local .txt, .jsonl or .parquet files, folders or "
        "globs, or a hub dataset such as allenai/c4 (default: austen)",
    )
    group.add_argument("--dataset-config", type=nonempty, metavar="NAME", help="the hub dataset's part, e.g. en")
    group.add_argument(
        "--eval-dataset",
        type=nonempty,
        nargs="+",
        metavar="TEXT",
        help="the held-out text (default: one of the novels, the hub dataset's validation split, or "
        "the end of the local text)",
    )
    group.add_argument(
        "--tokenizer",
        type=nonempty,
        metavar="NAME",
        help="a tokenizer.json, a folder or a hub name, e.g. t5-base (default: a BPE of 4,096 entries "
        "that comes along)",
    )
    group.add_argument(
        "--text-column",
        type=nonempty,
        default="text",
        metavar="NAME",
        help="the key that holds the text (default: text)",
    )
    group.add_argument(
        "--sequence-length",
        type=positive,
        default=256,
        metavar="N",
        help="tokens of one sequence (default: 256)",
    )
    group.add_argument(
        "--no-pack",
        dest="pack",
        action="store_false",
        help="one document a sequence, truncated or padded, instead of full sequences",
    )
    group.add_argument("--max-train-tokens", type=positive, metavar="N", help="read no more training text")
    group.add_argument(
        "--max-eval-tokens",
        type=positive,
        metavar="N",
        help="hold out no more text; at the end of a text of several documents whole ones alone, at least one",
    )
    group.add_argument(
        "--test-half",
        action="store_true",
        help="evaluate on the first half of the held-out text, and score the second half once, at the end",
    )


def add_plugins(group: argparse._ActionsContainer) -> None:
    """The flag that allows plugins, where no JSON on the command line names them."""
    group.add_argument(
        "--plugins",
        nargs="+",
        default=[],
        metavar="NAME",
        help="modules or .py files to import for methods of your own; a plugin that the folder names is imported only "
        "if it is named here",
    )


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help=f"updates (default: the JSON's schedule, else {DEFAULT_STEPS})",
    )
    group.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        help="sequences of one update, over all processes (default: the JSON's train_batch_size, else "
        f"{DEFAULT_BATCH_SIZE})",
    )
    group.add_argument(
        "--micro-batch-size",
        type=positive,
        metavar="N",
        help="sequences that one process takes at a time (default: the JSON's, else up to "
        f"{LARGEST_DEFAULT_MICRO_BATCH})",
    )
    group.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="of the weights and of the order of the text (default: the JSON's megalr.seed, else 0)",
    )
    group.add_argument(
        "--eval-every",
        type=positive,
        metavar="N",
        help="updates between two evaluations on the whole held-out text (default: about 20 evaluations in a run, on a "
        "sample that costs at most 5 %% of it; the first and the last read the whole text)",
    )
    group.add_argument(
        "--galore-compatible-eval",
        action="store_true",
        help="print the perplexity as published code computes it beside the real one; it is lower",
    )
    group.add_argument(
        "--log-every",
        type=positive,
        default=1,
        metavar="N",
        help="updates between two rows of metrics.jsonl (default: 1)",
    )
    group.add_argument(
        "--peak-tflops",
        type=positive_float,
        metavar="X",
        help="peak speed of one device in TFLOP/s, for the MFU (default: that of known GPUs)",
    )
    group.add_argument(
        "--profile",
        type=positive,
        default=0,
        metavar="N",
        help=f"trace N updates after {WARM_UP} to warm up; profile/trace.json.gz in the run's folder opens in Perfetto",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output",
        type=nonempty,
        metavar="DIR",
        help="the run's folder (default: runs/ and the JSON's name, with a number behind it when taken)",
    )
    group.add_argument(
        "--save-every",
        type=interval,
        default=Interval(updates=1000),
        metavar="N",
        help="updates between two checkpoints, or time, such as 90s, 30m or 2h; one is always written at the end "
        "(default: 1000)",
    )
    group.add_argument(
        "--keep-checkpoints",
        type=positive,
        metavar="N",
        help="leave the newest N checkpoints and delete older ones (default: all)",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue from the folder's newest valid checkpoint, with any number of processes, ZeRO stage and "
        "tensor-parallel size",
    )
    group.add_argument("--overwrite", action="store_true", help="delete the run that is in the folder first")
    group.add_argument(
        "--export",
        type=nonempty,
        metavar="DIR",
        help="at the end, write an ordinary Hugging Face model with dense weights here",
    )
