"""The other way: a model and its optimizer made smaller in place, by the same engine."""

from collections.abc import Mapping, Sequence

from torch import nn
from torch.optim import Optimizer

from growkern.api import change_inplace, check_caller
from growkern.commit.optimizer import Masters
from growkern.engine.report import GrowthReport
from growkern.errors import PlanError
from growkern.execution.execute import Memory
from growkern.model.spec import ModelSpec
from growkern.planning.build import build
from growkern.planning.check import check
from growkern.planning.decisions import ShrinkMethod
from growkern.planning.growth_plan import GrowthPlan
from growkern.planning.sizes import Target, resolve_sizes
from growkern.shrink import WeightSelection
from growkern.support.wrappers import unwrapped

SHRINKING_STATES = ("exact", "copy", "drop")


def shrink_inplace(
    model: nn.Module,
    optim: Optimizer | None = None,
    *,
    to: Target = "0.5x",
    method: ShrinkMethod | None = None,
    state: str = "exact",
    dynamics: str | None = "mup",
    spec: ModelSpec | None = None,
    backend: str | None = None,
    plan: GrowthPlan | None = None,
    scheduler: object | None = None,
    ema: nn.Module | Sequence[nn.Module] | None = None,
    masters: Masters | None = None,
    rules: Mapping[str, int | None] | None = None,
    memory: Memory | None = None,
) -> GrowthReport:
    """Shrink a model and its optimizer in place, in the middle of training.

    Parameter objects that stay keep their identity; those of dropped blocks leave the optimizer's groups and state. Groups
    that a growth has split are made one again where their learning rates agree, and groups left empty are dropped, with their
    entries in the schedulers, unless a scheduler that drives ``optim`` was not handed over. When anything fails, everything is
    bitwise as it was.

    Args:
        model: Source model; changed in place.
        optim: Its optimizer; changed in place.
        to: ``"0.5x"`` (all widths), or a mapping from size name to an int or a factor: ``hidden, heads, kv_heads, ffn, positions,
            layers``. What is not named follows ``hidden`` in proportion where that is whole.
        method: Default ``shrink.WeightSelection()``; ``shrink.FirstCopies()`` takes an even growth back. No method preserves the
            function of a model that was not grown.
        state: What becomes of optimizer state: ``"exact"``, ``"copy"`` or ``"drop"``; see ``expand_inplace``.
        dynamics: What becomes of learning rates; to take a growth back, that of the growth.
        spec: Description of a model of your own.
        backend: See ``expand_inplace``.
        plan: A plan made before (``growkern.plan(..., shrink=...)``), in place of ``to``, ``method``, ``state`` and ``dynamics``.
        scheduler: The learning-rate scheduler that drives ``optim``, or a list of them; they follow its groups.
        ema: Averages of the model; see ``expand_inplace``.
        masters: Of weights in lower precision; those of dropped blocks are taken out of it.
        rules: Of an optimizer whose law is not known.
        memory: See ``expand_inplace``.

    Returns:
        What was done; ``print`` it.

    Raises:
        PlanError: The shrinking cannot be planned; every reason at once, with the way out.
        UnsupportedModelError: See ``describe``.
        UnsupportedOptimizerError: The optimizer's state cannot be taken along.
        InsufficientMemoryError: The target does not fit beside the source.
        CommitError: The shrinking failed on its way and was taken back.

    Example:
        >>> growkern.shrink_inplace(model, optim, to={"hidden": 512, "layers": 6})
    """
    model, optim = unwrapped(model), unwrapped(optim)
    check_caller(model, optim, plan)
    if plan is not None:
        again = dynamics not in ("mup", plan.dynamics) or state not in ("exact", plan.state)
        if to != "0.5x" or method is not None or again:
            raise PlanError(
                "plan= already says what to shrink; leave to=, method=, state= and dynamics= out."
            )
        if not plan.shrinks:
            raise PlanError("plan: no target is smaller than its source; expand_inplace runs it.")
    elif state not in SHRINKING_STATES:
        raise PlanError(
            f"state={state!r}: nothing is copied, so {', '.join(map(repr, SHRINKING_STATES))}."
        )

    def planned(found: ModelSpec) -> GrowthPlan:
        if plan is None:
            own = WeightSelection() if method is None else method
            sizes = resolve_sizes(found, to, shrink=True)
            return build(found, sizes, shrink=own, state=state, dynamics=dynamics)
        check(plan, found)
        return plan

    drop = (plan.state if plan else state) == "drop"
    return change_inplace(
        model, optim, planned, drop, spec, backend, scheduler, ema, masters, rules, memory
    )
