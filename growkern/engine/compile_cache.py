"""torch.compile guards parameter shapes, so every growth causes a recompilation, and dynamo limits the number of recompilations."""

import sys
from typing import Any

import torch


def reset_near_limit(n_growths: int) -> bool:
    """Reset dynamo when growths may have used half of its ``recompile_limit``; beyond the limit, graphs run eagerly.

    Args:
        n_growths: Number of growths of the model so far.

    Returns:
        True when all compiled code will be compiled again.
    """
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is None or n_growths % max(1, dynamo.config.recompile_limit // 2):
        return False
    return reset()


def reset() -> bool:
    """Let all compiled code be compiled again, as after a change of hooks, which dynamo does not guard; return True if there is any."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is None or not dynamo.utils.counters["stats"]["unique_graphs"]:
        return False
    torch.compiler.reset()
    return True
