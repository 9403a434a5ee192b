"""Train in a process that may be killed at any moment and started again: ``main(folder, die)``.

The run grows twice on a schedule and saves a checkpoint after each step. ``die`` says when the process kills itself: N, after step N;
``growing``, during the next growth.
"""

import os
import signal
from pathlib import Path

import torch
from models import loss_of, make

import growkern
from growkern.commit import commit

STEPS = 12


def data(step: int) -> torch.Tensor:
    return torch.randint(0, 66, (2, 16), generator=torch.Generator().manual_seed(step))


def main(folder: Path, die: str = "") -> None:
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optim, lambda t: 1 / (1 + t))
    schedule = growkern.GrowthSchedule(
        [
            growkern.At(step=4, to={"hidden": 48}),
            growkern.At(step=8, to={"layers": 3, "ffn": 100}),  # uneven copies take hooks
        ]
    )
    first, path = 0, folder / "checkpoint.pt"
    if path.exists():
        saved = torch.load(path, weights_only=False)
        growkern.resume(model, optim, saved["schedule"]["history"], scheduler=scheduler)
        model.load_state_dict(saved["model"])
        optim.load_state_dict(saved["optim"])
        scheduler.load_state_dict(saved["scheduler"])
        schedule.load_state_dict(saved["schedule"])
        first = saved["step"]
    schedule.attach(model, optim, scheduler)
    if die == "growing":
        commit._attributes = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    for step in range(first, STEPS):
        loss = loss_of(model, data(step))
        loss.backward()
        optim.step()
        optim.zero_grad()
        scheduler.step()
        saved = {
            "step": step + 1,
            "model": model.state_dict(),
            "optim": optim.state_dict(),
            "scheduler": scheduler.state_dict(),
            "schedule": schedule.state_dict(),
        }
        torch.save(saved, folder / "next.pt")
        (folder / "next.pt").rename(path)
        print(step + 1, flush=True)
        if die == str(step + 1):
            os.kill(os.getpid(), signal.SIGKILL)
