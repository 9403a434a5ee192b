"""One growth, from request to report: describe, refuse stale references, agree on the plan, stage, commit, report."""

import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from growkern.commit.checkpoint_guard import growth_history
from growkern.commit.commit import check_blocks, commit
from growkern.commit.optimizer import OptimTarget
from growkern.commit.optimizer_guard import settle
from growkern.commit.undo import Undo
from growkern.distributed.gather import Gather
from growkern.distributed.shards import fully_sharded, reshard
from growkern.distributed.zero import whole
from growkern.engine.cached_sizes import refuse_fractions
from growkern.engine.checkpoint_caches import refresh_caches
from growkern.engine.claims import claimed
from growkern.engine.compile_cache import reset_near_limit
from growkern.engine.ddp import Ranks
from growkern.engine.first_blocks import standing_in
from growkern.engine.forward_check import ForwardCheck
from growkern.engine.freezing import Lifted, lifted
from growkern.engine.grad_norm import grad_norm_factor
from growkern.engine.history import recorded
from growkern.engine.live_objects import (
    averages_of,
    refuse_mid_pass,
    refuse_neighbors,
    refuse_stale_references,
    unmanaged_schedulers,
)
from growkern.engine.next_steps import decayed_gains, notes, on_hooks, on_ties
from growkern.engine.optim_target import optim_target
from growkern.engine.report import GrowthReport
from growkern.engine.request import Request
from growkern.engine.sharded import refuse_plan, refuse_request
from growkern.engine.sources import reduce_grads, tensors_of
from growkern.errors import CommitError, GrowthError
from growkern.execution.execute import NOTHING, Execution
from growkern.model.describe import describe
from growkern.model.spec import ModelSpec
from growkern.optimizer.describe import describe_optimizers
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
from growkern.optimizer.update_scale import refuse_mid_ramp, scale_of
from growkern.planning.growth_plan import GrowthPlan
from growkern.planning.growth_record import read
from growkern.support.interrupts import uncollected, uninterrupted
from growkern.support.laps import Laps
from growkern.support.live_registry import Live
from growkern.support.memory import Offload, keep_on_device
from growkern.support.named_tensors import Tensors
from growkern.support.names import named_parameters, same_modules

if TYPE_CHECKING:
    from growkern.distributed.fsdp import FullySharded

logger = logging.getLogger("growkern")
Rules = Mapping[str, Rule | None]  # state key -> rule


def run(request: Request) -> GrowthReport:
    """Run a request for a growth or a shrinking; if it fails, everything is bitwise unchanged.

    Raises:
        GrowthError: See ``growkern.expand_inplace``.
    """
    with uncollected(), ExitStack() as before:  # nothing is written yet
        before.enter_context(same_modules(request.model))
        refuse_mid_pass(request.model, *request.optims)
        with claimed(request.model, request.optims, request.ema, request.master_weights):
            reshard(request.model)
            with standing_in(request) as seeded:
                if seeded is not request:
                    before.close()
                return _run(seeded, before.close)


@contextmanager
def _full_precision() -> Generator[None]:
    """Switch autocast off, under which the means of new optimizer state would be computed in low precision."""
    kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _run(request: Request, begin: Callable[[], None]) -> GrowthReport:
    """Run a request; ``begin`` is called before the first write."""
    laps, live = Laps(), Live.now()
    ranks = Ranks(request.model, live.modules)
    with ranks.together(), torch.inference_mode(False), torch.no_grad(), _full_precision():
        averages = averages_of(request.model, request.ema)
        for average in averages:
            reshard(average)
        shards = fully_sharded(request.model, *averages)
        refuse_request(request, averages, shards)
        with (
            whole(
                request.optims, ranks.before_gather, request.undo and request.undo.rollbacks
            ) as part,
            lifted((request.model, *averages)) as kept,
        ):
            sources = _describe(request, averages)
            given = request.check_of(sources.spec)
            laps.end("describe")
            if ranks.meshes:  # a forward gathers
                ranks.alike(str((given is None, request.backend)), "check= and backend=")
            check = None
            if given is not None:
                check = ForwardCheck(request.model, given, ranks.before_forward)
            laps.end("check")
            plan, unmanaged = _agree_on_plan(request, sources, ranks, live, laps, shards)
            del live
            if check is not None and plan.function_preserving:
                check.measure_rounding()
            staged = _stage(request, sources, plan, unmanaged, ranks)
            laps.end("cut")
            begin()
            noted = _commit(request, sources, staged, ranks, kept, check, laps, shards, part)
            laps.end("commit")
    for optim in request.optims if plan.shrinks and not request.undo else ():
        if (scale := scale_of(optim)) is not None and not scale.scales:  # the growth is undone
            scale.detach()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for device in {p.device for _, p in named_parameters(request.model) if p.is_cuda}:
            torch.cuda.synchronize(device)
    refresh_caches(request.model)
    reset_near_limit(request.model)
    laps.end("write")  # waits for the device
    report = _report(request, sources, staged, noted, laps)
    logger.debug("%s", report)
    return report


