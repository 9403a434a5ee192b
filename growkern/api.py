"""The public calls: describe, plan, execute, commit, report."""

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from time import perf_counter

import torch
from torch import nn
from torch.optim import Optimizer

from growkern.commit import check_blocks, commit
from growkern.depth import IdentityBlocks
from growkern.describe import describe, describe_optimizer, tensors_of
from growkern.errors import CommitError, GrowthError, PlanError, UnsupportedOptimizerError
from growkern.execute import Execution, Memory
from growkern.forgotten import Live, forgotten_schedulers, refuse_forgotten
from growkern.groups import check_scheduler, schedulers
from growkern.law import build, check
from growkern.memory import elsewhere, in_place
from growkern.methods import DepthMethod, WidthMethod
from growkern.plan import GrowthPlan
from growkern.reference import norm_of
from growkern.report import GrowthReport
from growkern.sizes import Target, resolve_sizes
from growkern.spaces import ModelSpec
from growkern.state import Law, OptimSpec
from growkern.tensors import Tensors
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
    spec: ModelSpec | None = None,
    seed: int = 0,
) -> GrowthPlan:
    """Plan a growth without changing anything; ``print`` it to see every decision.

    Args:
        model: Source model.
        optim: Its optimizer, to have its state checked too.
        to: ``"2x"``, ``"1.5x"`` (all widths), or a mapping from size name to an int or a factor.
        width: Width method; default ``width.Lossless()``.
        depth: Depth method; default ``depth.IdentityBlocks()``.
        state: ``"exact"`` grows optimizer state by the dual law, ``"drop"`` clears it.
        spec: Description of a model of your own.
        seed: Of all noise. Equal seeds give equal plans, and equal bits, on every machine.

    Returns:
        The plan; ``expand_inplace(..., plan=plan)`` runs it.

    Raises:
        PlanError: The growth cannot be planned; every reason at once, with the way out.
        UnsupportedModelError: See ``describe``.
        UnsupportedOptimizerError: The optimizer's state cannot be grown.
    """
    model = _unwrapped(model)
    found = describe(model, spec)
    if optim is not None:
        describe_optimizer(model, optim, found, drop=state == "drop")
    return _plan(found, to, width, depth, state, seed)


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
    seed: int = 0,
    backend: str | None = None,
    plan: GrowthPlan | None = None,
    scheduler: object | None = None,
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
        state: ``"exact"`` grows optimizer state by the dual law, ``"drop"`` clears it.
        dynamics: ``"mup"`` multiplies learning rates by the law's factor for good, where it is one number per tensor, by
            splitting param groups, and divides their weight decay by it, so that decay per step stays; None leaves the
            groups alone and reports the factors.
        spec: Description of a model of your own.
        seed: Of all noise.
        backend: ``"triton"``, ``"torch"``, or None for triton on a GPU and torch elsewhere.
        plan: A plan made before, in place of ``to``, ``width``, ``depth``, ``state`` and ``seed``.
        scheduler: The learning-rate scheduler that drives ``optim``, or a list of them; they follow the split groups.

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
    start = perf_counter()
    model = _unwrapped(model)
    if dynamics is not None and (not isinstance(dynamics, str) or dynamics != "mup"):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PlanError(f"unknown dynamics={dynamics!r}: 'mup' or None.")
    if plan is not None and not isinstance(plan, GrowthPlan):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PlanError(
            f"plan: expected a GrowthPlan, got {type(plan).__name__}; GrowthPlan.from_json reads one."
        )
    if plan is not None and (to != "2x" or width is not None or depth is not None):
        raise PlanError("plan= already says what to grow; leave to=, width= and depth= out.")
    check_scheduler(optim, scheduler)
    found = describe(model, spec)
    drop = (plan.state if plan else state) == "drop"
    described = describe_optimizer(model, optim, found, drop=drop) if optim is not None else None
    live = Live.scan()
    refuse_forgotten(model, optim, live)
    if plan is None:
        plan = _plan(found, to, width, depth, state, seed)
    else:
        check(plan, found)
    law = described.law if described else None
    factors = lr_factors(plan, law, described)
    split = {name: f for name, f in factors.items() if f and f != 1} if dynamics == "mup" else {}
    if (
        optim is not None
        and split
        and (alone := forgotten_schedulers(optim, schedulers(scheduler), live))
    ):
        raise PlanError(
            f"a learning-rate scheduler ({', '.join(alone)}) drives this optimizer, and dynamics='mup' splits its "
            "param groups: pass scheduler=, one or a list, so that it follows, or dynamics=None."
        )
    del live
    check_blocks(plan, model)
    n_params = sum(p.numel() for p in model.parameters())
    with torch.inference_mode(False), torch.no_grad():
        sources = tensors_of(model, optim, found)
        run = Execution(plan, sources, law, backend=backend, memory=memory)
        norms = [_grad_norm(plan, sources, "source")]
        lean = run.memory == "lean"
        try:
            parts = run.parts() if lean else [*run.parts()]
        except GrowthError:
            raise
        except Exception as error:
            raise CommitError(f"the growth failed before anything was changed: {error}") from error
        with elsewhere() if lean else nullcontext(in_place) as keep:
            commit(
                plan, parts, model, optim, described, keep=keep, lr_factors=split, scheduler=scheduler,
                last=lambda: norms.append(_grad_norm(plan, tensors_of(model, optim, found), "name")),
            )  # fmt: skip
        del parts
        before, after = norms
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    counts: dict[float | None, int] = {}
    for factor in factors.values():
        counts[factor] = counts.get(factor, 0) + 1
    report = GrowthReport(
        family=plan.family,
        source_sizes=dict(plan.source_sizes),
        target_sizes=dict(plan.target_sizes),
        n_params_source=n_params,
        n_params_target=sum(p.numel() for p in model.parameters()),
        n_new_blocks=sum(block.new for block in plan.blocks),
        function_preserving=plan.function_preserving,
        reasons=plan.reasons,
        n_bytes_read=run.n_read,
        n_bytes_written=run.n_written,
        seconds=perf_counter() - start,
        memory=run.memory,
        peak_bytes=run.peak_bytes,
        lr_factors=counts,
        lr_applied=dynamics == "mup",
        grad_norm_factor=after / before if before > 0 and after > 0 else None,
        noisy=plan.noisy,
        notes=(*plan.notes, *_notes(plan, found, described, factors, split, scheduler)),
    )
    logger.debug("%s", report)
    return report


