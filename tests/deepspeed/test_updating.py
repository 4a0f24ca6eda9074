"""What an update moves, when, and how much memory that takes; how much state each rank keeps."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from megalr.layout.rounds import ROUNDS_IN_MEMORY
from tests.covering import slow_but
from tests.deepspeed.updating import EVEN, PAIR, SEVEN, largest_matrix
from tests.references import REFERENCES

pytestmark = pytest.mark.distributed
MODULE = "tests.deepspeed.updating"


@pytest.mark.parametrize("world", [3, 4])
@pytest.mark.parametrize("shapes", [EVEN, SEVEN], ids=["even", "seven"])
@pytest.mark.parametrize("matrices", [2, 12, 10_000])
def test_temporary_memory_stays_below_the_bound(ranks, world, shapes, matrices):
    """Of a rule that needs one matrix; the bound is as large as some number of matrices."""
    bucket_bytes = matrices * largest_matrix(shapes)
    for peak, left, rounds in ranks(world).run(f"{MODULE}:memory", shapes, 3, bucket_bytes):
        assert left == 0
        # A matrix that is larger than a round is alone in it.
        assert peak <= max(bucket_bytes, 6 * largest_matrix(shapes)) + largest_matrix(shapes)
        assert matrices < 10_000 or rounds == 1


@pytest.mark.parametrize("transport", [False, True])
@pytest.mark.parametrize("bucket_bytes", [1, 30_000, 100_000])
def test_temporary_memory_of_a_refactorization(ranks, bucket_bytes, transport):
    one_pair = (3 if transport else 1) * 4 * sum(m * n for m, n in PAIR)
    for peak, left in ranks(3).run(f"{MODULE}:refactorization_memory", bucket_bytes, transport=transport):
        assert left == 0
        assert one_pair < peak <= max(bucket_bytes, ROUNDS_IN_MEMORY * one_pair)


@pytest.mark.parametrize("world", [2, 3])
def test_the_next_round_travels_while_this_one_is_computed(ranks, world):
    results = ranks(world).run(f"{MODULE}:events", 3, 1)  # one matrix a round and owner
    rounds = -(-len(SEVEN) // world)
    for happened, _, _ in results:
        first_of_round = [i for i, event in enumerate(happened) if event == "rule"]
        assert len(first_of_round) in (rounds, rounds - 1)
        for k, index in enumerate(first_of_round):
            # Started by then: gathers up to k + 1, scatters up to k - 1.
            assert happened[:index].count("start") == min(k + 2, rounds) + k
        assert happened.count("start") == 2 * rounds
    # Every message that one rank starts is the one that the others expect at that place.
    for message in zip(*(sizes for _, sizes, _ in results), strict=True):
        for rank, (to, _) in enumerate(message):
            assert to == [came[rank] for _, came in message]


def test_whole_matrices_are_computed_while_the_first_cut_ones_travel(ranks):
    for happened, _, local in ranks(3).run(f"{MODULE}:events", 1, 1):
        assert local > 0
        assert happened[: local + 1] == ["start"] + ["rule"] * local


@pytest.mark.parametrize(
    ("world", "stage"),
    slow_but(
        itertools.product((1, 2, 3, 4), (0, 1, 2, 3)),
        [(2, 0), *((world, stage) for world in (2, 3) for stage in (1, 2, 3)), (4, 3)],
    ),
)
def test_bytes_moved(ranks, world, stage):
    for traffic in ranks(world).run(f"{MODULE}:traffic", stage):
        assert traffic.planned
        assert traffic.moved == 2 * 4 * traffic.away_from_owners
        if world == 1 or stage == 0:
            assert traffic.moved == 0
        else:
            assert 0 < traffic.moved / world <= 2 * 4 * traffic.elements / world


RULES = [name for name, reference in REFERENCES.items() if reference.papers_floats(64, 64, 16) is not None]


@pytest.mark.parametrize(
    ("optimizer", "stage", "world"),
    slow_but(itertools.product(RULES, (2, 3), (1, 2, 4)), [("Muon", 2, 2), ("GaLoreAdamW", 3, 2)]),
)
def test_state_by_rank(ranks, optimizer, stage, world):
    """Four layers of 4 matrices of 64 x 64 and 3 of 64 x 172."""
    floats = REFERENCES[optimizer].papers_floats
    total = 4 * 4 * (4 * floats(64, 64, 16) + 3 * floats(64, 172, 16))
    results = ranks(world).run(f"{MODULE}:state_bytes", stage, optimizer)
    kept = [result[0] for result in results]
    scalars = sum(kept) - total
    assert 0 <= scalars <= 4 * 28
    assert max(kept) <= 1.15 * total / world
    for _, by_rule, table, measured, computed in results:
        assert by_rule == sum(kept)
        assert measured == computed
        if world > 1:
            assert table.endswith("allow 1.00")
            assert f"largest {max(kept) * world / sum(kept):.2f} x the mean" in table


# State that is not fp32 throughout, or that not every matrix has.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "4 and 8 bits": ("QGaLoreAdamW", {"min_8bit_size": 1024}),
    "small moments in fp32": ("QGaLoreAdamW", {"min_8bit_size": 2000, "proj_type": "reverse_std"}),
    "columns": ("FRUGAL", {}),
    "sparse moments": ("SPAM", {"density": 0.3}),
    "a basis and its complement": ("FRUGAL", {"projector": "random"}),
    "no state": ("SCALE", {}),
    "momentum of the head": ("SCALE", {"head": True, "embeddings": True}),
    "a row of the head": ("AdamMini", {"head": True}),
    "one block of four": ("BAdam", {"switch_interval": 1}),
    "one block, not yet changed": ("BAdam", {"switch_interval": 5, "block_order": "descending"}),
}


@pytest.mark.parametrize(
    ("case", "stage"),
    slow_but(
        itertools.product(OTHERS, (0, 1, 2, 3)),
        [("columns", 0), ("one block of four", 1), ("momentum of the head", 2), ("4 and 8 bits", 3)],
    ),
)
def test_computed_state_of_other_forms(ranks, case, stage):
    optimizer, params = OTHERS[case]
    results = ranks(3).run(f"{MODULE}:state_bytes", stage, optimizer, **params)
    for _, _, _, measured, computed in results:
        assert measured == computed
    whole = sum(kept for kept, *_ in results) // (3 if stage == 0 else 1)
    share = 4 if REFERENCES[optimizer].rests else 1  # of the blocks, all of one size
    assert all(share * whole == by_rule for _, by_rule, *_ in results)


@pytest.mark.parametrize("stage", slow_but((0, 1), [1]))
def test_computed_state_at_other_stages(ranks, stage):
    for _, _, table, measured, computed in ranks(3).run(f"{MODULE}:state_bytes", stage, "FiraAdamW"):
        assert measured == computed
        assert ("x the mean" in table) == (stage > 0)
