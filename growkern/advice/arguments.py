"""Validation of the arguments of ``growkern.advise``: numbers, curves, the seed, and the agreement of a law with its curves."""

from collections.abc import Iterable, Sequence
from math import isfinite
from typing import cast

from growkern.advice.scaling import (
    KEPT_RANGE,
    Curve,
    FittedCurve,
    ScalingLaw,
    check_curves,
    deviation,
)
from growkern.errors import PlanError, raise_all
from growkern.planning.argument_checks import wrong_int
from growkern.support.text import short

LEAST_SPENT = 0.5  # share of the curve's FLOPs that spent= states at least
LIMIT = 1e3  # multiple of a curve's parameters, tokens and compute beyond which the law is not asked: three decades of extrapolation
SAME = 0.01  # largest mean deviation, as a share of the loss, of a law's curve from the curve that is given with the law


def number(value: object, name: str, wanted: str) -> float:
    """Return an argument as a float.

    Args:
        value: The argument.
        name: Name of the argument, for the error message.
        wanted: Noun phrase that says what to pass in its place.

    Raises:
        PlanError: The value is text, a bool or no number, is not finite, or is not above 0.
    """
    try:
        result = _float(value)
    except (
        TypeError,
        ValueError,
        OverflowError,
        RuntimeError,
    ):  # RuntimeError: a tensor of several numbers
        result = -1.0
    if not (isfinite(result) and result > 0):
        raise PlanError(f"{name}={short(value)}: pass {wanted}: a finite number above 0.")
    return result  # fmt: skip


def pair(values: object, name: str, wanted: str) -> tuple[float, float]:
    """Return a list, tuple or array of two numbers above 0; raise PlanError for anything else."""
    tolist = getattr(values, "tolist", None)
    items = tolist() if callable(tolist) else values
    if not isinstance(items, list | tuple) or len(cast(Sequence[object], items)) != 2:
        raise PlanError(f"{name}={short(values)}: pass {wanted}, a pair of numbers.")
    first, second = (
        number(value, f"{name}[{i}]", wanted)
        for i, value in enumerate(cast(Sequence[object], items))
    )
    return first, second


def points(curve: object, name: str) -> list[tuple[float, float]]:
    """Convert a curve, given as any sequence or array, to pairs of Python floats; ``fit`` checks the floats."""
    try:
        pairs = cast(Iterable[tuple[object, object]], curve)
        converted = [(_float(tokens), _float(loss)) for tokens, loss in pairs]
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise PlanError(f"{name}: expected pairs of (tokens, loss in nats): {error}.") from None
    if not converted:
        raise PlanError(f"{name} has no points. Pass (tokens, loss in nats) of the run so far.")
    return converted


def curves(others: object, own: Curve) -> list[tuple[float, Curve]]:
    """Convert the argument ``others`` to pairs of a number of parameters and a curve, none of which is the curve ``own``."""
    try:
        read = [(size, curve) for size, curve in cast(Iterable[tuple[object, object]], others)]
    except (TypeError, ValueError):
        raise PlanError(
            f"others={short(others)}: pass a list of pairs of a number of parameters and a curve, [(28_000, curve)]."
        ) from None
    wanted = "the number of parameters of the curve, without the input embedding"
    converted: list[tuple[float, Curve]] = [
        (number(size, f"others[{i}][0]", wanted), points(curve, f"others[{i}][1]"))
        for i, (size, curve) in enumerate(read)
    ]
    same = [f"others[{i}]" for i, (_, curve) in enumerate(converted) if curve == [*own]]
    if same:
        raise PlanError(
            f"{', '.join(same)}: the points are those of the source's curve. Pass the curve of a model of another size (others=, --other)."
        )
    return converted


def checked_seed(seed: object) -> int:
    """Return a seed as an int; raise PlanError if it is not a whole number from 0 to 2**64 - 1."""
    if [*wrong_int("seed", seed, 0, (1 << 64) - 1)]:
        raise PlanError(f"seed={short(seed)}: pass a whole number from 0 to 2**64 - 1.")
    return int(seed)  # pyright: ignore[reportArgumentType]


