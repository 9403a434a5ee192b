"""Under exact dynamics, in every loop that a schedule attaches to, the grown run is the run that never grows.

The runs are in float64 and without clipping: a growth changes the gradient norm over all parameters, and so what a threshold clips.
"""

from functools import partial

import pytest
import torch
import torch._dynamo.testing
from models import Words, batch, exact_norms, logits, loss_of, make

from growkern import width
from growkern.training.schedule import GrowthSchedule
from growkern.training.triggers import At

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
lightning = pytest.importorskip("lightning.pytorch")
from growkern.integrations import accelerate as on_accelerate  # noqa: E402
from growkern.integrations import hf  # noqa: E402
from growkern.integrations import lightning as on_lightning  # noqa: E402

pytestmark = [  # warnings that Lightning raises
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*is deprecated:FutureWarning"),
]

STEPS, AT, MICROS, RATE = 8, 3, 2, 1e-2


def llama(**changes) -> torch.nn.Module:
    return make("llama", tied=True, **changes).double()


def adamw(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)


def decaying(optim) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optim, lambda i: 1.0 - i / (2 * STEPS))


def in_the_hf_trainer(schedule, path):
    """Train by the Trainer's own fused AdamW, scheduler and shuffling, with four batches per step."""
    model, losses = llama(), []

    # A model of transformers rounds its own loss to float32.
    def loss_in_float64(outputs, labels, num_items_in_batch):
        scores = outputs.logits[:, :-1].flatten(0, 1)
        total = torch.nn.functional.cross_entropy(scores, labels[:, 1:].flatten(), reduction="sum")
        losses.append(total.item())
        return total / num_items_in_batch

    args = transformers.TrainingArguments(
        output_dir=str(path), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=RATE, weight_decay=0.1,
        gradient_accumulation_steps=MICROS, max_grad_norm=0, save_strategy="no", report_to=[], use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model,
        args=args,
        train_dataset=Words(4 * STEPS * MICROS),
        compute_loss_func=loss_in_float64,
    )
    if schedule:
        hf.attach(trainer, schedule)
    trainer.train()
    assert trainer.optimizer.optimizer.defaults["fused"] and len(losses) == STEPS * MICROS
    return model, losses


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model, self.losses = llama(), []

    def training_step(self, ids, index):
        loss = loss_of(self.model, ids)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optim = adamw(self.model)
        return [optim], [{"scheduler": decaying(optim), "interval": "step"}]


def in_lightning(schedule, path):
    module = Module()
    trainer = lightning.Trainer(
        callbacks=[on_lightning.GrowthCallback(schedule)] if schedule else [], precision="64-true", max_epochs=1,
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=str(path),
    )  # fmt: skip
    batches = [batch(seed=i) for i in range(STEPS)]
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return module.model, module.losses


def in_accelerate(schedule, path):
    accelerate.state.AcceleratorState._reset_state(True)  # the test's other run has one
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=MICROS)
    model, losses = llama(), []
    optim = adamw(model)
    wrapped, optim, scheduler = accelerator.prepare(model, optim, decaying(optim))
    if schedule:
        on_accelerate.attach(accelerator, wrapped, optim, schedule)
    for i in range(STEPS * MICROS):
        with accelerator.accumulate(wrapped):
            loss = loss_of(wrapped, batch(seed=i))
            accelerator.backward(loss)
            optim.step()
            scheduler.step()
            optim.zero_grad()
        losses.append(loss.item())
    return model, losses


def in_a_plain_loop(schedule, path, forward=lambda model: model, micros=MICROS, **changes):
    model, losses = llama(**changes), []
    called, optim = forward(model), adamw(model)
    scheduler = decaying(optim)
    if schedule:
        schedule.attach(called, optim, scheduler)
    for i in range(STEPS * micros):
        loss = loss_of(called, batch(seed=i))
        (loss / micros).backward()
        if (i + 1) % micros == 0:
            optim.step()
            scheduler.step()
            optim.zero_grad()
        losses.append(loss.item())
    return model, losses


def in_a_compiled_model(schedule, path):
    torch.compiler.reset()
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = partial(torch.compile, backend=counted)
    found = in_a_plain_loop(schedule, path, compiled, micros=1, num_hidden_layers=1)
    assert counted.frame_count == (2 if schedule else 1)  # the target is compiled too
    return found


LOOPS = [in_the_hf_trainer, in_lightning, in_accelerate, in_a_compiled_model, in_a_plain_loop]


def gap(dynamics, source, expected, loop, path) -> float:
    """Return the largest difference in losses and in final logits between the run that grows and the run that does not."""
    event = At(step=AT, to="2x", width=width.Lossless(noise=0), dynamics=dynamics)
    schedule = GrowthSchedule([event])
    grown, losses = loop(schedule, path)

    assert schedule.fired == [AT]
    assert (source.config.hidden_size, grown.config.hidden_size) == (24, 48)
    assert next(grown.parameters()).dtype == torch.float64
    assert max(expected) - min(expected) > 0.1, "nothing was learned"
    n_before = len(losses) * AT // STEPS
    assert losses[:n_before] == expected[:n_before]
    with torch.no_grad():
        apart = logits(grown.eval(), batch(seed=99)) - logits(source.eval(), batch(seed=99))
    return max(
        float(apart.abs().max()), *(abs(a - b) for a, b in zip(losses, expected, strict=True))
    )


@pytest.mark.slow
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_the_grown_run_is_the_run_that_never_grows_and_without_dynamics_another(
    loop, tmp_path, monkeypatch
):
    exact_norms(monkeypatch)

    never_grows = loop(None, tmp_path)

    assert gap("exact", *never_grows, loop, tmp_path) < 1e-9
    if (
        loop is not in_a_compiled_model
    ):  # to compile twice more shows no other run than the plain loop
        assert gap(None, *never_grows, loop, tmp_path) > 1e-4
