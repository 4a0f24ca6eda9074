"""What a run will hold in memory, by formula, before it is started; ``--help`` lists the flags.

python launchers/plan.py --models 60m 350m 1b --ranks 128 256 512 --stage 2 --processes 8
"""

import sys
from pathlib import Path

# Python puts this folder first, so that tasks which import the package evaluate would get evaluate.py instead.
sys.path[:] = [place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parent]

from megalr.commands import plan  # noqa: E402

if __name__ == "__main__":
    sys.exit(plan(sys.argv[1:]))
