"""Growth in Lightning's Trainer."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from growkern.commit.optimizer import Masters
from growkern.engine.report import growth_event, growth_metrics
from growkern.errors import PlanError, UnsupportedModelError
from growkern.integrations.bar import Bar
from growkern.optimizer.schedulers import driven_by
from growkern.support.argument_types import typed_arguments
from growkern.training.attachment import Attachment
from growkern.training.options import Options, spec_function
from growkern.training.replay import catch_up
from growkern.training.schedule import GrowthSchedule

__all__ = ["GrowthCallback"]


def __dir__() -> list[str]:
    return __all__


REFUSED = {"FSDPStrategy": "FSDP1 keeps flat parameters", "DeepSpeedStrategy": "a DeepSpeedEngine owns the parameters"}  # fmt: skip


class GrowthCallback(Callback):
    """Grow during ``trainer.fit``: ``Trainer(callbacks=[growkern.lightning.GrowthCallback(schedule)])``.

    Growth happens at the end of a batch, after the optimizer step and before checkpoints are written. The schedule observes the loss
    of the training step as ``loss``, and every metric that the module logs, once per value. Each growth is logged to the loggers, and
    checkpoints contain the schedule. A checkpoint of a grown model loads into a module of the starting sizes by ``ckpt_path`` alone:
    the callback replays the growths first. Under ``ModelParallelStrategy`` with ``fully_shard`` every process grows its shards.

    Args:
        schedule: The growth schedule.
        model: Function from the LightningModule to the model that grows; None for the only child module that has parameters.
        tokens: Function from a batch to its number of tokens; needed by events that count tokens, unless ``schedule.observe`` gets tokens.
        options: See ``GrowthSchedule.attach``.

    Raises:
        PlanError: At the start of fitting: no optimizer of the module has a parameter of the model, or the module has no single child
            with parameters.
        UnsupportedModelError: Before the model is set up: the trainer has an FSDPStrategy or a DeepSpeedStrategy.

    Example:
        >>> schedule = growkern.GrowthSchedule([growkern.At(step=2, to={"hidden": 48})])
        >>> trainer = lightning.Trainer(callbacks=[growkern.lightning.GrowthCallback(schedule)], **options)
        >>> trainer.fit(module, loader)
        >>> module.model.config.hidden_size
        48

    Reference:
        ``lightning.pytorch.Callback``: https://lightning.ai/docs/pytorch/stable/extensions/callbacks.html
    """

    @typed_arguments(PlanError)
    def __init__(
        self,
        schedule: GrowthSchedule,
        model: Callable[[LightningModule], nn.Module] | None = None,
        *,
        tokens: Callable[[Any], int] | None = None,
        **options: Unpack[Options],
    ) -> None:
        self.schedule, self.model, self.tokens = schedule, model or _only_child, tokens
        self.options = options
        self.attachment: Attachment | None = None
        self.owners: dict[str, str] = {}
        self.waiting: Callable[[], None] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replay growths before weights load. Lightning may load weights before the optimizer exists: then replay and load wait."""
        kinds = {kind.__name__ for kind in type(trainer.strategy).__mro__}
        for name in kinds & REFUSED.keys():
            raise UnsupportedModelError(
                f"GrowthCallback: under {name}, {REFUSED[name]}, which is not supported yet; use ModelParallelStrategy, and apply "
                "fully_shard in configure_model of the LightningModule."
            )
        self._let_load(trainer)
        load = trainer.strategy.load_model_state_dict
        load_shards = trainer.strategy.load_checkpoint

        def replay_and_load_shards(
            checkpoint_path: Any, weights_only: bool | None = None
        ) -> dict[str, Any]:
            path = Path(trainer.strategy.broadcast(checkpoint_path))
            saved = _callbacks(path, weights_only).get(self.state_key, {})
            if history := saved.get("history"):
                self._replay(trainer, pl_module, history, with_optimizer=stage == "fit")
            return load_shards(checkpoint_path, weights_only=weights_only)

        def load_or_wait(checkpoint: Mapping[str, Any], strict: bool = True) -> None:
            saved = checkpoint.get("callbacks", {}).get(self.state_key, {})
            history: list[str] = saved.get("history", [])

            def replay_and_load() -> None:
                if history:
                    self._replay(trainer, pl_module, history, with_optimizer=stage == "fit")
                load(checkpoint, strict=strict)

            if history and stage == "fit":
                self.waiting = replay_and_load
            else:
                replay_and_load()

        if trainer.strategy.restore_checkpoint_after_setup:
            trainer.strategy.load_checkpoint = replay_and_load_shards
        else:
            trainer.strategy.load_model_state_dict = load_or_wait

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replay growths on model and optimizer, and load the delayed weights. Lightning loads the optimizer state next."""
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            waiting()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hook on the trainer's weight loading."""
        self._let_load(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the schedule to the restored optimizer."""
        model = self.model(pl_module)
        optims = _optimizers_of(model, trainer, self.options.get("master_weights"))
        self._detach()
        self.options.setdefault("on_progress", Bar(trainer.is_global_zero))
        self.attachment = self.schedule.attach(
            model, optims, _schedulers_of(optims, trainer), deferred=True, **self.options
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Observe loss and tokens of the batch, and fire due events."""
        loss: Any = outputs.get("loss") if isinstance(outputs, dict) else outputs  # pyright: ignore[reportUnknownVariableType]
        own = {"loss": loss} if isinstance(loss, Tensor) else {}
        self._observe("batch", trainer, own, self.tokens(batch) if self.tokens else 0)
        for _, report in self.attachment.grow() if self.attachment else []:
            for logger in trainer.loggers:
                logger.log_metrics(growth_metrics(report), step=trainer.global_step)
                _log_text(logger, growth_event(report), trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Observe the metrics that validation logged."""
        if not trainer.sanity_checking:
            self._observe("validation", trainer, {})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Observe the metrics that are logged once per epoch."""
        self._observe("epoch", trainer, {})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach the schedule."""
        self._detach()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Detach the schedule, and remove the hook on the trainer's weight loading."""
        self._detach()
        self._let_load(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict of the schedule."""
        return self.schedule.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state dict of the schedule."""
        self.schedule.load_state_dict(state_dict)

    def _observe(
        self, hook: str, trainer: Trainer, own: dict[str, Tensor], tokens: int = 0
    ) -> None:
        # Lightning keeps the last value of every metric. Each metric is read only in the hook where it first appeared, when it is new.
        metrics = own | dict(trainer.callback_metrics)
        fresh = {k: v for k, v in metrics.items() if self.owners.setdefault(k, hook) == hook}
        event = self.schedule.next_event
        kept = {"loss"} if self.tokens else set[str]()  # growkern.advise needs both
        seen = {k: v for k, v in fresh.items() if event and k in kept | {event.observes}}
        n: Any = tokens
        if trainer.world_size > 1:  # all processes have to grow at the same step
            seen = {k: trainer.strategy.reduce(v, reduce_op="mean") for k, v in seen.items()}
            n = trainer.strategy.reduce(
                torch.tensor(tokens, device=trainer.strategy.root_device), reduce_op="sum"
            )
        self.schedule.observe(tokens=n)
        self.schedule.observe_metrics(seen)

    def _detach(self) -> None:
        if self.attachment is not None:
            self.attachment.remove()
        self.attachment = None

    def _let_load(self, trainer: Trainer) -> None:
        self.waiting = None
        for name in ("load_model_state_dict", "load_checkpoint"):
            vars(trainer.strategy).pop(name, None)

    def _replay(
        self, trainer: Trainer, pl_module: LightningModule, history: list[str], *, with_optimizer: bool
    ) -> None:  # fmt: skip
        model, spec = self.model(pl_module), spec_function(self.options.get("spec"))
        optims = (
            _optimizers_of(model, trainer, self.options.get("master_weights"))
            if with_optimizer
            else []
        )
        several = _schedulers_of(optims, trainer) or None
        catch_up(
            model, optims, history, scheduler=several, ema=self.options.get("ema"),
            master_weights=self.options.get("master_weights"), spec=spec,
        )  # fmt: skip


def _log_text(logger: Any, text: str, step: int) -> None:
    """Log the text of a growth to a logger of W&B's kind or of TensorBoard's; other loggers log numbers only."""
    if hasattr(logger, "log_text"):
        logger.log_text("growth/event", columns=["step", "growth"], data=[[str(step), text]], step=step)  # fmt: skip
    elif hasattr(logger.experiment, "add_text"):
        logger.experiment.add_text("growth/event", text, step)


def _callbacks(checkpoint: Path, weights_only: bool | None) -> Mapping[str, Any]:
    """Return the states of the callbacks in a checkpoint: a file, or a folder of shards with a file for everything else."""
    file = checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint
    if not file.exists():
        return {}
    saved = torch.load(file, map_location="cpu", mmap=True, weights_only=weights_only)
    return saved.get("callbacks", {})


def _optimizers_of(
    model: nn.Module, trainer: Trainer, master_weights: Masters | None
) -> list[Optimizer]:
    """Return the module's optimizers that have a parameter of the model, or its copy; a module may train other models too."""
    own = {*model.parameters(), *(master_weights or {}).values()}
    optims = [
        optim
        for optim in trainer.optimizers
        if any(p in own for group in optim.param_groups for p in group["params"])
    ]
    if not optims:
        raise PlanError(
            f"GrowthCallback: none of the {len(trainer.optimizers)} optimizers of this module has a parameter of the "
            f"{type(model).__name__} that grows; return its optimizer from configure_optimizers."
        )
    return optims


def _schedulers_of(optims: list[Optimizer], trainer: Trainer) -> list[object]:
    schedulers: list[object] = [config.scheduler for config in trainer.lr_scheduler_configs]
    return [s for s in schedulers if driven_by(s) in optims]


def _only_child(pl_module: LightningModule) -> nn.Module:
    children = {name: m for name, m in pl_module.named_children() if any(True for _ in m.parameters())}  # fmt: skip
    if len(children) != 1 or any(True for _ in pl_module.parameters(recurse=False)):
        raise PlanError(
            f"GrowthCallback cannot tell which model to grow: {type(pl_module).__name__} has parameters in "
            f"{', '.join(children) or 'no child'}. Pass model=lambda module: module.<name>."
        )
    return next(iter(children.values()))
