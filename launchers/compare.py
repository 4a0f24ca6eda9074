"""Compare methods by a recipe: each trains the same model on the same text; ``--help`` lists the flags.

python launchers/compare.py --recipe launchers/recipes/paper_tiny.yaml --output runs/paper_tiny --jobs 2
"""

import sys
from pathlib import Path

# Python puts this folder first, so that tasks which import the package evaluate would get evaluate.py instead.
sys.path[:] = [place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parent]

from megalr.comparison.compare import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], models_folder=Path(__file__).parent / "models"))
