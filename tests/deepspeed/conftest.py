"""The ``ranks`` fixture."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.deepspeed.harness import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """``ranks(world_size).run("module:function", ...)``: pools that live as long as the test session."""
    pools: dict[int, RankPool] = {}

    def pool(world_size: int) -> RankPool:
        return pools.setdefault(world_size, RankPool(world_size))

    yield pool
    for each in pools.values():
        each.close()
