"""Training procedures of the papers: each returns a growth schedule that prints what it will do over the whole run.

Lengths that a paper's public text does not give are arguments without defaults. Every stage is an event, so that ``attach``, resuming and
the integrations are those of any ``GrowthSchedule``. All of them take ``tokens_per_step``, for the FLOPs, and ``spec``, a function from a
custom model to its description; ``total_steps`` is the number of steps of the whole run.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

from torch import nn

from growkern import depth, width
from growkern.planning.decisions import DepthMethod, WidthMethod
from growkern.planning.sizes import Target
from growkern.training import procedure
from growkern.training.options import SpecOf
from growkern.training.procedure import Procedure, Stage
from growkern.training.slope import WhenSlope
from growkern.training.stacking import (
    STACK,
    cgls,
    checked,
    g_stack,
    g_stack_tokens,
    late_depth,
    llama_pro,
    midas,
    mslt,
    stack_bert,
)
from growkern.training.trains import SubModels
from growkern.training.triggers import At

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


def __dir__() -> list[str]:
    return __all__


AKI = width.AKI()  # a default
# operator -> threshold of the slope, and how far the learning-rate schedule goes back (Shen et al., arXiv:2203.06211)
STAGED = {"width": (0.0475, 1.776), "depth": (0.0575, 1.412), "both": (0.03, 2.455)}
STAGED_END = 0.052  # threshold of the slope at the end of the run
STAGED_TO: dict[str, Target] = {"width": {"hidden": "2x"}, "depth": {"layers": "2x"}, "both": {"hidden": "2x", "layers": "2x"}}  # fmt: skip


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
        tokens_per_step, spec: See ``Procedure``.

    Returns:
        The schedule of the run, not attached yet; ``print`` it.

    Raises:
        PlanError: The growth cannot be planned, or ``size`` does not divide the depth.

    Example:
        >>> to = {"hidden": 48, "layers": 6}
        >>> schedule = growkern.procedures.bert2bert(model, to, at=1, stage1_steps=50, total_steps=200, tokens_per_step=32)
        >>> [(event.trigger, event.to, event.trains) for event in schedule.events]
        [('step 1', {'hidden': 48, 'layers': 6}, SubModels(size=3, seed=0)), ('step 51', None, All())]

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
        total_steps, tokens_per_step, spec: See ``Procedure``.

    Returns:
        The schedule of the run, not attached yet; ``print`` it.

    Raises:
        PlanError: The numbers of stages and steps differ, or a growth cannot be planned.

    Example:
        >>> stages = {"ffn": "2x"}, {"layers": "2x"}
        >>> schedule = growkern.procedures.compound_grow(model, stages, steps=(50, 50), total_steps=300, tokens_per_step=32)
        >>> [(event.trigger, event.to) for event in schedule.events]
        [('step 50', {'ffn': '2x'}), ('step 100', {'layers': '2x'})]

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
        total_steps, tokens_per_step, spec: See ``Procedure``.

    Returns:
        The schedule of the run, not attached yet; ``print`` it.

    Raises:
        PlanError: A growth cannot be planned.

    Example:
        >>> schedule = growkern.procedures.staged_training(model, ["depth", "width"], total_steps=20_000, tokens_per_step=32)
        >>> [event.trigger for event in schedule.events]
        ['slope of eval_loss above -0.0575', 'slope of eval_loss above -0.0475', 'slope of eval_loss above -0.052']

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
