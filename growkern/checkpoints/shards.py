"""Safetensors shards of a target, whose tensors are written in any order."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growkern.errors import PlanError
from growkern.support.memory import write_bytes
from growkern.support.text import short

CONFIG, SINGLE, INDEX, PATTERN = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model{suffix}.safetensors",
)
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


def n_bytes_of(text: str) -> int:
    """Parse a size such as ``"5GB"``; raise PlanError for any other text."""
    match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]+)?)\s*([KMGT]B|)\s*", text.upper())
    if match is None or (n_bytes := int(float(match[1]) * UNITS[match[2]])) < 1:
        raise PlanError(f"cannot read the size {short(text)}; write a size such as 5GB or 500MB.")
    return n_bytes


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
