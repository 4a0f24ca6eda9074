"""Held-out perplexity of a run, a checkpoint or an exported model; ``--help`` lists the flags.

python launchers/evaluate.py runs/zero2_lowrank
python launchers/evaluate.py path/of/an/exported/model --dataset my.txt
"""

import sys

from megalr.train.score import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
