"""Sharding of whole-matrix work: fragments (what lies where), placement (who owns what), exchange (moving data).

Nothing here knows any rule.
"""

from megalr.partition.exchange import Exchange, Item, buckets
from megalr.partition.fragments import Shard, read_shard
from megalr.partition.layout import Fragment, Layout
from megalr.partition.placement import Unit, place

__all__ = ["Exchange", "Fragment", "Item", "Layout", "Shard", "Unit", "buckets", "place", "read_shard"]
