"""The public calls: describe, plan, execute, commit, report."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from time import perf_counter

import torch
from torch import nn
from torch.optim import Optimizer

from growkern.commit.checkpoint_guard import n_growths
from growkern.commit.commit import check_blocks, commit
from growkern.commit.optimizer import Masters, OptimTarget
from growkern.depth import IdentityBlocks
from growkern.engine.compile_cache import reset_near_limit
from growkern.engine.ddp import Ranks
from growkern.engine.live_objects import Live, averages_of, forgotten_schedulers, refuse_forgotten
from growkern.engine.next_steps import notes
from growkern.engine.report import GrowthReport
from growkern.engine.sources import tensors_of
from growkern.errors import (
    CommitError,
    GrowthError,
    PlanError,
    UnsupportedModelError,
    UnsupportedOptimizerError,
)
from growkern.execution.execute import Execution, Memory
from growkern.execution.tiles import Given
from growkern.execution.torch_backend import norm_of
from growkern.model.describe import describe
from growkern.model.spec import ModelSpec
from growkern.optimizer.describe import describe_optimizer
from growkern.optimizer.lr_scaling import Multiplier, lr_factors, multipliers, scales, slices
from growkern.optimizer.schedulers import check_scheduler, follows, schedulers
from growkern.optimizer.state_rules import GRADIENT, MASTER, MASTER_GRAD, VALUE, OptimSpec, Rule
from growkern.optimizer.update_scale import scale_of
from growkern.planning.build import build
from growkern.planning.check import check
from growkern.planning.decisions import DepthMethod, ShrinkMethod, WidthMethod
from growkern.planning.growth_plan import GrowthPlan
from growkern.planning.sizes import Target, resolve_sizes
from growkern.support.memory import elsewhere, in_place
from growkern.support.named_tensors import Tensors
from growkern.support.wrappers import mid_step, unwrapped
from growkern.width import Lossless

logger = logging.getLogger("growkern")


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
    masters: Masters | None = None,
    rules: Mapping[str, int | None] | None = None,
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
        masters: Of weights in lower precision; see ``expand_inplace``.
        rules: Of an optimizer whose law is not known.
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
            model, unwrapped(optim), found, drop=state == "drop", rules=rules, masters=masters
        )
    if shrink is not None:
        if width or depth or seed:
            raise PlanError("shrink= says it all; leave width=, depth= and seed= out.")
        sizes = resolve_sizes(found, to, shrink=True)
        return build(found, sizes, shrink=shrink, state=state, dynamics=dynamics)
    return _plan(model, found, to, width, depth, state, dynamics, seed)


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
    masters: Masters | None = None,
    rules: Mapping[str, int | None] | None = None,
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
        width: Width method; default ``width.Lossless()``: exact, with symmetry-breaking twin noise.
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
        masters: Parameter -> the float32 copy that ``optim`` holds in its place, when weights are kept in lower precision;
            masters of new blocks are added to it.
        rules: For an optimizer whose law is not known: state key -> order in the gradient (0: gathered as it is, 1, 2), None
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

    def planned(found: ModelSpec) -> GrowthPlan:
        if plan is None:
            return _plan(model, found, to, width, depth, state, dynamics, seed)
        check(plan, found)
        return plan

    drop, given = (plan.state if plan else state) == "drop", getattr(width, "rows", None)
    return change_inplace(
        model, optim, planned, drop, spec, backend, scheduler, ema, masters, rules, memory, given
    )


def change_inplace(
    model: nn.Module,
    optim: Optimizer | None,
    planned: Callable[[ModelSpec], GrowthPlan],
    drop: bool,
    spec: ModelSpec | None,
    backend: str | None,
    scheduler: object | None,
    ema: nn.Module | Sequence[nn.Module] | None,
    masters: Masters | None,
    rules: Mapping[str, int | None] | None,
    memory: Memory | None,
    given: Given | None = None,
) -> GrowthReport:
    """Describe, plan, execute, commit, report; see ``expand_inplace``."""
    start, live = perf_counter(), Live.scan()
    ranks = Ranks(model, live.modules)
    with ranks.together(), torch.inference_mode(False), torch.no_grad():
        check_scheduler(optim, scheduler)
        averages = averages_of(model, ema)
        if optim is not None and (scale := scale_of(optim)) is not None:
            scale.restore()  # a schedule's hook may run before the one that ends the step
        found = describe(model, spec)
        described = None
        if optim is not None:
            described = describe_optimizer(
                model, optim, found, drop=drop, rules=rules, masters=masters
            )
        known = averages if ema is not None else None
        live = refuse_forgotten(model, optim, live, known, masters)
        plan = planned(found)
        alone = forgotten_schedulers(optim, schedulers(scheduler), live) if optim else []
        del live
        check_blocks(plan, model)
        ranks.agree(plan.to_json() if ranks.wrappers else "", "the plan")
        n_params = sum(p.numel() for p in model.parameters())
        target: OptimTarget | None = None
        grown: Mapping[str, Rule | None] = {}
        if optim is not None and described is not None:
            target = _optim_target(plan, model, optim, described, scheduler, alone, masters)
        law = described.law if described else None
        if law is not None:
            units = plan.dynamics == "exact" and not law.slices
            grown = law.grown(plan.state, source_units=units)
        grown = {**grown, MASTER: VALUE, MASTER_GRAD: GRADIENT}
        sources = tensors_of(model, optim, found, masters)
        if law is not None and law.resets:
            own = {MASTER, MASTER_GRAD}  # values, whatever becomes of the history
            states = sources.states.items()
            sources.states = {n: {k: s[k] for k in own & s.keys()} for n, s in states}
        run = Execution(plan, sources, grown, backend=backend, memory=memory, given=given)
        shadows = [run.of(tensors_of(average, None, found)) for average in averages]
        norms = [_grad_norm(plan, sources, "source", model, optim, masters)]
        lean = run.memory == "lean"

        def last() -> bool:
            live = tensors_of(model, optim, found, masters)
            norms.append(_grad_norm(plan, live, "name", model, optim, masters))
            return ranks.finish()

        try:
            parts = [one.parts() if lean else [*one.parts()] for one in (run, *shadows)]
        except GrowthError:
            raise
        except Exception as error:
            raise CommitError(f"the growth failed before anything was changed: {error}") from error
        with elsewhere() if lean else nullcontext(in_place) as keep:
            followers = [*zip(averages, parts[1:], strict=True)]
            commit(plan, parts.pop(0), model, target, followers=followers, keep=keep, last=last)
        del parts, followers
        before, after = norms
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    reset_near_limit(n_growths(model))
    counts = dict(Counter(lr_factors(plan, law, described).values()))
    runs, kept = [run, *shadows], plan.preserves
    carried = plan.dynamics is not None and law is not None and law.lr is not None
    report = GrowthReport(
        family=plan.family,
        source_sizes=dict(plan.source_sizes),
        target_sizes=dict(plan.target_sizes),
        n_params_source=n_params,
        n_params_target=sum(p.numel() for p in model.parameters()),
        n_new_blocks=sum(block.new for blocks in plan.stacks.values() for block in blocks),
        preserves="gradient" if kept == "trajectory" and not carried else kept,
        reasons=plan.reasons,
        n_bytes_read=sum(one.n_read for one in runs),
        n_bytes_written=sum(one.n_written for one in runs),
        seconds=perf_counter() - start,
        memory=run.memory,
        peak_bytes=sum(one.peak_bytes for one in runs),
        lr_factors=counts,
        lr_applied=carried,
        grad_norm_factor=after / before if before > 0 and after > 0 else None,
        noisy=plan.noisy,
        notes=(*plan.notes, *notes(plan, found, target)),
    )
    logger.debug("%s", report)
    return report


def _optim_target(
    plan: GrowthPlan,
    model: nn.Module,
    optim: Optimizer,
    described: OptimSpec,
    scheduler: object | None,
    alone: Sequence[str],
    masters: Masters | None,
) -> OptimTarget:
    """Who carries the learning-rate law: param groups, the optimizer itself, or hooks."""
    law, split, before = described.law, dict[str, float](), scale_of(optim)
    joins = plan.shrinks and not alone and follows(scheduler)
    own: Masters = {} if masters is None else masters
    source = {n: own.get(p, p) for n, p in model.named_parameters(remove_duplicate=False)}
    found: dict[str, Multiplier] = {}
    if law is not None and plan.dynamics is not None:
        found = multipliers(plan, law, described, plan.dynamics)
    if law is not None and plan.dynamics == "mup" and not law.slices:
        if not alone and follows(scheduler):
            factors = lr_factors(plan, law, described)
            split = {name: f for name, f in factors.items() if f is not None and f != 1}
            if plan.shrinks and before is not None:  # what a growth gave its hooks, they give back
                origin = {row.name: source.get(row.source) for row in plan.rows}
                split = {n: f for n, f in split.items() if origin[n] not in before.scales}
        found = {name: one for name, one in found.items() if name not in split}
    if law is not None and law.slices:
        states = {name: optim.state.get(p, {}) for name, p in source.items()}
        vectors = slices(plan, source, states, found)
        return OptimTarget(
            optim, described, scheduler=scheduler, slices=vectors, masters=own, joins=joins
        )
    hooked = scales(plan, source, found, before)
    return OptimTarget(optim, described, split, scheduler, hooked, masters=own, joins=joins)


def _check_arguments(
    model: object, optim: object, plan: object, to: object, width: object, depth: object, state: str,
    dynamics: object, seed: int | None,
) -> None:  # fmt: skip
    """Raise for what is of the wrong kind, said twice, or asked for at the wrong time."""
    check_caller(model, optim, plan)
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


def check_caller(model: object, optim: object, plan: object) -> None:
    """Raise for what is of the wrong kind, or called at the wrong time."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}."
        )
    if isinstance(optim, Optimizer) and mid_step(optim):
        raise PlanError(
            "a growth in a closure or a pre-hook of optimizer.step() would change half a step; grow between steps, or in a "
            "post-hook (GrowthSchedule.attach)."
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


def _grad_norm(
    plan: GrowthPlan, tensors: Tensors, side: str, model: nn.Module, optim: Optimizer | None, masters: Masters | None
) -> float:  # fmt: skip
    """The global gradient norm without new blocks: from gradients in flight, else from second moments."""
    names = [getattr(row, side) for row in plan.rows if not row.new and row.constant is None]
    if tensors.grads:
        return norm_of([tensors.grads[n] for n in names if n in tensors.grads], 2)
    scale, squares = scale_of(optim) if optim is not None else None, list[torch.Tensor]()
    for name in names:
        square = tensors.states.get(name, {}).get("exp_avg_sq")
        if isinstance(square, torch.Tensor):
            p = model.get_parameter(name)
            held = (masters or {}).get(p, p)
            squares.append(scale.sum_of_squares(held, square) if scale is not None else square)
    return norm_of(squares, 1) ** 0.5


__all__ = ["GrowthError", "UnsupportedOptimizerError", "expand_inplace", "plan"]
