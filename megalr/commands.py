"""The ``megalr`` command: pretrain, evaluate, plan, compare, checkpoint, report."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from megalr import resources
from megalr.errors import UserError
from megalr.flags import PlainParser, positive, typed_as
from megalr.processes import KEEP_FREED_MEMORY, free_port
from megalr.schema import slip
from megalr.version import __version__

USER_ERROR_CODE = 2
# A process that has one of these has been started by a launcher, which has decided how many there are.
OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
CPU_PROCESSES = 2  # by default, so that the shards are real; they share the cores


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        run: takes the words after the subcommand, returns the exit code.
        summary: its line in ``megalr --help``.
        is_filter: whether it only prints, so that ``| head`` may end it.
    """

    run: Callable[[Sequence[str]], int]
    summary: str
    is_filter: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand that the command line names.

    Args:
        argv: the command line without the program's name; None for this process's own.

    Returns:
        The subcommand's exit code; 2 for an unknown one.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"megalr {__version__}")
        return 0
    command = COMMANDS.get(name)
    if command is None:
        meant = slip(name, COMMANDS)
        hint = f"did you mean {meant}?" if meant else f"write one of {', '.join(COMMANDS)}"
        print(f"error: there is no command {name!r}: {hint}\n(`megalr --help` explains each)", file=sys.stderr)
        return USER_ERROR_CODE
    if argv is None and command.is_filter:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    with typed_as(f"megalr {name}"):
        try:
            return command.run(words[1:])
        except (UserError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return USER_ERROR_CODE


def pretrain(words: Sequence[str]) -> int:
    """Pretrain as one of a launcher's processes; without a launcher, start DeepSpeed's in place of this process.

    Returns:
        The exit code; DeepSpeed's launcher returns the one of the process that ended first.

    Raises:
        UserError: a flag or the JSON that no process could use.
    """
    from megalr.pretrain import main as pretrain_main
    from megalr.train.arguments import parse_arguments
    from megalr.train.interruption import LAUNCHER

    if any(name in os.environ for name in OF_A_LAUNCHER):
        sys.argv = ["megalr", "pretrain", *words]  # a run's folder and messages repeat the command line
        return pretrain_main(words)
    if {"-h", "--help"} & set(words):
        with contextlib.suppress(SystemExit):
            parse_arguments(["--help"])
        print(f"\n{_launch_parser().format_help()}", end="")
        return 0
    flags, rest = _launch_parser().parse_known_args(words)
    _check(rest)
    command = launcher_command(rest, flags.processes, flags.port)
    print(shlex.join(["deepspeed", *command[3:]]), flush=True)
    os.environ.update(launcher_environment(os.environ, flags.processes))
    os.environ[LAUNCHER] = str(os.getpid())
    os.execv(command[0], command)  # signals and the exit code are then the launcher's own


def launcher_command(words: Sequence[str], processes: int | None, port: int | None) -> list[str]:
    """The command that starts DeepSpeed's launcher, which starts ``megalr.pretrain``.

    Args:
        words: the flags of pretraining.
        processes: how many on each node; None for one per GPU or, on a CPU, ``LOCAL_SIZE``.
        port: where they meet; None for a free one.
    """
    number = [] if processes is None else ["--num_accelerators", str(processes)]
    flags = [*number, "--master_port", str(port or free_port())]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *flags, "--module", "megalr.pretrain", *words]


def launcher_environment(given: os._Environ[str] | dict[str, str], processes: int | None) -> dict[str, str]:
    """What to add to the environment: on a CPU, the number of processes and threads, unless they are set.

    Args:
        given: the environment as it is.
        processes: as for :func:`launcher_command`.
    """
    import torch

    here = str(Path(sys.executable).parent)  # of ninja and of DeepSpeed's scripts, if it is not activated
    added = {"PATH": f"{here}{os.pathsep}{given.get('PATH', os.defpath)}"}
    if torch.cuda.is_available():
        return added
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = given.get("LOCAL_SIZE", "")
    number = processes or (int(wanted) if wanted.isdecimal() and int(wanted) else min(CPU_PROCESSES, cores))
    defaults = {"LOCAL_SIZE": str(number), "OMP_NUM_THREADS": str(max(1, cores // number)), **KEEP_FREED_MEMORY}
    return added | {name: value for name, value in defaults.items() if name not in given}


def evaluate(words: Sequence[str]) -> int:
    """Score a run, a checkpoint or an exported model."""
    from megalr.train.score import main as score_main

    return score_main(words)


def plan(words: Sequence[str]) -> int:
    """Print the memory of runs by formula."""
    from megalr.memory.table import main as table_main
    from megalr.train.models import empty_model, read_model_config

    return table_main(words, lambda name: empty_model(read_model_config(name, resources.folder("models"))))


def compare(words: Sequence[str]) -> int:
    """Train the methods of a recipe on the same text."""
    from megalr.comparison.compare import main as compare_main

    return compare_main(words, models_folder=resources.folder("models"), launcher=["-m", "megalr.pretrain"])


def checkpoint(words: Sequence[str]) -> int:
    """Look at, check or export checkpoints."""
    from megalr.checkpoint.__main__ import main as checkpoint_main

    return checkpoint_main(words)


def report(words: Sequence[str]) -> int:
    """Write a web page of runs; without any, print the environment."""
    if not words:
        import_module("megalr.report").main()
        return 0
    return int(import_module("megalr.webpage.__main__").main(words))


COMMANDS = {
    "pretrain": Command(pretrain, "pretrain a model, on every GPU or on two CPU processes"),
    "evaluate": Command(evaluate, "score a run, a checkpoint or an exported model"),
    "plan": Command(plan, "show the memory of a run, by formula, before you start it", is_filter=True),
    "compare": Command(compare, "train the methods of a recipe on the same text, and make a table and plots"),
    "checkpoint": Command(checkpoint, "inspect, verify or export checkpoints", is_filter=True),
    "report": Command(report, "write a run's web page, or print versions for a bug report", is_filter=True),
}


def _help() -> str:
    lines = [f"  {name:<12}{command.summary}" for name, command in COMMANDS.items()]
    shipped = [f"  {kind:<12}{' '.join(resources.names(kind))}" for kind in resources.IN_CHECKOUT]
    return "\n".join(
        [
            "usage: megalr COMMAND ...",
            "",
            "Pretrain language models under DeepSpeed with low-rank and projected optimizers.",
            "",
            "commands:",
            *lines,
            "",
            "`megalr COMMAND --help` lists the flags of a command, `megalr --version` prints the version.",
            "",
            "Start with `megalr pretrain --deepspeed zero2_lowrank.json`.",
            "",
            "These names work in place of paths:",
            *shipped,
        ]
    )


def _launch_parser() -> PlainParser:
    parser = PlainParser(usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    group = parser.add_argument_group(
        "processes",
        "`megalr pretrain` starts DeepSpeed's launcher. For its other flags, and for several nodes, write it out: "
        "`deepspeed [FLAGS OF THE LAUNCHER] --module megalr.pretrain [FLAGS]`.",
    )
    group.add_argument(
        "--processes",
        type=positive,
        metavar="N",
        help="processes on each node (default: one per GPU; on a CPU, LOCAL_SIZE or 2)",
    )
    group.add_argument(
        "--port", type=positive, metavar="N", help="the port where the processes meet (default: a free one)"
    )
    return parser


def _check(words: Sequence[str]) -> None:
    """Refuse at once what every process would refuse after all have started."""
    from megalr.config.settings import read_json
    from megalr.train.arguments import parse_arguments

    read_json(parse_arguments(words).deepspeed)
