"""Run Lightning's Trainer in a process that may be killed: ``main(folder, die)``, with the ``die`` of ``killed_hf.py``."""

from pathlib import Path

import fsspec
import lightning.pytorch as lightning
import torch
from models import batch, loss_of, make
from processes import kill

import growkern
from growkern.commit import commit
from growkern.integrations.lightning import GrowthCallback

STEPS, EPOCH = 8, 5


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = make("llama", tied=True)

    def training_step(self, ids, index):
        return loss_of(self.model, ids)

    def configure_optimizers(self):
        optim = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optim, lambda i: 1.0 - i / 20)
        return [optim], [{"scheduler": scheduler, "interval": "step"}]


class Batches:
    """A loader whose state dict keeps its position, which Lightning needs to resume inside an epoch."""

    done = 0

    def __len__(self):
        return EPOCH

    def __iter__(self):
        for i in range(self.done % EPOCH, EPOCH):
            self.done = i + 1
            yield batch(seed=i)

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.done = state["done"]


class Save(lightning.callbacks.ModelCheckpoint):
    """Print the number of every saved step, and kill the process after the checkpoint of step ``die``."""

    die = ""

    def _save_checkpoint(self, trainer, filepath):
        super()._save_checkpoint(trainer, filepath)
        print(trainer.global_step, flush=True)
        if self.die == str(trainer.global_step):
            kill()


def complete(path: Path) -> bool:
    """Whether ``torch.load`` reads a checkpoint to the end."""
    try:
        torch.load(path, weights_only=False)
    except Exception:
        return False
    return True


def newest(folder: Path) -> Path | None:
    found = sorted(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    return next((path for path in reversed(found) if complete(path)), None)


def main(folder: Path, die: str = "") -> None:
    module = Module()
    schedule = growkern.GrowthSchedule(
        [
            growkern.At(step=3, to={"hidden": 48}, dynamics="mup"),
            growkern.At(step=6, to={"layers": 3}),
        ]
    )
    save = Save(str(folder), filename="{step}", every_n_train_steps=1, save_top_k=-1)
    save.die = die
    trainer = lightning.Trainer(
        callbacks=[GrowthCallback(schedule), save], max_steps=STEPS, accelerator="cpu", devices=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=str(folder),
    )  # fmt: skip
    what, _, step = die.partition("-")
    if what == "growing":
        attributes = commit._attributes
        commit._attributes = lambda *rest: (
            kill()
            if schedule.attachment is not None and schedule.counts.n_steps == int(step)
            else attributes(*rest)
        )
    if what == "saving":  # Lightning writes a file beside the checkpoint, and moves it there
        file = fsspec.implementations.local.LocalFileOpener
        move = file.commit
        file.commit = lambda self: kill() if f"step={step}." in self.path else move(self)
    checkpoint = newest(folder)
    trainer.fit(module, Batches(), ckpt_path=str(checkpoint) if checkpoint else None)
    state = {"model": module.model.state_dict(), "schedule": schedule.state_dict()}
    torch.save(state | {"resumed": str(checkpoint)}, folder / "end.pt")
