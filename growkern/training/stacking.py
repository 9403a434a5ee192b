"""Procedures that grow in depth alone; ``growkern.procedures`` has them all."""

from collections.abc import Sequence
from itertools import accumulate
from math import inf, log10

from torch import nn

from growkern import depth
from growkern.errors import PlanError, UnsupportedModelError
from growkern.planning.decisions import DepthMethod
from growkern.support.argument_types import typed_arguments
from growkern.training import procedure
from growkern.training.options import SpecOf
from growkern.training.procedure import Procedure
from growkern.training.trains import New, Top
from growkern.training.triggers import At, Event

checked = typed_arguments(PlanError, model=UnsupportedModelError)
STACK, FRESH = depth.Stack(), depth.Fresh()  # defaults


@checked
def stack_bert(
    model: nn.Module, *, layers: Sequence[int] = (3, 6, 12), steps: Sequence[int] = (50_000, 70_000), total_steps: int,
    tokens_per_step: float, spec: SpecOf | None = None,
) -> Procedure:  # fmt: skip
    """Double the depth by stacking the model on itself, with a new optimizer state each time: StackBERT.

    Args:
        model: Model of ``layers[0]`` blocks.
        layers: Number of blocks of each stage.
        steps: Number of steps of each stage but the last.
        total_steps, tokens_per_step, spec: See ``Procedure``.

    Returns:
        The schedule of the run, not attached yet; ``print`` it.

    Raises:
        PlanError: The stages do not fit the model, or each other.

    Example:
        >>> schedule = growkern.procedures.stack_bert(model, layers=(2, 4, 8), steps=(50, 70), total_steps=300, tokens_per_step=32)
        >>> [(event.trigger, event.to) for event in schedule.events]
        [('step 50', {'layers': 4}), ('step 120', {'layers': 8})]

    Reference:
        Gong et al., "Efficient Training of BERT by Progressively Stacking", ICML 2019.
    """
    procedure.check_stages("stack_bert", model, layers, steps, 1, spec)
    events = [
        At(step=at, to={"layers": n}, depth=STACK, state="drop")
        for n, at in zip(layers[1:], accumulate(steps), strict=True)
    ]
    return Procedure("StackBERT", model, events, total_steps=total_steps, tokens_per_step=tokens_per_step, spec=spec)  # fmt: skip


@checked
def mslt(
    model: nn.Module, *, layers: Sequence[int] = (3, 6, 9, 12), steps: Sequence[int], joint: int, tokens_per_step: float,
    spec: SpecOf | None = None,
) -> Procedure:  # fmt: skip
    """Add copies of the top blocks stage by stage, train only what is new and the head, and train everything at the end: MSLT.

    Args:
        model: Model of ``layers[0]`` blocks.
        layers: Number of blocks of each stage.
        steps: Number of steps of each stage.
        joint: Number of steps at the end in which everything trains, 1 or more.
        tokens_per_step, spec: See ``Procedure``.

    Returns:
        The schedule of the run, not attached yet; ``print`` it.

    Raises:
        PlanError: The stages do not fit the model, or each other.

    Example:
        >>> schedule = growkern.procedures.mslt(model, layers=(2, 3, 4), steps=(90, 90, 90), joint=90, tokens_per_step=32)
        >>> [(event.trigger, event.to, event.trains) for event in schedule.events]
        [('step 90', {'layers': 3}, Top(n=None, head=True)), ('step 180', {'layers': 4}, Top(n=None, head=True)), ('step 270', None, All())]

    Reference:
        Yang et al., "Progressively Stacking 2.0: A Multi-stage Layerwise Training Method for BERT Training Speedup", arXiv:2011.13635.
    """
    procedure.check_stages("mslt", model, layers, steps, 0, spec)
    procedure.check_least("mslt", 1, joint=joint)
    *ends, last = accumulate(steps)
    events: list[Event] = [
        At(step=at, to={"layers": n}, depth=depth.TopCopies(), trains=Top())
        for n, at in zip(layers[1:], ends, strict=True)
    ]
    events.append(At(step=last, to=None))
    return Procedure("MSLT", model, events, total_steps=last + joint, tokens_per_step=tokens_per_step, spec=spec)  # fmt: skip


