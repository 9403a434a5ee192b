"""Safetensors shards of a checkpoint: a header reader, a writer that takes tensors in any order, an output folder written atomically."""

import json
import os
import re
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from growkern.errors import CheckpointError, PlanError, raise_all
from growkern.support.interrupts import uninterrupted
from growkern.support.memory import write_bytes

SINGLE, INDEX, PATTERN = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model{suffix}.safetensors",
)
PICKLES = "pytorch_model*.bin"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
ALIGNMENT = 8  # bytes; safetensors pads the header to a multiple


def stored(folder: Path) -> dict[str, torch.dtype]:
    """Read the names and dtypes of a checkpoint's tensors from the headers of its shards.

    Returns:
        Dtype of each tensor, by name on disk.

    Raises:
        CheckpointError: Shards are missing, truncated, or without a tensor that the index lists; every reason at once.
    """
    if (folder / SINGLE).is_file():
        return _header(folder / SINGLE)
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
    places: Any = parsed(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
        raise CheckpointError(
            f"{folder / INDEX} has no weight_map; save the checkpoint again by save_pretrained."
        )
    by_file: dict[str, list[str]] = {}
    for name, file in places.items():  # pyright: ignore[reportUnknownVariableType]
        by_file.setdefault(str(file), []).append(str(name))  # pyright: ignore[reportUnknownArgumentType]
    dtypes: dict[str, torch.dtype] = {}
    problems: list[str] = []
    for file, names in sorted(by_file.items()):
        if not (folder / file).is_file():
            problems.append(
                f"{file}: is missing, with {len(names)} tensors ({names[0]}, ...); copy the file again."
            )
            continue
        try:
            held = _header(folder / file)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        missing = [name for name in names if name not in held]
        problems += [f"{name}: is not in {file}; copy the file again." for name in missing]
        dtypes |= held
    raise_all(CheckpointError, f"{folder} is incomplete:", problems)
    return dtypes


def parsed(path: Path) -> dict[str, Any]:
    """Read a JSON file; raise CheckpointError if the file does not contain a JSON object."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"cannot read {path}: the file contains no JSON object.")
    return content  # pyright: ignore[reportUnknownVariableType]


def n_bytes_of(text: str) -> int:
    """Parse a size such as ``"5GB"``; raise PlanError for any other text."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B|)\s*", text.upper())
    if match is None or (n_bytes := int(float(match[1]) * UNITS[match[2]])) < 1:
        raise PlanError(f"cannot read the size {text!r}; write a size such as 5GB or 500MB.")
    return n_bytes


def _header(path: Path) -> dict[str, torch.dtype]:
    import safetensors

    read: Any = safetensors.safe_open
    try:
        with read(path, "pt") as file:
            codes: dict[str, str] = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path.name}: is damaged or cut short ({error}); copy the file again."
        ) from None
    if odd := sorted({code for code in codes.values() if code not in DTYPES}):
        raise CheckpointError(
            f"{path.name}: has tensors of {', '.join(odd)}; growkern grows {', '.join(DTYPES)}: convert the tensors first."
        )
    return {name: DTYPES[code] for name, code in codes.items()}


class Shards:
    """Writer of shards whose tensor names and shapes are known; each tensor is written directly to its place in a file.

    Attributes:
        files: Names of the shard files.
        n_bytes: Bytes of all tensors.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], max_shard_size: int) -> None:
        """Create the shard files with their headers.

        Args:
            folder: Folder of the shards; the folder exists.
            tensors: Tensors of the final shapes and dtypes (on the meta device) by name, in the order of the shards.
            max_shard_size: Maximum bytes of a shard; a larger tensor gets a shard of its own.
        """
        from huggingface_hub import split_torch_state_dict_into_shards

        split = split_torch_state_dict_into_shards(
            dict(tensors), filename_pattern=PATTERN, max_shard_size=max_shard_size
        )
        self.folder, self.files = folder, tuple(split.filename_to_tensors)
        self.n_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
        self._index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        self._left = dict(tensors)
        self._at: dict[str, tuple[Path, int]] = {}
        for file, names in split.filename_to_tensors.items():
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            start = 0
            for name in sorted(names, key=lambda n: (-tensors[n].element_size(), n)):  # aligned
                t = tensors[name]
                end = start + t.numel() * t.element_size()
                header[name] = {
                    "dtype": CODES[t.dtype],
                    "shape": list(t.shape),
                    "data_offsets": [start, end],
                }
                self._at[name], start = (folder / file, start), end
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % ALIGNMENT)
            with open(folder / file, "wb") as opened:
                opened.write(len(text).to_bytes(8, "little") + text)
                opened.truncate(opened.tell() + start)
            for name in names:
                path, offset = self._at[name]
                self._at[name] = path, 8 + len(text) + offset

    def write(self, name: str, tensor: Tensor) -> int:
        """Write a tensor, exactly once; return its size in bytes."""
        planned = self._left.pop(name)
        assert tensor.shape == planned.shape, (name, tensor.shape, planned.shape)
        path, offset = self._at[name]
        with open(path, "r+b", buffering=0) as file:
            file.seek(offset)
            return write_bytes(tensor.to(planned.dtype), file)

    def close(self) -> None:
        """Write the index if there are several shards; assert that all tensors were written."""
        assert not self._left, [*self._left][:3]
        if len(self.files) > 1:
            text = json.dumps(self._index, indent=2, sort_keys=True) + "\n"
            (self.folder / INDEX).write_text(text, encoding="utf-8")


@contextmanager
def aside(out: Path, overwrite: bool) -> Generator[Path]:
    """Yield a temporary folder beside ``out``, which is renamed to ``out`` on success and removed on failure.

    Raises:
        CheckpointError: ``out`` cannot be written.
    """
    tag = uuid4().hex[:8]
    folder, replaced = (out.with_name(f".{out.name}.{tag}.{what}") for what in ("part", "replaced"))
    try:
        folder.mkdir()
        yield folder
        for path in (*folder.iterdir(), folder):
            _sync(path)
        with uninterrupted():
            if overwrite and out.exists():
                out.rename(replaced)
            try:
                folder.rename(out)
            except OSError:
                if replaced.exists():
                    replaced.rename(out)
                raise
        _sync(out.parent)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"cannot write {out}: {error}. Nothing was changed.") from error
        raise
    finally:
        if out.exists():
            shutil.rmtree(replaced, ignore_errors=True)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
