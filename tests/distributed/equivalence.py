"""The equivalence table: the largest relative error of any weight against one plain PyTorch process.

python -m tests.distributed.equivalence > docs/equivalence.md
"""

from __future__ import annotations

from tests.distributed.harness import RankPool
from tests.distributed.test_training import STAGES, WORLDS, reference_weights, relative_errors

ACCUMULATIONS = (1, 4)

HEAD = """# Equivalence

Twenty updates with two refactorizations and two momentum resets in them, gradients clipped, odd shapes so that
partition boundaries cut factors in mid-row, fp32. Each figure is the largest relative error, in the 2-norm, of any of
the model's weights against one plain PyTorch process (`tests/reference.py`), without DeepSpeed or megalr's optimizer.
Factors are compared as their product, because singular vectors have no sign of their own. `make test` holds all of them
below 1e-4 (`tests/distributed/test_training.py`); this table is printed by `python -m tests.distributed.equivalence`.
"""


def main() -> None:
    """Run every combination and print the table as Markdown."""
    columns = [(world, accumulation) for world in WORLDS for accumulation in ACCUMULATIONS]
    figures: dict[tuple[int, int, int], float] = {}
    for world in WORLDS:
        with RankPool(world) as pool:
            for stage in STAGES:
                for accumulation in ACCUMULATIONS:
                    got = pool.run("tests.distributed.training:train", stage, accumulation)[0]
                    figures[stage, world, accumulation] = max(relative_errors(got, reference_weights()).values())
    print(HEAD)
    titles = [f"{world} process{'es' * (world > 1)}, accumulation {accumulation}" for world, accumulation in columns]
    print(f"| ZeRO stage | {' | '.join(titles)} |")
    print(f"|---|{'---|' * len(columns)}")
    for stage in STAGES:
        cells = [f"{figures[stage, world, accumulation]:.1e}" for world, accumulation in columns]
        print(f"| {stage} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
