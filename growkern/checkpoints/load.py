"""Loading of transformers checkpoints, and the layout of a model's tensors on disk."""

import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from growkern.checkpoints.shards import CONFIG
from growkern.checkpoints.source import Snapshot, StoredTensors, parsed, slices
from growkern.errors import CheckpointError, UnsupportedModelError, raise_all
from growkern.planning.growth_plan import GrowthPlan, TensorRow
from growkern.support.text import one_line, short

# fields by which transformers loads kernels from the hub, replaces modules, or distributes the model
ACTED_ON = {
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation", "_experts_implementation",
    "_experts_implementation_internal", "fusion_config", "kernel_config", "distributed_config", "transformers_weights",
}  # fmt: skip
COUNT = re.compile(r"(?:num|n)_(?:\w+_)?(?:layers?|(labels|experts))|(?:en|de)coder_layers")
MANY = 1 << 16  # more labels or experts than a model has
NESTING = 20  # more levels than a config has
SLACK = 1 << 24  # elements of buffers that are computed, not stored
DETAIL = 500  # characters of a message of transformers


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        folder: Folder of the checkpoint.
        model: The model on the CPU, in evaluation mode, in the widest stored dtype. ``load`` says which weights are in memory.
        stored: The tensors on disk.
        unused: Names of stored tensors that the model does not have.
        snapshot: Snapshot of the folder from before the first read.
    """

    folder: Path
    model: Any
    stored: StoredTensors
    unused: tuple[str, ...]
    snapshot: Snapshot

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the config, the shards and the index."""
        return CONFIG, *self.stored.files


