"""Read checkpoints of ``torch.distributed.checkpoint`` (DCP): entries, whole tensors, or ranges of rows, without a collective."""

from collections.abc import Iterator, Sequence
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from growkern.checkpoints.output import METADATA
from growkern.distributed.shards import Range
from growkern.errors import CheckpointError
from growkern.support.text import one_line

KeyPath = tuple[str | int, ...]  # keys and indices that lead to an entry of a nested state dict


class _Into(LoadPlanner):
    """Puts what a reader reads into one tensor, or keeps the bytes of objects by key."""

    def __init__(self, into: Tensor | None = None) -> None:
        self.into, self.found = into, dict[str, BytesIO]()

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None: ...

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        self.found[read_item.storage_index.fqn] = value

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part, chunk = self.into, read_item.dest_index.offset or ()
        assert part is not None
        for axis, (first, n) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            part = part.narrow(axis, chunk[axis] + first, n)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None: ...


class Source:
    """A stored checkpoint.

    Attributes:
        folder: Folder of the checkpoint.
        tensors: Metadata of every tensor by key.
        paths: Path in the saved state dict of every entry by key; a key is its path, joined by dots.
    """

    def __init__(self, folder: Path) -> None:
        """Read the metadata.

        Raises:
            CheckpointError: The folder has no metadata, or metadata that this torch cannot read.
        """
        if not (folder / METADATA).is_file():
            raise CheckpointError(
                f"{folder} has no file {METADATA}: pass a folder that torch.distributed.checkpoint.save wrote."
            )
        self.folder, self._reader = folder, FileSystemReader(folder)
        try:
            metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(metadata, True)
        except Exception as error:  # of pickle, or an AssertionError
            raise CheckpointError(
                f"cannot read {folder / METADATA}: {one_line(error)}; copy the checkpoint again, or save it by this torch."
            ) from error
        stored = metadata.state_dict_metadata
        self.tensors = {k: v for k, v in stored.items() if isinstance(v, TensorStorageMetadata)}
        paths: dict[str, KeyPath] = metadata.planner_data or {}
        self.paths = {key: paths.get(key, (key,)) for key in stored}

    @property
    def files(self) -> Iterator[str]:
        """Names of the files that hold the checkpoint."""
        yield METADATA
        yield from {info.relative_path for info in self._reader.storage_data.values()}

    def of(self, key: str) -> "StoredTensor":
        """Return a tensor that is read on demand."""
        return StoredTensor(self, key)

    def tensor(self, key: str) -> Tensor:
        """Read a whole tensor."""
        stored = self.of(key)
        into = torch.empty(stored.shape, dtype=stored.dtype)
        stored.read(into)
        return into

    def contents(self, keys: Sequence[str]) -> dict[str, BytesIO]:
        """Read the bytes of entries that are no tensors."""
        place, items = torch.Size((0,)), list[ReadItem]()
        for index in map(MetadataIndex, keys):
            items.append(ReadItem(LoadItemType.BYTE_IO, index, place, index, place, place))
        found = _Into()
        self._read(items, found, f"{len(keys)} entries")
        return found.found

    def values(self, keys: Sequence[str]) -> dict[str, Any]:
        """Read entries of plain Python values, or tensors."""
        known = {key: self.tensor(key) for key in keys if key in self.tensors}
        contents = self.contents([key for key in keys if key not in known])
        return {
            key: known[key] if key in known else self._loaded(key, contents[key]) for key in keys
        }

    def _loaded(self, key: str, content: BytesIO) -> Any:
        try:
            return torch.load(content, weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"cannot read the entry {key} of {self.folder}: {one_line(error)}; growth reads numbers, texts, lists and dicts."
            ) from error

    def read(self, key: str, into: Tensor, rows: Sequence[Range]) -> None:
        """Read rows of a tensor into the same rows of a tensor of its shape."""
        metadata, items = self.tensors[key], list[ReadItem]()
        for first, n in rows:
            rest = metadata.size[1:]
            chunk = ChunkStorageMetadata(
                torch.Size((first, *(0 for _ in rest))), torch.Size((n, *rest))
            )
            items += create_read_items_for_chunk_list(key, metadata, [chunk])
        self._fill(key, items, into, sum(n for _, n in rows) * prod(metadata.size[1:]))

    def read_all(self, key: str, into: Tensor) -> None:
        """Read a whole tensor into a tensor of its shape."""
        metadata = self.tensors[key]
        chunk = ChunkStorageMetadata(torch.Size([0] * len(metadata.size)), metadata.size)
        items = create_read_items_for_chunk_list(key, metadata, [chunk])
        self._fill(key, items, into, prod(metadata.size))

    def _fill(self, key: str, items: list[ReadItem], into: Tensor, n: int) -> None:
        if sum(prod(item.lengths) for item in items) != n:
            raise CheckpointError(
                f"{self.folder} does not hold all of {key}: the process that saved a part is missing; save the checkpoint again."
            )
        self._read(items, _Into(into), key)

    def _read(self, items: list[ReadItem], into: _Into, key: str) -> None:
        try:
            self._reader.read_data(LoadPlan(items), into).wait()
        except Exception as error:
            raise CheckpointError(
                f"cannot read {key} of {self.folder}: {one_line(error)}; copy the checkpoint again."
            ) from error


class StoredTensor:
    """A tensor of a checkpoint; see ``growkern.execution.boxwise.Stored``."""

    def __init__(self, source: Source, key: str) -> None:
        metadata = source.tensors[key]
        self.source, self.name = source, key
        self.shape, self.dtype = tuple(metadata.size), metadata.properties.dtype

    def read(self, into: Tensor, rows: Sequence[Range] | None = None) -> None:
        """Read rows (None: all) into the same rows of a tensor of the whole shape."""
        if rows is None or not self.shape:
            self.source.read_all(self.name, into)
        else:
            self.source.read(self.name, into, rows)
