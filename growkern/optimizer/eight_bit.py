"""Optimizer state in 8 bits, as bitsandbytes keeps it: codes into a map of 256 values, and the scale of every block of 256."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

BLOCK = 256
N_BYTES = 8  # per element while it grows: its value and its block's scale


def is_coded(value: object) -> bool:
    """True for codes; small tensors are kept as they are."""
    return isinstance(value, Tensor) and not value.is_floating_point()


def scale_key(key: str) -> str:
    """Where the scales of ``state1`` or ``state2`` are."""
    return f"absmax{key[-1]}"


def decoded(state: Mapping[str, Any], key: str) -> tuple[Tensor, Tensor]:
    """The values of ``state1`` or ``state2``, and every element's scale, float32."""
    codes: Tensor = state[key]
    per_block: Tensor = state[scale_key(key)]
    scales = per_block.repeat_interleave(BLOCK)[: codes.numel()].view(codes.shape)
    values: Tensor = state[f"qmap{key[-1]}"][codes.long()] * scales
    return values, scales


def encoded(values: Tensor, scales: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of grown values, and the scale of every block.

    A block whose elements bring one scale keeps it, and so its codes, bit for bit; another takes its largest value.

    Args:
        values: What ``decoded`` gave, grown.
        scales: The same of the scales.
        code: The map, sorted, (256,).
    """
    n_blocks = -(-values.numel() // BLOCK)
    padded = (torch.nn.functional.pad(t.flatten(), (0, n_blocks * BLOCK - t.numel())) for t in (values, scales))  # fmt: skip
    blocks, given = (t.view(n_blocks, BLOCK) for t in padded)
    largest, one = blocks.abs().amax(1), given[:, 0]
    alike = given.eq(one[:, None]).all(1) & (one >= largest)
    scale = torch.where(alike, one, largest)
    unit = blocks / torch.where(scale > 0, scale, 1.0)[:, None]
    codes = torch.bucketize(unit, (code[1:] + code[:-1]) / 2).to(torch.uint8)
    return codes.flatten()[: values.numel()].view(values.shape), scale
