"""A teacher's distribution in a few numbers: its largest probabilities, or samples."""

from collections.abc import Callable

import torch
from torch import Tensor

Pair = tuple[Tensor | None, Tensor]  # columns and their weights; None: a weight for every column
Targets = Callable[[slice], Pair]  # rows of a batch -> the teacher's distributions of these rows


def top(logits: Tensor, k: int, tau: float, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """Return the k largest probabilities of each row, and their columns.

    Args:
        logits: Teacher's logits (n, V).
        k: Number of columns.
        tau: Temperature.
        renormalize: True to divide the probabilities by their sum, as the paper does; False to leave the sum (the *held mass*) below 1.

    Returns:
        Columns and weights, both (n, k).
    """
    values, index = logits.topk(k, -1)
    if renormalize:
        return index, (values / tau).softmax(-1)
    return index, (values / tau - (logits / tau).logsumexp(-1, keepdim=True)).exp()


def sampled(
    logits: Tensor, n: int, tau: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw n columns of each row from the teacher's distribution; the expected gradient is that of the whole distribution.

    Args:
        logits: Teacher's logits (rows, V).
        n: Number of draws.
        tau: Temperature.
        generator: Generator of the draws; None for the default one.

    Returns:
        Columns and weights, both (rows, n). A column that is drawn several times occurs once, with its share of the draws as weight; the
        rest of the row has weight 0.

    Reference:
        Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", ACL 2025, arXiv:2503.16870.
    """
    draws = torch.multinomial((logits / tau).softmax(-1), n, replacement=True, generator=generator)
    return merged(draws, torch.full(draws.shape, 1.0 / n, dtype=logits.dtype, device=draws.device))


def merged(index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Add the weights of equal columns of a row, so that every column with a weight occurs once. Shapes (n, k) stay."""
    index, order = index.sort(1)
    is_new = torch.ones_like(index)
    is_new[:, 1:] = index[:, 1:] != index[:, :-1]
    place = is_new.cumsum(1) - 1
    total = torch.zeros_like(weight).scatter_add_(1, place, weight.gather(1, order))
    return torch.zeros_like(index).scatter_(1, place, index), total
