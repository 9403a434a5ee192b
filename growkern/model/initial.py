"""Initialize new blocks with the model's own code, or with a given function, on the CPU, from one seed per block."""

from collections.abc import Callable
from hashlib import blake2b
from math import nan
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from growkern.errors import UnsupportedModelError
from growkern.support.names import wrapped_in

Initialize = Callable[[nn.Module], object]
# held while the global generator has a block's seed: growths may run in several threads
_GENERATOR = RLock()


def blank(p: Tensor) -> Tensor:
    """Return a CPU tensor in at least float32, filled with NaN, for the model's code to initialize."""
    return torch.full(p.shape, nan, dtype=torch.promote_types(p.dtype, torch.float32))


def seed_of(seed: int, name: str) -> int:
    """Return the seed of a block's draws: a hash of the plan's seed and the block's name."""
    return int.from_bytes(blake2b(f"{seed} {name}".encode(), digest_size=7).digest(), "little")


def initializer(model: nn.Module, name: str) -> Initialize | None:
    """Return ``_init_weights`` of the closest module around a block that has one (transformers, nanoGPT), or None."""
    while name:
        name = name.rpartition(".")[0]
        init_weights: Any = getattr(model.get_submodule(name), "_init_weights", None)
        if callable(init_weights):
            return init_weights
    return None


def nothing(module: nn.Module) -> None:
    """Leave the parameters of a module as they are: ``initialize`` then leaves them NaN, until a checkpoint is loaded."""


def initialize(block: nn.Module, around: Initialize | None, seed: int) -> None:
    """Initialize a block whose parameters are ``blank``: first as its constructors do, then as the model or the user does.

    Args:
        block: A block on the CPU.
        around: Function that is applied to every module, children first; None to apply no function; ``nothing`` to initialize nothing.
        seed: Seed of the CPU generator, whose state is restored afterwards; no other generator is touched.

    Raises:
        UnsupportedModelError: The code fails, or does not initialize a parameter.
    """
    if around is nothing:
        return
    with _GENERATOR, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            _apply(_reset, block)
            if around is not None:
                _apply(around, block)
        except Exception as error:
            raise UnsupportedModelError(
                f"cannot initialize a new {type(block).__name__}: the code that initializes it fails ({error!r}). {WAY_OUT}"
            ) from error
    left = [
        f"{name} ({type(block.get_submodule(name.rpartition('.')[0])).__name__})"
        for name, p in block.named_parameters()
        if p.isnan().any()
    ]
    if left:
        raise UnsupportedModelError(
            f"cannot initialize a new {type(block).__name__}: nothing initializes {', '.join(left[:3])}: the module has no "
            f"reset_parameters(), and neither a function passed as init= nor an _init_weights() around the block covers it. {WAY_OUT}"
        )


WAY_OUT = (
    "Add reset_parameters() or _init_weights(), pass Fresh(init=...), or choose another depth method, such as IdentityBlocks() "
    "or Stack()."
)


def _apply(function: Initialize, block: nn.Module) -> None:
    """Apply a function to the modules of a block, children first, and to no wrapper, which would repeat it on the module that it holds."""

    def apply(module: nn.Module) -> None:
        if wrapped_in(module) is None:
            function(module)

    block.apply(apply)


def _reset(module: nn.Module) -> None:
    """Initialize the parameters of a module as its constructor does."""
    reset: Any = getattr(module, "reset_parameters", None) or getattr(
        module, "_reset_parameters", None
    )
    if callable(reset):
        reset()