def check(
    law: ScalingLaw, n: tuple[float, float], f: tuple[float, float], now: float, budget: float
) -> None:
    """Raise PlanError for sizes, FLOPs and budgets that allow no advice."""
    read = law.curves[0]
    tokens = read.points[-1][0]
    seen, largest = tokens * f[0], max(curve.n_params for curve in law.curves)
    problems: list[str] = []
    if not n[1] > n[0]:
        problems.append(
            f"target={n[1]:,.0f} parameters is not larger than source={n[0]:,.0f}. Name the larger model that the source grows into."
        )
    elif f[1] <= f[0]:
        problems.append(
            f"flops_per_token={f}: the target must cost more than the source. Pass the FLOPs per token of the source, then of the target."
        )
    if not budget > now:
        problems.append(
            f"budget={budget:.4g} FLOPs is spent: {now:.4g} FLOPs are spent until now. The budget counts the whole run; pass a larger one."
        )
    if n[1] > LIMIT * largest:
        problems.append(
            f"target={n[1]:.4g} parameters is {n[1] / largest:.3g} x the largest model with a curve; the law says nothing beyond "
            f"{LIMIT:,.0f} x. Pass a smaller target, or the curve of a larger model (others=, --other)."
        )
    elif budget / f[1] < tokens / LIMIT:
        problems.append(
            f"target={n[1]:.4g} parameters reads {budget / f[1]:.3g} tokens in the whole budget, {tokens * f[1] / budget:.3g} x fewer than "
            f"the curve; the law says nothing beyond {LIMIT:,.0f} x. Pass a smaller target or a larger budget."
        )
    if budget > LIMIT * seen:
        problems.append(
            f"budget={budget:.4g} FLOPs is {budget / seen:.3g} x the compute of the curve; the law says nothing beyond {LIMIT:,.0f} x. "
            "Train the source longer, or pass a smaller budget."
        )
    if now < LEAST_SPENT * seen:
        problems.append(
            f"spent={now:.4g} FLOPs: the curve ends at {seen:.4g} FLOPs, its tokens times the source's flops_per_token. Pass the FLOPs "
            "until now, or leave spent= out."
        )
    raise_all(PlanError, "cannot advise on this growth:", problems)


def few_tokens(law: ScalingLaw, f: tuple[float, float], budget: float) -> bool:
    """Return True if the whole budget gives the target fewer tokens than any point that the law was fitted to."""
    return budget / f[1] < law.curves[0].points[-1][0] / KEPT_RANGE


def check_law(law: object, own: tuple[float, Curve], others: Sequence[tuple[float, Curve]]) -> None:
    """Raise PlanError unless a law was fitted to the given curves, or to earlier moments of the same runs."""
    if not isinstance(law, ScalingLaw):
        raise PlanError(f"law={short(law)}: pass Advice.law of an earlier call, or leave law= out.")
    check_curves([own, *others])
    given = [("curve", *own), *((f"others[{i}]", *other) for i, other in enumerate(others))]
    problems: list[str] = []
    if others and len(law.curves) != len(given):
        problems.append(f"it was fitted to {len(law.curves)} curves, not to {len(given)}.")
    for fitted, (name, n, curve) in zip(law.curves, given, strict=False):
        problems += _disagreement(fitted, name, n, curve)
    raise_all(
        PlanError,
        "law= does not belong to these curves; leave law= out, and a law is fitted to them:",
        problems,
    )


def _disagreement(fitted: FittedCurve, name: str, n: float, curve: Curve) -> list[str]:
    """Return the reason why a law's curve is not the beginning of a given curve, as a list of at most one text."""
    if fitted.n_params != n:
        return [
            f"{name}: it was fitted to a model of {fitted.n_params:,.0f} parameters, not of {n:,.0f}."
        ]
    off = deviation(fitted, curve)
    if off is None:
        first, last = fitted.points[0][0], fitted.points[-1][0]
        return [
            f"{name}: it was fitted to {first:,.0f} to {last:,.0f} tokens, and the curve has {curve[0][0]:,.0f} to {curve[-1][0]:,.0f}."
        ]
    if off > SAME:
        return [
            f"{name}: the losses that it was fitted to deviate by {off:.1%} from the curve's at equal tokens."
        ]
    return []


def _float(value: object) -> float:
    """Convert a number, but no text and no bool, to a Python float."""
    if isinstance(value, str | bytes | bytearray | bool):
        raise TypeError(f"{short(value)} is not a number")
    return float(value)  # pyright: ignore
