"""Caches of a model's state dict, which a checkpointer holds and saves: made anew after a growth."""

import gc
import sys
from typing import Any

from torch import nn

CACHE = (
    "ModelWrapper"  # torchtitan's; up to 0.2 it saves the tensors that it cached when it was made
)


def refresh_caches(model: nn.Module) -> None:
    """Make the state dicts anew that torchtitan's checkpointer caches of a model. Without torchtitan the heap is not searched."""
    if "torchtitan" not in sys.modules:
        return
    things: list[Any] = gc.get_objects()
    for cache in (thing for thing in things if type(thing).__name__ == CACHE):
        parts = getattr(cache, "model", None)
        if isinstance(parts, list) and any(part is model for part in parts):  # pyright: ignore[reportUnknownVariableType]
            cache.__init__(parts)