@checked
def cgls(
    model: nn.Module, *, layers: Sequence[int], steps: Sequence[int], warm_steps: int, total_steps: int, tokens_per_step: float,
    spec: SpecOf | None = None,
) -> Procedure:  # fmt: skip
    """Add blocks on top stage by stage; train what is new for some steps, then everything: curriculum-guided layer scaling.

    The paper trains on harder data from stage to stage, and what is new on a balanced part of it; the data are yours.

    Args:
        model: Model of ``layers[0]`` blocks.
        layers: Number of blocks of each stage.
        steps: Number of steps of each stage but the last.
        warm_steps: Number of steps at the start of a stage in which only what is new trains, and the head.
        total_steps, tokens_per_step, spec: See ``Procedure``.

    Returns:
        The schedule of the run, not attached yet; ``print`` it.

    Raises:
        PlanError: The stages do not fit the model, or each other.

    Example:
        >>> schedule = growkern.procedures.cgls(model, layers=(2, 4), steps=(100,), warm_steps=20, total_steps=200, tokens_per_step=32)
        >>> [(event.trigger, event.to, event.trains) for event in schedule.events]
        [('step 100', {'layers': 4}, Top(n=None, head=True)), ('step 120', None, All())]

    Reference:
        "Curriculum-Guided Layer Scaling for Language Model Pretraining", arXiv:2506.11389.
    """
    procedure.check_stages("cgls", model, layers, steps, 1, spec)
    procedure.check_least("cgls", 0, warm_steps=warm_steps)
    events: list[Event] = []
    for n, at in zip(layers[1:], accumulate(steps), strict=True):
        events.append(At(step=at, to={"layers": n}, depth=depth.TopCopies(), trains=Top()))
        events.append(At(step=at + warm_steps, to=None))
    return Procedure("CGLS", model, events, total_steps=total_steps, tokens_per_step=tokens_per_step, spec=spec)  # fmt: skip


@checked
def midas(
    model: nn.Module, *, layers: Sequence[int], steps: Sequence[int], total_steps: int, tokens_per_step: float, spec: SpecOf | None = None
) -> Procedure:  # fmt: skip
    """Insert copies of the middle blocks in the middle, stage by stage: MIDAS.

    Args:
        model: Model of ``layers[0]`` blocks.
        layers: Number of blocks of each stage, such as ``(3, 6, 9, 12)``: each stage adds equally many.
        steps: Number of steps of each stage but the last. The paper's stages become longer polynomially.
        total_steps, tokens_per_step, spec: See ``Procedure``.

    Returns:
        The schedule of the run, not attached yet; ``print`` it.

    Raises:
        PlanError: The stages do not fit the model, or each other.

    Example:
        >>> schedule = growkern.procedures.midas(model, layers=(2, 3, 4), steps=(50, 100), total_steps=300, tokens_per_step=32)
        >>> [(event.trigger, event.to) for event in schedule.events]
        [('step 50', {'layers': 3}), ('step 150', {'layers': 4})]

    Reference:
        Saunshi et al., "On the Inductive Bias of Stacking Towards Improving Reasoning", NeurIPS 2024, arXiv:2409.19044.
    """
    procedure.check_stages("midas", model, layers, steps, 1, spec)
    events = [
        At(step=at, to={"layers": n}, depth=depth.Middle())
        for n, at in zip(layers[1:], accumulate(steps), strict=True)
    ]
    return Procedure("MIDAS", model, events, total_steps=total_steps, tokens_per_step=tokens_per_step, spec=spec)  # fmt: skip


@checked
def late_depth(
    model: nn.Module, *, layers: int, total_steps: int, tokens_per_step: float, share: float = 0.8, depth: DepthMethod = FRESH,
    spec: SpecOf | None = None,
) -> Procedure:  # fmt: skip
    """Train a model of no block or one until a share of the steps, then grow it to its full depth at once.

    The paper grows in the stable phase of a warmup-stable-decay schedule.

    Args:
        model: Model of 0 or 1 block.
        layers: Number of blocks of the target.
        share: Share of the steps before the growth, between 0 and 1.
        depth: Depth method; the paper initializes the blocks anew, or copies.
        total_steps, tokens_per_step, spec: See ``Procedure``.

    Returns:
        The schedule of the run, not attached yet; ``print`` it.

    Raises:
        PlanError: ``share`` is not between 0 and 1, or the growth cannot be planned.

    Example:
        >>> schedule = growkern.procedures.late_depth(shallow, layers=12, total_steps=1000, tokens_per_step=32)
        >>> [(event.trigger, event.to) for event in schedule.events]
        [('step 800', {'layers': 12})]

    Reference:
        Bu, "Scaling depth capacity via zero/one-layer model expansion", arXiv:2511.04981.
    """
    procedure.check_run("late_depth", total_steps, tokens_per_step)
    if not 0 < share < 1:
        raise PlanError(f"late_depth: share={share}; pass a share of the steps between 0 and 1.")
    event = At(step=max(1, round(share * total_steps)), to={"layers": layers}, depth=depth)
    return Procedure("late depth", model, [event], total_steps=total_steps, tokens_per_step=tokens_per_step, spec=spec)  # fmt: skip


