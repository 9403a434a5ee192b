"""Run Hugging Face's Trainer in a process that may be killed at any moment and started again: ``main(folder, die, kind)``.

The run follows the schedule ``kind``, and saves a checkpoint after each step. ``die`` says when the process kills itself: N, after the
checkpoint of step N; ``growing-N``, during the growth of step N; ``saving-N``, during the checkpoint of step N.
"""

import json
from pathlib import Path

import torch
import transformers
from models import Words, make
from processes import kill

import growkern
from growkern import procedures
from growkern.commit import commit
from growkern.integrations import hf

STEPS = 8


class Tell(transformers.TrainerCallback):
    """Print the number of every saved step, and kill the process after the checkpoint of step ``die``."""

    def __init__(self, die):
        self.die = die

    def on_save(self, args, state, control, **live):
        print(state.global_step, flush=True)
        if self.die == str(state.global_step):
            kill()


def complete(folder: Path) -> bool:
    """Whether a checkpoint was written to the end: the Trainer writes ``trainer_state.json`` last."""
    try:
        json.loads((folder / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def newest(folder: Path) -> Path | None:
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return next((path for path in reversed(found) if complete(path)), None)


def growths(model: torch.nn.Module) -> growkern.GrowthSchedule:
    return growkern.GrowthSchedule(
        [
            growkern.At(step=3, to={"hidden": 48}, dynamics="mup"),
            growkern.At(step=6, to={"layers": 3}),
        ]
    )


PADS = growkern.width.CopyAndPad(norm="corrected")
RUN = dict(total_steps=STEPS, tokens_per_step=32)
SCHEDULES = {
    "growths": growths,
    "mslt": lambda model: procedures.mslt(
        model, layers=(2, 3, 4), steps=(2, 1, 3), joint=2, tokens_per_step=32
    ),
    "bert2bert": lambda model: procedures.bert2bert(
        model, {"hidden": 48, "layers": 4}, at=3, stage1_steps=3, size=2, **RUN
    ),
    "ramp": lambda model: growkern.GrowthSchedule(
        [growkern.At(step=3, to={"hidden": 48}, width=PADS, ramp=4)]
    ),
    "llama_pro": lambda model: procedures.llama_pro(model, layers=4, at=3, **RUN),
}


def main(folder: Path, die: str = "", kind: str = "growths") -> None:
    model = make("llama", tied=True)
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, save_strategy="steps",
        save_steps=1, lr_scheduler_type="cosine", report_to=[], use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, logging_steps=1,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=args, train_dataset=Words(2 * STEPS))
    schedule = SCHEDULES[kind](model)
    hf.attach(trainer, schedule)
    trainer.add_callback(Tell(die))
    checkpoint = newest(folder)
    if checkpoint is not None:
        hf.resume(trainer, str(checkpoint))
    what, _, step = die.partition("-")
    if what == "growing":
        attributes = commit._attributes
        commit._attributes = lambda *rest: (
            kill() if schedule.counts.n_steps == int(step) else attributes(*rest)
        )
    if what == "saving":
        save = trainer._save_rng_state
        trainer._save_rng_state = lambda to: kill() if to.endswith(die[6:]) else save(to)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    state = {"model": model.state_dict(), "schedule": schedule.state_dict(), "losses": losses}
    torch.save(state | {"resumed": str(checkpoint)}, folder / "end.pt")
