"""Grow a sharded model in one process of a group; save its peak of memory and what it received, as promised and as measured."""

import gc
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
import torch.distributed as dist
import transformers
from fsdp_worker import ADAMW, by_column, joins, sharded
from peak_worker import resident
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import growkern
from growkern.distributed.gather import Gather
from growkern.execution.cost import Cost, cost_of
from growkern.support import memory

SIZES = dict(vocab_size=4096, hidden_size=512, num_attention_heads=8, num_key_value_heads=8)
SIZES |= dict(intermediate_size=1536, num_hidden_layers=4)
TO, SMALL_TO = {"hidden": 1024, "layers": 8}, {"hidden": 96, "layers": 5}
SMALL = SIZES | dict(vocab_size=512, hidden_size=64, intermediate_size=96)


class Received(TorchDispatchMode):
    """Counts the bytes that a process receives in collectives that move tensors, and of these the bytes that it gathers whole."""

    n_bytes = n_whole = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if "all_gather_into_tensor" in str(func):
            self.n_bytes += made.nbytes - args[0].nbytes
            self.n_whole += made.nbytes - args[0].nbytes
        if "alltoall_base" in str(func):
            self.n_bytes += args[0].nbytes
        return made


N_TRIES = 2  # gloo's threads let go of their buffers late on a busy machine


def made(world: int, sizes: dict[str, int], **how: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = sharded(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)), world, **how)
    optim = ADAMW(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optim.step()
    optim.zero_grad()
    return model, optim


def predicted(sizes: dict[str, int], to: object, world: int) -> Cost:
    """Predict a growth from the configuration alone."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    return cost_of(growkern.plan(model, to=to), world, bandwidth=1e9, n_buffers=2)


def peak_of(mode: str, world: int) -> tuple[int, int]:
    """Return the peak of a growth beyond what was resident before, and the promised peak."""
    model, optim = made(world, SIZES)
    gc.collect()
    memory.trim()
    start = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    report = growkern.expand_inplace(model, optim, to=TO, memory=mode)
    return resident("VmHWM") - start, report.peak_bytes


@contextmanager
def gathered() -> Generator[list[int]]:
    """Yield a list of how many gathered tensors still live whenever the next is gathered."""
    whole, made, alive = Gather.whole, list[Any](), list[int]()

    def counted(self: Gather, t: torch.Tensor) -> torch.Tensor:
        alive.append(sum(one() is not None for one in made))
        made.append(ref(full := whole(self, t)))
        return full

    rows = Gather.rows

    def counted_rows(self: Gather, *args: Any) -> torch.Tensor:
        alive.append(sum(one() is not None for one in made))
        made.append(ref(full := rows(self, *args)))
        return full

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gather, "whole", counted)
        patch.setattr(Gather, "rows", counted_rows)
        yield alive


def needed_by(plan: growkern.GrowthPlan, rank: int, world: int) -> int:
    """Return the bytes of weights and AdamW's state that a process reads and does not hold, counted row by row."""
    read: dict[tuple[str, bool], set[int]] = {}
    row_bytes: dict[str, int] = {}
    for row in plan.tensors:
        if not plan.changes(row) or row.constant is not None:
            continue
        (n, *rest), (n_target, *_) = plan.shapes(row)
        copied = plan.axis_maps(row)[0].index_map.indices
        parts, targets = (torch.arange(size).chunk(world) for size in (n, n_target))
        held = {*parts[rank].tolist()} if rank < len(parts) else set[int]()
        mine = targets[rank].tolist() if rank < len(targets) else []
        rows = {copied[i] for i in mine} - held - {-1}
        for is_state in (False, True)[: 1 + (not row.new)]:
            read.setdefault((row.source, is_state), set()).update(rows)
        row_bytes[row.source] = 4 * torch.Size(rest).numel()
    return sum(
        len(rows) * row_bytes[name] * (2 if is_state else 1)
        for (name, is_state), rows in read.items()
    )


def received_by(mode: str, world: int, to: dict[str, int]) -> dict[str, int]:
    """Return the bytes of the source, and what a process has received of them, as counted here and as reported."""
    model, optim = made(world, SMALL)
    state = [t for p in model.parameters() for t in optim.state[p].values() if t.dim()]
    n_bytes = sum(t.numel() * t.element_size() for t in (*model.parameters(), *state))
    plan = growkern.plan(model, to=to)
    with Received() as received, gathered() as alive:
        report = growkern.expand_inplace(model, optim, to=to, memory=mode)
    cost = predicted(SMALL, to, world)
    return {
        "source": n_bytes, "received": received.n_bytes, "reported": report.n_bytes_received, "expected": cost.total.n_bytes_received,
        "alive": max(alive), "whole": received.n_whole, "needed": needed_by(plan, dist.get_rank(), world),
    }  # fmt: skip


def columns_received(world: int, to: dict[str, int]) -> dict[str, int]:
    """Return the bytes that a process receives where columns are sharded: of what new blocks copy, all that it does not hold."""
    model, optim = made(world, SMALL, options=dict(shard_placement_fn=by_column))
    plan = growkern.plan(model, to=to)
    copied = [row for row in plan.tensors if row.new and row.constant is None]
    params = dict(model.named_parameters())
    n_bytes = sum(params[row.source].numel() * 4 for row in copied if params[row.source].dim() == 2)
    with Received() as received:
        growkern.expand_inplace(model, optim, plan=plan)
    return {"received": received.n_bytes, "expected": n_bytes * (world - 1) // world}


def main(folder: Path, rank: int, world: int) -> None:
    joins(folder, rank, world)
    found = {mode: received_by(mode, world, SMALL_TO) for mode in ("stage", "lean")}
    found["deeper"] = received_by("stage", world, {"layers": 6})
    found["columns"] = columns_received(world, {"layers": 6})
    for mode, run in [*found.items()][:2]:
        peaks = [peak_of(mode, world) for _ in range(N_TRIES)]
        run["peak"], run["promised"] = min(peaks)
        run["expected peak"] = predicted(SIZES, TO, world).peak_bytes[mode]
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
