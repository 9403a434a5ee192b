"""Advice before compute is spent: whether to grow a model, never grow, or start the target from scratch; when to grow; what growth saves.

The scaling law (``growkern.advice.scaling``) predicts the losses of source and target. The *worth* of the source's training at a growth is
the number of FLOPs after which the target from scratch reaches the source's loss. A free and perfect growth after g of B FLOPs ends at the
loss of the target from scratch after ``B - g + worth(g)`` FLOPs; a recipe ends at the loss after ``pace * (B - g) + kept * worth(g)``
FLOPs. ``kept`` and ``pace`` of each recipe were measured (``growkern.recipes``), the pace over at most ``BUDGETS[1]`` times the compute at
the growth; the FLOPs beyond are worth as much as from scratch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from growkern.advice import arguments
from growkern.advice.advice import LEAST, SURE, Advice, Option
from growkern.advice.choice import choose
from growkern.advice.observed import Observed, observed
from growkern.advice.scaling import Curve, ScalingLaw, fit, interval, standard_normal
from growkern.errors import PlanError
from growkern.recipes import BUDGETS, FACTORS, MEASURED
from growkern.recipes.recipe import Interval, Recipe
from growkern.support.text import short
from growkern.training.schedule import GrowthSchedule

OTHER_SIZE = 1.25  # ratio of parameters from which a curve says what a larger model gains
FAR = 4.0  # multiple of a curve's parameters and compute beyond which the law is an extrapolation
LATEST = 0.5  # share of the budget; no later growth was measured
NOTHING: Interval = (0.0, 0.0, 0.0)
N_TIMES = 16  # growth points that are tried between now and ``LATEST``


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
        kind: ``"width"``, ``"depth"`` or ``"both"``: what grows. Default: what the schedule's next event or the recipe grows, else
            ``"width"``.
        recipe: Name of a measured recipe, or a ``Recipe`` of your own measurements. Default: the recipe of the schedule's next event,
            else the recipe of the kind that the fewest others beat where both were measured.
        flops_per_token: FLOPs of a token, forward and backward, of source and target. Default: as observed by the schedule, else
            6 x parameters.
        spent: FLOPs until now. Default: as observed by the schedule, else the curve's last tokens times the source's FLOPs per token.
        law: Law fitted to these curves or to earlier moments of the same runs, ``Advice.law`` of an earlier call; other budgets and
            recipes then need no new fit.
        seed: Seed of the draws, from 0 to 2**64 - 1.

    Returns:
        Options with intervals, a decision under either accounting, and the unknowns.

    Raises:
        PlanError: A curve cannot be fitted, the target is not larger than the source, the budget is spent, target or budget are more
            than 1,000 times beyond the curve, ``spent`` is less than half of the curve's FLOPs, ``others`` contains the source's own curve,
            the recipe is unknown, the law belongs to other curves, or an argument is no number.

    Example:
        >>> curve = [(3e5 * i / 20, 1 + (i / 20) ** -0.3) for i in range(1, 21)]  # (tokens, loss) of the run so far
        >>> advice = growkern.advise(curve, source=58_656, target=217_664, budget=1.2e12)
        >>> advice.decision, [option.name for option in advice.options]
        ('cannot tell', ['from scratch', 'never grow', 'grow now', 'grow later'])

    Reference:
        Hoffmann et al., arXiv:2203.15556 (the law); Shen et al., "Staged Training for Transformer Language Models",
        arXiv:2203.06211 (the loss a grown model starts at, read off the target's own curve).
    """
    seed = arguments.checked_seed(seed)
    run = _inputs(curve, source, target)
    n, points = run.n_params, run.curve
    if run.kind is not None and kind not in (None, run.kind):
        raise PlanError(
            f"kind={short(kind)}: the schedule's next event grows {run.kind!r}; leave kind= out."
        )
    chosen = choose(run.recipe if recipe is None else recipe, kind)
    wanted = "FLOPs of a token, forward and backward, of source and target"
    f = run.flops_per_token
    f = f if flops_per_token is None else arguments.pair(flops_per_token, "flops_per_token", wanted)
    now = run.spent if spent is None else arguments.number(spent, "spent", "the FLOPs until now")
    now = points[-1][0] * f[0] if now is None else now
    budget = arguments.number(budget, "budget", "the FLOPs of the whole run")
    read = arguments.curves(others, points)
    if law is None:
        law = fit([(n[0], points), *read], seed=seed)
    else:
        arguments.check_law(law, (n[0], points), read)
    arguments.check(law, n, f, now, budget)
    return _advice(law, n, f, chosen, now, budget, seed, run.notes)


def _inputs(curve: Curve | GrowthSchedule, source: object, target: object) -> Observed:
    """Return what a schedule has observed, or a curve with its sizes.

    Raises:
        PlanError: A schedule is given with sizes, or a curve without them.
    """
    if isinstance(curve, GrowthSchedule):
        if source is not None or target is not None:
            raise PlanError(
                "advise(schedule): the schedule knows its model and plans its target; leave source= and target= out."
            )
        return observed(curve)
    if source is None or target is None:
        raise PlanError(
            f"advise(source={source}, target={target}): pass the numbers of parameters of source and target, without the input "
            "embedding; or pass a GrowthSchedule in place of the curve."
        )
    wanted = "the number of parameters, without the input embedding"
    n = arguments.number(source, "source", wanted), arguments.number(target, "target", wanted)
    return Observed(n, (6.0 * n[0], 6.0 * n[1]), arguments.points(curve, "curve"))


