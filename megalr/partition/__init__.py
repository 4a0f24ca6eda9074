"""Sharding of whole-matrix work: fragments (what lies where), placement (who owns what), exchange (moving data).

Nothing here knows any rule.
"""

from megalr.partition.exchange import Exchange, Item, buckets
from megalr.partition.fragments import Shard, frozen_parts, planned_layout, read_shard
from megalr.partition.joining import join
from megalr.partition.layout import Fragment, Layout
from megalr.partition.placement import Unit, imbalance, least_imbalance, place
from megalr.partition.tensor_parallel import (
    in_whole,
    joined,
    mark_cut,
    mark_gradients,
    mark_places,
    own_part,
    place_of_part,
    places_in_whole,
    read_shards,
    tensor_parallel_cuts,
    tensor_parallel_rank,
    whole_frozen,
)

__all__ = [
    "Exchange",
    "Fragment",
    "Item",
    "Layout",
    "Shard",
    "Unit",
    "buckets",
    "frozen_parts",
    "imbalance",
    "in_whole",
    "join",
    "joined",
    "least_imbalance",
    "mark_cut",
    "mark_gradients",
    "mark_places",
    "own_part",
    "place",
    "place_of_part",
    "places_in_whole",
    "planned_layout",
    "read_shard",
    "read_shards",
    "tensor_parallel_cuts",
    "tensor_parallel_rank",
    "whole_frozen",
]
