"""Width methods: each gives an index map per space and a contract per stream."""

from growkern.width.lossless import Lossless

__all__ = ["Lossless"]
