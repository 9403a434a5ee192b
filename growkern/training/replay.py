"""Replay of recorded growths on a model of the starting sizes, so that the model can load a checkpoint of the grown sizes."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from torch import nn

from growkern.commit.checkpoint_guard import growth_history
from growkern.commit.optimizer import Masters
from growkern.engine.history import replanned
from growkern.engine.request import Request
from growkern.engine.run import all_or_nothing, run
from growkern.errors import GrowthError, PlanError
from growkern.execution.execute import NOTHING
from growkern.model.spec import ModelSpec
from growkern.optimizer.describe import Optimizers, optimizers
from growkern.planning.check import check
from growkern.planning.growth_plan import GrowthPlan
from growkern.planning.growth_record import GrowthRecord, digest_of, read
from growkern.support.renamed import renamed_arguments
from growkern.support.text import short
from growkern.support.wrappers import unwrapped

Growth = GrowthPlan | GrowthRecord


@renamed_arguments(masters="master_weights")
def resume(
    model: nn.Module,
    optim: Optimizers = None,
    history: Sequence[str | GrowthPlan] | None = None,
    *,
    scheduler: object | None = None,
    ema: nn.Module | Sequence[nn.Module] | None = None,
    master_weights: Masters | None = None,
    spec: Callable[[nn.Module], ModelSpec] | None = None,
) -> None:
    """Replay growths and shrinkings without moving data: sizes, blocks, attributes, config, param groups and hooks become the target's.

    Replaced weights are NaN until a checkpoint is loaded.

    Args:
        model: Model of the starting sizes; changed in place. If the model's config already records the first growths
            (``from_pretrained``), these growths are skipped, and ``optim`` must be None.
        optim: Optimizer of the model, or a list of optimizers, newly built.
        history: Recorded growths: ``config.growkern_history`` of a checkpoint, ``history`` of a schedule's state dict, or plans. None:
            ``growkern_history`` of the model's own config.
        scheduler: The learning-rate scheduler that drives ``optim``; updated with the param groups.
        ema: Weight averages of the model, replayed by the same plans.
        master_weights: Mapping from parameter to the float32 copy that ``optim`` updates in place of the parameter.
        spec: Function from a custom model to its description.

    Raises:
        PlanError: A growth does not fit the model that the previous growths produce, or its plan differs from the recorded plan. Model
            and optimizer are bitwise unchanged.

    Example:
        >>> growkern.resume(model, optim, torch.load("schedule.pt")["history"])
        >>> model.load_state_dict(torch.load("model.pt")); optim.load_state_dict(torch.load("optim.pt"))
    """
    model, optims = unwrapped(model), optimizers(optim)
    done = growth_history(model)
    given: object = history
    if given is not None and not (
        isinstance(given, list | tuple) and all(isinstance(h, str | GrowthPlan) for h in given)  # pyright: ignore
    ):
        raise PlanError(
            f"history: expected a list of recorded growths, such as schedule.state_dict()['history'], got {short(given)}."
        )
    growths = [
        entry if isinstance(entry, GrowthPlan) else read(entry)
        for entry in (done if history is None else history)
    ]
    if done and [digest_of(growth) for growth in growths[: len(done)]] != [
        *map(digest_of, map(read, done))
    ]:
        raise PlanError(
            f"config.growkern_history records {len(done)} growths of this model, which are not the first of the "
            f"{len(growths)} of the history: build the model from the config of the start."
        )
    if optims and done:
        raise PlanError(
            "this model has grown, and the optimizer has not: build the model from the config of the start, so that its growths "
            "can be replayed on both."
        )
    for number, (before, after) in enumerate(pairwise(growths[len(done) :]), len(done) + 1):
        if dict(before.target_sizes) != dict(after.source_sizes) or not _names_fit(before, after):
            raise PlanError(
                f"growth {number + 1} of {len(growths)} does not fit: growth {number + 1} starts at {dict(after.source_sizes)}, growth "
                f"{number} ends at {dict(before.target_sizes)}. Pass all growths, in their order."
            )
    with all_or_nothing(model) as undo:
        for number, growth in enumerate(growths[len(done) :], len(done) + 1):
            try:
                run(
                    Request(
                        model, optims, partial(_plan, growth), growth.state == "drop", spec=spec(model) if spec else None,
                        backend=NOTHING, scheduler=scheduler, ema=ema, master_weights=master_weights, undo=undo,
                    )
                )  # fmt: skip
            except GrowthError as error:
                raise PlanError(
                    f"growth {number} of {len(growths)} does not fit: {error} Nothing was changed."
                ) from error


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
