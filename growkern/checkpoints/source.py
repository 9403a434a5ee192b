"""Source files of a checkpoint: JSON, tensors in safetensors shards, and a snapshot that notices changes.

Tensors are read by file reads, because reading a memory map of a file that was cut short ends the process (SIGBUS).
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any, cast

import torch
from torch import Tensor

from growkern.checkpoints.shards import DTYPES, INDEX, SINGLE
from growkern.errors import CheckpointError, raise_all
from growkern.support.text import one_line

PICKLES = "pytorch_model*.bin"
MAX_JSON = 1 << 28  # bytes; no config and no index is larger
State = tuple[int, int, int]  # bytes, time of the last change in ns, inode


@dataclass(frozen=True)
class Snapshot:
    """Size, modification time and inode of every file of a folder at one moment.

    Attributes:
        folder: The folder.
        states: State of each file, by name.
    """

    folder: Path
    states: Mapping[str, State]

    @staticmethod
    def of(folder: Path) -> "Snapshot":
        """Take a snapshot of a folder; links are followed."""
        return Snapshot(folder, {p.name: _state(p) for p in folder.iterdir() if p.is_file()})

    def refuse_changes(self, names: Iterable[str]) -> None:
        """Raise CheckpointError if one of these files is no longer as it was."""
        now = Snapshot.of(self.folder).states
        changed = [name for name in names if now.get(name) != self.states.get(name)]
        if changed:
            raise CheckpointError(
                f"{self.folder} changed while it was read ({', '.join(changed[:3])}); grow it when nothing writes to the folder."
            )


def _state(path: Path) -> State:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


class StoredTensors:
    """Tensors in the safetensors shards of a folder, by name on disk. The shards stay open.

    Attributes:
        files: Names of the shards, and of the index if there is one.
        dtypes: Dtype of each tensor.
        shapes: Shape of each tensor.
    """

    def __init__(self, folder: Path) -> None:
        """Read the headers of the shards.

        Raises:
            CheckpointError: Shards are missing, outside the folder, truncated, or without a tensor that the index lists; every reason
                at once.
        """
        listed = _listed(folder)
        self.folder, self.files = folder, (*listed, *([] if SINGLE in listed else [INDEX]))
        self.dtypes: dict[str, torch.dtype] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._shards: dict[str, tuple[str, Any]] = {}  # tensor -> name and reader of its shard
        self._mapped: dict[int, str] = {}  # address of a memory-mapped tensor -> name of the tensor
        self._maps: dict[str, Any] = {}  # name of a shard -> memory-mapping reader
        problems = [p for file, names in sorted(listed.items()) for p in self._open(file, names)]
        if problems and SINGLE in listed:
            raise CheckpointError(problems[0])
        raise_all(CheckpointError, f"{folder} is incomplete:", problems)

    def _open(self, file: str, names: list[str]) -> list[str]:
        """Open a shard, which should have these tensors; return the problems."""
        shown, path = one_line(file), self.folder / file
        if Path(file).name != file:
            return [f"{shown}: is not the name of a file in the folder; correct {INDEX}."]
        try:
            if not path.is_file():
                return [
                    f"{shown}: is missing, with {len(names)} tensors ({one_line(names[0])}, ...); copy the file again."
                ]
            reader = _opened(path, "pread")
        except OSError as error:  # a name too long, or no permission
            return [f"{shown}: cannot be read ({error.strerror}); correct {INDEX}."]
        except CheckpointError as error:
            return [str(error)]
        held = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118  (no mapping)
        codes = {name: part.get_dtype() for name, part in held.items()}
        if odd := sorted({code for code in codes.values() if code not in DTYPES}):
            return [
                f"{shown}: has tensors of {', '.join(odd)}; growkern grows {', '.join(DTYPES)}: convert the tensors first."
            ]
        for name in {n for n in held if n not in self.dtypes} | (held.keys() & set(names)):
            self.dtypes[name] = DTYPES[codes[name]]
            self.shapes[name] = tuple(held[name].get_shape())
            self._shards[name] = file, reader
        missing = [name for name in names if name not in held]
        return [f"{one_line(name)}: is not in {shown}; copy the file again." for name in missing]

    @property
    def n_elements(self) -> int:
        """Number of elements of all tensors."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def read(self, name: str) -> Tensor:
        """Read a tensor; raise CheckpointError if its shard has been cut short."""
        import safetensors

        file, reader = self._shards[name]
        try:
            return reader.get_tensor(name)
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(
                f"cannot read {name} from {self.folder / file}: {error}. The file was cut short; copy it again."
            ) from None

    def map(self, name: str) -> Tensor:
        """Map a tensor to memory, without reading its elements."""
        file = self._shards[name][0]
        if file not in self._maps:
            self._maps[file] = _opened(self.folder / file, "mmap")
        tensor: Tensor = self._maps[file].get_tensor(name)
        self._mapped[tensor.data_ptr()] = name
        return tensor

    def name_of(self, tensor: Tensor) -> str | None:
        """Return the name of a tensor that ``map`` returned, or of a tensor that shares all its elements; else None."""
        name = self._mapped.get(tensor.data_ptr()) if tensor.numel() else None
        if name is None or not tensor.is_contiguous() or tensor.dtype != self.dtypes[name]:
            return None
        return name if tensor.shape == self.shapes[name] else None


