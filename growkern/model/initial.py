"""Blocks that the model's own code initialises: on the CPU, from a seed of their own."""

from collections.abc import Callable
from hashlib import blake2b
from math import nan
from typing import Any

import torch
from torch import Tensor, nn

from growkern.errors import UnsupportedModelError

Initialise = Callable[[nn.Module], object]


def blank(p: Tensor) -> Tensor:
    """Where a parameter is drawn: on the CPU, in float32 at least, NaN until something writes it."""
    return torch.full(p.shape, nan, dtype=torch.promote_types(p.dtype, torch.float32))


def seed_of(seed: int, name: str) -> int:
    """The seed of a block's draws: that of the plan, and the block's name."""
    return int.from_bytes(blake2b(f"{seed} {name}".encode(), digest_size=7).digest(), "little")


def initialiser(model: nn.Module, name: str) -> Initialise | None:
    """``_init_weights`` of the closest module around a block that has one (transformers, nanoGPT); None where none has."""
    while name:
        name = name.rpartition(".")[0]
        found: Any = getattr(model.get_submodule(name), "_init_weights", None)
        if callable(found):
            return found
    return None


def initialise(block: nn.Module, around: Initialise | None, seed: int) -> None:
    """Initialise a block whose parameters are ``blank``, as its constructors do and then as the model does.

    Args:
        block: A block on the CPU.
        around: What the model applies to every module, children first; None for nothing.
        seed: Of the CPU's generator, which is afterwards as it was; no other generator is touched.

    Raises:
        UnsupportedModelError: The model's code fails, or leaves a parameter unwritten.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            block.apply(_reset)
            if around is not None:
                block.apply(around)  # pyright: ignore[reportArgumentType]
        except Exception as error:
            raise UnsupportedModelError(
                f"cannot initialise a new {type(block).__name__}: its model's own code fails ({error!r}). {WAY_OUT}"
            ) from error
    left = [
        f"{name} ({type(block.get_submodule(name.rpartition('.')[0])).__name__})"
        for name, p in block.named_parameters()
        if p.isnan().any()
    ]
    if left:
        raise UnsupportedModelError(
            f"cannot initialise a new {type(block).__name__}: nothing initialises {', '.join(left[:3])}: the module has no "
            f"reset_parameters(), and no _init_weights() around the block covers it. {WAY_OUT}"
        )


WAY_OUT = "Give it one, or choose another depth method, such as IdentityBlocks() or Stack()."


def _reset(module: nn.Module) -> None:
    """What a constructor does to the parameters of a module."""
    reset: Any = getattr(module, "reset_parameters", None) or getattr(
        module, "_reset_parameters", None
    )
    if callable(reset):
        reset()
