"""Public functions: each checks its arguments and builds a request, which the engine runs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from growkern.commit.checkpoint_guard import growth_history, n_growths
from growkern.commit.optimizer import Masters
from growkern.depth import IdentityBlocks
from growkern.distributed.shards import reshard
from growkern.engine.cached_sizes import refuse_missing_eps, unlisted_sizes
from growkern.engine.first_blocks import first_blocks
from growkern.engine.forward_check import Check
from growkern.engine.history import DEPTHS
from growkern.engine.report import GrowthReport
from growkern.engine.request import Request
from growkern.engine.run import run
from growkern.errors import PlanError, UnsupportedModelError, raise_all
from growkern.execution.execute import NOTHING
from growkern.execution.sets import Memory
from growkern.model.describe import describe, traced_example
from growkern.model.spec import ModelSpec
from growkern.optimizer.describe import Optimizers, describe_optimizers, optimizers
from growkern.planning.build import build
from growkern.planning.check import check as check_plan
from growkern.planning.decisions import DepthMethod, ShrinkMethod, WidthMethod
from growkern.planning.growth_plan import GrowthPlan
from growkern.planning.method_text import names_method
from growkern.planning.plan_fields import problems_of
from growkern.planning.sizes import Target, resolve_sizes
from growkern.shrink import WeightSelection
from growkern.support.argument_types import typed_arguments
from growkern.support.progress import Progress
from growkern.support.renamed import renamed_arguments
from growkern.support.text import short
from growkern.support.wrappers import unwrapped
from growkern.width import Lossless

SHRINKING_STATES = "exact", "copy", "drop"
typed = typed_arguments(  # all other arguments are checked by the functions that read them
    PlanError, "model", "optim", "to", "width", "depth", "state", "dynamics", "seed", "plan", "spec", "check", "memory", "ema",
    "master_weights", "scheduler",
)  # fmt: skip


@renamed_arguments(masters="master_weights", rules="state_rules")
@typed
def plan(
    model: nn.Module,
    optim: Optimizers = None,
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
    """Plan a growth or a shrinking without changing anything; ``print`` the plan to see every decision.

    Args:
        model: Source model.
        optim: Optimizer of the model, or a list of optimizers; their state is checked too.
        to: ``"2x"``, ``"1.5x"`` (all widths), or a mapping from size name, or field of the config, to an int or a factor.
        width: Width method; default ``width.Lossless()``.
        depth: Depth method; default ``depth.IdentityBlocks()``.
        state: How optimizer state grows; see ``expand_inplace``.
        dynamics: How learning rates follow the growth; see ``expand_inplace``.
        spec: Description of a custom model.
        seed: Seed of the noise; None: the number of earlier growths. Equal seeds give equal bits on every machine.
        master_weights: Float32 copies of low-precision weights; see ``expand_inplace``.
        state_rules: Rules for an optimizer without a known law; see ``expand_inplace``.
        shrink: Shrink method, in place of ``width`` and ``depth``; ``to`` then names smaller sizes.

    Returns:
        The plan; ``expand_inplace(..., plan=plan)`` or ``shrink_inplace(..., plan=plan)`` runs it.

    Raises:
        PlanError: The growth cannot be planned. The message lists every reason and a way out.
        UnsupportedModelError: See ``describe``.
        UnsupportedOptimizerError: The optimizer's state cannot be grown.

    Example:
        >>> plan = growkern.plan(model, optim, to={"hidden": 48, "layers": 3})
        >>> plan.preserves, plan.new_blocks
        ('function', ('model.layers.2',))
    """
    model = unwrapped(model)
    given = getattr(depth, "block", None)
    first: dict[str, nn.Module] = {}
    if isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        reshard(model)  # the optimizer has the shards
        first = first_blocks(model, spec, given)
    described = describe(model, spec, values=False, first=first)
    describe_optimizers(
        model, optimizers(optim), described, drop=state == "drop", state_rules=state_rules, master_weights=master_weights,
    )  # fmt: skip
    if shrink is not None:
        if width or depth or seed:
            raise PlanError(
                "shrink= decides width and depth, and draws nothing; leave width=, depth= and seed= out."
            )
        sizes = resolve_sizes(described, to, shrink=True)
        return build(described, sizes, shrink=shrink, state=state, dynamics=dynamics)
    return _plan(model, described, to, width, depth, state, dynamics, seed, spec is not None)


@renamed_arguments(masters="master_weights", rules="state_rules")
@typed
def expand_inplace(
    model: nn.Module,
    optim: Optimizers = None,
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
    check: Check | None = None,
    on_progress: Progress | None = None,
) -> GrowthReport:
    """Grow a model and its optimizer in place, in the middle of training.

    Parameter objects keep their identity; weights, buffers, gradients in flight, optimizer state, param groups, module
    attributes and config become those of the target. The model gets its own copy of the config, so other models with the same
    config object do not change. If the growth fails, everything is bitwise unchanged.

    Args:
        model: Source model; changed in place.
        optim: Optimizer of the model, or a list of optimizers, each of other parameters; changed in place.
        to: ``"2x"``, ``"1.5x"`` (all widths), or a mapping from size name, or field of the config, to an int or a factor:
            ``hidden, heads, kv_heads, ffn, layers, ...``. Unnamed widths follow ``hidden`` in proportion where the result is an integer.
        width: Width method; default ``width.Lossless()``: exact, and new coordinates copy nothing where pads are exact.
        depth: Depth method; default ``depth.IdentityBlocks()``: exact.
        state: How optimizer state grows. ``"exact"``: scaled by the dual law. ``"copy"``: copied unscaled. ``"asymmetric"``: the
            first copy of every element keeps the source's state unscaled, the other copies start from 0 (SPARKLING).
            ``"zero_pad"``: the first copy is scaled by the law, the other copies start from 0. ``"drop"``: cleared.
        dynamics: ``"mup"`` multiplies learning rates permanently by the law's factor (decay per step stays): by splitting param
            groups where the factor is one number per tensor and the scheduler was passed, else by ``UpdateScale``.
            ``"exact"`` keeps the run on the source's trajectory: it scales learning rate, epsilon and decay element by element, by
            ``UpdateScale`` (the optimizer's state then stays in the source's units) or by ``growkern.optim.AdamW`` itself.
            None leaves learning rates unchanged and reports the factors.
        spec: Description of a custom model.
        seed: Seed of the noise; None: the number of earlier growths, so that successive growths draw different noise.
        backend: ``"triton"``, ``"torch"``, or None for triton on a GPU and torch elsewhere. ``"nan"`` changes only the structure
            and fills replaced tensors with NaN (for ``resume``).
        plan: Plan from ``growkern.plan``, in place of ``to``, ``width``, ``depth``, ``state``, ``dynamics`` and ``seed``. A method that
            computes tensors (``vocab.CLPTransfer``, ``depth.Fresh(init=...)``) is passed beside it.
        scheduler: The learning-rate scheduler that drives ``optim``, or a list of schedulers; each follows the split groups.
        ema: Weight averages of the model (``AveragedModel``, or any module with the model's parameters), grown by the same plan;
            ``()`` if every live ``AveragedModel`` averages another model.
        master_weights: Mapping from parameter to the float32 copy that ``optim`` updates in place of the low-precision parameter;
            the copies for new blocks are added to it. The copy of a sharded parameter is sharded alike: ``p.detach().float()``.
        state_rules: Rules for an optimizer without a known law: state key -> order in the gradient: 0 (copied unscaled), 1 (first
            moment) or 2 (second moment); None for state that is kept. Of several optimizers, they apply to keys without a known rule.
        memory: ``"stage"`` computes every target beside the source, then swaps. ``"lean"`` grows one parameter (with gradient and state) at
            a time and keeps replaced sources on the host (for a model on the CPU: in a temporary file) for the rollback. None: the
            first of these that fits.
        check: A batch (a tensor, a sequence of positional arguments, or a mapping of keyword arguments), or a function from the model to
            its outputs, which must leave the model as it is. The forward runs on it before the growth and on the grown model, in
            evaluation mode; if the grown model's forward fails, or an output moves by more than rounding explains although the plan
            preserves the function, the growth is taken back. None for a model that was described by tracing: the traced inputs.
        on_progress: Called with the bytes written so far and the total bytes: on a CPU after every piece of a tensor, on a GPU with
            ``memory="lean"`` after every set of tensors. What it raises takes the growth back.

    Returns:
        The report; ``print`` it.

    Raises:
        PlanError: The growth cannot be planned. The message lists every reason and a way out.
        UnsupportedModelError: See ``describe``.
        UnsupportedOptimizerError: The optimizer's state cannot be grown.
        InsufficientMemoryError: The growth does not fit in memory. The message gives required and free memory.
        CommitError: The growth failed and was rolled back.

    Example:
        >>> scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optim, T_max=1000)
        >>> report = growkern.expand_inplace(model, optim, to={"hidden": 48, "layers": 4}, scheduler=scheduler)
        >>> report.preserves, report.n_params_source, report.n_params_target
        ('function', 10920, 77328)

    Reference:
        The dual law of weights and gradients: the guide "How it works".
    """
    model = unwrapped(model)
    check_arguments(model, plan, to, width, depth, state, dynamics, seed)

    methods = _methods(width, depth) if plan is None else None

    def make_plan(described: ModelSpec) -> GrowthPlan:
        if plan is None:
            return _plan(
                model, described, to, width, depth, state, dynamics, seed, spec is not None
            )
        check_plan(plan, described)
        return plan

    def check_of(described: ModelSpec) -> Check | None:
        if check is not None or backend == NOTHING:
            return check
        return traced_example(model, described, custom=spec is not None)

    drop_state = (plan.state if plan else state) == "drop"
    new_rows = getattr(width, "rows", None)
    return run(
        Request(
            model, optimizers(optim), make_plan, drop_state, methods, spec=spec, backend=backend, scheduler=scheduler, ema=ema,
            master_weights=master_weights, state_rules=state_rules, memory=memory, new_rows=new_rows, check_of=check_of,
            on_progress=on_progress, init=getattr(depth, "init", None),
            block=getattr(depth, "block", None),
        )
    )  # fmt: skip


@renamed_arguments(masters="master_weights", rules="state_rules")
@typed
def shrink_inplace(
    model: nn.Module,
    optim: Optimizers = None,
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

    Remaining Parameter objects keep their identity; parameters of dropped blocks leave the param groups and the optimizer
    state. Param groups that a growth split are merged where their learning rates agree, and empty groups are removed together with
    their scheduler entries, unless a live scheduler that drives ``optim`` was not passed. If the shrinking fails, everything is
    bitwise unchanged.

    Args:
        model: Source model; changed in place.
        optim: Optimizer of the model, or a list of optimizers, each of other parameters; changed in place.
        to: ``"0.5x"`` (all widths), or a mapping from size name, or field of the config, to an int or a factor:
            ``hidden, heads, kv_heads, ffn, positions,
            layers``. Unnamed widths follow ``hidden`` in proportion where the result is an integer.
        method: Shrink method; default ``shrink.WeightSelection()``. ``shrink.FirstCopies()`` undoes an even growth. No method
            preserves the function of a model that was not grown.
        state: How optimizer state shrinks: ``"exact"``, ``"copy"`` or ``"drop"``; see ``expand_inplace``.
        dynamics: How learning rates follow the shrinking; see ``expand_inplace``. To undo a growth, pass the growth's ``dynamics``.
        spec: Description of a custom model.
        backend: See ``expand_inplace``.
        plan: Plan from ``growkern.plan(..., shrink=...)``, in place of ``to``, ``method``, ``state`` and ``dynamics``.
        scheduler: The learning-rate scheduler that drives ``optim``, or a list of schedulers; each follows the param groups.
        ema: Weight averages of the model; see ``expand_inplace``.
        master_weights: Float32 copies of low-precision weights; the copies for dropped blocks are removed from the mapping.
        state_rules: Rules for an optimizer without a known law; see ``expand_inplace``.
        memory: See ``expand_inplace``.

    Returns:
        The report; ``print`` it.

    Raises:
        PlanError: The shrinking cannot be planned. The message lists every reason and a way out.
        UnsupportedModelError: See ``describe``.
        UnsupportedOptimizerError: The optimizer's state cannot be shrunk.
        InsufficientMemoryError: The target does not fit beside the source.
        CommitError: The shrinking failed and was rolled back.

    Example:
        >>> report = growkern.shrink_inplace(model, optim, to={"hidden": 12, "layers": 1})
        >>> report.n_params_source, report.n_params_target
        (10920, 1980)
    """
    model = unwrapped(model)
    _check_caller(model, plan)
    if plan is not None:
        again = dynamics not in ("mup", plan.dynamics) or state not in ("exact", plan.state)
        if to != "0.5x" or method is not None or again:
            raise PlanError(
                "plan= already says what to shrink; leave to=, method=, state= and dynamics= out."
            )
        if not plan.shrinks:
            raise PlanError(
                "plan: no target is smaller than its source; run the plan by expand_inplace."
            )
    elif state not in SHRINKING_STATES:
        raise PlanError(
            f"state={state!r} is not known to a shrinking; pass {', '.join(map(repr, SHRINKING_STATES))}."
        )

    own = WeightSelection() if method is None else method
    methods = {"shrink": own} if plan is None else None

    def make_plan(described: ModelSpec) -> GrowthPlan:
        if plan is None:
            sizes = resolve_sizes(described, to, shrink=True)
            return build(described, sizes, shrink=own, state=state, dynamics=dynamics)
        check_plan(plan, described)
        return plan

    drop_state = (plan.state if plan else state) == "drop"
    return run(
        Request(
            model, optimizers(optim), make_plan, drop_state, methods, spec=spec, backend=backend, scheduler=scheduler, ema=ema,
            master_weights=master_weights, state_rules=state_rules, memory=memory,
        )
    )  # fmt: skip