@dataclass(frozen=True)
class Slice:
    """A stored tensor as transformers' loader takes it: ``slice[...]`` is the tensor."""

    tensors: StoredTensors
    name: str
    mapped: bool

    def __getitem__(self, index: EllipsisType) -> Tensor:
        read = self.tensors.map if self.mapped else self.tensors.read
        return read(self.name)[index]


def slices(tensors: StoredTensors, mapped: Collection[str]) -> dict[str, Slice]:
    """Return all stored tensors as transformers' loader takes them; those in ``mapped`` are mapped to memory, all others are read."""
    return {name: Slice(tensors, name, name in mapped) for name in tensors.dtypes}


def parsed(path: Path) -> dict[str, Any]:
    """Read a JSON file; raise CheckpointError if the file does not contain a JSON object."""
    try:
        if (n_bytes := path.stat().st_size) > MAX_JSON:
            raise ValueError(f"the file has {n_bytes / 1e9:.3g} GB")
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise CheckpointError(f"cannot read {path}: its values are nested too deeply.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"cannot read {path}: the file contains no JSON object.")
    return content  # pyright: ignore[reportUnknownVariableType]


def _listed(folder: Path) -> dict[str, list[str]]:
    """Return the tensors of each shard that the index lists; no tensor if one file has all of them."""
    if (folder / SINGLE).is_file():
        return {SINGLE: []}
    if not (folder / INDEX).is_file():
        pickled = sorted(path.name for path in folder.glob(PICKLES))
        raise CheckpointError(
            f"{folder} has no {SINGLE} and no {INDEX}"
            + (
                f", but {pickled[0]}: load the checkpoint by from_pretrained and save it by save_pretrained, which writes safetensors."
                if pickled
                else "; pass a folder that save_pretrained wrote."
            )
        )
    found: Any = parsed(folder / INDEX).get("weight_map")
    places = cast(dict[str, Any], found) if isinstance(found, dict) else {}
    listed: dict[str, list[str]] = {}
    for name, file in places.items():
        listed.setdefault(str(file), []).append(name)
    if not listed or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(
            f"{folder / INDEX} has no weight_map; save the checkpoint again by save_pretrained."
        )
    return listed


def _opened(path: Path, backend: str) -> Any:
    import safetensors

    opened: Any = safetensors.safe_open
    try:
        return opened(path, "pt", backend=backend)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path.name}: is damaged or cut short ({error}); copy the file again."
        ) from None
