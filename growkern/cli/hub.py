"""Checkpoints of the Hugging Face Hub where a command takes a folder."""

import re
from pathlib import Path
from typing import Any

import typer

from growkern.cli.progress import is_shown
from growkern.errors import CheckpointError
from growkern.support.text import one_line

ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.md", "*.yaml", "LICENSE*", "NOTICE*"]  # fmt: skip


def local(context: typer.Context, checkpoint: Path) -> Path:
    """Return the folder of a checkpoint: the argument itself, or the folder to which a model of the Hub was downloaded.

    Args:
        context: Context of the command, which says whether the progress of a download is shown.
        checkpoint: Folder, or ``OWNER/NAME`` or ``OWNER/NAME@REVISION`` where no such path exists.

    Raises:
        CheckpointError: The Hub does not give the model, or cannot be reached.
    """
    asked = ID.fullmatch(checkpoint.as_posix())
    if checkpoint.exists() or asked is None:
        return checkpoint
    import huggingface_hub
    from huggingface_hub.utils import (  # fmt: skip
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    hidden = not is_shown(context) and not are_progress_bars_disabled()
    if hidden:
        disable_progress_bars()
    download: Any = getattr(huggingface_hub, "snapshot_download")  # noqa: B009  (untyped)
    try:
        folder = download(
            asked["id"], revision=asked["revision"], allow_patterns=FILES, ignore_patterns=["*/*"]
        )
    except Exception as error:  # of the network, of the Hub, or of the file system
        raise CheckpointError(
            f"{checkpoint} is no folder, and the Hub does not give a model of this id: {one_line(error, 300)}; pass a folder, or the id of "
            "a model that you may read."
        ) from error
    finally:
        if hidden:
            enable_progress_bars()
    return Path(folder)
