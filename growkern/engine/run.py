"""One growth, from request to report: describe, refuse stale references, agree on the plan, stage, commit, report."""

import logging
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import product
from time import perf_counter

import torch
from torch import Tensor, nn

from growkern.commit.checkpoint_guard import n_growths
from growkern.commit.commit import check_blocks, commit
from growkern.commit.optimizer import OptimTarget
from growkern.commit.undo import Undo
from growkern.engine.compile_cache import reset_near_limit
from growkern.engine.ddp import Ranks
from growkern.engine.history import recorded
from growkern.engine.live_objects import (
    averages_of,
    refuse_mid_step,
    refuse_stale_references,
    unmanaged_schedulers,
)
from growkern.engine.next_steps import notes
from growkern.engine.optim_target import optim_target
from growkern.engine.report import GrowthReport
from growkern.engine.request import Request
from growkern.engine.sources import tensors_of
from growkern.errors import CommitError, GrowthError
from growkern.execution.execute import Execution
from growkern.execution.torch_backend import norm_of
from growkern.model.describe import describe
from growkern.model.spec import ModelSpec
from growkern.optimizer.describe import describe_optimizer
from growkern.optimizer.lr_scaling import lr_factors
from growkern.optimizer.schedulers import check_scheduler, schedulers
from growkern.optimizer.state_rules import (
    GRADIENT,
    MASTER,
    MASTER_GRAD,
    VALUE,
    Law,
    OptimSpec,
    Rule,
)
from growkern.optimizer.update_scale import scale_of
from growkern.planning.growth_plan import GrowthPlan
from growkern.support.interrupts import uninterrupted
from growkern.support.live_registry import Live
from growkern.support.memory import keep_on_device, offload
from growkern.support.named_tensors import Tensors

logger = logging.getLogger("growkern")


def run(request: Request) -> GrowthReport:
    """Run a request for a growth or a shrinking; if it fails, everything is bitwise unchanged.

    Raises:
        GrowthError: See ``growkern.expand_inplace``.
    """
    refuse_mid_step(*request.optims)
    start, live = perf_counter(), Live.now()
    ranks = Ranks(request.model, live.modules)
    with ranks.together(), torch.inference_mode(False), torch.no_grad():
        sources = _describe(request)
        plan, unmanaged = _agree_on_plan(request, sources, ranks, live)
        del live
        staged = _stage(request, sources, plan, unmanaged)
        _commit(request, sources, staged, ranks)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    reset_near_limit(n_growths(request.model))
    report = _report(request, sources, staged, perf_counter() - start)
    logger.debug("%s", report)
    return report


@contextmanager
def all_or_nothing(model: nn.Module) -> Generator[Undo]:
    """Yield an ``Undo`` for the requests of several growths of a model; when the block raises, all growths are rolled back."""
    undo = Undo()
    try:
        yield undo
    except BaseException:
        with uninterrupted():
            undo.rollback()
            Ranks(model, Live.now().modules).rebuild()
        raise


@dataclass(frozen=True)
class _Described:
    """Descriptions of the model and the optimizer before anything changes.

    Attributes:
        spec: Description of the model.
        optim: Description of the optimizer, or None.
        averages: Averages of the model, which grow by the same plan.
        n_params: Number of parameters of the model.
    """

    spec: ModelSpec
    optim: OptimSpec | None
    averages: list[nn.Module]
    n_params: int

    @property
    def law(self) -> Law | None:
        """The law of the optimizer's state; None if unknown."""
        return self.optim.law if self.optim else None


@dataclass(frozen=True)
class _Staged:
    """A plan, ready to be executed.

    Attributes:
        plan: The plan.
        target: Target of the optimizer, or None.
        executions: Executions of the model and of every average.
        norms: Gradient norm before the growth; ``_commit`` appends the norm after it.
    """

    plan: GrowthPlan
    target: OptimTarget | None
    executions: list[Execution]
    norms: list[float]


def _describe(request: Request) -> _Described:
    """Describe the model and the optimizer, and check schedulers and averages."""
    model, optim = request.model, request.optim
    check_scheduler(optim, request.scheduler)
    averages = averages_of(model, request.ema)
    if optim is not None and (scale := scale_of(optim)) is not None:
        scale.restore()  # a schedule's post-hook may run before UpdateScale's
    spec, described = describe(model, request.spec), None
    if optim is not None:
        described = describe_optimizer(
            model,
            optim,
            spec,
            drop=request.drop_state,
            state_rules=request.state_rules,
            master_weights=request.master_weights,
        )
    return _Described(spec, described, averages, sum(p.numel() for p in model.parameters()))


def _agree_on_plan(
    request: Request, sources: _Described, ranks: Ranks, live: Live
) -> tuple[GrowthPlan, Sequence[str]]:
    """Refuse stale references, and agree on a plan with the other processes; return it and the schedulers that were not passed."""
    model, optim = request.model, request.optim
    averages = sources.averages if request.ema is not None else None
    left = refuse_stale_references(model, optim, live, averages, request.master_weights)
    plan = request.make_plan(sources.spec)
    unmanaged = unmanaged_schedulers(optim, schedulers(request.scheduler), left) if optim else []
    check_blocks(plan, model)
    ranks.agree(plan.to_json() if ranks.wrappers else "", "the plan")
    return plan, unmanaged


