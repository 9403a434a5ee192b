"""Replay of recorded growths on a model of the starting sizes, so that the model can load a checkpoint of the grown sizes."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from torch import nn
from torch.optim import Optimizer

from growkern.commit.checkpoint_guard import growth_history
from growkern.commit.optimizer import Masters
from growkern.commit.optimizer_guard import history_in, optim_guard_of
from growkern.engine.ddp import Ranks
from growkern.engine.history import replanned
from growkern.engine.request import Request
from growkern.engine.run import all_or_nothing, run
from growkern.errors import GrowthError, PlanError, UnsupportedModelError
from growkern.execution.execute import NOTHING
from growkern.model.describe import describe
from growkern.model.initial import nothing
from growkern.model.spec import ModelSpec
from growkern.optimizer.describe import Optimizers, optimizers
from growkern.planning.check import check
from growkern.planning.growth_plan import GrowthPlan
from growkern.planning.growth_record import GrowthRecord, digest_of, read
from growkern.support.argument_types import typed_arguments
from growkern.support.live_registry import Live
from growkern.support.renamed import renamed_arguments
from growkern.support.text import short
from growkern.support.wrappers import unwrapped

Growth = GrowthPlan | GrowthRecord


@renamed_arguments(masters="master_weights")
@typed_arguments(PlanError, "optim", "history", model=UnsupportedModelError)
def resume(
    model: nn.Module,
    optim: Optimizers = None,
    history: Sequence[str | GrowthPlan] | Mapping[str, Any] | None = None,
    *,
    scheduler: object | None = None,
    ema: nn.Module | Sequence[nn.Module] | None = None,
    master_weights: Masters | None = None,
    spec: Callable[[nn.Module], ModelSpec] | None = None,
) -> None:
    """Replay growths and shrinkings without moving data: sizes, blocks, attributes, config, param groups and hooks become the target's.

    Replaced weights are NaN until a checkpoint is loaded.

    Args:
        model: Model of the starting sizes; changed in place. Growths that the model's config already records (``from_pretrained``)
            are skipped.
        optim: Optimizer of the model, or a list of optimizers, newly built.
        history: Recorded growths: ``history`` of a report or of a schedule's state dict, the state dict of the optimizer,
            ``config.growkern_history`` of a checkpoint, or plans. None: the growths of the model's own config.
        scheduler: The learning-rate scheduler that drives ``optim``; updated with the param groups.
        ema: Weight averages of the model, replayed by the same plans.
        master_weights: Mapping from parameter to the float32 copy that ``optim`` updates in place of the parameter.
        spec: Function from a custom model to its description.

    Raises:
        PlanError: A growth does not fit the model that the previous growths produce, or its plan differs from the recorded plan. Model
            and optimizer are bitwise unchanged.
        UnsupportedModelError: ``model`` is no module.

    Example:
        >>> import copy
        >>> small = copy.deepcopy(model)
        >>> report = growkern.expand_inplace(model, optim, to={"hidden": 48, "layers": 3})
        >>> weights, saved = model.state_dict(), optim.state_dict()  # the checkpoint
        >>> new_optim = torch.optim.AdamW(small.parameters())
        >>> growkern.resume(small, new_optim, saved)
        >>> small.load_state_dict(weights)
        <All keys matched successfully>
        >>> new_optim.load_state_dict(saved)
    """
    model, optims = unwrapped(model), optimizers(optim)
    ranks = Ranks(model, Live.now().modules)
    with ranks.together():  # a process without a history would keep the others waiting
        growths = _ahead(growth_history(model), history, optims)
        ranks.agree("\n".join(map(digest_of, growths)) if ranks.several else "", "the history")
    for number, (before, after) in enumerate(pairwise(growths), 1):
        if dict(before.target_sizes) != dict(after.source_sizes) or not _names_fit(before, after):
            raise PlanError(
                f"growth {number + 1} of {len(growths)} does not fit: growth {number + 1} starts at {dict(after.source_sizes)}, growth "
                f"{number} ends at {dict(before.target_sizes)}. Pass all growths, in their order."
            )
    with all_or_nothing(model) as undo:
        for number, growth in enumerate(growths, 1):
            try:
                run(
                    Request(
                        model, optims, partial(_plan, growth), growth.state == "drop", spec=spec(model) if spec else None,
                        backend=NOTHING, scheduler=scheduler, ema=ema, master_weights=master_weights, split=_split(growth, optims),
                        init=nothing, undo=undo,
                    )
                )  # fmt: skip
            except GrowthError as error:
                raise PlanError(
                    f"growth {number} of {len(growths)} does not fit: {error} Nothing was changed."
                ) from error


def catch_up(
    model: nn.Module, optim: Optimizers, history: Sequence[str], *, spec: Callable[[nn.Module], ModelSpec] | None, **live: Any
) -> None:  # fmt: skip
    """Replay the growths of a checkpoint that is about to be loaded, unless the model was built at the checkpoint's sizes.

    Args:
        model: See ``resume``.
        optim: See ``resume``.
        history: Recorded growths of the checkpoint.
        spec: See ``resume``.
        live: ``scheduler``, ``ema`` and ``master_weights``: see ``resume``.
    """
    model, growths = unwrapped(model), [*map(read, history)]
    if not growths:
        return
    sizes, start = describe(model, spec(model) if spec else None).sizes, growths[0].source_sizes
    if dict(sizes) == dict(growths[-1].target_sizes) != dict(start):
        return
    resume(model, optim, history, spec=spec, **live)


def _ahead(done: Sequence[str], history: object, optims: Sequence[Optimizer]) -> list[Growth]:
    """Return the growths of a history that are ahead of a model with the growths ``done``.

    A history may begin before the model's last growths, or after them: that of an optimizer begins with the optimizer.
    """
    entries: Any = history_in(history) if isinstance(history, Mapping) else history  # pyright: ignore[reportUnknownArgumentType]
    entries = done if history is None else entries
    if not isinstance(entries, list | tuple) or not all(isinstance(h, str | GrowthPlan) for h in entries):  # pyright: ignore  # fmt: skip
        raise PlanError(
            "history: expected a list of recorded growths (each a str or a GrowthPlan), such as schedule.state_dict()['history'], or the "
            f"state dict of an optimizer, got {short(history)}."  # pyright: ignore[reportUnknownArgumentType]
        )
    growths: list[Growth] = [h if isinstance(h, GrowthPlan) else read(h) for h in entries]  # pyright: ignore
    own, all_of_them = [digest_of(read(text)) for text in done], [*map(digest_of, growths)]
    shared = (n for n in range(min(len(own), len(growths)), 0, -1) if own[-n:] == all_of_them[:n])
    n_shared = next(shared, 0)
    seen = [[*map(digest_of, map(read, _seen(optim)))] for optim in optims]
    for growth in growths[:n_shared]:
        split = growth.split if isinstance(growth, GrowthRecord) else None
        unseen = not all(digest_of(growth) in digests for digests in seen)
        if unseen and (history is None or split is None or any(split)):
            raise PlanError(
                "this model has grown, and the optimizer has not: build the model from the config of the start, so that its growths "
                "can be replayed on both; or, if the optimizer began after them, pass the optimizer's state dict as history."
            )
    return growths[n_shared:]


def _seen(optim: Optimizer) -> Sequence[str]:
    """Return the records of the growths that an optimizer has been through."""
    guard = optim_guard_of(optim)
    return guard.history if guard is not None else ()


def _split(growth: Growth, optims: Sequence[Optimizer]) -> Sequence[bool] | None:
    """Return which optimizers' param groups a growth split; growkern 0.1 split them all where no scheduler was in the way."""
    split = growth.split if isinstance(growth, GrowthRecord) else None
    if split is None:
        return [True] * len(optims)
    if optims and len(split) != len(optims):
        raise PlanError(
            f"{len(split)} optimizers grew with the model, and {len(optims)} were passed: pass as many, in the same order. Replay a "
            "growth without an optimizer by optim=None, and build the optimizer afterwards."
        )
    return split if optims else None


def _plan(growth: Growth, spec: ModelSpec) -> GrowthPlan:
    """Return the plan of a recorded growth for the model that the previous growths produce."""
    plan = growth if isinstance(growth, GrowthPlan) else replanned(growth, spec)
    check(plan, spec)
    return plan


def _names_fit(before: Growth, after: Growth) -> bool:
    """Return False if both growths are plans and the second plan reads other tensors than the first plan produces."""
    if not (isinstance(before, GrowthPlan) and isinstance(after, GrowthPlan)):
        return True
    left, grown = {row.name for row in before.tensors}, {row.source for row in after.tensors}
    return not grown - left and (after.shrinks or not left - grown)
