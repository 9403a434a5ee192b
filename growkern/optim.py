"""Optimizers: ``AdamW``, torch's with factors per row and column of a parameter."""

from growkern.optimizer.adamw import AdamW

__all__ = ["AdamW"]