def _plan(
    spec: ModelSpec,
    to: Target,
    width: WidthMethod | None,
    depth: DepthMethod | None,
    state: str,
    seed: int,
) -> GrowthPlan:
    return build(
        spec,
        resolve_sizes(spec, to),
        width=Lossless() if width is None else width,
        depth=IdentityBlocks() if depth is None else depth,
        state=state,
        seed=seed,
    )


def lr_factors(
    plan: GrowthPlan, law: Law | None, described: OptimSpec | None
) -> dict[str, float | None]:
    """The law's learning-rate factor of every target parameter that the optimizer holds; None where it is not one number."""
    if law is None or described is None:
        return {}
    held = {name for group in described.groups for name in group}
    return {row.name: law.lr_factor(*plan.scales(row)) for row in plan.rows if row.source in held}


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module that torch.compile wrapped, or the model itself."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def _grad_norm(plan: GrowthPlan, tensors: Tensors, side: str) -> float:
    """The global gradient norm without new blocks: from gradients in flight, else from second moments."""
    names = [getattr(row, side) for row in plan.rows if not row.new and row.constant is None]
    if tensors.grads:
        return norm_of([tensors.grads[n] for n in names if n in tensors.grads], 2)
    states = [tensors.states[n].get("exp_avg_sq") for n in names if n in tensors.states]
    return norm_of([s for s in states if isinstance(s, torch.Tensor)], 1) ** 0.5


def _notes(
    plan: GrowthPlan,
    spec: ModelSpec,
    described: OptimSpec | None,
    factors: Mapping[str, float | None],
    split: Mapping[str, float],
    scheduler: object | None,
) -> list[str]:
    notes: list[str] = []
    if split and any(getattr(one, "eta_min", 0) for one in schedulers(scheduler)):
        notes.append(
            "the scheduler's eta_min is one number for all groups: near it, learning-rate factors fade."
        )
    if split and described:
        notes.append(
            "weight decay was divided by the learning-rate factor where that is not 1, so that decay per step stays."
        )
        notes.append(
            "param groups were split by learning rate; to load this optimizer's state_dict into a new one, build it with the same groups."
        )
    if described and described.law is None:
        notes.append(
            f"the learning-rate law of {described.kind} is not known, so its groups stayed."
        )
    uneven = sum(factor is None for factor in factors.values())
    if uneven:
        notes.append(
            f"{uneven} tensors have a learning-rate factor per element, so theirs stayed; they may want a shorter step."
        )
    if described:
        held = {name for group in described.groups for name in group}
        missing = [
            row.source
            for row in plan.rows
            if not row.new and row.source in spec.tensors and row.source not in held
        ]
        if missing:
            notes.append(
                f"{len(missing)} tensors are in no param group (frozen, buffers or forgotten): {', '.join(missing[:3])}..."
            )
    if plan.state == "drop" and described:
        notes.append("optimizer state was dropped: warm the learning rate up again.")
    return notes


__all__ = ["GrowthError", "UnsupportedOptimizerError", "expand_inplace", "plan"]
