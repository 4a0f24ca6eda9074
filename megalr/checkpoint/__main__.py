"""``python -m megalr.checkpoint``: look at checkpoints, check them, export models from them. No engine is started."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalr.checkpoint.export.command import DTYPE_NAMES, export
from megalr.checkpoint.folders import candidates, is_one
from megalr.checkpoint.inspecting import inspect
from megalr.checkpoint.verifying import verify
from megalr.errors import UserError
from megalr.flags import PlainParser, nonempty
from megalr.plugins import load_plugins
from megalr.train.arguments import add_plugins
from megalr.train.quiet import quieten

DAMAGED_CODE, USER_ERROR_CODE = 1, 2
DIR_HELP = "one checkpoint's folder, or the directory that megalr.save_checkpoint was given"


def main(argv: Sequence[str]) -> int:
    """Do what the command line says.

    Args:
        argv: the command line without the program's name.

    Returns:
        The exit code: 0; 1 where `verify` has found damage; 2 after a UserError or what the
        system refuses, of which the message alone is printed.
    """
    try:
        arguments = _parser().parse_args(argv)
        place = Path(arguments.dir).expanduser().absolute()
        if arguments.command == "inspect":
            inspect(place, arguments.tensors)
        elif arguments.command == "verify":
            return 0 if verify(place) else DAMAGED_CODE
        else:
            _check_flags(arguments)
            quieten(first=True)
            load_plugins(arguments.plugins)
            export(
                place,
                Path(arguments.out).expanduser().absolute(),
                arguments.to,
                dtype=arguments.dtype,
                dense=arguments.dense,
                tokenizer=_tokenizer(arguments, place),
                overwrite=arguments.overwrite,
            )
        return 0
    except (UserError, OSError) as error:
        if os.environ.get("MEGALR_TRACEBACK"):
            traceback.print_exception(error)
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_CODE


def _check_flags(arguments: argparse.Namespace) -> None:
    if arguments.dense and arguments.to != "safetensors":
        raise UserError("--dense is for `--to safetensors`: a Hugging Face model is dense, adapters are not")
    if arguments.tokenizer is not None and arguments.to == "safetensors":
        raise UserError("--tokenizer is for `--to hf` and `--to peft`, whose folders are read as models")


def _tokenizer(arguments: argparse.Namespace, place: Path) -> Any:
    """The one that is to be saved with the model: the user's choice, or that of the run that wrote the checkpoint."""
    if arguments.to == "safetensors":
        return None
    if arguments.tokenizer is not None:
        return _fitting(arguments.tokenizer, place, chosen=True)
    from megalr.train.run_settings import read_settings  # noqa: PLC0415  (slow to import)

    try:
        directory = place.parent if is_one(place) else place
        if directory.name != "checkpoints" or not (directory.parent / "run.json").exists():
            raise UserError(f"{directory} is not of a run, whose run.json would name it")
        return _fitting(read_settings(directory.parent).text.tokenizer, place, chosen=False)
    except UserError as error:
        print(f"no tokenizer is saved with the model: {error}. --tokenizer names one", file=sys.stderr)
        return None


def _fitting(name: str | None, place: Path, *, chosen: bool) -> Any:
    # Slow to import.
    from megalr.data.tokenizer import digest_of_tokenizer, load_tokenizer  # noqa: PLC0415
    from megalr.train.checkpoints import TOKENIZER, text_of  # noqa: PLC0415
    from megalr.train.models import entries_of  # noqa: PLC0415

    tokenizer = load_tokenizer(name, say=print)
    manifest = next(iter(candidates(place.parent if is_one(place) else place)), None)
    size = None if manifest is None else (manifest.content["model"] or {}).get("vocab_size")
    entries = entries_of(tokenizer)
    if size is not None and entries > size:
        raise UserError(
            f"the tokenizer {name or 'that comes along'} has {entries:,} entries and the model {size:,}: it is not the "
            "one that the model was trained with"
        )
    trained_with = None if manifest is None else text_of(manifest).get(TOKENIZER)
    if trained_with is not None and trained_with != digest_of_tokenizer(tokenizer):
        words = (
            f"the tokenizer {name or 'that comes along'} is not the one that the model was trained with, or has "
            "changed since"
        )
        if not chosen:
            raise UserError(words)
        print(words, file=sys.stderr)
    return tokenizer


def _parser() -> argparse.ArgumentParser:
    parser = PlainParser(
        prog="python -m megalr.checkpoint",
        description="Look at, check and export checkpoints that megalr.save_checkpoint has written, without an engine.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser(
        "inspect",
        help="say what a checkpoint is, or list several",
        description="Say what a checkpoint is: updates, layout, method, bytes, files. Of a directory of several: a "
        "line for each, newest first, with the one that `latest` names. Files that are missing or have another size "
        "are named; `verify` reads them.",
    )
    command.add_argument("dir", type=nonempty, metavar="DIR", help=DIR_HELP)
    command.add_argument(
        "--tensors",
        nargs="?",
        const="",
        metavar="PATTERN",
        help="list the tensors instead: key (kind/name), shape, dtype, pieces; those whose key contains or matches "
        "PATTERN, such as 'weights/*q_proj*'",
    )
    command = commands.add_parser(
        "verify",
        help="check every file",
        description="Read every file and compare it with its checksums. The exit code is 1 where something is wrong.",
    )
    command.add_argument("dir", type=nonempty, metavar="DIR", help=DIR_HELP)
    _add_export(
        commands.add_parser(
            "export",
            help="write a model for other programs",
            description="Write a model of the fp32 weights, cast once. Damaged checkpoints are refused; of a directory "
            "of several the newest that is whole is taken.",
        )
    )
    return parser


def _add_export(command: argparse.ArgumentParser) -> None:
    command.add_argument("dir", type=nonempty, metavar="DIR", help=DIR_HELP)
    command.add_argument("out", type=nonempty, metavar="OUT", help="the folder to write to")
    command.add_argument(
        "--to",
        required=True,
        choices=("hf", "safetensors", "peft"),
        help="hf: a dense Hugging Face model; safetensors: one file with the weights as they were trained; peft: the "
        "factors of LoRA or ReLoRA as adapters, and in OUT/base the model that they are added to",
    )
    command.add_argument("--dense", action="store_true", help="with --to safetensors: dense weights")
    command.add_argument("--dtype", choices=DTYPE_NAMES, help="default: the one that the model computed with")
    command.add_argument(
        "--tokenizer",
        type=nonempty,
        metavar="NAME",
        help="save this one with the model: a tokenizer.json, a folder, or a name on the hub (default: that of the run "
        "whose checkpoint it is)",
    )
    add_plugins(command)
    command.add_argument("--overwrite", action="store_true", help="replace an export that is in OUT")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    sys.exit(main(sys.argv[1:]))
