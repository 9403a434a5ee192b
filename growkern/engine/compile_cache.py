"""torch.compile guards parameter shapes, so every growth causes a recompilation, and dynamo limits the number of recompilations."""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from warnings import catch_warnings, filterwarnings

import torch
from torch import nn

from growkern.commit.checkpoint_guard import n_growths
from growkern.support.compiled import is_compiled
from growkern.support.names import named_modules


def reset_near_limit(model: nn.Module) -> bool:
    """Reset dynamo when growths may have used half of its ``recompile_limit``; beyond the limit, graphs run eagerly.

    Modules of a model that are compiled by themselves share one limit, and may use all of it between two growths: dynamo is reset at every
    growth, as the graphs of the source are of no use.

    Args:
        model: The model, which has grown.

    Returns:
        True when all compiled code will be compiled again.
    """
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return False
    parts = any(is_compiled(module) for _, module in named_modules(model) if module is not model)
    if not parts and n_growths(model) % max(1, dynamo.config.recompile_limit // 2):
        return False
    return reset()


@contextmanager
def eagerly() -> Generator[None]:
    """Run what is compiled eagerly: for a single forward, under hooks of all modules, dynamo would compile graphs that never run again."""
    with catch_warnings():
        filterwarnings("ignore", "Using `torch.compile")  # torch.compile(block) under these hooks
        if "torch._dynamo" not in sys.modules:
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield


def reset() -> bool:
    """Let all compiled code be compiled again, as after a change of hooks, which dynamo does not guard; return True if there is any."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is None or not dynamo.utils.counters["stats"]["unique_graphs"]:
        return False
    torch.compiler.reset()
    return True
