"""What the docstrings say of Accelerate, Lightning and DDP holds: the weights of a plain loop."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from models import batch, make
from scheduled import same_weights

from growkern.inherit import KnowledgeInheritance

UNTIL, STEPS = 3, 4


def data(seed):
    return {"input_ids": batch(seed), "labels": batch(seed)}


def loss_of(**options):
    return KnowledgeInheritance(make("llama", tied=False, seed=1), until=UNTIL, **options)


def plain_loop(n_accumulated=1):
    """Train by the loss in a plain loop, micro-batches weighted alike."""
    model, loss = make("llama", tied=True), loss_of()
    optim = torch.optim.SGD(model.parameters(), lr=0.1)
    loss.attach(model, optim)
    for step in range(STEPS):
        for i in range(n_accumulated):
            (loss(data(step * n_accumulated + i)) / n_accumulated).backward()
        optim.step()
        optim.zero_grad()
    return model


def test_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, loss = make("llama", tied=True), loss_of()
    model, optim = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    loss.attach(model, optim)
    accelerator.register_for_checkpointing(loss)

    for i in range(2 * STEPS):
        with accelerator.accumulate(model):
            accelerator.backward(loss(data(i)))
            optim.step()
            optim.zero_grad()

    same_weights(accelerator.unwrap_model(model), plain_loop(n_accumulated=2))
    accelerator.save_state(str(tmp_path))
    loss.n_steps = 0
    accelerator.load_state(str(tmp_path))
    assert loss.n_steps == STEPS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*is deprecated:FutureWarning")
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.loss = make("llama", tied=True), loss_of()

        def on_train_start(self):
            self.loss.remove()  # of an earlier fit
            self.loss.attach(self.model, self.optimizers())

        def training_step(self, given):
            return self.loss(given)

        def configure_optimizers(self):
            return torch.optim.SGD(self.model.parameters(), lr=0.1)

    module = Module()
    loader = torch.utils.data.DataLoader([data(i) for i in range(STEPS)], batch_size=None)
    options = dict(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    options |= dict(max_epochs=1, accelerator="cpu", devices=1, default_root_dir=str(tmp_path))
    lightning.Trainer(**options).fit(module, loader)

    same_weights(module.model, plain_loop())
    assert module.loss.n_steps == STEPS and module.loss.alpha == 0
    lightning.Trainer(**options).fit(module, loader)
    assert module.loss.n_steps == 2 * STEPS


def in_a_group(rank: int, folder: str) -> None:
    """Train on one row of every batch; the mean over the processes is that of the batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)  # fmt: skip
    model, loss = make("llama", tied=True), loss_of()
    replica = torch.nn.parallel.DistributedDataParallel(model)
    optim = torch.optim.SGD(model.parameters(), lr=0.1)
    loss.attach(replica, optim)
    for step in range(STEPS):
        loss({k: v[rank : rank + 1] for k, v in data(step).items()}).backward()
        optim.step()
        optim.zero_grad()
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ddp(tmp_path):
    mp.start_processes(in_a_group, (str(tmp_path),), nprocs=2, start_method="spawn")

    states = [torch.load(Path(tmp_path) / f"{rank}.pt") for rank in range(2)]
    for name, expected in plain_loop().state_dict().items():
        assert torch.equal(states[0][name], states[1][name])
        torch.testing.assert_close(states[0][name], expected, rtol=1e-5, atol=1e-6, msg=name)