def load(folder: Path, *, mapped: bool = False) -> Checkpoint:
    """Check the files of a ``save_pretrained`` checkpoint, and load the model.

    Args:
        folder: Folder with ``config.json`` and safetensors files.
        mapped: False to read all weights into memory. True to map the weights that need no conversion from the shards; use
            ``Layout.read`` for their elements.

    Returns:
        The model, of the class that the config names, and the stored tensors.

    Raises:
        CheckpointError: The checkpoint is incomplete, damaged, not in safetensors format, or changes while it is read; every reason at
            once.
        UnsupportedModelError: No family describes the model class, or the checkpoint is quantized.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; pass the folder of a saved checkpoint.")
    snapshot = Snapshot.of(folder)
    kind, fields = config_of(folder)
    stored = StoredTensors(folder)
    raise_all(
        CheckpointError,
        f"cannot use {folder / CONFIG}:",
        [*absurd(fields, kind, len(stored.dtypes))],
    )
    floating = [dtype for dtype in stored.dtypes.values() if dtype.is_floating_point]
    widest = floating[0] if floating else torch.float32
    for dtype in floating:
        widest = torch.promote_types(widest, dtype)
    with _quiet(), _failures(folder, kind):  # the classes of the errors depend on the config
        decoded = getattr(kind.config_class, "_decode_special_floats", dict)  # of infinite numbers
        config = kind.config_class.from_dict(decoded(fields))
        with torch.device("meta"):
            blank = kind(config)
        _refuse_size(blank, stored, folder)
        unread = {n for n in _unconverted(blank, stored) if stored.dtypes[n] == widest}
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=slices(stored, unread if mapped else ()),
            dtype=widest,
            local_files_only=True,
            output_loading_info=True,
        )
    problems = [*sorted(info["missing_keys"]), *map(str, info["error_msgs"])]
    if problems:
        raise CheckpointError(
            f"{folder} is incomplete: {len(problems)} tensors of {kind.__name__} are not stored ({', '.join(problems[:5])}). "
            "Save the checkpoint again by save_pretrained."
        )
    _refuse_integers(model, stored, folder)
    checkpoint = Checkpoint(folder, model, stored, tuple(sorted(info["unexpected_keys"])), snapshot)
    snapshot.refuse_changes(checkpoint.files)
    return checkpoint


class Layout:
    """Layout of the model's tensors on disk: names, splits and dtypes.

    Attributes:
        rows: Row of each stored target tensor, by name in the model.
        sources: Stored tensors of the source by name on disk, on the meta device.
        targets: Stored tensors of the target by name on disk, on the meta device.
        mapped: Names on disk of source tensors that are memory-mapped from the shards without conversion, by name in the model.
        n_bytes: Bytes of the stored target tensors.
    """

    def __init__(self, source: Checkpoint, plan: GrowthPlan, values: Mapping[str, Tensor]) -> None:
        self.model, self.stored = source.model, source.stored
        kept = set(self.model.state_dict()) - set(self.model._keys_to_ignore_on_save or ())  # pyright: ignore[reportPrivateUsage]
        self.rows: dict[str, TensorRow] = {r.name: r for r in plan.tensors if r.source in kept}
        self.sources: dict[str, Tensor] = {}
        self.targets: dict[str, Tensor] = {}
        self.mapped: dict[str, str] = {}
        whole: dict[str, Tensor] = {}
        for row in self.rows.values():
            value = values[row.source]
            shape = plan.shapes(row)[1]
            before, after = (
                reverted(self.model, {name: torch.empty(dims, dtype=value.dtype, device="meta")})
                for name, dims in ((row.source, value.shape), (row.name, shape))
            )
            whole[row.name] = torch.empty(shape, dtype=value.dtype, device="meta")
            stored = [self.stored.dtypes.get(old, value.dtype) for old in before]
            self.sources |= {o: t.to(d) for (o, t), d in zip(before.items(), stored, strict=True)}
            for i, (new, tensor) in enumerate(after.items()):  # more than before if experts grow
                self.targets[new] = tensor.to(stored[i * len(stored) // len(after)])
            if (name := self.stored.name_of(value)) is not None:
                self.mapped[row.source] = name
        shapes = {name: tensor.shape for name, tensor in reverted(self.model, whole).items()}
        if shapes != {name: tensor.shape for name, tensor in self.targets.items()}:
            raise UnsupportedModelError(
                f"a checkpoint of {type(self.model).__name__} stores several of the model's tensors as one, which growkern does "
                "not grow on disk: load the model, grow it by expand_inplace, and save it."
            )
        self.n_bytes = sum(t.numel() * t.element_size() for t in self.targets.values())

    def on_disk(self, name: str, tensor: Tensor) -> Mapping[str, Tensor]:
        """Return a target tensor as stored, by name on disk; empty if the model does not store the tensor."""
        return reverted(self.model, {name: tensor}) if name in self.rows else {}

    def read(self, name: str, value: Tensor) -> Tensor:
        """Return a source tensor with its elements: read from the shard if ``value`` is memory-mapped, else ``value`` itself."""
        disk = self.mapped.get(name)
        return value if disk is None else self.stored.read(disk)


def config_of(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the transformers class that a checkpoint's config names, and the fields of the config that ``load`` passes to it."""
    import transformers

    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder} has no {CONFIG}; pass a folder that save_pretrained wrote."
        )
    fields = parsed(folder / CONFIG)
    if "quantization_config" in fields:
        raise UnsupportedModelError(
            f"{folder} is quantized; grow the checkpoint from before the quantization, and quantize the target."
        )
    named = fields.get("architectures")
    if not isinstance(named, list) or len(named) != 1:  # pyright: ignore[reportUnknownArgumentType]
        raise UnsupportedModelError(
            f'{folder / CONFIG} does not name the model\'s class; add it, such as "architectures": ["LlamaForCausalLM"].'
        )
    name = str(named[0])  # pyright: ignore[reportUnknownArgumentType]
    kind = getattr(transformers, name, None)
    if not isinstance(kind, type) or not hasattr(kind, "from_pretrained"):
        raise UnsupportedModelError(
            f"{folder / CONFIG}: this transformers has no class {short(name)}; install a release that has it."
        )
    return kind, {name: value for name, value in fields.items() if name not in ACTED_ON}


