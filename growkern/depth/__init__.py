"""Depth methods: each gives the order of blocks in the target."""

from growkern.depth.identity import IdentityBlocks
from growkern.depth.stack import Stack

__all__ = ["IdentityBlocks", "Stack"]
