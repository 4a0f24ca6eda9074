"""The equivalence tables: the largest relative error of any weight against one plain PyTorch process.

python -m tests.deepspeed.equivalence docs/equivalence.md
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path

from tests.deepspeed import (
    factoring,
    rule_training,
    test_projected,
    test_rules,
    test_tensor_parallel,
    test_velora,
)
from tests.deepspeed.harness import RankPool
from tests.deepspeed.test_training import STAGES, reference_weights, relative_errors

WORLDS = (1, 2, 3, 4)
ACCUMULATIONS = (1, 4)
PROJECTED = {
    "input": {},
    "std": {"section": {"side": "std"}},
    "input, shared": {"model": "llama", "section": {"share_basis": True, "rank": 4}},
}

HEAD = """# Equivalence

These tables compare training under DeepSpeed with one plain PyTorch process. That process uses neither DeepSpeed nor
megalr's optimizer: every method is written a second time, in `tests/references/`, in `tests/reference.py` and beside
it. Each figure is the largest relative error, in the 2-norm, of any weight of the model. Gradients are clipped and
everything is fp32. Shapes are odd, so that partition boundaries cut matrices in the middle of a row. The columns are
processes x accumulation steps.

`python -m tests.deepspeed.equivalence docs/equivalence.md` makes the tables. `make test` checks that every line except
those of tensor parallelism stays below 1e-4, with ranks that are threads of one process (`tests/world`). It also checks
a selection of lines under DeepSpeed. `make test-all` checks all of them: `tests/deepspeed/test_rules.py`,
`test_projected.py`, `test_factors.py`, `test_velora.py`, `test_tensor_parallel.py` and `test_training.py`.
"""
RULES_HEAD = """
## Rules on dense matrices

Each run has twelve updates, in which every basis is refreshed at least twice. The model has wide, tall and square
matrices, one with a single row, two that are smaller than the rank, and a stack of three (`tests/odd_model.py`).
"""
PROJECTED_HEAD = """
## Projected layers

Each run has twelve updates, in which every basis is refreshed at least twice. The models are the one above, of which
the wide, tall and square matrices are replaced, and a LLaMA whose layers share bases. The reference is
`tests/plain_projected.py`, which computes with whole weights and whole gradients.
"""
LAYERS_HEAD = """
## Other parametrizations

Each run has twelve updates, on the same matrices as projected layers, with AdamW unless the line names another rule. It
has at least two events of its method: refactorizations and momentum resets ("restarts"), merges, exact steps, or
switches. The references are `tests/references/parametrizations/` and `tests/plain_factors.py`. They form whole weights
and leave gradients to autograd.
"""
VELORA_HEAD = """
## Compressed activations

Each run has twelve updates of a rule, with VeLoRA on the tall and the square matrix of the same model. The reference is
`tests/plain_velora.py`, in which autograd computes the compressed gradient.
"""
TENSOR_HEAD = """
## Tensor parallelism

The columns are tensor-parallel x data-parallel ranks. The model is a LLaMA whose dense layers AutoTP cuts. Each run has
twelve updates with at least two refreshes. Runs with low-rank and SLTrain layers have twenty updates, with two
refactorizations and two momentum resets. Q-GaLore has larger errors: it rounds moments to eight bits, and a sum in
another order can round to another value.
"""
FACTORS_HEAD = """
## Low-rank factors

