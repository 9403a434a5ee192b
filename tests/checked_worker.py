"""Check growths of a sharded model by a function that fails in one process alone, before its forward, and save what all have raised."""

import signal
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from models import batch, loss_of, make
from torch import nn
from torch.distributed.fsdp import fully_shard

import growkern

LIMIT = 60
TO = {"hidden": 36, "layers": 3}


def sharded() -> nn.Module:
    model = make("llama", tied=False)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    return model


def checks(rank: int, fails_in: int):
    """Return a function that fails in the last process, in this call of it."""
    calls: list[int] = []

    def check(model: nn.Module) -> object:
        calls.append(1)
        if rank == dist.get_world_size() - 1 and len(calls) == fails_in:
            raise ValueError("only here")
        return model(batch())

    return check


def main(folder: Path, rank: int, world: int) -> None:
    signal.alarm(LIMIT)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store, patience = f"file://{folder / 'store'}", timedelta(seconds=LIMIT // 2)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=patience)  # fmt: skip
    model = sharded()
    optim = torch.optim.AdamW(model.parameters())
    loss_of(model, batch()).backward()
    optim.step()
    schedule = growkern.GrowthSchedule([growkern.At(step=2, to=TO)])
    calls = {
        "before": lambda: growkern.expand_inplace(model, optim, to=TO, check=checks(rank, 1)),
        "after": lambda: growkern.expand_inplace(model, optim, to=TO, check=checks(rank, 2)),
        "attached": lambda: schedule.attach(model, optim, check=checks(rank, 1)),
        "never": lambda: growkern.expand_inplace(model, optim, to=TO, check=checks(rank, 3)),
    }
    found: dict[str, object] = {}
    for name, call in calls.items():
        before = [p.to_local().clone() for p in model.parameters()]
        try:
            call()
            found[name] = "nothing"
        except growkern.errors.GrowthError as error:
            found[name] = str(error)
            assert all(map(torch.equal, before, (p.to_local() for p in model.parameters())))
    found["loss"] = float(loss_of(model, batch()).detach())
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
