"""Growth in Hugging Face's Trainer."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from growkern.commit.optimizer import Masters
from growkern.engine.report import growth_event, growth_metrics
from growkern.errors import PlanError
from growkern.integrations.bar import Bar
from growkern.integrations.hf_inherit import inherit as inherit
from growkern.model.spec import ModelSpec
from growkern.support.argument_types import typed_arguments
from growkern.training.attachment import Attachment
from growkern.training.options import Options, spec_function
from growkern.training.replay import catch_up
from growkern.training.replay import resume as replay
from growkern.training.schedule import GrowthSchedule

__all__ = ["attach", "inherit", "resume"]


def __dir__() -> list[str]:
    return __all__


class Trainer(Protocol):
    """Attributes and methods of ``transformers.Trainer`` that this module uses."""

    args: Any
    callback_handler: Any
    lr_scheduler: Any
    model: Any
    _load_from_checkpoint: Callable[..., None]

    def add_callback(self, callback: Any) -> None:
        """Add a callback."""

    def create_optimizer(self) -> Optimizer:
        """Return the optimizer; create the optimizer if there is none."""
        ...

    def log(self, logs: dict[str, Any]) -> None:
        """Log to every tracker."""


@typed_arguments(PlanError)
def attach(trainer: Trainer, schedule: GrowthSchedule, **options: Unpack[Options]) -> object:
    """Grow during ``trainer.train()``. Call ``attach`` once, before ``train``.

    Growth happens at the end of a step, before the step is logged, evaluated and saved: the checkpoint of the step contains the
    grown model. The schedule observes every metric that the trainer logs (``loss``, ``eval_loss``, ...), ``trainer.log`` logs each
    growth, and the schedule is saved and restored with the trainer's state: ``trainer.train(resume_from_checkpoint=...)`` first replays
    the checkpoint's growths on a model of the starting sizes. Steps that mixed precision skips do not count, unlike in
    ``global_step``. Under ``load_best_model_at_end`` the search for the best model restarts after each growth, because checkpoints
    from before the growth no longer fit the model. Under FSDP2 (``TrainingArguments(fsdp=True)``) every process grows its shards, and
    resuming works alike; a model that ``from_pretrained`` has sharded (``DistributedConfig``) grows, and Trainer saves no optimizer of it.

    Args:
        trainer: Trainer of ``transformers``.
        schedule: The growth schedule.
        options: See ``GrowthSchedule.attach``.

    Returns:
        The callback; ``trainer.remove_callback`` removes it.

    Raises:
        PlanError: Another schedule is attached, or an event needs tokens and the trainer does not count tokens.

    Example:
        >>> schedule = growkern.GrowthSchedule([growkern.At(step=2, to={"hidden": 48})])
        >>> callback = growkern.hf.attach(trainer, schedule)
        >>> output = trainer.train()
        >>> trainer.model.config.hidden_size
        48

    Reference:
        ``transformers.TrainerCallback``: https://huggingface.co/docs/transformers/main_classes/callback
    """
    from transformers.trainer_callback import ExportableState, TrainerCallback

    if not hasattr(trainer, "callback_handler"):
        raise PlanError(f"trainer: expected a transformers.Trainer, got {type(trainer).__name__}.")

    if any(
        type(callback).__name__ == "GrowthCallback"
        for callback in trainer.callback_handler.callbacks
    ):
        raise PlanError(
            "cannot attach this schedule to the trainer: another schedule is attached. Put all events into one schedule, or "
            "remove the other schedule by trainer.remove_callback."
        )
    if (
        any(event.counts_tokens for event in schedule.ahead)
        and trainer.args.include_num_input_tokens_seen == "no"
    ):
        raise PlanError(
            "cannot attach this schedule to the trainer: an event needs tokens, and the trainer does not count them. "
            'Pass TrainingArguments(include_num_input_tokens_seen="all").'
        )

    # Every trainer gets a new class, without constructor arguments: the trainer restores a callback by calling the callback's class.
    class GrowthCallback(TrainerCallback, ExportableState):
        attachment: Attachment | None = None
        n_tokens = 0

        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {"schedule": schedule.state_dict()}}

        def on_train_begin(self, args: Any, state: Any, control: Any, **live: Any) -> None:
            saved = state.stateful_callbacks.get("GrowthCallback")
            if (
                saved is None
            ):  # the run had no schedule before; the trainer's next save expects the entry
                schedule.counts.n_steps = state.global_step
                state.stateful_callbacks["GrowthCallback"] = self.state()
            else:
                schedule.load_state_dict(saved["attributes"]["schedule"])
            self.n_tokens = state.num_input_tokens_seen
            if self.attachment is not None:  # left by a run that raised an error
                self.attachment.remove()
            model: nn.Module = trainer.model
            options.setdefault("on_progress", Bar(state.is_world_process_zero))
            self.attachment = schedule.attach(
                model, live["optimizer"], live["lr_scheduler"], deferred=True, **options
            )

        def on_step_end(self, args: Any, state: Any, control: Any, **live: Any) -> None:
            schedule.observe(tokens=state.num_input_tokens_seen - self.n_tokens)
            self.n_tokens = state.num_input_tokens_seen
            for _, report in self.attachment.grow() if self.attachment else []:
                if args.load_best_model_at_end:
                    state.best_metric = state.best_model_checkpoint = None
                    state.best_global_step = None
                should_log = (
                    control.should_log
                )  # trainer.log clears the flag, which would suppress the loss log of this step
                trainer.log({**growth_metrics(report), "growth/event": growth_event(report)})
                control.should_log = should_log

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **live: Any
        ) -> None:  # fmt: skip
            schedule.observe_metrics(logs or {})

        def on_train_end(self, args: Any, state: Any, control: Any, **live: Any) -> None:
            if self.attachment is not None:
                self.attachment.remove()

    callback = GrowthCallback()
    trainer.add_callback(callback)
    load = trainer._load_from_checkpoint  # pyright: ignore[reportPrivateUsage]

    def replay_and_load(checkpoint: str, model: nn.Module | None = None) -> None:
        if callback in trainer.callback_handler.callbacks and (saved := _saved(checkpoint)):
            catch_up(
                trainer.model, trainer.create_optimizer(), saved["history"], scheduler=trainer.lr_scheduler, ema=options.get("ema"),
                master_weights=options.get("master_weights"), spec=spec_function(options.get("spec")),
            )  # fmt: skip
        load(checkpoint, model)

    trainer._load_from_checkpoint = replay_and_load  # pyright: ignore[reportPrivateUsage]
    return callback


def resume(
    trainer: Trainer,
    checkpoint: str,
    *,
    ema: nn.Module | Sequence[nn.Module] | None = None,
    master_weights: Masters | None = None,
    spec: Callable[[nn.Module], ModelSpec] | None = None,
) -> None:
    """Replay a checkpoint's growths on the trainer's model and optimizer, for a trainer without a schedule.

    Call ``resume`` before ``trainer.train(resume_from_checkpoint=checkpoint)``; a trainer with an attached schedule does so by itself.

    Args:
        trainer: Trainer of a model of the starting sizes.
        checkpoint: Folder of a checkpoint that a trainer with a schedule has written.
        ema, master_weights, spec: See ``growkern.resume``.

    Raises:
        PlanError: The checkpoint contains no schedule, or the recorded growths do not fit the model.

    Example:
        >>> growkern.hf.resume(trainer, "run/checkpoint-3")
        >>> output = trainer.train(resume_from_checkpoint="run/checkpoint-3")
        >>> trainer.model.config.hidden_size, trainer.state.global_step
        (48, 4)

    Reference:
        ``transformers.Trainer.train(resume_from_checkpoint=...)``: https://huggingface.co/docs/transformers/main_classes/trainer
    """
    saved = _saved(checkpoint)
    if saved is None:
        raise PlanError(
            f"cannot resume from {checkpoint!r}: its trainer_state.json has no schedule. Pass a checkpoint of a trainer to which "
            "growkern.hf.attach attached a schedule."
        )
    replay(
        trainer.model, trainer.create_optimizer(), saved["history"], scheduler=trainer.lr_scheduler, ema=ema,
        master_weights=master_weights, spec=spec,
    )  # fmt: skip


def _saved(checkpoint: str) -> Any:
    """Return the state of the schedule in a checkpoint; None if there is none."""
    try:
        state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
        return state["stateful_callbacks"]["GrowthCallback"]["attributes"]["schedule"]
    except (OSError, KeyError, TypeError, ValueError):
        return None
