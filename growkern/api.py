"""The public calls: each checks its arguments and makes a request, which the engine runs."""

from collections.abc import Mapping, Sequence

from torch import nn
from torch.optim import Optimizer

from growkern.commit.checkpoint_guard import n_growths
from growkern.commit.optimizer import Masters
from growkern.depth import IdentityBlocks
from growkern.engine.report import GrowthReport
from growkern.engine.request import Request
from growkern.engine.run import run
from growkern.errors import (
    PlanError,
    UnsupportedModelError,
)
from growkern.execution.execute import Memory
from growkern.model.describe import describe
from growkern.model.spec import ModelSpec
from growkern.optimizer.describe import describe_optimizer
from growkern.planning.build import build
from growkern.planning.check import check
from growkern.planning.decisions import DepthMethod, ShrinkMethod, WidthMethod
from growkern.planning.growth_plan import GrowthPlan
from growkern.planning.sizes import Target, resolve_sizes
from growkern.shrink import WeightSelection
from growkern.support.renamed import renamed_arguments
from growkern.support.wrappers import unwrapped
from growkern.width import Lossless

SHRINKING_STATES = "exact", "copy", "drop"


@renamed_arguments(masters="master_weights", rules="state_rules")
def plan(
    model: nn.Module,
    optim: Optimizer | None = None,
    *,
    to: Target = "2x",
    width: WidthMethod | None = None,
    depth: DepthMethod | None = None,
    state: str = "exact",
    dynamics: str | None = "mup",
    spec: ModelSpec | None = None,
    seed: int | None = None,
    master_weights: Masters | None = None,
    state_rules: Mapping[str, int | None] | None = None,
    shrink: ShrinkMethod | None = None,
) -> GrowthPlan:
    """Plan a growth, or a shrinking, without changing anything; ``print`` it to see every decision.

    Args:
        model: Source model.
        optim: Its optimizer, to have its state checked too.
        to: ``"2x"``, ``"1.5x"`` (all widths), or a mapping from size name to an int or a factor.
        width: Width method; default ``width.Lossless()``.
        depth: Depth method; default ``depth.IdentityBlocks()``.
        state: What becomes of optimizer state; see ``expand_inplace``.
        dynamics: What becomes of learning rates; see ``expand_inplace``.
        spec: Description of a model of your own.
        seed: Of all noise; None for the number of growths before. Equal seeds give equal bits, on every machine.
        master_weights: Of weights in lower precision; see ``expand_inplace``.
        state_rules: Of an optimizer whose law is not known.
        shrink: How to shrink, in place of ``width`` and ``depth``; ``to`` then names smaller sizes.

    Returns:
        The plan; ``expand_inplace(..., plan=plan)`` runs it, or ``shrink_inplace``.

    Raises:
        PlanError: The growth cannot be planned; every reason at once, with the way out.
        UnsupportedModelError: See ``describe``.
        UnsupportedOptimizerError: The optimizer's state cannot be grown.
    """
    model = unwrapped(model)
    found = describe(model, spec)
    if optim is not None:
        describe_optimizer(
            model,
            unwrapped(optim),
            found,
            drop=state == "drop",
            state_rules=state_rules,
            master_weights=master_weights,
        )
    if shrink is not None:
        if width or depth or seed:
            raise PlanError("shrink= says it all; leave width=, depth= and seed= out.")
        sizes = resolve_sizes(found, to, shrink=True)
        return build(found, sizes, shrink=shrink, state=state, dynamics=dynamics)
    return _plan(model, found, to, width, depth, state, dynamics, seed)


