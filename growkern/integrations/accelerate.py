"""Growth in a loop of Hugging Face Accelerate."""

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from growkern.engine.report import GrowthReport
from growkern.support.wrappers import unwrapped
from growkern.training.attachment import Attachment, Options, growth_metrics
from growkern.training.schedule import GrowthSchedule
from growkern.training.triggers import Event

if TYPE_CHECKING:
    from accelerate import Accelerator


def attach(
    accelerator: "Accelerator", model: nn.Module, optim: Optimizer, schedule: GrowthSchedule, scheduler: object | None = None,
    **options: Unpack[Options],
) -> Attachment:  # fmt: skip
    """Grow inside ``optim.step()``: one line after ``accelerator.prepare``.

    Growth is in place, so what Accelerate holds of model, optimizer and schedulers stays valid. It is logged to the trackers, and
    the schedule is saved and loaded with ``save_state`` and ``load_state``.

    Args:
        accelerator: That prepared the model.
        model: As ``prepare`` gave it, or bare.
        optim: As ``prepare`` gave it, or bare.
        schedule: What grows when; report tokens and metrics to it in the loop, by ``schedule.observe``.
        scheduler: The learning-rate scheduler, or a list; those that were prepared are found without.
        options: As in ``GrowthSchedule.attach``.

    Returns:
        The attachment; ``remove()`` takes it off.

    Raises:
        PlanError: The schedule is attached already, or another one is attached to the optimizer.
        UnsupportedModelError: The model cannot be grown.

    Example:
        >>> model, optim, data = accelerator.prepare(model, optim, data)
        >>> growkern.accelerate.attach(accelerator, model, optim, GrowthSchedule([At(step=1000)]))
    """
    bare = unwrapped(optim)
    prepared: list[Any] = accelerator._schedulers  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]
    found = [
        one for one in prepared if unwrapped(getattr(unwrapped(one), "optimizer", None)) is bare
    ]
    attachment = schedule.attach(
        accelerator.unwrap_model(model),  # pyright: ignore[reportUnknownArgumentType]
        bare,
        scheduler or found,
        **options,
    )

    def logs(event: Event, report: GrowthReport) -> None:
        accelerator.log(growth_metrics(event, report), step=schedule.counts.n_steps)

    attachment.on_growth.append(logs)
    custom: list[Any] = accelerator._custom_objects  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]
    if not any(one is schedule for one in custom):
        accelerator.register_for_checkpointing(schedule)
    return attachment
