"""Run every case of tests/distributed/test_wrapped.py in one process of a group, and save what each ended with."""

from datetime import timedelta
from pathlib import Path

import pytest
import tensor_parallel_worker
import torch
import torch.distributed as dist
from fsdp_worker import ADAMW, joined, step_of, whole
from models import exact_norms, make
from torch.distributed._composable import checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from wraps import Counted, compiled, keyed

import growkern
from growkern.commit import commit
from growkern.errors import CommitError, PlanError, UnsupportedModelError
from growkern.support.names import canonical

AT, STEPS, TO = 5, 15, {"hidden": 48, "layers": 3}
WRAPS = {  # case -> from a block and a backend of torch.compile to what takes the place of the block
    "compiled": compiled,
    "in a compiled module": lambda block, backend: torch.compile(block, backend=backend),
    "checkpointed": lambda block, backend: checkpoint_wrapper(block),
    "composable": lambda block, backend: checkpoint(block),
    "as torchtitan": lambda block, backend: compiled(checkpoint_wrapper(block), backend),
    "whole": lambda block, backend: block,
    "keyed, as torchtitan": lambda block, backend: compiled(checkpoint_wrapper(block), backend),
    "tensor parallel": lambda block, backend: compiled(checkpoint_wrapper(block), backend),
}


def run(case: str, rank: int | None, world: int) -> dict[str, object]:
    """Train with a growth, after one that fails; where ``rank`` is None, one process trains the bare model on the joined batch."""
    torch.compiler.reset()
    counted, spec = Counted(), None
    if "keyed" in case:
        model, spec = keyed(make("plain", tied=True).double())
        blocks = model.blocks
    else:
        model = make("llama", tied=False, use_cache=False).double()
        blocks = model.model.layers
    inner = type(blocks["0"].attention if spec else blocks[0].mlp)
    mesh = init_device_mesh("cpu", (world,)) if rank is not None else None
    if case == "tensor parallel":
        tensor_parallel_worker.of_blocks(mesh, model)
    if mesh is not None:
        for name, block in blocks.named_children():
            blocks.register_module(name, WRAPS[case](block, counted))
        for module in (*blocks.children(), model) if case != "tensor parallel" else ():
            fully_shard(module, mesh=mesh)
        if case == "whole":
            model.compile(backend=counted)
    optim = ADAMW(model.parameters())
    losses, runs, forwards = list[float](), list[int](), list[int]()
    for step in range(STEPS):
        counted.n = counted.forwards = 0
        with counted.count(inner):
            if case == "tensor parallel":
                losses.append(tensor_parallel_worker.step_of(model, optim, joined(step, world), 1))
            else:
                losses.append(step_of(model, optim, step, rank, world))
        runs.append(counted.n)
        forwards.append(counted.forwards)
        if step == AT - 1:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(CommitError):
                if rank in (None, world - 1):
                    patch.setattr(commit, "_guard", None)
                growkern.expand_inplace(model, optim, to=TO, spec=spec)
            if case == "tensor parallel":
                with pytest.raises(PlanError, match="kv_heads=3 does not divide"):
                    growkern.expand_inplace(
                        model, optim, to={"hidden": 36, "heads": 6, "kv_heads": 3}
                    )
            growkern.expand_inplace(model, optim, to=TO, spec=spec)
    weights = {canonical(name): whole(p.detach()) for name, p in model.named_parameters()}
    kinds = [type(block).__name__ for block in blocks.children()]
    return {"losses": losses, "weights": weights, "runs": runs, "forwards": forwards, "kinds": kinds}  # fmt: skip


def refused(world: int) -> str:
    """Return the error for a model whose wrapper is sharded in the place of the model."""
    model, mesh = make("llama", tied=False), init_device_mesh("cpu", (world,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    around = fully_shard(torch.compile(model, backend="eager"), mesh=mesh)
    with pytest.raises(UnsupportedModelError) as raised:
        growkern.expand_inplace(around, to=TO)
    return str(raised.value)


def main(folder: Path, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    store, patience = f"file://{folder / 'store'}", timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=patience)  # fmt: skip
    found: dict[object, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        exact_norms(patch)
        for case in WRAPS:
            found[case] = run(case, rank, world)
        found["refused"] = refused(world)
        if rank == 0:
            found["alone"], found["alone, keyed"] = (run(w, None, world) for w in ("", "keyed"))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
