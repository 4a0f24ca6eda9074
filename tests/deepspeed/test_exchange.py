"""The exchange brings whole matrices to their owners and results back, whatever the cuts are."""

import pytest

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("layout", ["cut", "replicated", "idle ranks"])
def test_round_trip(ranks, world, layout):
    for seed in range(5):
        options = {"replicated": layout == "replicated", "idle_ranks": 1 if layout == "idle ranks" else 0}
        for report in ranks(world).run("tests.deepspeed.exchanging:round_trip", seed, **options):
            assert report["gathered"] and report["scattered"]
            assert report["sent_to_gather"] == report["due_to_gather"]
            assert world > 1 or report["sent_to_gather"] == 0


def test_replicas_agree_and_add_up(ranks):
    """Two groups of two ranks that do the same work: the first one's word counts, sums are of all four."""
    for rank, (agreed, of_group, of_all) in enumerate(ranks(4).run("tests.deepspeed.exchanging:of_replicas")):
        assert agreed == rank % 2
        assert of_group == (1 if rank < 2 else 5)
        assert of_all == 6
