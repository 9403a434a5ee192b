"""A teacher's distribution in a few numbers: its largest probabilities, or samples."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from growkern.errors import PlanError
from growkern.support.argument_types import typed_arguments
from growkern.support.dtypes import arithmetic

Pair = tuple[Tensor | None, Tensor]  # columns and their weights; None: a weight for every column
Targets = Callable[[slice], Pair]  # rows of a batch -> the teacher's distributions of these rows


@typed_arguments(PlanError)
def top(logits: Tensor, k: int, tau: float, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """Return the k largest probabilities of each row, and their columns.

    Args:
        logits: Teacher's logits (..., V).
        k: Number of columns.
        tau: Temperature.
        renormalize: True to divide the probabilities by their sum, as the paper does; False to leave the sum (the *held mass*) below 1.

    Returns:
        Columns and weights, both (..., k).

    Raises:
        PlanError: ``k`` is not from 1 to V, or the temperature is not positive.

    Example:
        >>> growkern.inherit.top(torch.tensor([[0.5, 0.125, 0.25, 0.125]]).log(), 2, tau=1.0)
        (tensor([[0, 2]]), tensor([[0.5000, 0.2500]]))

    Reference:
        Qin et al., "Knowledge Inheritance for Pre-trained Language Models", NAACL 2022, arXiv:2105.13880 (``renormalize=True``).
    """
    _refuse("k", k, logits, tau, logits.shape[-1] if logits.dim() else 0)
    logits = logits.to(arithmetic(logits.dtype))  # before the temperature divides
    values, index = logits.topk(k, -1)
    if renormalize:
        return index, (values / tau).softmax(-1)
    return index, (values / tau - (logits / tau).logsumexp(-1, keepdim=True)).exp()


@typed_arguments(PlanError)
def sampled(
    logits: Tensor, n: int, tau: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw n columns of each row from the teacher's distribution; the expected gradient is that of the whole distribution.

    Args:
        logits: Teacher's logits (..., V).
        n: Number of draws.
        tau: Temperature.
        generator: Generator of the draws; None for the default one.

    Returns:
        Columns and weights, both (..., n). A column that is drawn several times occurs once, with its share of the draws as weight; the
        rest of the row has weight 0.

    Raises:
        PlanError: ``n`` is below 1, or the temperature is not positive.

    Example:
        >>> index, weight = growkern.inherit.sampled(torch.tensor([[0.5, 0.125, 0.25, 0.125]]).log(), 64, tau=1.0)
        >>> index.shape, weight.sum()
        (torch.Size([1, 64]), tensor(1.))

    Reference:
        Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", ACL 2025, arXiv:2503.16870.
    """
    _refuse("n", n, logits, tau, 1 << 24)
    logits = logits.to(arithmetic(logits.dtype))
    probs = (logits / tau).softmax(-1).reshape(-1, logits.shape[-1])
    draws = torch.multinomial(probs, n, replacement=True, generator=generator)
    share = torch.full(draws.shape, 1.0 / n, dtype=logits.dtype, device=draws.device)
    index, weight = merged(draws, share)
    shape = *logits.shape[:-1], n
    return index.view(shape), weight.view(shape)


def _refuse(name: str, value: int, logits: Tensor, tau: float, most: int) -> None:
    if not logits.dim() or not logits.is_floating_point():
        raise PlanError(
            f"logits: {tuple(logits.shape)} of {logits.dtype} are no logits; pass floats (..., V)."
        )
    if not 1 <= value <= most:
        raise PlanError(f"{name}: {value} is no number of weights here; pass 1 to {most}.")
    if not 0 < tau < math.inf:
        raise PlanError(f"tau: {tau} is not positive and finite; pass such a number.")


def refuse_length(teacher: torch.Size, labels: torch.Size) -> None:
    """Raise PlanError if the teacher speaks of other positions than those that have a label."""
    if teacher != labels:
        raise PlanError(
            f"the teacher has outputs for positions {tuple(teacher)}, and the labels have {tuple(labels)}. Pass one label per position of "
            "the teacher's inputs, and -100 where there is none: the last position has no next token."
        )


def merged(index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Add the weights of equal columns of a row, so that every column with a weight occurs once. Shapes (n, k) stay."""
    index, order = index.sort(1)
    is_new = torch.ones_like(index)
    is_new[:, 1:] = index[:, 1:] != index[:, :-1]
    place = is_new.cumsum(1) - 1
    total = torch.zeros_like(weight).scatter_add_(1, place, weight.gather(1, order))
    return torch.zeros_like(index).scatter_(1, place, index), total
