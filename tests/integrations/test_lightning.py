"""Lightning's Trainer grows after a batch, before its checkpoint, and ends with the same bits as a plain loop that grows by hand."""

from pathlib import Path

import pytest
import torch
from models import Plain, batch, loss_of, make
from scheduled import DEEPER, WIDER, pair, same_weights

import growkern
from growkern.errors import PlanError
from growkern.training.schedule import GrowthSchedule
from growkern.training.triggers import At, WhenPlateau

lightning = pytest.importorskip("lightning.pytorch")
event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
callbacks = pytest.importorskip("growkern.integrations.lightning")

pytestmark = [  # warnings that Lightning raises
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*is deprecated:FutureWarning"),
]


class Module(lightning.LightningModule):
    def __init__(self, **sizes):
        super().__init__()
        self.model = make("llama", tied=True, **sizes)

    def training_step(self, ids, index):
        loss = loss_of(self.model, ids)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, ids, index):
        self.log("val_loss", torch.tensor(1.0))

    def configure_optimizers(self):
        optim = torch.optim.AdamW(self.model.parameters(), lr=1e-2, fused=True)
        return {
            "optimizer": optim,
            "lr_scheduler": {"scheduler": cosine(optim), "interval": "step"},
        }


def cosine(optim):
    return torch.optim.lr_scheduler.LambdaLR(optim, lambda i: 1.0 - i / 20)


def data(n=6):
    return torch.utils.data.DataLoader([batch(seed=i) for i in range(n)], batch_size=None)


def trainer_of(path, *several, **changes):
    options = dict(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=str(path), log_every_n_steps=1, num_sanity_val_steps=0,
        limit_val_batches=0,
    )  # fmt: skip
    return lightning.Trainer(callbacks=list(several), **(options | changes))


@pytest.mark.parametrize("n_accumulated", [1, 2])
def test_fit_ends_with_the_weights_of_a_loop_that_grows_by_hand(n_accumulated, tmp_path):
    module = Module()
    schedule = GrowthSchedule([At(step=2, to=WIDER), At(step=4, to=DEEPER)])
    callback = callbacks.GrowthCallback(schedule)
    trainer_of(tmp_path, callback, accumulate_grad_batches=n_accumulated).fit(
        module, data(6 * n_accumulated)
    )

    by_hand = make("llama", tied=True)
    optim = torch.optim.AdamW(by_hand.parameters(), lr=1e-2, fused=True)
    scheduler = cosine(optim)
    for i in range(6 * n_accumulated):
        (loss_of(by_hand, batch(seed=i)) / n_accumulated).backward()
        if (i + 1) % n_accumulated == 0:
            optim.step()
            scheduler.step()
            optim.zero_grad()
            if i + 1 == 2 * n_accumulated:
                growkern.expand_inplace(by_hand, optim, to=WIDER, seed=0, scheduler=scheduler)
            if i + 1 == 4 * n_accumulated:
                growkern.expand_inplace(by_hand, optim, to=DEEPER, seed=1, scheduler=scheduler)

    assert schedule.fired == [2, 4] and schedule.attachment is None
    same_weights(module.model, by_hand)


