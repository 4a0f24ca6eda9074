"""What a run will hold in memory, by formula, before it is started; ``--help`` lists the flags.

python launchers/plan.py --models 60m 350m 1b --ranks 128 256 512 --stage 2 --processes 8
"""

import sys

from megalr.commands import plan

if __name__ == "__main__":
    sys.exit(plan(sys.argv[1:]))
