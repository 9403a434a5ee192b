"""8-bit optimizer state of bitsandbytes: codes into a map of 256 values, and one scale per block of 256 elements."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

BLOCK = 256
N_BYTES = 8  # per element during a growth: float32 value and float32 scale of its block


def is_coded(value: object) -> bool:
    """True for 8-bit codes; bitsandbytes keeps the state of small tensors in floating point."""
    return isinstance(value, Tensor) and not value.is_floating_point()


def scale_key(key: str) -> str:
    """State key of the block scales of ``state1`` or ``state2``."""
    return f"absmax{key[-1]}"


def decoded(state: Mapping[str, Any], key: str) -> tuple[Tensor, Tensor]:
    """Decode ``state1`` or ``state2``: its values, and the block scale of every element, float32."""
    codes: Tensor = state[key]
    per_block: Tensor = state[scale_key(key)]
    scales = per_block.repeat_interleave(BLOCK)[: codes.numel()].view(codes.shape)
    values: Tensor = state[f"qmap{key[-1]}"][codes.long()] * scales
    return values, scales


def n_broken(state: Mapping[str, Any], key: str) -> int:
    """Return the number of blocks of ``state1`` or ``state2`` whose scale is not finite."""
    return int(state[scale_key(key)].isfinite().logical_not().sum())


def encoded(values: Tensor, scales: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Encode grown values: return codes, and the scale of every block.

    A block whose elements all have one scale keeps that scale, and so its codes, bit for bit. The scale of any other block is its
    largest absolute value.

    Args:
        values: Grown values of ``decoded``.
        scales: Grown scales of ``decoded``.
        code: Map of the codes, sorted, (256,).
    """
    n_blocks = -(-values.numel() // BLOCK)
    padded = (torch.nn.functional.pad(t.flatten(), (0, n_blocks * BLOCK - t.numel())) for t in (values, scales))  # fmt: skip
    blocks, given = (t.view(n_blocks, BLOCK) for t in padded)
    largest, first_scale = blocks.abs().amax(1), given[:, 0]
    alike = given.eq(first_scale[:, None]).all(1)
    scale = torch.where(alike, first_scale, largest)
    unit = blocks / torch.where(scale > 0, scale, 1.0)[:, None]
    codes = torch.bucketize(unit, (code[1:] + code[:-1]) / 2).to(torch.uint8)
    return codes.flatten()[: values.numel()].view(values.shape), scale
