"""Change who trains in a live model, in all of its processes or in none, and keep it through a growth."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager

from torch import nn

from growkern.commit.frozen import (
    Frozen,
    freeze,
    frozen_of,
    lift,
    refuse_lbfgs,
)
from growkern.commit.optimizer import Masters
from growkern.engine.compile_cache import reset
from growkern.engine.ddp import Ranks
from growkern.planning.growth_plan import GrowthPlan
from growkern.support.live_registry import Live
from growkern.support.names import named_parameters


def choose(model: nn.Module, frozen: Frozen, masters: Masters | None = None) -> None:
    """Freeze parts of a model, in place of what is frozen, and rebuild the reducers of ``DistributedDataParallel``.

    Args:
        model: The model.
        frozen: See ``growkern.commit.frozen.freeze``.
        masters: See ``freeze``.

    Raises:
        PlanError: No parameter would train, or the processes do not choose alike. Nothing has changed.
        UnsupportedModelError: See ``freeze``.
    """
    before = frozen_of(model)
    if before is None and not frozen.names:
        return
    live = Live.now()
    ranks = Ranks(model, live.modules)
    with ranks.together():
        still = {p for n, p in named_parameters(model, remove_duplicate=False) if n in frozen.names}
        held = [(optim, optim.param_groups[0]["params"]) for optim in live.optimizers]
        refuse_lbfgs(optim for optim, params in held if still & {*params})
        text = "\n".join([*sorted(frozen.names), str(frozen.n_blocks)]) if ranks.several else ""
        ranks.agree(text, "who trains")
        freeze(model, frozen, masters)
        try:
            ranks.vote(True)
        except BaseException:
            freeze(model, before.again() if before else Frozen(), masters)
            raise
        ranks.rebuild()
    if frozen.n_blocks is None or before is None or before.n_blocks is None:
        reset()  # else dynamo tells sub-models by who trains in them, and keeps a graph for each


def release(model: nn.Module) -> None:
    """Let everything train again, in this process: the others may be gone."""
    if lift(model) is not None:
        Ranks(model, Live.now().modules).rebuild()
        reset()


@contextmanager
def lifted(models: Iterable[nn.Module]) -> Generator["Lifted", None, None]:
    """Let everything train while the block grows the models, so that new blocks are no copies of frozen ones; then freeze again."""
    kept = Lifted([(model, frozen) for model in models if (frozen := lift(model)) is not None])
    try:
        yield kept
    except BaseException:
        kept.freeze(None)
        raise


class Lifted:
    """Models that were frozen before a growth, each with what was frozen."""

    def __init__(self, models: list[tuple[nn.Module, Frozen]]) -> None:
        self.models = models

    def freeze(self, plan: GrowthPlan | None) -> None:
        """Freeze the models again: as before (None), or in the target of a plan."""
        for model, frozen in self.models:
            lift(model)
            freeze(model, frozen.again() if plan is None else frozen.after(plan))