@checked
def llama_pro(
    model: nn.Module, *, layers: int, at: int, total_steps: int, tokens_per_step: float, spec: SpecOf | None = None
) -> Procedure:  # fmt: skip
    """Insert identity blocks between the blocks, and train them alone from then on: LLaMA Pro.

    Args:
        model: The model.
        layers: Number of blocks of the target.
        at: Number of steps before the growth.
        total_steps, tokens_per_step, spec: See ``Procedure``.

    Returns:
        The schedule of the run, not attached yet; ``print`` it.

    Raises:
        PlanError: The growth cannot be planned.

    Example:
        >>> schedule = growkern.procedures.llama_pro(model, layers=4, at=1, total_steps=100, tokens_per_step=32)
        >>> [(event.trigger, event.to, event.trains) for event in schedule.events]
        [('step 1', {'layers': 4}, New(head=False))]

    Reference:
        Wu et al., "LLaMA Pro: Progressive LLaMA with Block Expansion", ACL 2024, arXiv:2401.02415.
    """
    procedure.check_least("llama_pro", 1, at=at)
    event = At(step=at, to={"layers": layers}, depth=depth.IdentityBlocks(), trains=New())
    return Procedure("LLaMA Pro", model, [event], total_steps=total_steps, tokens_per_step=tokens_per_step, spec=spec)  # fmt: skip


@checked
def g_stack_tokens(n_params: float, flops: float) -> float:
    """Return the tokens after which G_stack grows a model.

    Args:
        n_params: Number of parameters of the target, above 1.
        flops: FLOPs of the whole run: 6 per parameter and token.

    Raises:
        PlanError: A number is out of range, or the run has less than one token.

    Example:
        >>> round(growkern.procedures.g_stack_tokens(8e9, 6 * 8e9 * 15e12) / 1e9, 2)
        6.58

    Reference:
        Du et al., "Stacking Your Transformers", NeurIPS 2024, arXiv:2405.15319.
    """
    procedure.check_least("g_stack_tokens", 1, above=True, n_params=n_params)
    if not 6 * n_params <= flops < inf:
        raise PlanError(
            f"g_stack_tokens: flops={flops}; pass a finite number from {6 * n_params:.4g}, the FLOPs of one token."
        )
    return 10 ** (0.88 * log10(n_params) + 163.27 / log10(flops) - 5.74)


@checked
def g_stack(
    model: nn.Module, *, total_steps: int, tokens_per_step: float, factor: int = 4, rewarm: int = 3000, spec: SpecOf | None = None
) -> Procedure:  # fmt: skip
    """Stack the model on itself once, after the tokens of the paper's rule, and warm a new optimizer state up: G_stack.

    Args:
        model: The small model.
        factor: Factor on the depth.
        rewarm: Number of steps in which the learning rate rises from 0 after the growth.
        total_steps, tokens_per_step, spec: See ``Procedure``.

    Returns:
        The schedule of the run, not attached yet; ``print`` it.

    Raises:
        PlanError: The rule says that the run is too short to grow.

    Example:
        >>> schedule = growkern.procedures.g_stack(model, total_steps=100_000, tokens_per_step=2**21)
        >>> [(event.trigger, event.to) for event in schedule.events]
        [('step 58', {'layers': '4x'})]

    Reference:
        Du et al., "Stacking Your Transformers", NeurIPS 2024, arXiv:2405.15319.
    """
    procedure.check_run("g_stack", total_steps, tokens_per_step)
    to, total = {"layers": f"{factor}x"}, total_steps * tokens_per_step
    if total < 1:
        raise PlanError(
            f"g_stack: tokens_per_step={tokens_per_step:.4g}; the run has less than one token, pass more."
        )
    growth = [At(step=1, to=to, depth=STACK)]
    rehearsed = Procedure("G_stack", model, growth, total_steps=2, tokens_per_step=1, spec=spec)
    n_params = rehearsed.stages[-1].n_params
    step = max(1, round(g_stack_tokens(n_params, 6.0 * n_params * total) / tokens_per_step))
    if step >= total_steps:
        raise PlanError(
            f"g_stack: the rule grows a target of {n_params:,} parameters after {step:,} steps, and the run has {total_steps:,}: train the "
            "target from scratch, or pass a longer run."
        )
    event = At(step=step, to=to, depth=STACK, state="drop", rewarm=rewarm)
    return Procedure("G_stack", model, [event], total_steps=total_steps, tokens_per_step=tokens_per_step, spec=spec)  # fmt: skip