def _stage(
    request: Request, sources: _Described, plan: GrowthPlan, unmanaged: Sequence[str]
) -> _Staged:
    """Prepare the executions: check shapes and memory, but compute and change nothing."""
    model, optim, law = request.model, request.optim, sources.law
    target = None
    if optim is not None and sources.optim is not None:
        target = optim_target(plan, request, sources.optim, unmanaged)
    tensors = tensors_of(model, optim, sources.spec, request.master_weights)
    if law is not None and law.resets:
        own = {MASTER, MASTER_GRAD}  # master weights grow even when the state is reset
        states = tensors.states.items()
        tensors.states = {n: {k: s[k] for k in own & s.keys()} for n, s in states}
    execution = Execution(
        plan, tensors, _state_rules(plan, law), backend=request.backend, memory=request.memory,
        given=request.new_rows,
    )  # fmt: skip
    shadows = [
        execution.of(tensors_of(average, None, sources.spec)) for average in sources.averages
    ]
    return _Staged(
        plan, target, [execution, *shadows], [_grad_norm(plan, tensors, "source", request)]
    )


def _state_rules(plan: GrowthPlan, law: Law | None) -> Mapping[str, Rule | None]:
    """Return state key -> rule, master weights included."""
    rules: Mapping[str, Rule | None] = {}
    if law is not None:
        units = plan.dynamics == "exact" and not law.slices
        rules = law.grown(plan.state, source_units=units)
    return {**rules, MASTER: VALUE, MASTER_GRAD: GRADIENT}


def _commit(request: Request, sources: _Described, staged: _Staged, ranks: Ranks) -> None:
    """Compute the target tensors and put them into the live model and optimizer; roll all writes back on failure."""
    plan, lean = staged.plan, staged.executions[0].memory == "lean"

    def before_finalize() -> bool:
        live = tensors_of(request.model, request.optim, sources.spec, request.master_weights)
        staged.norms.append(_grad_norm(plan, live, "name", request))
        return ranks.finish()

    try:
        parts = [
            execution.parts() if lean else [*execution.parts()] for execution in staged.executions
        ]
    except GrowthError:
        raise
    except Exception as error:
        raise CommitError(f"the growth failed before anything was changed: {error}") from error
    with offload() if lean and not request.undo else nullcontext(keep_on_device) as keep:
        followers = [*zip(sources.averages, parts[1:], strict=True)]
        commit(
            plan, parts.pop(0), request.model, staged.target, record=recorded(plan, sources.spec), followers=followers,
            undo=request.undo or Undo(keep), before_finalize=before_finalize,
        )  # fmt: skip


def _report(request: Request, sources: _Described, staged: _Staged, seconds: float) -> GrowthReport:
    plan, law, executions = staged.plan, sources.law, staged.executions
    before, after = staged.norms
    carried = plan.dynamics is not None and law is not None and law.lr is not None
    return GrowthReport(
        family=plan.family,
        source_sizes=dict(plan.source_sizes),
        target_sizes=dict(plan.target_sizes),
        n_params_source=sources.n_params,
        n_params_target=sum(p.numel() for p in request.model.parameters()),
        n_new_blocks=sum(block.new for blocks in plan.stacks.values() for block in blocks),
        preserves="gradient" if plan.preserves == "trajectory" and not carried else plan.preserves,
        reasons=plan.reasons,
        n_bytes_read=sum(execution.n_read for execution in executions),
        n_bytes_written=sum(execution.n_written for execution in executions),
        seconds=seconds,
        memory=executions[0].memory,
        peak_bytes=sum(execution.peak_bytes for execution in executions),
        lr_factors=dict(Counter(lr_factors(plan, law, sources.optim).values())),
        lr_applied=carried,
        grad_norm_factor=after / before if before > 0 and after > 0 else None,
        noisy=plan.noisy,
        notes=(*plan.notes, *notes(plan, sources.spec, staged.target)),
    )


def _grad_norm(plan: GrowthPlan, tensors: Tensors, side: str, request: Request) -> float:
    """Return the global gradient norm, pads and new blocks left out: from gradients in flight, else from second moments."""
    rows = {getattr(r, side): r for r in plan.tensors if not r.new and r.constant is None}
    names = [*rows]
    if tensors.grads:
        return norm_of([tensors.grads[n] for n in names if n in tensors.grads], 2)
    optim = request.optim
    scale, squares = scale_of(optim) if optim is not None else None, list[Tensor]()
    for name in names:
        square = tensors.states.get(name, {}).get("exp_avg_sq")
        if isinstance(square, Tensor):
            p = request.model.get_parameter(name)
            if scale is not None:
                square = scale.second_moment((request.master_weights or {}).get(p, p), square)
            parts = [square]
            if side == "name":
                spans = (axis.index_map.copied for axis in plan.axis_maps(rows[name]))
                parts = [square[at] for at in product(*spans)]
            squares += [part.sum()[None] for part in parts] if scale is not None else parts
    return norm_of(squares, 1) ** 0.5
