"""Benchmarks: print tables in Markdown; --output writes the raw numbers.

python launchers/benchmark.py optimizer --models 60m --steps 50
python launchers/benchmark.py projected --no-time
python launchers/benchmark.py methods --recipe launchers/recipes/paper_tiny.yaml --output runs/paper_tiny
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# Python puts this folder first, so that tasks which import the package evaluate would get evaluate.py instead.
sys.path[:] = [place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parent]
sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is not part of the installed package

from benchmarks import checkpoints, ops, optimizer, projected, tensor_parallel  # noqa: E402
from megalr.comparison import compare  # noqa: E402
from megalr.errors import UserError  # noqa: E402
from megalr.flags import PlainParser  # noqa: E402

# Each module declares its flags and runs.
BENCHMARKS = {
    "optimizer": optimizer,
    "projected": projected,
    "tensor_parallel": tensor_parallel,
    "checkpoints": checkpoints,
    "ops": ops,
    "methods": compare,  # the same as launchers/compare.py
}


def main() -> int:
    """Run the benchmark that the command line names."""
    try:
        arguments = make_parser().parse_args()
        BENCHMARKS[arguments.benchmark].run(arguments, Path(__file__).parent / "models")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make_parser() -> argparse.ArgumentParser:
    """A subcommand for each benchmark."""
    parser = PlainParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, module in BENCHMARKS.items():
        lines = (module.__doc__ or "").splitlines()
        module.add_arguments(commands.add_parser(name, help=lines[0], description=module.__doc__))
    return parser


if __name__ == "__main__":
    sys.exit(main())
