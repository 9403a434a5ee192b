"""Training procedures of the papers: each returns a growth schedule that prints what it will do over the whole run.

Lengths that a paper's public text does not give are arguments without defaults. Every stage is an event, so that ``attach``, resuming and
the integrations are those of any ``GrowthSchedule``. All of them take ``tokens_per_step``, for the FLOPs, and ``spec``, a function from a
custom model to its description; ``total_steps`` is the number of steps of the whole run.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import inf, log10
from typing import Literal

from torch import nn

from growkern import depth, width
from growkern.errors import PlanError, UnsupportedModelError
from growkern.planning.decisions import DepthMethod, WidthMethod
from growkern.planning.sizes import Target
from growkern.support.argument_types import typed_arguments
from growkern.training import procedure
from growkern.training.options import SpecOf
from growkern.training.procedure import Procedure, Stage
from growkern.training.slope import WhenSlope
from growkern.training.trains import New, SubModels, Top
from growkern.training.triggers import At, Event

__all__ = [
    "Procedure",
    "Stage",
    "bert2bert",
    "cgls",
    "compound_grow",
    "g_stack",
    "g_stack_tokens",
    "late_depth",
    "llama_pro",
    "midas",
    "mslt",
    "stack_bert",
    "staged_training",
]

AKI, STACK, FRESH = width.AKI(), depth.Stack(), depth.Fresh()  # defaults
checked = typed_arguments(PlanError, model=UnsupportedModelError)
# operator -> threshold of the slope, and how far the learning-rate schedule goes back (Shen et al., arXiv:2203.06211)
STAGED = {"width": (0.0475, 1.776), "depth": (0.0575, 1.412), "both": (0.03, 2.455)}
STAGED_END = 0.052  # threshold of the slope at the end of the run
STAGED_TO: dict[str, Target] = {"width": {"hidden": "2x"}, "depth": {"layers": "2x"}, "both": {"hidden": "2x", "layers": "2x"}}  # fmt: skip


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

    Raises:
        PlanError: The stages do not fit the model, or each other.

    Example:
        >>> growkern.procedures.stack_bert(model, layers=(2, 4), steps=(100,), total_steps=300, tokens_per_step=32)

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

    Raises:
        PlanError: The stages do not fit the model, or each other.

    Example:
        >>> growkern.procedures.mslt(model, layers=(2, 3, 4), steps=(100, 100, 100), joint=50, tokens_per_step=32)

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
def bert2bert(
    model: nn.Module, to: Target, *, at: int, stage1_steps: int, total_steps: int, tokens_per_step: float, size: int = 3,
    width: WidthMethod = AKI, depth: DepthMethod = STACK, spec: SpecOf | None = None,
) -> Procedure:  # fmt: skip
    """Grow a small model, train sub-models of the target in turn (stage 1), then train the target (stage 2): bert2BERT.

    Args:
        model: The small model.
        to: Target, see ``expand_inplace``.
        at: Number of steps of the small model in this run, 1 or more.
        stage1_steps: Number of steps of stage 1. The paper trains 5 of 40 epochs so, and finds 20 epochs harmful.
        total_steps: Number of steps of the run, stage 2 included.
        size: Number of blocks that train in a step of stage 1.
        width: Width method: ``width.AKI()`` or ``width.FPI()``.
        depth: Depth method.

    Raises:
        PlanError: The growth cannot be planned, or ``size`` does not divide the depth.

    Example:
        >>> growkern.procedures.bert2bert(model, {"hidden": 48, "layers": 6}, at=1, stage1_steps=50, total_steps=200, tokens_per_step=32)

    Reference:
        Chen et al., "bert2BERT: Towards Reusable Pretrained Language Models", ACL 2022, arXiv:2110.07143.
    """
    procedure.check_least("bert2bert", 1, at=at)
    procedure.check_least("bert2bert", 0, stage1_steps=stage1_steps)
    events = [
        At(step=at, to=to, width=width, depth=depth, state="drop", dynamics=None, trains=SubModels(size)),
        At(step=at + stage1_steps, to=None),
    ]  # fmt: skip
    return Procedure("bert2BERT", model, events, total_steps=total_steps, tokens_per_step=tokens_per_step, spec=spec)  # fmt: skip


@checked
def compound_grow(
    model: nn.Module, stages: Sequence[Target], *, steps: Sequence[int], total_steps: int, tokens_per_step: float,
    spec: SpecOf | None = None,
) -> Procedure:  # fmt: skip
    """Grow one dimension after the other, with a new optimizer state each time: CompoundGrow.

    The paper also grows the length of the sequences, which belongs to your data: count it in ``tokens_per_step``.

    Args:
        model: The first model.
        stages: Target of each growth, such as ``[{"ffn": "2x"}, {"layers": "2x"}]``.
        steps: Number of steps before each growth, counted from the growth before.

    Raises:
        PlanError: The numbers of stages and steps differ, or a growth cannot be planned.

    Example:
        >>> growkern.procedures.compound_grow(model, [{"ffn": "2x"}, {"layers": "2x"}], steps=(50, 50), total_steps=300, tokens_per_step=32)

    Reference:
        Gu et al., "On the Transformer Growth for Progressive BERT Training", NAACL 2021, arXiv:2010.12562.
    """
    procedure.check_steps("compound_grow", len(stages) + 1, steps, 1)
    events = [
        At(step=at, to=to, width=width.HyperClone(), depth=STACK, state="drop", dynamics=None)
        for to, at in zip(stages, accumulate(steps), strict=True)
    ]
    return Procedure("CompoundGrow", model, events, total_steps=total_steps, tokens_per_step=tokens_per_step, spec=spec)  # fmt: skip


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

    Raises:
        PlanError: The rule says that the run is too short to grow.

    Example:
        >>> growkern.procedures.g_stack(model, total_steps=100_000, tokens_per_step=2**21)

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


@checked
def staged_training(
    model: nn.Module, growths: Sequence[Literal["width", "depth", "both"]], *, total_steps: int, tokens_per_step: float, rewarm: int = 200,
    warmup: int = 0, spec: SpecOf | None = None,
) -> Procedure:  # fmt: skip
    """Double width, depth or both each time that the slope of the validation loss says so, and rewind the learning rate: staged training.

    The loop observes ``eval_loss`` at equal distances, and passes its scheduler to ``attach``. The last event grows nothing: when it fires,
    and ``schedule.ahead`` is empty, the slope is where the paper ends the run.

    Args:
        model: The smallest model.
        growths: What doubles at each growth.
        rewarm: Number of steps in which the learning rate rises from 0 after a growth; the paper has 150 to 200.
        warmup: See ``WhenSlope``.

    Raises:
        PlanError: A growth cannot be planned.

    Example:
        >>> growkern.procedures.staged_training(model, ["depth", "width"], total_steps=20_000, tokens_per_step=32)

    Reference:
        Shen, Walsh, Keutzer, Dodge, Peters, Beltagy, "Staged Training for Transformer Language Models", ICML 2022, arXiv:2203.06211.
    """
    events = [
        WhenSlope(
            tau=STAGED[what][0], to=STAGED_TO[what], width=width.HyperClone(), depth=depth.IdentityBlocks(), dynamics=None,
            rewind=STAGED[what][1], rewarm=rewarm, warmup=warmup,
        )
        for what in growths
    ]  # fmt: skip
    events.append(WhenSlope(tau=STAGED_END, to=None, warmup=warmup))
    return Procedure("staged training", model, events, total_steps=total_steps, tokens_per_step=tokens_per_step, spec=spec)  # fmt: skip


@checked
def llama_pro(
    model: nn.Module, *, layers: int, at: int, total_steps: int, tokens_per_step: float, spec: SpecOf | None = None
) -> Procedure:  # fmt: skip
    """Insert identity blocks between the blocks, and train them alone from then on: LLaMA Pro.

    Args:
        model: The model.
        layers: Number of blocks of the target.
        at: Number of steps before the growth.

    Raises:
        PlanError: The growth cannot be planned.

    Example:
        >>> growkern.procedures.llama_pro(model, layers=4, at=1, total_steps=100, tokens_per_step=32)

    Reference:
        Wu et al., "LLaMA Pro: Progressive LLaMA with Block Expansion", ACL 2024, arXiv:2401.02415.
    """
    procedure.check_least("llama_pro", 1, at=at)
    event = At(step=at, to={"layers": layers}, depth=depth.IdentityBlocks(), trains=New())
    return Procedure("LLaMA Pro", model, [event], total_steps=total_steps, tokens_per_step=tokens_per_step, spec=spec)  # fmt: skip


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

    Raises:
        PlanError: The stages do not fit the model, or each other.

    Example:
        >>> growkern.procedures.cgls(model, layers=(2, 4), steps=(100,), warm_steps=20, total_steps=200, tokens_per_step=32)

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

    Raises:
        PlanError: The stages do not fit the model, or each other.

    Example:
        >>> growkern.procedures.midas(model, layers=(2, 3, 4), steps=(50, 100), total_steps=300, tokens_per_step=32)

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

    Raises:
        PlanError: ``share`` is not between 0 and 1, or the growth cannot be planned.

    Example:
        >>> growkern.procedures.late_depth(model, layers=12, total_steps=1000, tokens_per_step=32)

    Reference:
        Bu, "Scaling depth capacity via zero/one-layer model expansion", arXiv:2511.04981.
    """
    procedure.check_run("late_depth", total_steps, tokens_per_step)
    if not 0 < share < 1:
        raise PlanError(f"late_depth: share={share}; pass a share of the steps between 0 and 1.")
    event = At(step=max(1, round(share * total_steps)), to={"layers": layers}, depth=depth)
    return Procedure("late depth", model, [event], total_steps=total_steps, tokens_per_step=tokens_per_step, spec=spec)  # fmt: skip
