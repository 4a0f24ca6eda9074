"""What the ranks run in the exchange tests: hand-made layouts, every element's value known."""

from __future__ import annotations

import math
import random

import torch
import torch.distributed as dist

from megalr.layout.exchange import Exchange
from megalr.layout.layout import Fragment, Layout
from megalr.layout.placement import Unit


def random_layout(seed: int, world_size: int, *, replicated: bool = False, idle_ranks: int = 0) -> Layout:
    """Parameters of odd shapes, cut at random places; two buffers a rank; the last ranks may hold nothing."""
    rng = random.Random(seed)
    shapes = {f"p{i}": rng.choice([(1, 9), (7, 1), (5, 4), (3, 11), (2, 3, 5), (6,)]) for i in range(8)}
    holders = max(1, world_size - idle_ranks)
    used = {(rank, buffer): 0 for rank in range(world_size) for buffer in (0, 1)}
    fragments = []
    for name, shape in shapes.items():
        numel, buffer = math.prod(shape), rng.randrange(2)
        if replicated:
            places = [(rank, 0, numel, rank) for rank in range(holders)]
        else:
            cuts = sorted({0, numel, *(rng.randrange(numel + 1) for _ in range(rng.randrange(3)))})
            places = [(rng.randrange(holders), a, b, 0) for a, b in zip(cuts, cuts[1:], strict=False)]
        for rank, begin, end, copy in places:
            fragments.append(Fragment(name, begin, end - begin, rank, buffer, used[rank, buffer], copy))
            used[rank, buffer] += end - begin
    return Layout(world_size, shapes, fragments)


def round_trip(seed: int, replicated: bool = False, idle_ranks: int = 0) -> dict[str, object]:
    """Gather two fields at random owners, compare, scatter other values, compare again."""
    rank, world = dist.get_rank(), dist.get_world_size()
    layout = random_layout(seed, world, replicated=replicated, idle_ranks=idle_ranks)
    rng = random.Random(seed + 1)
    items = [Unit((name,), rng.randrange(world)) for name in layout.shapes]
    truth = {n: torch.arange(math.prod(s)).float().view(s) + 100 * i for i, (n, s) in enumerate(layout.shapes.items())}
    first, second = _buffers(layout, rank, truth), _buffers(layout, rank, {n: -t for n, t in truth.items()})
    exchange = Exchange(layout, rank, dist.group.WORLD)
    whole = exchange.gather(items, [first, second])
    gathered = set(whole) == {i.names[0] for i in items if i.owner == rank} and all(
        torch.equal(pair[0], truth[name]) and torch.equal(pair[1], -truth[name]) for name, pair in whole.items()
    )
    sent_to_gather = exchange.bytes_sent
    exchange.scatter(items, {name: [pair[0] * 2, pair[1] * 3] for name, pair in whole.items()}, [first, second])
    expected_first = _buffers(layout, rank, {n: 2 * t for n, t in truth.items()})
    expected_second = _buffers(layout, rank, {n: -3 * t for n, t in truth.items()})
    scattered = all(map(torch.equal, first + second, expected_first + expected_second))
    return {
        "gathered": gathered,
        "scattered": scattered,
        "sent_to_gather": sent_to_gather,
        "due_to_gather": 8
        * sum(f.length for i in items for f in layout.cover(i.names[0], i.owner) if f.rank == rank != i.owner),
    }


def of_replicas() -> tuple[float, float, float]:
    """Of the ranks' numbers, in two groups of two that do the same: what is agreed upon, and both kinds of sum."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    replicas = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    exchange = Exchange(random_layout(0, 2), rank % 2, groups[rank // 2], replicas=replicas[rank % 2])
    mine = torch.tensor([float(rank)])
    found = [operation(mine.clone()) for operation in (exchange.broadcast_replicas, exchange.sum, exchange.sum_all)]
    return found[0].item(), found[1].item(), found[2].item()


def _buffers(layout: Layout, rank: int, values: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    buffers = []
    for buffer in (0, 1):
        here = [f for f in layout.fragments if f.rank == rank and f.buffer == buffer]
        flat = torch.zeros(sum(f.length for f in here))
        for f in here:
            flat[f.offset : f.offset + f.length] = values[f.name].reshape(-1)[f.start : f.start + f.length]
        buffers.append(flat)
    return buffers
