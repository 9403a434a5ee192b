"""Growth in Hugging Face's Trainer."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from growkern.errors import PlanError
from growkern.model.spec import ModelSpec
from growkern.training.attachment import Attachment, Options, growth_metrics
from growkern.training.replay import resume as replay
from growkern.training.schedule import GrowthSchedule


class Trainer(Protocol):
    """What is used of ``transformers.Trainer``."""

    args: Any
    callback_handler: Any
    model: Any

    def add_callback(self, callback: Any) -> None:
        """Add a callback."""

    def create_optimizer(self) -> Optimizer:
        """Create the optimizer, unless there is one, and return it."""
        ...

    def log(self, logs: dict[str, float]) -> None:
        """Log to every tracker."""


def attach(trainer: Trainer, schedule: GrowthSchedule, **options: Unpack[Options]) -> object:
    """Grow while ``trainer.train()`` runs: one line before it.

    Growth happens when a step has ended, before that step is logged, evaluated and saved: its checkpoint is the target's. What the
    trainer logs (``loss``, ``eval_loss``, ...) is observed by the schedule, growth is logged by ``trainer.log``, and the schedule is
    saved and restored with the trainer's state. Steps that mixed precision skipped do not count, unlike in ``global_step``.
    Under ``load_best_model_at_end`` the best model is sought anew after each growth: earlier ones no longer fit.

    Args:
        trainer: Of ``transformers``.
        schedule: What grows when.
        options: As in ``GrowthSchedule.attach``.

    Returns:
        The callback; ``trainer.remove_callback`` takes it off.

    Raises:
        PlanError: Another schedule is attached, or an event needs tokens, and the trainer does not count them.
    """
    from transformers.trainer_callback import ExportableState, TrainerCallback

    if any(
        type(callback).__name__ == "GrowthCallback"
        for callback in trainer.callback_handler.callbacks
    ):
        raise PlanError(
            "cannot attach this schedule to the trainer: another one is attached. Put all events into one schedule, or take that "
            "one off by trainer.remove_callback."
        )
    if (
        any(event.counts_tokens for event in schedule.ahead)
        and trainer.args.include_num_input_tokens_seen == "no"
    ):
        raise PlanError(
            "cannot attach this schedule to the trainer: an event needs tokens, and the trainer does not count them. "
            'Pass TrainingArguments(include_num_input_tokens_seen="all").'
        )

    # Of its own class for every trainer, and without arguments: the trainer restores a callback by calling its class.
    class GrowthCallback(TrainerCallback, ExportableState):
        attachment: Attachment | None = None
        n_tokens = 0

        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {"schedule": schedule.state_dict()}}

        def on_train_begin(self, args: Any, state: Any, control: Any, **live: Any) -> None:
            saved = state.stateful_callbacks.get("GrowthCallback")
            if (
                saved is None
            ):  # of a run without a schedule; the trainer's next save expects the entry
                schedule.counts.n_steps = state.global_step
                state.stateful_callbacks["GrowthCallback"] = self.state()
            else:
                schedule.load_state_dict(saved["attributes"]["schedule"])
            self.n_tokens = state.num_input_tokens_seen
            if self.attachment is not None:  # of a run that an error ended
                self.attachment.remove()
            model: nn.Module = trainer.model
            self.attachment = schedule.attach(
                model, live["optimizer"], live["lr_scheduler"], deferred=True, **options
            )

        def on_step_end(self, args: Any, state: Any, control: Any, **live: Any) -> None:
            schedule.observe(tokens=state.num_input_tokens_seen - self.n_tokens)
            self.n_tokens = state.num_input_tokens_seen
            for event, report in self.attachment.grow() if self.attachment else []:
                if args.load_best_model_at_end:
                    state.best_metric = state.best_model_checkpoint = None
                    state.best_global_step = None
                should_log = (
                    control.should_log
                )  # a log resets it, and with it the loss of this step would be lost
                trainer.log(growth_metrics(event, report))
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
    return callback


def resume(
    trainer: Trainer, checkpoint: str, *, spec: Callable[[nn.Module], ModelSpec] | None = None
) -> None:
    """Bring the trainer's model and optimizer to the sizes of a checkpoint: before ``train(resume_from_checkpoint=checkpoint)``.

    Args:
        trainer: On a model of the starting sizes.
        checkpoint: A folder that a trainer with a schedule has written.
        spec: As in ``growkern.resume``.

    Raises:
        PlanError: No trainer with a schedule has written it, or its growths do not fit the model.
    """
    try:
        state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
        saved = state["stateful_callbacks"]["GrowthCallback"]["attributes"]["schedule"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise PlanError(
            f"cannot resume from {checkpoint!r}: its trainer_state.json holds no schedule ({error!r}). It is written by a trainer "
            "that growkern.hf.attach was called on."
        ) from None
    replay(trainer.model, trainer.create_optimizer(), saved["history"], spec=spec)
