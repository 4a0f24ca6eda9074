"""Checkpoints that an earlier megalr wrote: every bit is loaded, and training goes on as it would have."""

from __future__ import annotations

import json

import pytest
import torch

from tests.deepspeed.old_checkpoints import CASES, FOLDER

pytestmark = pytest.mark.distributed
MODULE = "tests.deepspeed.old_checkpoints"
# Other processors add in another order. Where numbers are rounded to few bits, such a sum may be rounded the other way.
EXACT, ROUNDED = 1e-6, 1e-3


def part_of(seen, before):
    """What there was before; numbers that have been added since begin at zero."""
    if not isinstance(before, dict):
        return seen
    assert not any(seen[key] for key in seen.keys() - before.keys())
    return {key: part_of(seen[key], before[key]) for key in before}


@pytest.mark.parametrize("case", CASES)
def test_every_bit_is_loaded(ranks, case):
    world = CASES[case][2]
    results = ranks(world).run(f"{MODULE}:load", case)
    expected = json.loads((FOLDER / case / "expected.json").read_text())
    for rank, (seen, _) in enumerate(results):
        hashes, wanted = seen.pop("hashes"), expected[rank].pop("hashes")
        assert len(wanted) > 10  # noqa: PLR2004  (weights, masters and moments of a small model)
        seen["numbers"].pop("settings")  # which are those of this run
        assert part_of(seen, expected[rank]) == expected[rank]
        assert hashes == wanted
    after = torch.load(FOLDER / case / "after.pt", weights_only=True)
    weights = results[0][1]
    assert weights.keys() == after.keys()
    tolerance = ROUNDED if case.endswith(("bf16", "q-galore")) else EXACT
    for name, weight in after.items():
        assert (weights[name] - weight).norm() <= tolerance * weight.norm(), name
