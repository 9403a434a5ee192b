"""Depth methods: each gives the order of blocks in the target."""

from growkern.depth.fresh import Fresh
from growkern.depth.identity import IdentityBlocks
from growkern.depth.interpose import DepthUpscale, Interpose, Layers
from growkern.depth.middle import Middle
from growkern.depth.stack import Stack, TopCopies

__all__ = [
    "DepthUpscale",
    "Fresh",
    "IdentityBlocks",
    "Interpose",
    "Layers",
    "Middle",
    "Stack",
    "TopCopies",
]


def __dir__() -> list[str]:
    return __all__
