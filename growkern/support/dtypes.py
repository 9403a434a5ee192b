"""Dtypes that growth computes in."""

import torch


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype computed in: float64 for float64, float32 for every other."""
    return torch.float64 if dtype == torch.float64 else torch.float32