def test_checkpoints_hold_the_target_and_the_schedule_and_resume(tmp_path):
    def parts(**sizes):
        schedule = GrowthSchedule(
            [At(step=2, to=WIDER, dynamics=None), At(step=5, to=DEEPER, dynamics=None)]
        )
        several = [
            lightning.callbacks.ModelCheckpoint(
                str(tmp_path), filename="{step}", every_n_train_steps=1, save_top_k=-1
            ),
            callbacks.GrowthCallback(schedule),
        ]
        return (
            Module(**sizes), schedule, trainer_of(tmp_path, *several, enable_checkpointing=True, max_epochs=2)
        )  # fmt: skip

    module, schedule, trainer = parts()
    trainer.fit(module, data(4))
    path = tmp_path / "step=4.ckpt"  # the end of the first epoch
    saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    assert saved["state_dict"]["model.model.embed_tokens.weight"].shape == (66, 48)
    assert saved["callbacks"]["GrowthCallback"]["fired"] == [2]

    grown = dict(hidden_size=48, num_attention_heads=8, num_key_value_heads=4, intermediate_size=80)
    grown |= dict(rms_norm_eps=5e-7)  # the growth has halved the epsilon
    resumed, again, trainer = parts(**grown)
    trainer.fit(resumed, data(4), ckpt_path=str(path))

    assert again.fired == schedule.fired == [2, 5]
    assert again.state_dict() == schedule.state_dict()
    same_weights(module.model, resumed.model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_module_of_the_starting_sizes_is_resumed_bitwise(tmp_path):
    def parts():
        deeper = At(step=3, to=DEEPER, trains=growkern.trains.New(head=True))
        schedule = GrowthSchedule([At(step=2, to=WIDER), deeper], trains=growkern.trains.Top(1))
        several = [
            lightning.callbacks.ModelCheckpoint(
                str(tmp_path), filename="{step}", every_n_train_steps=1, save_top_k=-1
            ),
            callbacks.GrowthCallback(schedule),
        ]
        return Module(), schedule, trainer_of(tmp_path, *several, enable_checkpointing=True, max_epochs=3)  # fmt: skip

    module, schedule, trainer = parts()
    trainer.fit(module, data(2))

    for step in (2, 4):  # after one growth, and after both
        resumed, again, trainer = parts()
        trainer.fit(resumed, data(2), ckpt_path=str(tmp_path / f"step={step}.ckpt"))

        assert again.state_dict() == schedule.state_dict() and again.fired == [2, 3]
        same_weights(module.model, resumed.model)
        assert "load_model_state_dict" not in vars(trainer.strategy)
    fresh, _, trainer = parts()
    trainer.validate(fresh, data(1), ckpt_path=str(tmp_path / "step=6.ckpt"), verbose=False)
    same_weights(module.model, fresh.model)  # validate() has no optimizer


class Averaged(Module):
    """A model that transformers does not know, with an average of its weights."""

    def __init__(self):
        super().__init__()
        self.model = make("plain", tied=True)
        self.average = torch.optim.swa_utils.AveragedModel(self.model)

    def training_step(self, ids, index):
        self.average.update_parameters(self.model)
        return super().training_step(ids, index)


def test_a_model_of_your_own_is_resumed_bitwise_with_its_average(tmp_path):
    def parts():
        module = Averaged()
        growth = callbacks.GrowthCallback(
            GrowthSchedule([At(step=2, to=WIDER)]), lambda m: m.model,
            spec=Plain.spec, ema=module.average,
        )  # fmt: skip
        saves = lightning.callbacks.ModelCheckpoint(
            str(tmp_path), filename="{step}", every_n_train_steps=3, save_top_k=-1
        )
        return module, trainer_of(tmp_path, saves, growth, enable_checkpointing=True, max_epochs=2)

    module, trainer = parts()
    trainer.fit(module, data(3))
    resumed, trainer = parts()
    trainer.fit(resumed, data(3), ckpt_path=str(tmp_path / "step=3.ckpt"))

    assert resumed.average.module.wte.embedding_dim == 48
    same_weights(module, resumed)


def test_a_fit_that_raises_leaves_no_hook_behind(tmp_path):
    class Fails(Module):
        def training_step(self, ids, index):
            return super().training_step(ids, index) if index else 1 / 0

    schedule = GrowthSchedule([At(step=2, to=WIDER)])
    trainer = trainer_of(tmp_path, callbacks.GrowthCallback(schedule))
    with pytest.raises(ZeroDivisionError):
        trainer.fit(Fails(), data())

    assert schedule.attachment is None and "load_model_state_dict" not in vars(trainer.strategy)


def test_growth_is_in_the_event_files_whatever_the_logging_interval(tmp_path):
    module = Module()
    logger = pytest.importorskip("lightning.pytorch.loggers").TensorBoardLogger(str(tmp_path))
    trainer = trainer_of(
        tmp_path, callbacks.GrowthCallback(GrowthSchedule([At(step=2, to=WIDER)])),
        logger=logger, log_every_n_steps=5,
    )  # fmt: skip

    trainer.fit(module, data())

    (file,) = Path(tmp_path).rglob("events.out.tfevents.*")
    events = event_accumulator.EventAccumulator(str(file))
    events.Reload()
    n = sum(p.numel() for p in module.model.parameters())
    assert [(e.step, e.value) for e in events.Scalars("growth/hidden")] == [(2, 48.0)]
    assert [(e.step, e.value) for e in events.Scalars("growth/parameters")] == [(2, float(n))]
    (said,) = events.Tensors("growth/event/text_summary")
    assert said.step == 2
    assert (
        b"hidden 24 -> 48" in (text := said.tensor_proto.string_val[0])
        and f"{n:,}; ".encode() in text
    )


METRICS = {
    "the-step's-loss": (dict(metric="loss", min_delta=100), 3),
    "logged-in-training": (dict(metric="train_loss", min_delta=100), 3),
    "logged-in-validation": (dict(metric="val_loss"), 7),  # validation follows batches 2, 4 and 6
}


@pytest.mark.slow
@pytest.mark.parametrize(("options", "step"), METRICS.values(), ids=METRICS)
def test_every_value_of_a_metric_is_observed_once(options, step, tmp_path):
    module = Module()
    schedule = GrowthSchedule([WhenPlateau(patience=2, to=WIDER, **options)])
    trainer = trainer_of(
        tmp_path, callbacks.GrowthCallback(schedule),
        limit_val_batches=1, val_check_interval=2, num_sanity_val_steps=1,
    )  # fmt: skip

    trainer.fit(module, data(8), data(1))

    assert schedule.fired == [step]


def test_tokens_of_a_batch_are_counted(tmp_path):
    schedule = GrowthSchedule([At(tokens=70, to=WIDER)])

    trainer_of(tmp_path, callbacks.GrowthCallback(schedule, tokens=torch.numel)).fit(Module(), data())  # fmt: skip

    assert schedule.fired == [3] and schedule.counts.n_tokens == 6 * 32


def test_what_to_grow_is_never_guessed(tmp_path):
    class Two(Module):
        def __init__(self):
            super().__init__()
            self.other = torch.nn.Linear(2, 2)

    class Other(Two):
        def configure_optimizers(self):
            return torch.optim.SGD(self.other.parameters(), lr=0.1)

    with pytest.raises(PlanError, match="Two has parameters in model, other"):
        trainer_of(tmp_path, callbacks.GrowthCallback(GrowthSchedule([At(step=1)]))).fit(Two(), data())  # fmt: skip
    with pytest.raises(PlanError, match="none of the 1 optimizers of this module has a parameter"):
        callback = callbacks.GrowthCallback(GrowthSchedule([At(step=1)]), lambda m: m.model)
        trainer_of(tmp_path, callback).fit(Other(), data())
    schedule = GrowthSchedule([At(step=1, to=WIDER)])
    trainer_of(tmp_path, callbacks.GrowthCallback(schedule, lambda m: m.model)).fit(Two(), data())
    assert schedule.fired == [1]


class Pair(Module):
    """Muon and AdamW train the model, each with its scheduler, and SGD trains another one."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.other = torch.nn.Linear(2, 2)

    def configure_optimizers(self):
        optims = [*pair(self.model), torch.optim.SGD(self.other.parameters(), lr=0.1)]
        return optims, [cosine(optim) for optim in optims]

    def training_step(self, ids, index):
        optims = self.optimizers()[:2]
        loss = loss_of(self.model, ids)
        for optim in optims:
            optim.zero_grad()
        self.manual_backward(loss)
        for optim in optims:
            optim.step()


def test_two_optimizers_grow_and_a_third_trains_another_model(tmp_path):
    events = [At(step=2, to=WIDER), At(step=4, to=DEEPER)]
    module, schedule = Pair(), GrowthSchedule(events)
    growth = callbacks.GrowthCallback(schedule, lambda m: m.model)
    trainer_of(tmp_path, growth).fit(module, data())

    model = make("llama", tied=True)
    optims = pair(model)
    schedulers = [cosine(optim) for optim in optims]
    for i in range(6):
        loss_of(model, batch(seed=i)).backward()
        for optim in optims:
            optim.step()
            optim.zero_grad()
        for event in events:
            if event.step == i + 1:
                growkern.expand_inplace(model, optims, to=event.to, scheduler=schedulers)

    assert schedule.fired == [2, 4] and schedule.counts.n_steps == 6
    same_weights(module.model, model)


def test_a_loop_of_fabric_grows_as_one_by_hand():
    fabric = pytest.importorskip("lightning").Fabric(accelerator="cpu", devices=1)
    models = []
    for wraps in (True, False):
        bare = make("llama", tied=True)
        optim = torch.optim.AdamW(bare.parameters(), lr=1e-2)
        model, optim = fabric.setup(bare, optim) if wraps else (bare, optim)
        for i in range(4):
            loss = loss_of(model, batch(seed=i))
            fabric.backward(loss) if wraps else loss.backward()
            optim.step()
            optim.zero_grad()
            if i == 1:
                report = growkern.expand_inplace(model, optim, to=WIDER | DEEPER)
        models.append(bare)

    assert report.new_blocks == ("model.layers.2",) and "new blocks" in str(report)
    same_weights(*models)


class Mastered(Module):
    """bfloat16 weights, of which the optimizer has float32 copies."""

    def __init__(self):
        super().__init__()
        self.model.bfloat16()
        self.masters = {p: torch.nn.Parameter(p.detach().float()) for p in self.model.parameters()}

    def configure_optimizers(self):
        return torch.optim.AdamW(self.masters.values(), lr=1e-2)

    def on_before_optimizer_step(self, optimizer):
        for p, master in self.masters.items():
            master.grad, p.grad = p.grad.float(), None


def test_master_weights_grow_and_are_replayed(tmp_path):
    def fitted(path, n_steps, **resumed):
        module = Mastered()
        schedule = GrowthSchedule([At(step=1, to=WIDER)])
        callback = growkern.lightning.GrowthCallback(
            schedule, lambda m: m.model, master_weights=module.masters
        )
        trainer = trainer_of(path, callback, max_steps=n_steps)
        trainer.fit(module, data(), **resumed)
        trainer.save_checkpoint(path / "last.ckpt")
        return module

    fitted(tmp_path, 1)
    module = fitted(tmp_path / "resumed", 2, ckpt_path=str(tmp_path / "last.ckpt"))

    assert module.model.config.hidden_size == 48 and {*module.masters} == {
        *module.model.parameters()
    }
    assert all(master.shape == p.shape for p, master in module.masters.items())
