"""How evenly the state of real models' matrices is spread, over the layouts that DeepSpeed makes of them."""

import functools
import random
from pathlib import Path

import pytest

from megalr.config.settings import OptimizerConfig
from megalr.layout.placement import Unit, imbalance, least_imbalance
from megalr.layout.planned import planned_layout
from megalr.optim.groups import parameter_groups
from megalr.optim.matrices import choose_owners, matrix_shapes
from megalr.rules.registry import RULES
from megalr.train.models import empty_model, read_model_config
from tests.covering import daily_and_slow
from tests.unit.rule_runs import needed

MODELS = Path(__file__).parents[2] / "launchers" / "models"
SIZES = ("60m", "130m", "350m", "1b", "7b")
WORLDS = (2, 3, 4, 8, 16, 64)
ASKED_AGAIN = 4  # ranks, of whom each chooses the same owners from a layout of its own
WELL_BALANCED = 1.15
# What lies fixed leaves little to choose, and matrices of almost one size are packed in an order that misses the bound
# by less than a thousandth: 1.1861 and 1.1851, where 1.1854 and 1.1849 are the bounds.
NEARLY = {(rule, size, 2): 1.187 for rule in ("AdamMini", "FRUGAL") for size in ("350m", "1b")}
# Where what lies fixed weighs otherwise in bytes than in operations, the sum of both is balanced: here 1.26 and 1.11
# instead of 1.11 and 1.34.
COMPROMISES = {**NEARLY, **{("OnlineSubspaceDescent", size, 2): 1.26 for size in ("60m", "7b")}}


@functools.cache
def shapes_of(size):
    model = empty_model(read_model_config(size, MODELS))
    groups = {g.name: g for g in parameter_groups(model, OptimizerConfig(rule=RULES["Muon"]()))}
    return {name: tuple(p.shape) for name, p in groups["matrices"].parameters.items()}


@functools.cache
def layout_of(size, stage, world):
    return planned_layout([shapes_of(size)], stage=stage, world_size=world)


def rule_of(name, hidden):
    kind = RULES[name]
    return kind(**needed(name), **({"rank": hidden // 4} if getattr(kind, "rank", 1) > 1 else {}))


def balance_of(rule, layout):
    """State bytes: largest rank over the mean, what no placement could beat, and what lies fixed."""
    owners = choose_owners(rule, layout)
    shapes = matrix_shapes(layout).items()
    units = [Unit((name,), owner, rule.state_bytes(s)) for (name, s), owner in zip(shapes, owners, strict=True)]
    return imbalance(units, layout), least_imbalance(units, layout), owners


@pytest.mark.parametrize(
    ("optimizer", "size", "stage"), daily_and_slow([name for name, kind in RULES.items() if kind], SIZES, (2, 3))
)
def test_state_is_spread_as_evenly_as_the_shapes_allow(optimizer, size, stage):
    shapes = shapes_of(size)
    rule = rule_of(optimizer, min(min(s) for s in shapes.values()))
    allowed = COMPROMISES.get((optimizer, size, stage), WELL_BALANCED)
    for world in WORLDS:
        found, least, owners = balance_of(rule, layout_of(size, stage, world))
        assert least - 1e-9 <= found <= max(allowed, least) + 1e-9, f"{world} ranks: {found:.3f}, {least:.3f}"
        if world == ASKED_AGAIN:
            assert owners == choose_owners(rule, planned_layout([shapes], stage=stage, world_size=world))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("size", SIZES)
def test_what_lies_whole_stays(size, world):
    layout = layout_of(size, 2, world)
    for name, owner in zip(layout.shapes, choose_owners(RULES["Muon"](), layout), strict=True):
        homes = [rank for rank in range(world) if layout.is_whole_on(name, rank)]
        assert not homes or homes == [owner]


def test_imbalance_by_hand():
    """Two ranks; 6 lies whole on rank 0, 3 and 2 are cut."""
    layout = planned_layout([{"a": (2, 3), "b": (1, 6)}], stage=2, world_size=2)
    units = [Unit(("a",), 0, 6.0), Unit(("b",), 1, 2.0)]
    assert imbalance(units, layout) == least_imbalance(units, layout) == 1.5
    layout = planned_layout([{"a": (2, 3), "b": (3, 3), "c": (1, 3)}], stage=3, world_size=2)
    units = [Unit((n,), owner, float(layout.numel(n))) for n, owner in zip("abc", [0, 0, 1], strict=True)]
    assert imbalance(units, layout) == 15 / 9
    assert least_imbalance(units, layout) == 1.0
    assert least_imbalance(units[:2], layout) == 9 / 7.5
    assert imbalance([], layout) == least_imbalance([], layout) == 1.0


def test_no_placement_beats_the_bound():
    rng = random.Random(0)
    for _ in range(200):
        world = rng.randrange(1, 5)
        shapes = {f"p{i}": (rng.randrange(1, 9), rng.randrange(1, 9)) for i in range(rng.randrange(1, 12))}
        layout = planned_layout([shapes], stage=rng.choice([2, 3]), world_size=world)
        fixed = [next((r for r in range(world) if layout.is_whole_on(name, r)), None) for name in shapes]
        owners = [rng.randrange(world) if home is None or world == 1 else home for home in fixed]
        units = [Unit((n,), owner, float(layout.numel(n))) for n, owner in zip(shapes, owners, strict=True)]
        assert imbalance(units, layout) >= least_imbalance(units, layout) - 1e-12
