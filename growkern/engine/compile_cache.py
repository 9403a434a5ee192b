"""torch.compile: parameter shapes are guarded, so every growth costs one compilation, and there is a limit to their number."""

import sys
from typing import Any

import torch


def reset_near_limit(n_growths: int) -> bool:
    """Forget compiled graphs when half of dynamo's ``recompile_limit`` may have gone into growths; beyond it graphs run eagerly.

    Args:
        n_growths: How many growths the model has been through.

    Returns:
        Whether everything that is compiled will be compiled once more.
    """
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is None or not dynamo.utils.counters["stats"]["unique_graphs"]:
        return False
    if n_growths % max(1, dynamo.config.recompile_limit // 2):
        return False
    torch.compiler.reset()
    return True
