"""Entries as torch.distributed.checkpoint plans them: who writes what, and who reads what from where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, LoadPlan, Metadata, SavePlan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megalr.checkpoint.format import DTYPES
from megalr.errors import UserError
from megalr.layout.rectangles import Entry, Piece

_Places = dict[tuple[str, torch.Size], Tensor]


class EntrySaver(DefaultSavePlanner):
    """Writes every rectangle once, whoever has it, and collects numbers that ranks have on their own."""

    def __init__(self, entries: Mapping[str, Entry], numbers: Mapping[str, Any]) -> None:
        """
        Args:
            entries: this rank's; a rectangle that several ranks have is written by one of them.
            numbers: this rank's, by name; those of all ranks become the metadata's ``planner_data``.
        """
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._entries, self._numbers = entries, numbers
        self._data = _places(entries)

    def create_local_plan(self) -> SavePlan:
        """What this rank could write.

        Raises:
            UserError: it is of a dtype that files cannot hold.
        """
        for key, entry in self._entries.items():
            if entry.dtype not in DTYPES:
                kind, _, name = key.partition("/")
                raise UserError(
                    f"{name} ({kind}) has dtype {entry.dtype}, which checkpoints cannot hold: keep it as real numbers "
                    "(torch.view_as_real), or a buffer out of the model's state (persistent=False)"
                )
        items = [
            WriteItem(
                MetadataIndex(key, torch.Size(piece.offsets)),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(_chunk(piece), TensorProperties(entry.dtype), torch.Size(entry.shape)),
            )
            for key, entry in self._entries.items()
            for piece in entry.pieces
        ]
        self.plan = SavePlan(items, planner_data=dict(self._numbers))
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Every rectangle once."""
        plans, metadata = super().create_global_plan(all_plans)
        numbers = {name: value for plan in all_plans for name, value in (plan.planner_data or {}).items()}
        return plans, replace(metadata, planner_data=numbers)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The values of a rectangle."""
        assert write_item.index.offset is not None
        return self._data[write_item.index.fqn, write_item.index.offset]


class EntryLoader(DefaultLoadPlanner):
    """Reads whatever overlaps the rectangles that this rank wants."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        """
        Args:
            entries: to be read into; their keys and shapes have been compared.
        """
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._entries, self._data = entries, _places(entries)

    def create_local_plan(self) -> LoadPlan:
        """What this rank reads."""
        assert self.metadata is not None
        items: list[ReadItem] = []
        for key, entry in self._entries.items():
            saved = self.metadata.state_dict_metadata[key]
            assert isinstance(saved, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(key, saved, [_chunk(piece) for piece in entry.pieces])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The rectangle that is read into."""
        assert index.offset is not None
        return self._data[index.fqn, index.offset]


def _places(entries: Mapping[str, Entry]) -> _Places:
    return {(key, torch.Size(p.offsets)): p.data for key, entry in entries.items() for p in entry.pieces}


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(piece.offsets), piece.data.shape)
