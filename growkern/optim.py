"""Optimizers: ``AdamW``, torch's AdamW with factors per row and per column of a parameter."""

from growkern.optimizer.adamw import AdamW

__all__ = ["AdamW"]


def __dir__() -> list[str]:
    return __all__