def absurd(fields: Mapping[str, Any], kind: Any, n_stored: int) -> Iterator[str]:
    """Yield the fields of a config that no model has: transformers would fail later on, or fill the memory."""
    for name, value in fields.items():
        shown, count = one_line(name), COUNT.fullmatch(name)
        limit = MANY if count and count[1] else n_stored  # every layer stores a tensor
        if name.startswith("__") or callable(getattr(kind.config_class, name, None)):
            yield f"{shown}: is no field of a {kind.config_class.__name__}; leave the field out."
        elif flaw := _flaw(value, NESTING):
            yield f"{shown}: {flaw}; correct the field."
        elif count and isinstance(value, int | float) and not 0 <= value <= limit:
            yield f"{shown}: is {short(value)}, and {n_stored} tensors are stored; correct the field."


def _flaw(value: object, levels: int) -> str | None:
    """Return what is wrong with a value of a JSON file, which may be nested as deeply as ``levels``."""
    if levels < 0:
        return f"is nested more than {NESTING} levels deep"
    if isinstance(value, float) and isnan(value):
        return "contains NaN"
    inner: list[Any] = []
    if isinstance(value, dict | list):
        inner = [*(value.values() if isinstance(value, dict) else value)]  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    return next((flaw for item in inner if (flaw := _flaw(item, levels - 1))), None)


def _refuse_size(model: nn.Module, stored: StoredTensors, folder: Path) -> None:
    """Raise CheckpointError if a model on the meta device is far larger than the stored tensors: its memory has not been allocated yet."""
    n = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    if n > 2 * stored.n_elements + SLACK:
        raise CheckpointError(
            f"{folder / CONFIG} describes a {type(model).__name__} of {n:,} elements, and {stored.n_elements:,} are stored; correct the "
            "sizes."
        )


def _refuse_integers(model: Any, stored: StoredTensors, folder: Path) -> None:
    """Raise CheckpointError for floating-point tensors of a model that are stored as integers, because growth would scale the integers."""
    if all(dtype.is_floating_point for dtype in stored.dtypes.values()):
        return
    problems = [
        f"{name}: is stored as {str(stored.dtypes[name]).removeprefix('torch.')}; dequantize the tensor, and save the checkpoint again."
        for held, tensor in model.state_dict().items()
        if tensor.is_floating_point()
        for name in reverted(model, {held: tensor.to("meta")})
        if name in stored.dtypes and not stored.dtypes[name].is_floating_point
    ]
    raise_all(CheckpointError, f"{folder} stores weights as integers:", problems)


def _unconverted(model: Any, stored: StoredTensors) -> set[str]:
    """Return the names on disk of tensors that the loader neither converts nor compares (tied tensors that are stored twice).

    A tensor too many in this set would still be loaded, but from a memory map.
    """
    names: dict[int, set[str]] = {}
    base = f"{model.base_model_prefix}."
    for name, tensor in model.state_dict(keep_vars=True).items():
        if len(on_disk := [*reverted(model, {name: tensor})]) == 1:
            (disk,) = on_disk
            options = {disk, disk.removeprefix(base), base + disk} & stored.dtypes.keys()
            names[id(tensor)] = names.get(id(tensor), set()) | options
    return {name for same in names.values() if len(same) == 1 for name in same}


def reverted(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of a model as they are stored, by name on disk."""
    from transformers import core_model_loading

    revert: Any = core_model_loading.revert_weight_conversion
    return revert(model, tensors)


@contextmanager
def _failures(folder: Path, kind: Any) -> Generator[None]:
    """Turn every error of transformers into CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"transformers cannot load {folder} as a {kind.__name__}: {one_line(error, DETAIL)}"
        ) from error


@contextmanager
def _quiet() -> Generator[None]:
    """Disable transformers' progress bars and its log messages below errors."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