@contextmanager
def all_or_nothing(model: nn.Module) -> Generator[Undo]:
    """Yield an ``Undo`` for the requests of several growths of a model; when the block raises, all growths are rolled back."""
    undo = Undo()
    with (
        uninterrupted() as held
    ):  # around all growths: no signal can arrive between an error and its rollback
        try:
            yield undo
            if held:
                raise KeyboardInterrupt
        except BaseException:
            undo.rollback()
            Ranks(model, Live.now().modules).rebuild()
            raise


@dataclass(frozen=True)
class _Described:
    """Descriptions of the model and its optimizers before anything changes.

    Attributes:
        spec: Description of the model.
        optims: Descriptions of the optimizers.
        averages: Averages of the model, which grow by the same plan.
        n_params: Number of parameters of the model.
    """

    spec: ModelSpec
    optims: tuple[OptimSpec, ...]
    averages: list[nn.Module]
    n_params: int


@dataclass(frozen=True)
class _Staged:
    """A plan, ready to be executed.

    Attributes:
        plan: The plan.
        targets: Targets of the optimizers.
        executions: Executions of the model and of every average.
        grad_norm_factor: The law's factor on the global gradient norm; None if unknown.
        record: The record of the growth, as JSON.
        notes: Notes on the source model for the report.
    """

    plan: GrowthPlan
    targets: list[OptimTarget]
    executions: list[Execution]
    grad_norm_factor: float | None
    record: str
    notes: list[str]


def _describe(request: Request, averages: list[nn.Module]) -> _Described:
    """Describe the model and its optimizers, and check schedulers and averages."""
    model, optims = request.model, request.optims
    check_scheduler(optims, request.scheduler)
    for optim in optims:
        settle(optim)
        if (scale := scale_of(optim)) is not None:
            scale.restore()  # a schedule's post-hook may run before UpdateScale's
            refuse_mid_ramp(scale)
    spec = describe(model, request.spec, values=request.backend != NOTHING, first=request.first)
    described = describe_optimizers(
        model, optims, spec, drop=request.drop_state, state_rules=request.state_rules, master_weights=request.master_weights,
    )  # fmt: skip
    n_first = sum(p.numel() for block in request.first.values() for p in block.parameters())
    n_params = sum(p.numel() for _, p in named_parameters(model)) - n_first
    return _Described(spec, described, averages, n_params)


def _agree_on_plan(
    request: Request, sources: _Described, ranks: Ranks, live: Live, laps: Laps, shards: "FullySharded | None"
) -> tuple[GrowthPlan, list[list[str]]]:  # fmt: skip
    """Refuse stale references, and agree on a plan with the other processes; return it and, per optimizer, the schedulers left out."""
    model, optims = request.model, request.optims
    averages = sources.averages if request.ema is not None else None
    left = refuse_stale_references(model, optims, live, averages, request.master_weights)
    laps.end("scan")
    plan = request.make_plan(sources.spec)
    refuse_plan(model, sources.spec, plan, shards)
    refuse_fractions(plan, model)
    if plan.target_sizes.get("hidden") != plan.source_sizes.get("hidden"):
        refuse_neighbors(model, optims, left)
    passed = schedulers(request.scheduler)
    unmanaged = [unmanaged_schedulers(optim, passed, left) for optim in optims]
    check_blocks(plan, model, request.init)
    ranks.agree(plan.to_json() if ranks.several else "", "the plan")
    laps.end("plan")
    return plan, unmanaged


def _stage(
    request: Request, sources: _Described, plan: GrowthPlan, unmanaged: list[list[str]], ranks: Ranks
) -> _Staged:  # fmt: skip
    """Prepare the executions: check shapes and memory, but compute and change nothing."""
    model, optims = request.model, request.optims
    split = [None] * len(optims) if request.split is None else request.split
    targets = [
        optim_target(plan, request, *one)
        for one in zip(optims, sources.optims, unmanaged, split, strict=True)
    ]
    tensors, rules = (
        tensors_of(model, optims, sources.spec, request.master_weights),
        dict[str, Rules](),
    )
    for described in sources.optims:
        law, own = described.law, _state_rules(plan, described.law)
        rules |= dict.fromkeys(described.names, own)
        for name in described.names if law is not None and law.resets else ():
            state = tensors.states.get(name, {})  # master weights grow even when the state is reset
            tensors.states[name] = {k: state[k] for k in (MASTER, MASTER_GRAD) if k in state}
    reduce_grads(tensors, ranks.go_on)
    gather = Gather(ranks.go_on) if ranks.meshes else None
    execution = Execution(
        plan, tensors, rules.__getitem__, backend=request.backend, memory=request.memory,
        given=request.new_rows, on_progress=request.on_progress, gather=gather,
    )  # fmt: skip
    shadows = [execution.of(tensors_of(average, (), sources.spec)) for average in sources.averages]
    masters = request.master_weights or {}
    held = {name: masters.get(p, p) for name, p in named_parameters(model, remove_duplicate=False)}
    updates = [scale for optim in optims if (scale := scale_of(optim)) is not None]
    factor = None
    if request.backend != NOTHING:  # else the model may be on the meta device, without elements
        factor = grad_norm_factor(plan, tensors, held, updates, ranks.n, ranks.total)
    record = recorded(plan, sources.spec, [bool(t.split) for t in targets], request.methods)
    read(record)  # what could not be read later is refused now
    noted = [*on_hooks(plan, model), *(on_ties(model) if request.spec is None else ())]
    return _Staged(plan, targets, [execution, *shadows], factor, record, noted)


