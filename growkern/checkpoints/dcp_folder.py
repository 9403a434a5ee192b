"""Growth of a folder of ``torch.distributed.checkpoint`` whose model is described by a ``config.json``, as on the command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from growkern.checkpoints.dcp import grow
from growkern.checkpoints.dcp_layout import layout_of
from growkern.checkpoints.dcp_source import Source
from growkern.checkpoints.grow import GrownCheckpoint
from growkern.checkpoints.load import absurd, config_of
from growkern.checkpoints.shards import CONFIG
from growkern.errors import CheckpointError, UnsupportedOptimizerError, raise_all
from growkern.model.describe import describe
from growkern.support.text import one_line, short


def grow_folder(
    folder: Path, out: Path, *, config: Path | None = None, optim: str | None = None, **options: Any
) -> GrownCheckpoint:
    """Grow a checkpoint; see ``growkern.dcp.grow``.

    Args:
        folder: Folder of the source.
        out: Folder of the target.
        config: Folder whose ``config.json`` describes the model; None for ``folder``.
        optim: Name of the optimizer's class in ``torch.optim``; None for a checkpoint without optimizer state.
        options: Further arguments of ``growkern.dcp.grow``.

    Raises:
        GrowthError: The config describes no model that growkern grows; or see ``growkern.dcp.grow``.
    """
    source, place = Source(folder), config or folder
    if not (place / CONFIG).is_file():
        raise CheckpointError(
            f"{place} has no {CONFIG}, and torch.distributed.checkpoint stores no description of the model: pass --config, a folder with "
            f"the {CONFIG} of the source."
        )
    kind, fields = config_of(place)
    problems = [*absurd(fields, kind, len(source.tensors))]
    raise_all(CheckpointError, f"cannot use {place / CONFIG}:", problems)
    decoded = getattr(kind.config_class, "_decode_special_floats", dict)  # of infinite numbers
    try:
        with torch.device("meta"):
            model = kind(kind.config_class.from_dict(decoded(fields)))
    except Exception as error:  # the classes of the errors depend on the config
        raise CheckpointError(f"transformers makes no {kind.__name__} of {place / CONFIG}: {one_line(error)}") from error  # fmt: skip
    return grow(folder, out, model, _optimizer(source, model, optim), **options)


def _optimizer(source: Source, model: nn.Module, name: str | None) -> Optimizer | None:
    """Make an optimizer of a class, with the param groups of a checkpoint."""
    if name is None:
        return None
    kind: Any = vars(torch.optim).get(name)
    if not isinstance(kind, type) or Optimizer not in kind.__mro__[1:]:
        raise UnsupportedOptimizerError(f"torch.optim has no optimizer {short(name)}; pass AdamW, or another class.")  # fmt: skip
    params = dict(model.named_parameters())
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    layout = layout_of(source, shapes, describe(model, values=False).ties)
    values = source.values([key for keys in layout.groups.values() for key in keys.values()])
    groups: list[tuple[Mapping[str, Any], list[str]]] = []
    for at, keys in layout.groups.items():
        own = {option: values[key] for option, key in keys.items()}
        members = own.pop("params") if not layout.flat else [at]
        alike = (names for options, names in groups if layout.flat and options == own)
        if (names := next(alike, None)) is None:
            groups.append((own, [*members]))
        else:
            names += members
    made: list[Any] = [{"params": [params[n] for n in names]} for _, names in groups]
    return kind(made or [*params.values()], lr=1.0)  # the stored options take its place
