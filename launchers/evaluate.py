"""Held-out perplexity of a run, a checkpoint or an exported model; ``--help`` lists the flags.

python launchers/evaluate.py runs/zero2_lowrank
python launchers/evaluate.py path/of/an/exported/model --dataset my.txt
"""

import sys
from pathlib import Path

# Python puts this folder first, so that tasks which import the package evaluate would get evaluate.py instead.
sys.path[:] = [place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parent]

from megalr.train.score import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
