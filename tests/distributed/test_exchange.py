"""The exchange brings whole matrices to their owners and results back, whatever the cuts are."""

import pytest

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("layout", ["cut", "replicated", "idle ranks"])
def test_round_trip(ranks, world, layout):
    for seed in range(5):
        options = {"replicated": layout == "replicated", "idle_ranks": 1 if layout == "idle ranks" else 0}
        for report in ranks(world).run("tests.distributed.exchanging:round_trip", seed, **options):
            assert report["gathered"] and report["scattered"]
            assert report["sent_to_gather"] == report["due_to_gather"]
            assert world > 1 or report["sent_to_gather"] == 0