def _state_rules(plan: GrowthPlan, law: Law | None) -> Rules:
    """Return state key -> rule of an optimizer, master weights included."""
    rules: Rules = {}
    if law is not None:
        units = plan.dynamics == "exact" and not law.slices
        rules = law.grown(plan.state, source_units=units)
    return {**rules, MASTER: VALUE, MASTER_GRAD: GRADIENT}


def _commit(
    request: Request, sources: _Described, staged: _Staged, ranks: Ranks, kept: Lifted, check: ForwardCheck | None, laps: Laps,
    shards: "FullySharded | None", part: Callable[[], None],
) -> list[str]:  # fmt: skip
    """Compute the target tensors and put them into the live model and its optimizers; roll all writes back on failure.

    Returns:
        Notes for the report.
    """
    plan, lean, noted = staged.plan, staged.executions[0].memory == "lean", [*staged.notes]

    def before_finalize() -> bool:
        laps.end("commit")
        if check is not None:
            noted.extend(check.compare(preserved=plan.function_preserving))
        laps.end("check")
        kept.freeze(plan)  # before the reducers are built, of what trains
        part()
        return ranks.finish()

    try:
        parts = [
            execution.parts() if lean else [*execution.parts()] for execution in staged.executions
        ]
    except GrowthError:
        raise
    except Exception as error:
        raise CommitError(f"the growth failed before anything was changed: {error}") from error
    with Offload() if lean and not request.undo else nullcontext() as keep:
        if keep is not None:
            parts = [_written(part, keep) for part in parts]
        followers = [*zip(sources.averages, parts[1:], strict=True)]
        undo = request.undo or Undo(keep or keep_on_device)
        if shards is not None:
            undo.swap = shards.swap
        commit(
            plan, parts.pop(0), request.model, staged.targets, record=staged.record, followers=followers,
            undo=undo, before_finalize=before_finalize, init=request.init, shards=shards,
        )  # fmt: skip
    return noted


def _written(parts: Iterable[Tensors], backups: Offload) -> Iterator[Tensors]:
    """Yield computed targets when the sources of the targets before them are backed up, which goes on beside the computation."""
    for staged in parts:
        backups.wait()
        yield staged


def _report(
    request: Request, sources: _Described, staged: _Staged, noted: list[str], laps: Laps
) -> GrowthReport:
    plan, executions = staged.plan, staged.executions
    for name, n in (item for execution in executions for item in execution.laps.items()):
        laps["commit"] -= n  # the targets were computed in it
        laps[name] = laps.get(name, 0.0) + n
    laws = [described.law for described in sources.optims]
    carried = bool(laws) and plan.dynamics is not None and all(law and law.lr for law in laws)
    continued = carried and not any(law and law.resets for law in laws)
    pairs = zip(sources.optims, request.optims, strict=True)
    continued &= not any(decayed_gains(plan, described, optim) for described, optim in pairs)
    factors = [lr_factors(plan, described.law, described) for described in sources.optims]
    return GrowthReport(
        family=plan.family,
        source_sizes=dict(plan.source_sizes),
        target_sizes=dict(plan.target_sizes),
        n_params_source=sources.n_params,
        n_params_target=sum(p.numel() for _, p in named_parameters(request.model)),
        new_blocks=plan.new_blocks,
        preserves="gradient"
        if plan.preserves == "trajectory" and not continued
        else plan.preserves,
        reasons=plan.reasons,
        n_bytes_read=sum(execution.n_read for execution in executions),
        n_bytes_written=sum(execution.n_written for execution in executions),
        n_bytes_received=sum(g.n_received for execution in executions if (g := execution.gather)),
        seconds=sum(laps.values()),
        steps=dict(laps),
        memory=executions[0].memory,
        peak_bytes=sum(execution.peak_bytes for execution in executions),
        lr_factors=dict(Counter(f for of in factors for f in of.values())),
        lr_applied=carried,
        grad_norm_factor=staged.grad_norm_factor,
        noisy=plan.noisy,
        history=tuple(growth_history(request.model)),
        notes=(
            *noted,
            *plan.notes,
            *notes(plan, sources.spec, staged.targets),
            *(note for execution in executions for note in execution.notes),
        ),
    )
