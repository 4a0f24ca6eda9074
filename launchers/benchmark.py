"""Benchmarks: tables in Markdown, and the raw numbers with --output.

python launchers/benchmark.py optimizer --models 60m --steps 50
python launchers/benchmark.py projected --no-time
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks of our own code are no part of the package

from benchmarks import checkpoints, ops, optimizer, projected, tensor_parallel  # noqa: E402
from megalr.comparison import methods  # noqa: E402
from megalr.errors import UserError  # noqa: E402

# Modules of benchmarks, each of which declares its flags and runs.
BENCHMARKS = {
    "optimizer": optimizer,
    "projected": projected,
    "tensor_parallel": tensor_parallel,
    "checkpoints": checkpoints,
    "methods": methods,
    "ops": ops,
}


def main() -> int:
    """Run the benchmark that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, module in BENCHMARKS.items():
        lines = (module.__doc__ or "").splitlines()
        module.add_arguments(commands.add_parser(name, help=lines[0], description=module.__doc__))
    arguments = parser.parse_args()
    try:
        BENCHMARKS[arguments.benchmark].run(arguments, Path(__file__).parent / "models")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
