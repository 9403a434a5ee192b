"""Advice before compute is spent: whether to grow a model, never grow, or start the target from scratch; when to grow; what growth saves.

The scaling law (``growkern.advice.scaling``) predicts the losses of source and target. The *worth* of the source's training at a growth is
the number of FLOPs after which the target from scratch reaches the source's loss. A free and perfect growth after g of B FLOPs ends at the
loss of the target from scratch after ``B - g + worth(g)`` FLOPs; a recipe ends at the loss after ``B - g + kept * worth(g)`` FLOPs. The
share ``kept`` of each recipe was measured (``growkern.recipes``).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod

import torch
from torch import Tensor

from growkern.advice.advice import SURE, Advice, Option
from growkern.advice.scaling import Curve, ScalingLaw, fit, interval
from growkern.depth import IdentityBlocks
from growkern.errors import PlanError, raise_all
from growkern.recipes import BUDGETS, MEASURED, RECIPES
from growkern.recipes.recipe import Interval, Recipe
from growkern.training.schedule import GrowthSchedule
from growkern.training.triggers import Event
from growkern.width import Lossless

FAR = 4.0  # multiple of the curve's compute beyond which the law is an extrapolation
LATEST = 0.5  # share of the budget; no later growth was measured
SEEDS = 3  # minimum number of seeds of a default recipe
LATER = 0.01  # minimum gain in saved compute, as a share, of growing later
NOTHING: Interval = (0.0, 0.0, 0.0)
N_TIMES = 16  # growth points that are tried between now and ``LATEST``
METHODS = {"width": Lossless(), "depth": IdentityBlocks()}  # default methods of expand_inplace


def advise(
    curve: Curve | GrowthSchedule,
    *,
    budget: float,
    source: float | None = None,
    target: float | None = None,
    others: Sequence[tuple[float, Curve]] = (),
    kind: str | None = None,
    recipe: str | Recipe | None = None,
    flops_per_token: tuple[float, float] | None = None,
    spent: float | None = None,
    law: ScalingLaw | None = None,
    seed: int = 0,
) -> Advice:
    """Advise whether to grow, never grow, or start the target from scratch, and predict what growing now would save.

    Args:
        curve: (tokens, loss in nats) of the run so far; or the attached ``GrowthSchedule`` of a run, which has observed tokens and losses.
        budget: FLOPs of the whole run, including the FLOPs until now.
        source: Number of parameters of the source, without the input embedding. A schedule counts all parameters of its model instead.
        target: Number of parameters of the target, without the input embedding. A schedule plans its next event instead.
        others: Pairs of number of parameters and curve, of models of other sizes on the same data. A second size narrows all intervals.
        kind: ``"width"`` or ``"depth"``: what grows. Default: what the schedule's next event grows, else ``"width"``.
        recipe: Name of a measured recipe, or a ``Recipe`` of your own measurements. Default: the recipe of the schedule's next event,
            else the best measured recipe of the kind.
        flops_per_token: FLOPs of a token, forward and backward, of source and target. Default: as observed by the schedule, else
            6 x parameters.
        spent: FLOPs until now. Default: as observed by the schedule, else the curve's last tokens times the source's FLOPs per token.
        law: Law fitted to these curves, ``Advice.law`` of an earlier call; other budgets and recipes then need no new fit.
        seed: Seed of the draws.

    Returns:
        Options with intervals, a decision under either accounting, and the unknowns.

    Raises:
        PlanError: A curve cannot be fitted, the target is not larger than the source, the budget is spent, or the recipe is unknown.

    Example:
        >>> advice = growkern.advise(curve, source=58_656, target=217_664, budget=1.2e12, others=[(30_000, smaller)])
        >>> advice.decision, advice.now.charged
        ('grow now', (0.02, 0.11, 0.19))

    Reference:
        Hoffmann et al., arXiv:2203.15556 (the law); Shen et al., "Staged Training for Transformer Language Models",
        arXiv:2203.06211 (the loss a grown model starts at, read off the target's own curve).
    """
    if isinstance(curve, GrowthSchedule):
        if source is not None or target is not None:
            raise PlanError(
                "advise(schedule): the schedule knows its model and plans its target; leave source= and target= out."
            )
        run = _observed(curve)
        kind, recipe = kind or run.kind, recipe or run.recipe
        n, f, points = run.n_params, flops_per_token or run.flops_per_token, run.curve
        spent, notes = run.spent if spent is None else spent, run.notes
    else:
        n, points, notes = _sizes(source, target), _points(curve, "curve"), ()
        f = flops_per_token or (6.0 * n[0], 6.0 * n[1])
    if law is not None and law.curves[0].n_params != n[0]:
        raise PlanError(
            f"law= was fitted to a model of {law.curves[0].n_params:,.0f} parameters, not of {n[0]:,.0f}; "
            "leave law= out to fit one."
        )
    (each_source, each_target), (budget,) = (
        _numbers(f, "flops_per_token", 2),
        _numbers([budget], "budget", 1),
    )
    f = each_source, each_target
    read = [(float(size), _points(other, "others")) for size, other in others]
    law = law or fit([(n[0], points), *read], seed=seed)
    now = points[-1][0] * f[0] if spent is None else spent
    _check(n, f, now, budget)
    return _advice(law, n, f, _recipe(recipe, kind or "width"), now, budget, seed, notes)


@dataclass(frozen=True)
class _Observed:
    """Inputs of the advice that a schedule provides."""

    n_params: tuple[float, float]
    flops_per_token: tuple[float, float]
    curve: Curve
    spent: float
    kind: str
    recipe: Recipe
    notes: tuple[str, ...]


def _observed(schedule: GrowthSchedule) -> _Observed:
    """Return the inputs of the advice from an attached schedule.

    Raises:
        PlanError: The schedule is not attached, has no remaining event, or has observed no tokens.
    """
    attachment, event, counts = schedule.attachment, schedule.next_event, schedule.counts
    problems = [
        text
        for wrong, text in (
            (
                attachment is None,
                "the schedule is not attached to a model: call schedule.attach(model, optim) first.",
            ),
            (
                event is None,
                "all events of the schedule have fired: add an event, or pass a curve with source= and target=.",
            ),
            (
                not counts.n_tokens,
                "the schedule has observed no tokens: call schedule.observe(tokens=..., loss=...) with every step.",
            ),
        )
        if wrong
    ]
    raise_all(
        PlanError, f"cannot advise on this schedule of {len(schedule.events)} events:", problems
    )
    assert attachment is not None and event is not None
    plan = attachment.planned(event)
    names = {name for name, _ in attachment.model.named_parameters()}
    target = sum(prod(plan.shapes(row)[1]) for row in plan.tensors if row.source in names)
    source = attachment.n_params
    each = (
        counts.n_flops / counts.n_tokens if counts.n_flops and not schedule.fired else 6.0 * source
    )
    layers = plan.source_sizes.get("layers", 0)
    deeper = plan.target_sizes.get("layers", layers) > layers
    wider = any(
        plan.target_sizes[k] > size for k, size in plan.source_sizes.items() if k != "layers"
    )
    kind = "depth" if deeper and not wider else "width"
    notes = (
        [
            "how width and depth, grown at once, differ from one of them: no such growth was measured."
        ]
        if deeper and wider
        else []
    )
    if schedule.fired:
        notes.append(
            "how a model that has grown before differs from one that has not: its curve since then is read as that of a run from scratch."
        )
    return _Observed(
        (source, target), (each, each * target / source), counts.curve.read(), counts.n_flops, kind, _recipe_of(event, kind), tuple(notes)
    )  # fmt: skip


def _recipe_of(event: Event, kind: str) -> Recipe:
    """Return the measured recipe with an event's method, state and dynamics; else the pooled recipe of the kind."""

    def settings(growth: Mapping[str, object]) -> tuple[object, ...]:
        method = growth.get(kind) or METHODS[kind]
        return method, growth.get("state", "exact"), growth.get("dynamics", "mup")

    asked = settings(vars(event))
    known = [recipe for recipe in RECIPES.values() if recipe.kind == kind]
    matching = [recipe for recipe in known if settings(recipe.growth) == asked]
    return matching[0] if matching else pooled(RECIPES, kind, type(asked[0]).__name__)


def pooled(recipes: Mapping[str, Recipe], kind: str | None, name: str) -> Recipe:
    """Return mean and spread of the measured recipes of a kind (of all kinds if the kind has none), for an unmeasured recipe."""
    known = [recipe for recipe in recipes.values() if recipe.kind == kind] or [*recipes.values()]
    n = len(known)
    kept = sum(recipe.kept for recipe in known) / n
    spread = sum((recipe.kept - kept) ** 2 for recipe in known) / n
    sd = (sum(recipe.sd**2 for recipe in known) / n + spread) ** 0.5
    worth = sum(recipe.worth[0] for recipe in known) / n, max(recipe.worth[1] for recipe in known)
    return Recipe(name, kind or "width", kept, sd, 0, worth=worth)


def _recipe(recipe: str | Recipe | None, kind: str) -> Recipe:
    if kind not in METHODS:
        raise PlanError(f"kind={kind!r} is unknown: pass 'width' or 'depth'.")
    if isinstance(recipe, Recipe):
        return recipe
    if recipe is None:
        known = [r for r in RECIPES.values() if r.kind == kind]
        sound = [r for r in known if all(s.n_seeds >= SEEDS for s in r.saved)] or known
        return max(sound, key=lambda r: r.kept) if sound else pooled(RECIPES, kind, kind)
    if recipe not in RECIPES or RECIPES[recipe].kind != kind:
        of_kind = [name for name, r in RECIPES.items() if r.kind == kind]
        raise PlanError(
            f"no recipe {recipe!r} of kind {kind!r} was measured. Known: {'; '.join(of_kind) or 'none'}. Pass a Recipe of your own "
            "measurements."
        )
    return RECIPES[recipe]


def _sizes(source: float | None, target: float | None) -> tuple[float, float]:
    if source is None or target is None:
        raise PlanError(
            f"advise(source={source}, target={target}): pass the numbers of parameters of source and target, without the input "
            "embedding; or pass a GrowthSchedule in place of the curve."
        )
    return float(source), float(target)


def _points(curve: Iterable[Sequence[float]], name: str) -> list[tuple[float, float]]:
    """Convert a curve, given as any sequence or array, to pairs of Python floats."""
    try:
        points = [(float(tokens), float(loss)) for tokens, loss in curve]
    except (TypeError, ValueError) as error:
        raise PlanError(f"{name}: expected pairs of (tokens, loss in nats): {error}.") from None
    if not points:
        raise PlanError(f"{name} has no points. Pass (tokens, loss in nats) of the run so far.")
    return points


def _numbers(values: object, name: str, n: int) -> tuple[float, ...]:
    try:
        numbers = tuple(float(value) for value in values)  # pyright: ignore
    except (TypeError, ValueError) as error:
        expected = "a number" if n == 1 else f"{n} numbers"
        raise PlanError(f"{name}: expected {expected}: {error}.") from None
    if len(numbers) != n:
        raise PlanError(f"{name}: expected {n} numbers, got {len(numbers)}.")
    return numbers


def _check(n: tuple[float, float], f: tuple[float, float], now: float, budget: float) -> None:
    """Raise PlanError for sizes, FLOPs and budgets that allow no advice."""
    problems: list[str] = []
    if not n[1] > n[0]:
        problems.append(
            f"target={n[1]:,.0f} parameters is not larger than source={n[0]:,.0f}. Name the larger model that the source grows into."
        )
    if not all(x > 0 and isfinite(x) for x in f):
        problems.append(
            f"flops_per_token={f}: pass the FLOPs per token (forward and backward) of source and target, above 0."
        )
    if f[1] <= f[0]:
        problems.append(
            f"flops_per_token={f}: the target must cost more than the source; pass (source, target)."
        )
    if not (isfinite(now) and now > 0):
        problems.append(f"spent={now}: pass the FLOPs of the run until now, above 0.")
    if not (isfinite(budget) and budget > now):
        problems.append(
            f"budget={budget:.4g} FLOPs is spent: the curve ends at {now:.4g} FLOPs. The budget counts the whole run; pass a larger one."
        )
    raise_all(PlanError, "cannot advise on this growth:", problems)


def _advice(
    law: ScalingLaw, n: tuple[float, float], f: tuple[float, float], recipe: Recipe, now: float, budget: float, seed: int,
    notes: Sequence[str],
) -> Advice:  # fmt: skip
    generator = torch.Generator().manual_seed(seed + 2)
    normal = torch.randn(2, len(law.draws), generator=generator, dtype=torch.float64)
    kept = recipe.kept + recipe.sd * normal[0]
    factor = (recipe.worth[0] + recipe.worth[1] * normal[1]).clamp_min(0)

    def scratch_flops(loss: Tensor) -> Tensor:
        """Return the FLOPs after which the target from scratch reaches a loss."""
        return (law.tokens(n[1], loss - law.noise) * f[1]).clamp_max(1e3 * budget)

    def need(at: float, kept: Tensor | float) -> Tensor:
        """Return the FLOPs after which the target from scratch reaches the final loss of a run that grew at ``at`` FLOPs."""
        worth = factor * scratch_flops(law.loss(n[0], at / f[0]))
        return (budget - at + kept * worth).clamp_min(0.01 * budget)

    def ends(flops: Tensor | float) -> Tensor:
        """Return the loss of the target from scratch after ``flops``."""
        return law.loss(n[1], torch.as_tensor(flops) / f[1]) + law.noise

    def saved(at: float, kept: Tensor | float) -> Tensor:
        return 1 - budget / need(at, kept)

    def shares(flops: Tensor) -> tuple[Interval, Interval]:
        """Return the savings, charged and sunk, if the target from scratch needs ``flops``."""
        return interval(1 - budget / flops), interval(1 - (budget - now) / flops)

    latest = max(now, LATEST * budget)
    times = [now * (latest / now) ** (i / (N_TIMES - 1)) for i in range(N_TIMES)]
    best = max(times, key=lambda at: float(saved(at, kept).median()))
    gain = float(saved(best, kept).median() - saved(now, kept).median())
    points = {"grow now": now} | ({"grow later": best} if gain > LATER else {})
    scratch, never = ends(budget), law.loss(n[0], budget / f[0])
    grown = {name: ends(need(at, kept)) for name, at in points.items()}
    last = [*grown][-1]
    charged = {"from scratch": scratch, "never grow": never, last: grown[last]}
    sunk = charged | {"from scratch": ends(budget - now)}
    chances = _chances(charged)
    options = [
        Option("from scratch", None, interval(scratch), NOTHING, NOTHING, chances["from scratch"]),
        Option(
            "never grow",
            None,
            interval(never),
            *shares(scratch_flops(never)),
            chances["never grow"],
        ),
    ]
    for name, at in points.items():
        chance = _chances(charged | {last: grown[name]})[last]
        options.append(Option(name, at, interval(grown[name]), *shares(need(at, kept)), chance))
    return Advice(
        _decide(chances), _decide(_chances(sunk)), tuple(options), interval(saved(now, 1.0)), recipe, n, f, now, budget, law,
        (*_unknown(law, n, f, recipe, now, budget), *notes),
    )  # fmt: skip


def _chances(losses: dict[str, Tensor]) -> dict[str, float]:
    """Return the share of the draws in which each option ends lowest."""
    lowest = torch.stack([*losses.values()]).argmin(0)
    return {name: float((lowest == i).double().mean()) for i, name in enumerate(losses)}


def _decide(chances: dict[str, float]) -> str:
    name = max(chances, key=lambda name: chances[name])
    return name if chances[name] >= SURE else "cannot tell"


def _unknown(
    law: ScalingLaw,
    n: tuple[float, float],
    f: tuple[float, float],
    recipe: Recipe,
    now: float,
    budget: float,
) -> list[str]:
    """Return the unknowns that limit the advice, one sentence each."""
    said: list[str] = []
    sizes = {curve.n_params for curve in law.curves}
    if len(sizes) == 1:
        said.append(
            f"what a larger model gains: all curves have {n[0]:,.0f} parameters, so the gain is the prior's guess. Pass the curve of a "
            "model of another size (others=, --other)."
        )
    seen = law.curves[0].points[-1][0] * f[0]
    if budget > FAR * seen:
        said.append(
            f"losses at the budget: it is {budget / seen:.1f} x the compute of the curve, and the law is an extrapolation beyond "
            f"{FAR:g} x."
        )
    said.append(
        f"how well growth does at your sizes: {recipe.name} was measured in {recipe.n} figures on models of {MEASURED}."
        if recipe.n
        else f"how well {recipe.name} does: it was not measured. Its figures are those of all recipes of its kind that were, or of all "
        "kinds where none was."
    )
    low, high = BUDGETS
    if not low <= budget / now <= high:
        said.append(
            f"how much of the source's worth growth keeps for a budget of {budget / now:.3g} x the compute until now: {low:.3g} to "
            f"{high:.3g} x were measured."
        )
    said.append(
        "losses after annealing, and whether the learning rates are the best: losses are those of the curve's own schedule, and an "
        "untuned rate of the source makes growth look worse than it is."
    )
    left = sum(curve.n_left_out for curve in law.curves)
    said.append(
        f"the warm-up: {left} of {sum(c.n_read for c in law.curves)} points, below a tenth of a curve's tokens, are left out."
    )
    return said
