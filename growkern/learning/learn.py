"""Learned growth: a few steps of training on the operators of a plan, before the target's own training goes on."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from growkern.analysis.comparison import Batch, Loss, loss_of
from growkern.api import plan as make_plan
from growkern.commit.optimizer import Masters
from growkern.commit.undo import Undo
from growkern.engine.ddp import Ranks
from growkern.engine.first_blocks import first_blocks
from growkern.engine.live_objects import averages_of
from growkern.engine.report import GrowthReport
from growkern.engine.request import Request
from growkern.engine.run import all_or_nothing, run
from growkern.errors import (
    InsufficientMemoryError,
    PlanError,
    UnsupportedModelError,
    raise_all,
)
from growkern.learning.build import build_operators
from growkern.learning.learner import learn_operators
from growkern.learning.operators import Operators, Values
from growkern.learning.pieces import Tie
from growkern.model.describe import describe
from growkern.model.spec import ModelSpec
from growkern.optimizer.describe import Optimizers, optimizers
from growkern.planning.axis_scales import SYMMETRIC
from growkern.planning.check import check
from growkern.planning.decisions import DepthMethod, WidthMethod
from growkern.planning.growth_plan import GrowthPlan
from growkern.planning.sizes import Target
from growkern.support.argument_types import misfits, typed_arguments
from growkern.support.live_registry import Live
from growkern.support.memory import free_bytes, stored_like
from growkern.support.names import named_parameters
from growkern.support.wrappers import unwrapped

REASON = "the operators were learned, so the target is another function than the closed form"


@typed_arguments(  # the plan and the growth check the arguments that are theirs
    PlanError, "optim", "to", "width", "depth", "dynamics", "spec", "seed", "scheduler", "ema", "master_weights",
    model=UnsupportedModelError,
)  # fmt: skip
def learn(
    model: nn.Module,
    optim: Optimizers,
    batches: Iterable[Any],
    *,
    to: Target = "2x",
    width: WidthMethod | None = None,
    depth: DepthMethod | None = None,
    steps: int = 100,
    lr: float = 1e-3,
    noise: float = 0.0,
    tie: Tie = "use",
    loss: Loss | None = None,
    dynamics: str | None = "mup",
    spec: ModelSpec | None = None,
    seed: int | None = None,
    scheduler: object | None = None,
    ema: nn.Module | Sequence[nn.Module] | None = None,
    master_weights: Masters | None = None,
    on_step: Callable[[int, float], object] | None = None,
) -> GrowthReport:
    """Grow a model in place by operators that a few steps of training learn, from a closed form as their start (LiGO, Mango).

    A weight of the target is ``A (sum_k w_k W_k) B^T``: matrices ``A`` and ``B`` per axis, coefficients ``w`` over the source's blocks.
    They start as the index maps and layers of the width and the depth method, so the target starts at that closed form bit for bit; what
    the closed form has beside copies (noise, random rows, zeros of identity blocks) is added and not learned. What grows from parameters
    with ``requires_grad=False`` gets the closed form. AdamW trains the operators alone, by a linear learning-rate decay to 0, on a copy of
    the model, which has copies of its hooks. The model itself changes once, at the end, as in ``expand_inplace``: all or nothing. Optimizer
    state and gradients in flight are dropped, because those of the source say nothing about learned weights. The operators are then
    forgotten: the grown model is an ordinary model. Torch's random number generators keep the state that they had before the call.

    Ordinary steps after the best closed form may lower the loss more than as many steps on the operators do: measure both.

    Args:
        model: Source model; changed in place.
        optim: Optimizer of the model, a list of optimizers, or None; its state is dropped.
        batches: Batches of the training data; each step takes one, and starts again after the last. ``loss`` reads them.
        to: See ``expand_inplace``.
        width: Width method of the start; default ``width.Lossless()``.
        depth: Depth method of the start; default ``depth.IdentityBlocks()``. LiGO starts from ``depth.Stack()``.
        steps: Number of steps on the operators; 0 gives the closed form.
        lr: First learning rate of the operators.
        noise: Uniform noise from 0 to ``noise`` on every entry of the matrices and coefficients at the start; LiGO uses 0.03. Without
            noise, copies that are equal in the closed form stay equal, as in training.
        tie: Which axes share a matrix. ``"use"``: those of the same use, as in the plan; a block has its own matrices for its heads and
            FFN, and readers have other matrices than writers. ``"published"``: LiGO's ties; readers and writers of a space share a
            matrix too, and the plan's scales stay. ``"shared"``: Mango of rank 1; all blocks share a matrix per kind of axis and
            one row of coefficients over layers, and the tensors of a block with equal axes (k and v, gate and up) are mixed.
        loss: Function of a model and a batch; by default the output's ``loss``, or the cross entropy of the next token.
        dynamics: See ``expand_inplace``.
        spec: Description of a custom model.
        seed: Seed of all noise; None: the number of earlier growths.
        scheduler: See ``expand_inplace``.
        ema: Weight averages of the model; the learned operators grow them too.
        master_weights: See ``expand_inplace``; the learned operators grow them too.
        on_step: Called after every step with the number of steps so far and the step's loss. What it raises ends the learning, and
            nothing was changed. A step that ends more than two seconds after the last line is logged too.

    Returns:
        The report; ``print`` it. ``report.learned`` has the losses.

    Raises:
        PlanError: See ``expand_inplace``; there is no batch; nothing that grows is learned; or the model is trained by several processes.
        UnsupportedModelError: See ``expand_inplace``; or the model cannot be copied.
        InsufficientMemoryError: Target, gradients and operators do not fit beside the source.
        CommitError: A loss is not finite, or the growth failed and was rolled back.

    Example:
        >>> report = growkern.learn(model, optim, batches, to={"hidden": 48, "layers": 4}, depth=depth.Stack(), steps=5)
        >>> report.learned.loss_after < report.learned.loss_before
        True

    Reference:
        Wang et al., "Learning to Grow Pretrained Models for Efficient Transformer Training", ICLR 2023, arXiv:2303.00980 (LiGO).
        Pan et al., "Reusing Pretrained Models by Multi-linear Operators for Efficient Training", NeurIPS 2023, arXiv:2310.10699 (Mango).
    """
    model = unwrapped(model)
    _check(model, steps, lr, noise)
    taken = _cycled(batches, steps, plain=loss is None)
    planned = make_plan(
        model, optim, to=to, width=width, depth=depth, state="drop", dynamics=dynamics, spec=spec, seed=seed,
        master_weights=master_weights,
    )  # fmt: skip

    def checked_plan(described: ModelSpec) -> GrowthPlan:
        check(planned, described)
        return planned

    request = Request(
        model, optimizers(optim), checked_plan, drop_state=True, spec=spec, scheduler=scheduler, ema=ema,
        master_weights=master_weights, new_rows=getattr(width, "rows", None), init=getattr(depth, "init", None),
        block=getattr(depth, "block", None),
    )  # fmt: skip
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng([*devices]), torch.inference_mode(False), torch.enable_grad():
        first = next(taken)
        described = describe(model, spec, first=first_blocks(model, spec, request.block))
        sources = _parameters(model, described)
        frozen = {name for name, p in _by_name(model).items() if not p.requires_grad}
        operators = build_operators(described, planned, sources, frozen=frozen, tie=tie, noise=float(noise))  # fmt: skip
        n_bytes = _refuse_memory(planned, sources, operators)
        target = _grown_copy(request)
        learned = learn_operators(
            target, operators, sources, loss or loss_of, chain([first], taken), steps, lr, on_step
        )
        del target
        report = _grow(request, described, operators) if steps or noise else run(request)
    report = replace(report, learned=replace(learned, n_bytes=n_bytes))
    if not (steps or noise):
        return report
    return replace(
        report, preserves="nothing", reasons=(*report.reasons, REASON), grad_norm_factor=None,
        notes=tuple(note for note in report.notes if not (noise and note.startswith(SYMMETRIC))),
    )  # fmt: skip


def _check(model: nn.Module, steps: int, lr: float, noise: float) -> None:
    """Raise PlanError for numbers out of range, and for a model that several processes train."""
    problems = [
        f"steps={steps}: pass 0 or more." if steps < 0 else "",
        f"lr={lr}: pass a positive number." if not 0 < lr < float("inf") else "",
        f"noise={noise}: pass 0 or a positive number." if not 0 <= noise < float("inf") else "",
    ]
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if several or Ranks(model, Live.now().modules).wrappers:
        problems.append(
            "the model is trained by several processes, whose operators would differ: learn in one process, "
            "save a checkpoint, and start the processes from it; or grow by expand_inplace."
        )
    raise_all(PlanError, "cannot learn a growth:", [*filter(None, problems)])


def _cycled(batches: Iterable[Any], steps: int, *, plain: bool) -> Iterator[Any]:
    """Yield batches, from the first one again after the last; ``plain``: the default loss reads them.

    Raises:
        PlanError: There is no batch, an iterator that cannot start again ends before the last step, or a batch is not of the type that
            the default loss reads.
    """
    if isinstance(batches, Tensor | Mapping):  # one batch
        batches = [batches]
    n = 0
    while True:
        before = n
        for batch in batches:
            n += 1
            for problem in misfits("batches", batch, Batch) if plain else ():
                raise PlanError(f"{problem} Or pass loss=, a function of model and batch.")
            yield batch
        if n == before:
            raise PlanError(
                f"batches: {n} batches for {steps} steps, and no more; pass a list or a DataLoader, which can start again, or fewer steps. "
                "Nothing was changed."
            )


def _parameters(model: nn.Module, spec: ModelSpec) -> dict[str, Tensor]:
    """Return the parameters by name, without tied names."""
    return {name: p.detach() for name, p in _by_name(model).items() if name not in spec.ties}


def _by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(named_parameters(model, remove_duplicate=False))


def _refuse_memory(plan: GrowthPlan, sources: Values, operators: Operators) -> int:
    """Return the bytes of learning beyond the source; raise InsufficientMemoryError if they are not free."""
    needed: dict[torch.device, int] = {}
    for row in plan.tensors:
        if (source := sources.get(row.source)) is not None:  # closed form, target, gradient
            n_bytes = 3 * prod(plan.shapes(row)[1]) * source.element_size()
            needed[source.device] = needed.get(source.device, 0) + n_bytes
    for p in operators.parameters.values():  # value, gradient, two moments
        needed[p.device] = needed.get(p.device, 0) + 4 * p.numel() * p.element_size()
    for device, n_bytes in needed.items():
        free = free_bytes(device)
        if free is not None and n_bytes > free:
            raise InsufficientMemoryError(
                f"learning needs, beside the source, {n_bytes / 2**30:.2f} GiB on {device} and activations; free: {free / 2**30:.2f} GiB. "
                "Free memory, choose a smaller target, or grow by expand_inplace. Nothing was changed."
            )
    return sum(needed.values())


class _TakenBackError(Exception):
    """Ends a growth that is to be rolled back."""


def _grown_copy(request: Request) -> nn.Module:
    """Return a copy of the grown model. The growth is rolled back, so that whatever refuses it is found before the learning."""
    copies = list[nn.Module]()
    try:
        with all_or_nothing(request.model) as undo:
            run(replace(request, undo=undo))
            try:
                copies.append(copy.deepcopy(request.model))
            except Exception as error:
                raise UnsupportedModelError(
                    f"cannot copy this {type(request.model).__name__}, to learn on the copy ({error}); remove the attribute that cannot be "
                    "copied, learn, and set the attribute again. Nothing was changed."
                ) from error
            raise _TakenBackError
    except _TakenBackError:
        return copies[0]


def _grow(request: Request, described: ModelSpec, operators: Operators) -> GrowthReport:
    """Grow the model, its optimizers and its averages by the closed form, and add what the operators change: all or nothing."""
    model, masters = request.model, request.master_weights or {}
    averages = averages_of(model, request.ema)
    of_averages = [_parameters(average, described) for average in averages]
    of_model = _parameters(model, described)
    params = _by_name(model).items()
    of_masters = of_model | {name: masters[p].detach() for name, p in params if p in masters}
    with all_or_nothing(model) as undo:
        report = run(replace(request, undo=undo))
        with torch.no_grad():
            _add(operators, of_model, _by_name(model), undo)
            for average, sources in zip(averages, of_averages, strict=True):
                _add(operators, sources, _by_name(average), undo)
            held = {name: masters[p] for name, p in _by_name(model).items() if p in masters}
            _add(operators, of_masters, held, undo)
    return report


def _add(
    operators: Operators, sources: Values, params: Mapping[str, nn.Parameter], undo: Undo
) -> None:
    """Add what the operators change to parameters in the closed form, and drop the gradients of all."""
    for name, p in params.items():
        value = p.detach()
        if name in operators.pieces:
            value = stored_like(value, (value + operators.change(name, sources)).to(p.dtype))
        if name in operators.pieces or p.grad is not None:
            undo.storage(p, value, None)
