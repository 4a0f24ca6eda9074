"""Where torch.distributed.checkpoint writes and reads: a safetensors file of each rank, a manifest of all.

DCP's own file storage pickles its metadata and knows neither checksums nor an all-or-nothing publication, so only its
planning is used. A file's bytes are summed while they are written; nothing is copied but tensors on an accelerator.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import LoadPlan, LoadPlanner, Metadata, SavePlan, SavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from megalr.checkpoint.arguments import check_client_state
from megalr.checkpoint.format import BY_NAME, DTYPES, piece_name
from megalr.checkpoint.manifest import Manifest, check_same, write_manifest
from megalr.checkpoint.publishing import is_own, prune, publish, tidy, unfinished, written_now
from megalr.checkpoint.reading import open_tensors
from megalr.checkpoint.values import check_values
from megalr.disk import make_folder, sync
from megalr.errors import UserError

logger = logging.getLogger(__name__)

ALIGNMENT = 8  # bytes; of a header


class FolderWriter(StorageWriter):
    """Writes one checkpoint; the coordinator publishes it when all ranks have written."""

    def __init__(self, directory: Path, tag: str, document: Mapping[str, Any], keep: int | None) -> None:
        """
        Args:
            directory: of all checkpoints.
            tag: the new folder's name.
            document: what the manifest is to say beside what is found here; "numbers" without "matrices".
            keep: how many checkpoints are to be left, the new one among them; None for all.
        """
        self._directory, self._tag, self._document, self._keep = directory, tag, document, keep
        self._folder = unfinished(directory, tag)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to do: a writer is for one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the folder is made when all ranks have a plan."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator: make an empty folder, and number the ranks."""
        check_client_state(self._document["client"])
        json.dumps(self._document)  # what JSON cannot hold is refused before anything is written
        place = self._directory / self._tag
        if place.exists() and not (place.is_dir() and is_own(place)):
            raise UserError("it is there already and no megalr checkpoint: choose another tag or directory")
        make_folder(self._directory)
        tidy(self._directory)
        self._folder.mkdir()
        names = [f"rank-{index:05d}.safetensors" for index in range(len(plans))]
        return [replace(plan, storage_data=(self._tag, name)) for plan, name in zip(plans, names, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file, and wait until the disk has it."""
        tag, _ = plan.storage_data
        if tag != self._tag:
            raise UserError(f'its tag is "{self._tag}", and the first process\'s "{tag}"')
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._write(plan, planner) if plan.items else [])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator: write the manifest, publish, prune."""
        tensors: dict[str, Any] = {}
        files: dict[str, Any] = {}
        for key, found in metadata.state_dict_metadata.items():
            assert isinstance(found, TensorStorageMetadata)
            dtype = DTYPES[found.properties.dtype]
            tensors[key] = {"shape": list(found.size), "dtype": dtype, "pieces": []}
        for result in (result for of_rank in results for result in of_rank):
            file, piece = result.storage_data
            files[file["name"]] = {"bytes": file["bytes"], "header": file["header"]}
            tensors[result.index.fqn]["pieces"].append(piece)
        for name, file in files.items():
            path = self._folder / name
            if not path.is_file() or path.stat().st_size != file["bytes"]:
                raise UserError(f"another process has written {name}, which is not there: do all see the same folder?")
        content = dict(self._document)
        content["numbers"] = {**content["numbers"], "matrices": metadata.planner_data}
        content |= {"written": written_now(self._directory), "files": files, "tensors": tensors}
        write_manifest(self._folder, content)
        sync(self._folder)
        publish(self._directory, self._tag)
        if self._keep is not None:
            try:
                prune(self._directory, self._keep)
            except OSError as error:  # the new one is there
                logger.warning("older checkpoints could not be removed: %s", error)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """It is never asked for a place by its name."""
        return False

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        (_, name), position = plan.storage_data, 0
        header: dict[str, Any] = {}
        for item in plan.items:
            size = _size_of(item)
            begin, position = position, position + size
            header[_name_of(item.index)] = {
                "dtype": DTYPES[_tensor_data(item).properties.dtype],
                "shape": list(_tensor_data(item).chunk.sizes),
                "data_offsets": [begin, position],
            }
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % ALIGNMENT)
        head = len(head).to_bytes(8, "little") + head
        file = {"name": name, "bytes": len(head) + position, "header": zlib.crc32(head)}
        results = []
        self._folder.mkdir(exist_ok=True)  # where other nodes see the coordinator's only later
        with (self._folder / name).open("wb") as out:
            out.write(head)
            for item in plan.items:
                data = planner.resolve_data(item)
                assert isinstance(data, Tensor)
                flat: Any = data.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
                values = memoryview(flat)
                chunk, begin = _tensor_data(item).chunk, out.tell()
                out.write(values)
                piece = [list(chunk.offsets), list(chunk.sizes), name, begin, zlib.crc32(values)]
                results.append(WriteResult(item.index, len(values), (file, piece)))
            out.flush()
            os.fsync(out.fileno())
        sync(self._folder)
        return results


class FolderReader(StorageReader):
    """Reads one checkpoint; of each rank's files only what is asked for."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._files = {
            (key, tuple(piece[0])): piece[2] for key, found in manifest.tensors.items() for piece in found["pieces"]
        }

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to do: a reader is for one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Shapes, dtypes and rectangles."""
        return Metadata(
            {
                key: TensorStorageMetadata(
                    TensorProperties(BY_NAME[found["dtype"]]),
                    torch.Size(found["shape"]),
                    [ChunkStorageMetadata(torch.Size(p[0]), torch.Size(p[1])) for p in found["pieces"]],
                )
                for key, found in self._manifest.tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the manifest has been read."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read rectangles into what they are for, file by file.

        Raises:
            ReplacedError: another save took the place of this one meanwhile; what was read may be a mixture.
            UserError: values cannot be trained on, see :func:`~megalr.checkpoint.values.check_values`.
        """
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            index = item.storage_index
            assert index.offset is not None
            by_file.setdefault(self._files[index.fqn, tuple(index.offset)], []).append(item)
        for name, items in by_file.items():
            with open_tensors(self._manifest, name) as file:
                for item in items:
                    begin, lengths = item.storage_offsets, item.lengths
                    where = tuple(slice(b, b + n) for b, n in zip(begin, lengths, strict=True))
                    target = planner.resolve_tensor(item)
                    values = file.get_slice(self._stored_name(item.storage_index))[where]
                    check_values(item.storage_index.fqn, values, self._manifest.folder)
                    target.copy_(values)
                    planner.commit_tensor(item, target)
        check_same(self._manifest)  # on every rank, also one that has read nothing but the numbers
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """It is never asked for a place by its name."""
        return False

    def _stored_name(self, index: MetadataIndex) -> str:
        assert index.offset is not None
        return piece_name(self._manifest.tensors[index.fqn].get("stored", index.fqn), index.offset)


def _name_of(index: MetadataIndex) -> str:
    assert index.offset is not None
    return piece_name(index.fqn, index.offset)


def _tensor_data(item: WriteItem) -> Any:
    assert item.tensor_data is not None
    return item.tensor_data


def _size_of(item: WriteItem) -> int:
    data = _tensor_data(item)
    return int(data.chunk.sizes.numel()) * data.properties.dtype.itemsize
