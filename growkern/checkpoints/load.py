"""Loading of transformers checkpoints, and the layout of a model's tensors on disk."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growkern.checkpoints.shards import parsed, stored
from growkern.errors import CheckpointError, UnsupportedModelError
from growkern.model.describe import refuse_unknown
from growkern.planning.growth_plan import GrowthPlan, TensorRow

CONFIG = "config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        folder: Folder of the checkpoint.
        model: The model on the CPU, in evaluation mode, in the widest stored dtype; its weights are memory-mapped from the shards.
        dtypes: Dtype of each stored tensor, by name on disk.
        unused: Names of stored tensors that the model does not have.
    """

    folder: Path
    model: Any
    dtypes: Mapping[str, torch.dtype]
    unused: tuple[str, ...]


def load(folder: Path) -> Checkpoint:
    """Check the files of a ``save_pretrained`` checkpoint, and load the model.

    Args:
        folder: Folder with ``config.json`` and safetensors files.

    Returns:
        The model, of the class that the config names, and the stored dtypes.

    Raises:
        CheckpointError: The checkpoint is incomplete, damaged, or not in safetensors format; every reason at once.
        UnsupportedModelError: No family describes the model class, or the checkpoint is quantized.
    """
    kind = _kind(folder)
    dtypes = stored(folder)
    floating = [dtype for dtype in dtypes.values() if dtype.is_floating_point]
    widest = floating[0] if floating else torch.float32
    for dtype in floating:
        widest = torch.promote_types(widest, dtype)
    with _quiet():
        try:
            model, info = kind.from_pretrained(
                str(folder.resolve()),
                dtype=widest,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except Exception as error:  # the type depends on what is wrong with the config
            raise CheckpointError(
                f"transformers cannot load {folder} as a {kind.__name__}: {error}"
            ) from error
    problems = [*sorted(info["missing_keys"]), *map(str, info["error_msgs"])]
    if problems:
        raise CheckpointError(
            f"{folder} is incomplete: {len(problems)} tensors of {kind.__name__} are not stored ({', '.join(problems[:5])}). "
            "Save the checkpoint again by save_pretrained."
        )
    return Checkpoint(folder, model, dtypes, tuple(sorted(info["unexpected_keys"])))


class Layout:
    """Layout of the model's tensors on disk: names, splits and dtypes.

    Attributes:
        rows: Row of each stored target tensor, by name in the model.
        sources: Stored tensors of the source by name on disk, on the meta device.
        targets: Stored tensors of the target by name on disk, on the meta device.
        mapped: Names of source tensors that are memory-mapped from the shards without conversion.
        n_bytes: Bytes of the stored target tensors.
    """

    def __init__(self, source: Checkpoint, plan: GrowthPlan, values: Mapping[str, Tensor]) -> None:
        self.model = source.model
        kept = set(self.model.state_dict()) - set(self.model._keys_to_ignore_on_save or ())  # pyright: ignore[reportPrivateUsage]
        self.rows: dict[str, TensorRow] = {r.name: r for r in plan.tensors if r.source in kept}
        self.sources: dict[str, Tensor] = {}
        self.targets: dict[str, Tensor] = {}
        self.mapped: set[str] = set()
        whole: dict[str, Tensor] = {}
        for row in self.rows.values():
            value = values[row.source]
            shape = plan.shapes(row)[1]
            before, after = (
                self._reverted({name: torch.empty(dims, dtype=value.dtype, device="meta")})
                for name, dims in ((row.source, value.shape), (row.name, shape))
            )
            whole[row.name] = torch.empty(shape, dtype=value.dtype, device="meta")
            stored = [source.dtypes.get(old, value.dtype) for old in before]
            self.sources |= {o: t.to(d) for (o, t), d in zip(before.items(), stored, strict=True)}
            for i, (new, tensor) in enumerate(after.items()):  # more than before if experts grow
                self.targets[new] = tensor.to(stored[i * len(stored) // len(after)])
            if source.dtypes.get(next(iter(before))) == value.dtype and len(before) == 1:
                self.mapped.add(row.source)
        shapes = {name: tensor.shape for name, tensor in self._reverted(whole).items()}
        if shapes != {name: tensor.shape for name, tensor in self.targets.items()}:
            raise UnsupportedModelError(
                f"a checkpoint of {type(self.model).__name__} stores several of the model's tensors as one, which growkern does "
                "not grow on disk: load the model, grow it by expand_inplace, and save it."
            )
        self.n_bytes = sum(t.numel() * t.element_size() for t in self.targets.values())

    def on_disk(self, name: str, tensor: Tensor) -> Mapping[str, Tensor]:
        """Return a target tensor as stored, by name on disk; empty if the model does not store the tensor."""
        return self._reverted({name: tensor}) if name in self.rows else {}

    def _reverted(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        from transformers import core_model_loading

        revert: Any = core_model_loading.revert_weight_conversion
        return revert(self.model, tensors)


def _kind(folder: Path) -> Any:
    """Return the transformers class that a checkpoint's config names."""
    import transformers

    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; pass the folder of a saved checkpoint.")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder} has no {CONFIG}; pass a folder that save_pretrained wrote."
        )
    config = parsed(folder / CONFIG)
    if "quantization_config" in config:
        raise UnsupportedModelError(
            f"{folder} is quantized; grow the checkpoint from before the quantization, and quantize the target."
        )
    named = config.get("architectures")
    if not isinstance(named, list) or len(named) != 1:  # pyright: ignore[reportUnknownArgumentType]
        raise UnsupportedModelError(
            f'{folder / CONFIG} does not name the model\'s class; add it, such as "architectures": ["LlamaForCausalLM"].'
        )
    name = str(named[0])  # pyright: ignore[reportUnknownArgumentType]
    kind = getattr(transformers, name, None)
    if not isinstance(kind, type) or not hasattr(kind, "from_pretrained"):
        raise UnsupportedModelError(
            f"{folder / CONFIG}: this transformers has no class {name!r}; install a release that has it."
        )
    refuse_unknown(kind)
    return kind


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