def _advice(
    law: ScalingLaw, n: tuple[float, float], f: tuple[float, float], recipe: Recipe, now: float, budget: float, seed: int,
    notes: Sequence[str],
) -> Advice:  # fmt: skip
    normal = standard_normal(3, len(law.draws), seed=seed + 2)
    kept = recipe.kept + recipe.sd * normal[0]
    factor = (recipe.worth[0] + recipe.worth[1] * normal[1]).clamp_min(0)
    pace = (recipe.pace[0] + recipe.pace[1] * normal[2]).clamp_min(0)
    measured = (BUDGETS[1] - 1) * now  # FLOPs after a growth

    def scratch_flops(loss: Tensor) -> Tensor:
        """Return the FLOPs after which the target from scratch reaches a loss."""
        return (law.tokens(n[1], loss - law.noise) * f[1]).clamp_max(1e3 * budget)

    def need(at: float, kept: Tensor | float = kept, pace: Tensor | float = pace) -> Tensor:
        """Return the FLOPs after which the target from scratch reaches the final loss of a run that grew at ``at`` FLOPs."""
        worth = factor * scratch_flops(law.loss(n[0], at / f[0]))
        gained = (pace - 1) * min(budget - at, measured)
        return (budget - at + gained + kept * worth).clamp_min(0.01 * budget)

    def ends(flops: Tensor | float) -> Tensor:
        """Return the loss of the target from scratch after ``flops``."""
        return law.loss(n[1], flops / f[1]) + law.noise

    def shares(flops: Tensor) -> tuple[Interval, Interval]:
        """Return the savings, charged and sunk, if the target from scratch needs ``flops``."""
        return interval(1 - budget / flops), interval(1 - (budget - now) / flops)

    latest = max(now, LATEST * budget)
    times = [now * (latest / now) ** (i / (N_TIMES - 1)) for i in range(N_TIMES)]
    saves = [float((1 - budget / need(at)).median()) for at in times]
    best, gain = times[saves.index(max(saves))], max(saves) - saves[0]
    points = {"grow now": now} | ({"grow later": best} if gain > LEAST else {})
    never = law.loss(n[0], budget / f[0])
    needs = {name: need(at) for name, at in points.items()}
    last = [*points][-1]
    whole = torch.full_like(never, budget)
    charged = {"from scratch": whole, "never grow": scratch_flops(never), last: needs[last]}
    sunk = charged | {"from scratch": whole - now}
    chances = _chances(charged)
    options = [
        Option("from scratch", None, interval(ends(budget)), NOTHING, NOTHING, chances["from scratch"]),
        Option("never grow", None, interval(never), *shares(charged["never grow"]), chances["never grow"]),
    ]  # fmt: skip
    for name, at in points.items():
        chance = _chances(charged | {last: needs[name]})[last]
        options.append(Option(name, at, interval(ends(needs[name])), *shares(needs[name]), chance))
    perfect = interval(1 - budget / need(now, 1.0, 1.0))
    return Advice(
        _decide(chances), _decide(_chances(sunk)), tuple(options), perfect, recipe, n, f, now, budget, law,
        (*_unknown(law, n, f, recipe, now, budget), *notes), max(0.0, 1 - sum(chances.values())),
    )  # fmt: skip


def _chances(needs: dict[str, Tensor]) -> dict[str, float]:
    """Return the share of the draws in which each option ends lowest, by at least ``LEAST`` of the compute.

    Args:
        needs: Name of an option -> FLOPs after which the target from scratch reaches the option's final loss, one value per draw.
    """
    flops = torch.stack([*needs.values()])
    first, second = (top := flops.topk(2, dim=0)).values
    lowest = top.indices[0].where(second <= (1 - LEAST) * first, -1)  # -1: a tie
    return {name: float((lowest == i).double().mean()) for i, name in enumerate(needs)}


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
    sizes = [curve.n_params for curve in law.curves]
    if max(sizes) < OTHER_SIZE * min(sizes):
        said.append(
            f"what a larger model gains: all curves are of models of about {n[0]:,.0f} parameters, so the gain is the prior's guess. Pass "
            "the curve of a model of another size (others=, --other)."
        )
    largest = max(sizes)
    if n[1] > FAR * largest:
        said.append(
            f"losses of the target: it has {n[1] / largest:.1f} x the parameters of the largest model with a curve, and the law is an "
            f"extrapolation beyond {FAR:g} x."
        )
    if arguments.few_tokens(law, f, budget):
        said.append(
            f"losses of the target from scratch: within the budget it reads {budget / f[1]:.3g} tokens, fewer than any point of the fit."
        )
    seen = law.curves[0].points[-1][0] * f[0]
    if budget > FAR * seen:
        said.append(
            f"losses at the budget: it is {budget / seen:.1f} x the compute of the curve, and the law is an extrapolation beyond "
            f"{FAR:g} x."
        )
    said.append(
        f"how well growth does at your sizes: {recipe.name} was measured in {recipe.runs} of models of {MEASURED}."
        if recipe.n
        else f"how well {recipe.name} does: it was not measured. Its figures are those of all recipes of its kind that were, or of all "
        "kinds where none was."
    )
    low, high = FACTORS
    if not low <= n[1] / n[0] <= high:
        said.append(
            f"how growth to {n[1] / n[0]:.3g} x the parameters does: growth to {low:g} to {high:g} x was measured."
        )
    low, high = BUDGETS
    if not low <= budget / now <= high:
        said.append(
            f"how growth does for a budget of {budget / now:.3g} x the compute until now: {low:.3g} to {high:.3g} x were measured."
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
