"""Knowledge inheritance in Hugging Face's Trainer."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from growkern.errors import PlanError
from growkern.inherit import KnowledgeInheritance
from growkern.inherit.head import linear_head, shifts_labels
from growkern.inherit.teachers import OWN
from growkern.support.argument_types import typed_arguments
from growkern.support.wrappers import unwrapped


class Trainer(Protocol):
    """Attributes and methods of ``transformers.Trainer`` that this module uses."""

    args: Any
    accelerator: Any
    callback_handler: Any
    compute_loss: Callable[..., Any]
    compute_loss_func: Any
    get_tp_size: Callable[[], int]
    label_smoother: Any
    log: Callable[..., None]
    loss_is_scaled_for_ga: bool | None
    model: Any
    model_accepts_loss_kwargs: bool
    _loss_shifts_labels: bool
    _set_signature_columns_if_needed: Callable[[], None]
    _signature_columns: Any

    def add_callback(self, callback: Any) -> None:
        """Add a callback."""


@typed_arguments(PlanError)
def inherit(trainer: Trainer, loss: KnowledgeInheritance, *, shift: bool | None = None) -> object:
    """Train by a loss with a teacher in ``trainer.train()``. Call ``inherit`` once, before ``train``.

    All micro-batches of a step share one denominator, the number of predicted positions. Evaluation uses the model's own loss. A resumed
    run goes on with ``alpha`` of the checkpoint's step. ``teacher_at`` of the dataset reaches the loss, not the model. The trainer logs
    ``alpha`` with the loss.

    Args:
        trainer: Trainer of ``transformers``.
        loss: The loss, not attached yet.
        shift: See ``KnowledgeInheritance.attach``.

    Returns:
        The callback that attaches the loss when training begins, and removes it when training ends.

    Raises:
        PlanError: The trainer has a loss of its own (``compute_loss``, ``compute_loss_func``, label smoothing), replicates the model on
            several GPUs in one process, or inherits already.
        UnsupportedModelError: The model has no linear output head; see ``KnowledgeInheritance.attach``.

    Example:
        >>> loss = growkern.inherit.KnowledgeInheritance(teacher, sampled=16, until=4)
        >>> callback = growkern.hf.inherit(trainer, loss)
        >>> output = trainer.train()
        >>> loss.n_steps, loss.alpha
        (4, 0.0)

    Reference:
        Qin et al., "Knowledge Inheritance for Pre-trained Language Models", NAACL 2022, arXiv:2105.13880.
    """
    from transformers.trainer import Trainer as StockTrainer
    from transformers.trainer_callback import TrainerCallback

    _refuse(trainer, StockTrainer.compute_loss)
    linear_head(unwrapped(trainer.model))
    shift = shifts_labels(trainer.model) if shift is None else shift
    stock, report, counts = trainer.compute_loss, trainer.log, trainer.model_accepts_loss_kwargs

    class InheritCallback(TrainerCallback):
        alpha = 0.0  # of the last loss

        def on_train_begin(self, args: Any, state: Any, control: Any, **live: Any) -> None:
            loss.remove()  # of a run that raised an error
            loss.attach(trainer.model, live["optimizer"], shift=shift, n_steps=state.global_step)

        def on_train_end(self, args: Any, state: Any, control: Any, **live: Any) -> None:
            loss.remove()

    def compute_loss(
        model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # fmt: skip
        if not model.training or return_outputs:
            inputs = {key: value for key, value in inputs.items() if key != OWN[1]}
            return stock(model, inputs, return_outputs, num_items_in_batch if counts else None)
        callback.alpha = loss.alpha
        value = loss(inputs, n_items=num_items_in_batch, model=model)
        if trainer.args.average_tokens_across_devices and num_items_in_batch is not None:
            value = value * (trainer.accelerator.num_processes // trainer.get_tp_size())
        return value

    def log(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        report({**logs, "alpha": callback.alpha} if "loss" in logs else logs, *args, **kwargs)

    callback = InheritCallback()
    trainer.add_callback(callback)
    trainer.compute_loss, trainer.log = compute_loss, log
    trainer.model_accepts_loss_kwargs = trainer.loss_is_scaled_for_ga = True
    trainer._loss_shifts_labels = shift  # pyright: ignore[reportPrivateUsage]
    trainer._set_signature_columns_if_needed()  # pyright: ignore[reportPrivateUsage]
    trainer._signature_columns = [*trainer._signature_columns, OWN[1]]  # pyright: ignore[reportPrivateUsage]
    return callback


def _refuse(trainer: Trainer, stock: Callable[..., Any]) -> None:
    if not hasattr(trainer, "callback_handler"):
        raise PlanError(f"trainer: expected a transformers.Trainer, got {type(trainer).__name__}.")
    callbacks = trainer.callback_handler.callbacks
    if any(type(callback).__name__ == "InheritCallback" for callback in callbacks):
        raise PlanError(
            "this trainer inherits already; make a new trainer, or pass one loss with a function as teacher for several teachers."
        )
    if trainer.compute_loss_func is not None or trainer.label_smoother is not None:
        raise PlanError(
            "the trainer has a compute_loss_func or label smoothing, which this loss would replace silently; leave compute_loss_func and "
            "label_smoothing_factor out."
        )
    if type(trainer).compute_loss is not stock:
        raise PlanError(
            f"the {type(trainer).__name__} has a compute_loss of its own, which this loss would replace silently; call loss(inputs, "
            "n_items=num_items_in_batch, model=model) there, and attach the loss in on_train_begin of a callback."
        )
    if trainer.args.n_gpu > 1:
        raise PlanError(
            f"the trainer replicates the model on {trainer.args.n_gpu} GPUs in one process; start one process per GPU (torchrun)."
        )
