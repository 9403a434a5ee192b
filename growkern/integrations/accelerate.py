"""Growth in a training loop of Hugging Face Accelerate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import patch_optimizer_step  # pyright: ignore[reportUnknownVariableType]
from torch import nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from growkern.engine.report import GrowthReport, growth_event, growth_metrics
from growkern.errors import PlanError, UnsupportedModelError
from growkern.integrations.bar import Bar
from growkern.optimizer.describe import optimizers
from growkern.optimizer.schedulers import driven_by
from growkern.support.argument_types import typed_arguments
from growkern.support.wrappers import unwrapped
from growkern.training.attachment import Attachment
from growkern.training.options import Options, spec_function
from growkern.training.replay import catch_up
from growkern.training.schedule import GrowthSchedule
from growkern.training.triggers import Event

__all__ = ["attach"]


def __dir__() -> list[str]:
    return __all__


@typed_arguments(PlanError, "optim", model=UnsupportedModelError)
def attach(
    accelerator: Accelerator, model: nn.Module, optim: Optimizer | Sequence[Optimizer], schedule: GrowthSchedule,
    scheduler: object | None = None,
    **options: Unpack[Options],
) -> Attachment:  # fmt: skip
    """Grow inside ``optim.step()``. Call ``attach`` once, after ``accelerator.prepare``.

    Growth is in place, so Accelerate's references to model, optimizer and schedulers stay valid. Each growth is logged to the
    trackers, and ``save_state`` and ``load_state`` save and load the schedule. ``load_state`` of a checkpoint from after a growth first
    replays the growths on a model of the starting sizes. Under FSDP2 (``fsdp_version=2``) every process grows its shards.

    Args:
        accelerator: The accelerator that prepared the model.
        model: The model, prepared or not.
        optim: The optimizer, or a list of optimizers, prepared or not.
        schedule: The growth schedule; the training loop reports tokens and metrics by ``schedule.observe``.
        scheduler: The learning-rate scheduler, or a list of schedulers; None for the prepared schedulers that drive ``optim``.
        options: See ``GrowthSchedule.attach``.

    Returns:
        The attachment; ``remove()`` detaches the schedule.

    Raises:
        PlanError: The schedule is already attached, or another schedule is attached to the optimizer.
        UnsupportedModelError: The model cannot be grown.

    Example:
        >>> model, optim, loader = accelerator.prepare(model, optim, loader)
        >>> schedule = growkern.GrowthSchedule([growkern.At(step=1, to={"hidden": 48})])
        >>> attachment = growkern.accelerate.attach(accelerator, model, optim, schedule)
        >>> for batch in loader:
        ...     accelerator.backward(model(**batch).loss)
        ...     optim.step()
        ...     optim.zero_grad()
        >>> accelerator.unwrap_model(model).config.hidden_size
        48

    Reference:
        ``accelerate.Accelerator``: https://huggingface.co/docs/accelerate/package_reference/accelerator
    """
    optims = optimizers(optim)
    prepared: list[Any] = accelerator._schedulers  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]
    drivers = [s for s in prepared if driven_by(unwrapped(s)) in optims]
    options.setdefault("on_progress", Bar(accelerator.is_main_process))
    attachment = schedule.attach(
        accelerator.unwrap_model(model),  # pyright: ignore[reportUnknownArgumentType]
        optims,
        drivers if scheduler is None else scheduler,
        **options,
    )

    def logs(event: Event, report: GrowthReport) -> None:
        values = {**growth_metrics(report), "growth/event": growth_event(report)}
        accelerator.log(values, step=schedule.counts.n_steps)

    def watches(event: Event, report: GrowthReport) -> None:
        # with a GradScaler, Accelerate steps by the method that it took from the optimizer; UpdateScale watches the method of today
        wrappers: list[Any] = accelerator._optimizers  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]
        for held in wrappers:
            if held.scaler is not None and held.optimizer in optims:
                held._optimizer_original_step_method = held.optimizer.step
                held._optimizer_patched_step_method = patch_optimizer_step(
                    held, held.optimizer.step
                )

    attachment.on_growth += [logs, watches]
    custom: list[Any] = accelerator._custom_objects  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]
    if not any(registered is schedule for registered in custom):
        accelerator.register_for_checkpointing(schedule)

    load: Any = accelerator.load_state  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]

    # a pre-hook of load_state would be too late: Accelerate calls the hooks after shards of FSDP have been loaded
    def replay_and_load(input_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        at = next((i for i, registered in enumerate(custom) if registered is schedule), None)
        file = _folder(accelerator, input_dir) / f"custom_checkpoint_{at}.pkl"
        if schedule.attachment is attachment and file.exists():
            saved = torch.load(file, map_location="cpu", weights_only=True)
            catch_up(
                attachment.model, optims, saved["history"], scheduler=attachment.schedulers or None, ema=options.get("ema"),
                master_weights=options.get("master_weights"), spec=spec_function(options.get("spec")),
            )  # fmt: skip
        return load(input_dir, *args, **kwargs)

    accelerator.load_state = replay_and_load
    return attachment


def _folder(accelerator: Accelerator, input_dir: str | None) -> Path:
    """Return the folder that ``load_state`` reads: by default the newest checkpoint that Accelerate has numbered."""
    if input_dir is not None:
        return Path(input_dir).expanduser()
    saved = Path(accelerator.project_dir or "") / "checkpoints"
    numbered = {int(path.name.rpartition("_")[2]): path for path in saved.glob("checkpoint_*")}
    return numbered[max(numbered)] if numbered else saved
