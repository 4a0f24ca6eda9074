"""What a run will hold in memory, by formula, before it is started; ``--help`` lists the flags.

python launchers/plan.py --models 60m 350m 1b --ranks 128 256 512 --stage 2 --processes 8
"""

import sys
from pathlib import Path

from megalr.memory.table import main
from megalr.train.models import empty_model, read_model_config

MODELS = Path(__file__).parent / "models"

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], lambda name: empty_model(read_model_config(name, MODELS))))