Each run has twenty updates of AdamW on a low-rank LLaMA, with two refactorizations and two momentum resets. The
products of the factors are compared, because the sign of singular vectors is arbitrary.
"""


def main(path: Path) -> None:
    """Run every combination and write the tables as Markdown."""
    columns = [(world, accumulation) for world in WORLDS for accumulation in ACCUMULATIONS]
    rules: dict[tuple[str, int, int, int], float] = {}
    projected: dict[tuple[str, int, int, int], float] = {}
    layers: dict[tuple[str, int, int, int], float] = {}
    velora: dict[tuple[str, int, int, int], float] = {}
    factors: dict[tuple[int, int, int], float] = {}
    tensor = tensor_errors()
    for world in WORLDS:
        with RankPool(world) as pool:
            for stage in STAGES:
                for accumulation in ACCUMULATIONS:
                    for rule in rule_training.RULES:
                        got = pool.run(test_rules.TRAIN, stage, rule, accumulation)[0][0]
                        error, _ = test_rules.largest_error(got, test_rules.plain_weights(rule))
                        rules[rule, stage, world, accumulation] = error
                    for title, case in PROJECTED.items():
                        got = pool.run("tests.deepspeed.projecting:train", stage, accumulation, **case)[0][0]
                        model, section = case.get("model", "odd"), case.get("section", {})
                        expected = test_projected.reference(model, **section)
                        projected[title, stage, world, accumulation] = max(relative_errors(got, expected).values())
                    for title in factoring.CASES:
                        layers[title, stage, world, accumulation] = layers_error(pool, title, stage, accumulation)
                    for rule in test_velora.CASES:
                        velora[rule, stage, world, accumulation] = velora_error(pool, rule, stage, accumulation)
                    if 24 % (world * accumulation) == 0:  # sequences of an update
                        got = pool.run("tests.deepspeed.training:train", stage, accumulation)[0]
                        error = max(relative_errors(got, reference_weights()).values())
                        factors[stage, world, accumulation] = error
    with path.open("w", encoding="utf-8") as file, redirect_stdout(file):
        print(HEAD + RULES_HEAD)
        lines = [(rule, stage) for rule in rule_training.RULES for stage in STAGES]
        _table(("rule", "ZeRO stage"), lines, columns, lambda line, column: rules[*line, *column])
        print(PROJECTED_HEAD)
        cases = [(title, stage) for title in PROJECTED for stage in STAGES]
        _table(("side", "ZeRO stage"), cases, columns, lambda line, column: projected[*line, *column])
        print(LAYERS_HEAD)
        cases = [(title, stage) for title in factoring.CASES for stage in STAGES]
        _table(("layers", "ZeRO stage"), cases, columns, lambda line, column: layers[*line, *column])
        print(VELORA_HEAD)
        lines = [(rule, stage) for rule in test_velora.CASES for stage in STAGES]
        _table(("rule", "ZeRO stage"), lines, columns, lambda line, column: velora[*line, *column])
        print(TENSOR_HEAD)
        cases = [(title, stage) for title in test_tensor_parallel.KINDS for stage in STAGES]
        _table(
            ("method", "ZeRO stage"),
            cases,
            test_tensor_parallel.LAYOUTS,
            lambda line, column: tensor[*line, *column],
        )
        print(FACTORS_HEAD)
        known = [column for column in columns if (0, *column) in factors]
        _table(("ZeRO stage",), [(stage,) for stage in STAGES], known, lambda line, column: factors[*line, *column])


def tensor_errors() -> dict[tuple[str, int, int, int], float]:
    """The figures of tensor parallelism, by method, stage, and ranks of either kind."""
    found: dict[tuple[str, int, int, int], float] = {}
    for tensor, data in test_tensor_parallel.LAYOUTS:
        with RankPool(tensor * data) as pool:
            for title in test_tensor_parallel.KINDS:
                for stage in STAGES:
                    got, _ = test_tensor_parallel.trained(pool, title, tensor, stage)
                    error = max(relative_errors(got, test_tensor_parallel.expected(title)).values())
                    found[title, stage, tensor, data] = error
    return found


def layers_error(pool: RankPool, title: str, stage: int, accumulation: int) -> float:
    """The figure of one of :data:`tests.deepspeed.factoring.CASES`."""
    got = pool.run("tests.deepspeed.factoring:train", stage, title, accumulation)[0]
    return max(relative_errors(got, factoring.CASES[title].expected).values())


def velora_error(pool: RankPool, rule: str, stage: int, accumulation: int) -> float:
    """The figure of a rule with compressed activations."""
    got, _ = pool.run(test_rules.TRAIN, stage, rule, accumulation, megalr=test_velora.MEGALR)[0]
    return max(relative_errors(got, test_velora.CASES[rule].expected).values())


def _table(
    titles: Sequence[str],
    lines: Sequence[tuple],
    columns: Sequence[tuple[int, int]],
    figure: Callable[[tuple, tuple[int, int]], float],
) -> None:
    print(f"| {' | '.join([*titles, *(f'{world} x {accumulation}' for world, accumulation in columns)])} |")
    print(f"|{'---|' * (len(titles) + len(columns))}")
    for line in lines:
        print(f"| {' | '.join([*map(str, line), *(f'{figure(line, column):.1e}' for column in columns)])} |")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit((__doc__ or "").strip())
    main(Path(sys.argv[1]))
