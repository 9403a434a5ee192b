"""Shrink and perturb: every matrix is multiplied by a factor, and the target's initialization under muP is added to it.

    W' = shrink * pad(W) + N(0, sigma^2)

``sigma`` is the standard deviation at the source's widths times ``sqrt(n / n')`` for a matrix whose fan-in grows from ``n`` to ``n'``,
``n / n'`` for an output matrix (its rows are tokens, labels or experts, whose number does not grow with the width), and 1 for a matrix
that reads no coordinate of a space that grows, such as an embedding (Yang et al., arXiv:2203.03466, table 3).

Copied experts: noise is added to the router rows of the copies only.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod, sqrt

from growkern.errors import PlanError
from growkern.model.size_values import space_of
from growkern.model.spec import AxisUse, ModelSpec
from growkern.planning.decisions import WidthDecision
from growkern.planning.growth_plan import AxisMap, TensorRow

FINITE = "vocab", "experts"  # spaces that muP keeps while widths grow


def perturbed(
    rows: Iterable[TensorRow], spec: ModelSpec, axes: Mapping[str, AxisMap], wide: WidthDecision, state: str
) -> Iterator[TensorRow]:  # fmt: skip
    """Yield the rows of a plan, with shrink and noise on matrices if the width method asks for them.

    Raises:
        PlanError: The optimizer state is not dropped, or columns of a matrix have different scales.
    """
    if wide.router_std:
        n = spec.sizes["experts"]
        for row in rows:
            noisy = replace(row, noise_std=wide.router_std, noise_from=n)
            yield noisy if _is_router(row, spec) else row
        return
    if not wide.perturbs:
        yield from rows
        return
    if state != "drop":
        raise PlanError(
            f"cannot carry the optimizer state of {spec.family} with state={state!r}: no law relates gradients at shrunk and perturbed "
            "weights to the source's; pass state='drop'."
        )
    for row in rows:
        if not is_matrix(row, spec):
            yield row
            continue
        uses = spec.tensors[row.source]
        reads = [axes[key].weight_scale.uniform for use, key in zip(uses, row.axes, strict=True) if use.role == "reader"]  # fmt: skip
        known = [scale for scale in reads if scale]
        if len(known) != len(reads):
            raise PlanError(
                f"{row.source}: its columns read spaces that grow by different factors, so it has no single fan-in; grow these sizes "
                "by one factor."
            )
        fan_in = prod(known)  # n / n', by which the law scales readers and their learning rates
        is_output = all(map(_is_finite, (use for use in uses if use.role == "writer")))
        sigma = wide.init_std * (fan_in if is_output else sqrt(fan_in))
        yield replace(row, shrink=wide.shrink / fan_in, noise_std=sigma)


def is_matrix(row: TensorRow, spec: ModelSpec) -> bool:
    """True for a tensor of several axes that copies a source tensor: no vector, gain, counter, constant or drawn tensor."""
    uses = spec.tensors[row.source]
    copied = row.constant is None and not row.drawn and row.source not in spec.counters
    return copied and len(uses) > 1 and not any(use.role == "gain" for use in uses)


def _is_router(row: TensorRow, spec: ModelSpec) -> bool:
    """True for the matrix that computes a score for every expert."""
    writes = [use.streams for use in spec.tensors[row.source] if use.role == "writer"]
    return is_matrix(row, spec) and writes == [["experts"]]


def _is_finite(use: AxisUse) -> bool:
    """True for an axis whose coordinates are tokens, experts or a fixed number."""
    return all(space_of(stream) in FINITE for stream in use.streams)