@renamed_arguments(masters="master_weights", rules="state_rules")
def expand_inplace(
    model: nn.Module,
    optim: Optimizer | None = None,
    *,
    to: Target = "2x",
    width: WidthMethod | None = None,
    depth: DepthMethod | None = None,
    state: str = "exact",
    dynamics: str | None = "mup",
    spec: ModelSpec | None = None,
    seed: int | None = None,
    backend: str | None = None,
    plan: GrowthPlan | None = None,
    scheduler: object | None = None,
    ema: nn.Module | Sequence[nn.Module] | None = None,
    master_weights: Masters | None = None,
    state_rules: Mapping[str, int | None] | None = None,
    memory: Memory | None = None,
) -> GrowthReport:
    """Grow a model and its optimizer in place, in the middle of training.

    Parameter objects keep their identity; weights, buffers, gradients in flight, optimizer state, param groups, module
    attributes and config become those of the target. When anything fails, everything is bitwise as it was.

    Args:
        model: Source model; changed in place.
        optim: Its optimizer; changed in place.
        to: ``"2x"``, ``"1.5x"`` (all widths), or a mapping from size name to an int or a factor: ``hidden, heads, kv_heads,
            ffn, layers, ...``. What is not named follows ``hidden`` in proportion where that is whole.
        width: Width method; default ``width.Lossless()``: exact, and what is new copies nothing where pads are exact.
        depth: Depth method; default ``depth.IdentityBlocks()``: exact.
        state: What becomes of optimizer state. ``"exact"``: the dual law. ``"copy"``: gathered as it is. ``"asymmetric"``: the
            first copy of every element keeps what it was, the others start from 0 (SPARKLING). ``"zero_pad"``: the same,
            the first copy by the law. ``"drop"``: cleared.
        dynamics: ``"mup"`` multiplies learning rates by the law's factor for good (decay per step stays): by splitting param
            groups where it is one number per tensor and the scheduler was handed over, else by ``UpdateScale``.
            ``"exact"`` keeps the run on the source's trajectory: learning rate, epsilon and decay, element by element, by
            ``UpdateScale`` (the optimizer's state then stays in the source's units) or by ``growkern.optim.AdamW`` itself.
            None leaves learning rates alone and reports the factors.
        spec: Description of a model of your own.
        seed: Of all noise; None for the number of growths before this one, so that two do not draw the same.
        backend: ``"triton"``, ``"torch"``, or None for triton on a GPU and torch elsewhere; ``"nan"`` changes structure alone,
            and what is replaced is NaN (``resume``).
        plan: A plan made before, in place of ``to``, ``width``, ``depth``, ``state``, ``dynamics`` and ``seed``.
        scheduler: The learning-rate scheduler that drives ``optim``, or a list of them; they follow the split groups.
        ema: Averages of the model (``AveragedModel``, or any module like ``model``), grown by the same plan; ``()`` when
            those that are alive are of other models.
        master_weights: Parameter -> the float32 copy that ``optim`` holds in its place, when weights are kept in lower precision;
            those of new blocks are added to it.
        state_rules: For an optimizer whose law is not known: state key -> order in the gradient (0: gathered as it is, 1, 2), None
            for what is kept.
        memory: ``"stage"`` computes every target beside the source, then swaps; ``"lean"`` goes tensor by tensor and keeps
            replaced sources on the host (of a CPU: in a temporary file) for the undo; None takes the first that fits.

    The model gets a config of its own (a changed copy), so other models built from the same config object stay whole.

    Returns:
        What was done; ``print`` it.

    Raises:
        PlanError: The growth cannot be planned; every reason at once, with the way out.
        UnsupportedModelError: See ``describe``.
        UnsupportedOptimizerError: The optimizer's state cannot be grown.
        InsufficientMemoryError: The growth does not fit, with the figures.
        CommitError: The growth failed on its way and was taken back.

    Example:
        >>> growkern.expand_inplace(model, optim, to={"hidden": 1024, "layers": 24})

    Reference:
        The dual law of weights and gradients, README.md, "How it works".
    """
    model, optim = unwrapped(model), unwrapped(optim)
    _check_arguments(model, optim, plan, to, width, depth, state, dynamics, seed)

    def make_plan(found: ModelSpec) -> GrowthPlan:
        if plan is None:
            return _plan(model, found, to, width, depth, state, dynamics, seed)
        check(plan, found)
        return plan

    optims = () if optim is None else (optim,)
    drop_state = (plan.state if plan else state) == "drop"
    new_rows = getattr(width, "rows", None)
    return run(
        Request(
            model, optims, make_plan, drop_state, spec=spec, backend=backend, scheduler=scheduler, ema=ema,
            master_weights=master_weights, state_rules=state_rules, memory=memory, new_rows=new_rows,
        )
    )  # fmt: skip


@renamed_arguments(masters="master_weights", rules="state_rules")
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
    master_weights: Masters | None = None,
    state_rules: Mapping[str, int | None] | None = None,
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
        master_weights: Of weights in lower precision; those of dropped blocks are taken out of it.
        state_rules: Of an optimizer whose law is not known.
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
    _check_caller(model, plan)
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

    def make_plan(found: ModelSpec) -> GrowthPlan:
        if plan is None:
            own = WeightSelection() if method is None else method
            sizes = resolve_sizes(found, to, shrink=True)
            return build(found, sizes, shrink=own, state=state, dynamics=dynamics)
        check(plan, found)
        return plan

    optims = () if optim is None else (optim,)
    drop_state = (plan.state if plan else state) == "drop"
    return run(
        Request(
            model, optims, make_plan, drop_state, spec=spec, backend=backend, scheduler=scheduler, ema=ema,
            master_weights=master_weights, state_rules=state_rules, memory=memory,
        )
    )  # fmt: skip


def _check_arguments(
    model: object, optim: object, plan: object, to: object, width: object, depth: object, state: str,
    dynamics: object, seed: int | None,
) -> None:  # fmt: skip
    """Raise for what is of the wrong kind, said twice, or asked for at the wrong time."""
    _check_caller(model, plan)
    if not isinstance(plan, GrowthPlan):
        return
    again = dynamics not in ("mup", plan.dynamics) or seed not in (None, plan.seed)
    other = width is not None and str(width) != plan.width
    if to != "2x" or other or depth or again or state not in ("exact", plan.state):
        raise PlanError(
            "plan= already says what to grow; leave to=, width=, depth=, state=, dynamics= and seed= out."
        )
    if plan.shrinks:
        raise PlanError("plan: its targets are smaller than their sources; shrink_inplace runs it.")


def _check_caller(model: object, plan: object) -> None:
    """Raise for what is of the wrong kind."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}."
        )
    if plan is not None and not isinstance(plan, GrowthPlan):
        raise PlanError(
            f"plan: expected a GrowthPlan, got {type(plan).__name__}; GrowthPlan.from_json reads one."
        )


def _plan(
    model: nn.Module,
    spec: ModelSpec,
    to: Target,
    width: WidthMethod | None,
    depth: DepthMethod | None,
    state: str,
    dynamics: str | None,
    seed: int | None,
) -> GrowthPlan:
    return build(
        spec,
        resolve_sizes(spec, to),
        width=Lossless() if width is None else width,
        depth=IdentityBlocks() if depth is None else depth,
        state=state,
        dynamics=dynamics,
        seed=n_growths(model) if seed is None else seed,
    )
