"""Compare methods by a recipe: each trains the same model on the same text; ``--help`` lists the flags.

python launchers/compare.py --recipe launchers/recipes/paper_tiny.yaml --output runs/paper_tiny --jobs 2
"""

import sys
from pathlib import Path

from megalr.comparison.compare import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], models_folder=Path(__file__).parent / "models"))