def check_arguments(
    model: object, plan: object, to: object, width: object, depth: object, state: str,
    dynamics: object, seed: int | None,
) -> None:  # fmt: skip
    """Raise for arguments of the wrong type, arguments given in addition to ``plan``, and a plan that shrinks."""
    _check_caller(model, plan)
    if not isinstance(plan, GrowthPlan):
        return
    again = dynamics not in ("mup", plan.dynamics) or seed not in (None, plan.seed)
    other = any(
        method is not None and str(method) != text
        for method, text in ((width, plan.width), (depth, plan.depth))
    )
    if to != "2x" or other or again or state not in ("exact", plan.state):
        raise PlanError(
            "plan= already says what to grow; leave to=, width=, depth=, state=, dynamics= and seed= out."
        )
    if plan.drawn and depth is None and not names_method(plan.depth, DEPTHS):
        raise PlanError(
            f"plan: its depth method {short(plan.depth)} holds what no plan does: pass the method as depth= beside plan=."
        )
    if plan.shrinks:
        raise PlanError(
            "plan: targets are smaller than their sources; run the plan by shrink_inplace."
        )


def _check_caller(model: object, plan: object) -> None:
    """Raise for a model or a plan of the wrong type."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}."
        )
    if plan is not None and not isinstance(plan, GrowthPlan):
        raise PlanError(
            f"plan: expected a GrowthPlan, got {type(plan).__name__}; GrowthPlan.from_json reads a saved plan."
        )
    if plan is not None:
        raise_all(PlanError, "this is no plan of growkern:", [*problems_of(plan)])
    growth_history(model)  # the growth adds to it


def _methods(width: WidthMethod | None, depth: DepthMethod | None) -> dict[str, Any]:
    """Return the methods by the name of their argument of ``build``, defaults filled in."""
    return {
        "width": Lossless() if width is None else width,
        "depth": IdentityBlocks() if depth is None else depth,
    }


def _plan(
    model: nn.Module,
    spec: ModelSpec,
    to: Target,
    width: WidthMethod | None,
    depth: DepthMethod | None,
    state: str,
    dynamics: str | None,
    seed: int | None,
    custom: bool,
) -> GrowthPlan:
    plan = build(
        spec,
        resolve_sizes(spec, to),
        state=state,
        dynamics=dynamics,
        seed=n_growths(model) if seed is None else seed,
        **_methods(width, depth),
    )
    refuse_missing_eps(plan, model)
    return replace(plan, notes=(*plan.notes, *unlisted_sizes(plan, model))) if custom else plan
