"""Move rows and wholes of sharded tensors in one process of a group; save what each received."""

from pathlib import Path

import torch
import torch.distributed as dist
from models import make
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import growkern
import growkern.errors
from growkern.distributed.gather import Gather
from growkern.distributed.shards import mesh_dim_of_rows
from growkern.execution.rows import rows_read
from growkern.planning.index_map import IndexMap

MAPS = {
    "doubled": IndexMap.cyclic(10, 20),
    "uneven": IndexMap.cyclic(7, 11),
    "few": IndexMap.cyclic(3, 5),  # fewer rows than processes
    "drawn": IndexMap.drawn(10, 17, "seed"),
    "kept": IndexMap.identity(9),
}


def rows_of(case: str, dtype: torch.dtype, mesh: DeviceMesh) -> dict[str, object]:
    """Return the rows that this process reads as they arrived, and as they are in the whole."""
    one = MAPS[case]
    t = torch.randn(one.n_source, 2, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    places = [Replicate(), Shard(0)][-mesh.ndim :]
    sharded, votes = distribute_tensor(t, mesh, places), list[int]()
    dim = mesh_dim_of_rows(sharded)
    assert dim == mesh.ndim - 1
    rows = rows_read([one], mesh.size(dim))
    gather = Gather(lambda: votes.append(1))
    made = gather.rows(sharded, rows.transfer)
    process = mesh.get_local_rank(dim)
    at = [i for first, n in rows.read[process] for i in range(first, first + n)]
    bytes_read = rows.n_received[process] * 6 * t.element_size()
    return {
        "made": made[at], "expected": t[at], "votes": len(votes), "moves": any(rows.n_received), "received": gather.n_received,
        "read": bytes_read,
    }  # fmt: skip


def made(world: int | None, **changes: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model with AdamW's state, sharded unless ``world`` is None."""
    model = make("llama", tied=False, **changes)
    if world is not None:
        mesh = init_device_mesh("cpu", (world,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optim = torch.optim.AdamW(model.parameters())
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, 0.1 + i)
    optim.step()
    return model, optim


def of_few_rows(world: int | None) -> float:
    """Grow with gradients, where some processes hold no row of a tensor; return the factor on the gradient norm."""
    model, optim = made(world, intermediate_size=3)
    report = growkern.expand_inplace(model, optim, to={"ffn": 4}, width=growkern.width.Lossless(noise=1))  # fmt: skip
    return report.grad_norm_factor


def grown(broken: str, world: int | None) -> dict[str, torch.Tensor | str]:
    """Grow a model with an element that is not finite; where ``world`` is None, in one process."""
    model, optim = made(world)
    optim.zero_grad()
    p = model.model.layers[1].mlp.up_proj.weight
    t = optim.state[p]["exp_avg_sq"] if broken == "moment" else p
    local = t.to_local() if world is not None else t
    if broken == "weight that is not loaded":
        local.detach().fill_(float("nan"))
    elif world is None or dist.get_rank() == 0:
        local.detach()[0, 0] = float("nan")  # in one process alone
    try:
        growkern.expand_inplace(model, optim, to={"hidden": 48, "ffn": 56})
    except growkern.errors.GrowthError as error:
        return {"error": str(error)}
    moments = {name: optim.state[p]["exp_avg_sq"] for name, p in model.named_parameters()}
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in moments.items()}


def main(folder: Path, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)  # fmt: skip
    mesh = init_device_mesh("cpu", (world,))
    dtypes = {case: torch.bfloat16 if case == "uneven" else torch.float32 for case in MAPS}
    found = {case: rows_of(case, dtype, mesh) for case, dtype in dtypes.items()}
    found["bools"] = rows_of("doubled", torch.bool, mesh)
    backwards = DeviceMesh("cpu", [*range(world)][::-1])
    placed = {
        "columns": (mesh, Shard(1)), "replicas": (mesh, Replicate()), "processes in another order": (backwards, Shard(0)),
    }  # fmt: skip
    t = torch.zeros(8, 8)
    found["others"] = {
        name: mesh_dim_of_rows(distribute_tensor(t, *where[:1], [where[1]]))
        for name, where in placed.items()
    }
    if world == 4:
        found["hybrid"] = rows_of("doubled", torch.float32, init_device_mesh("cpu", (2, 2)))
    for broken in ("moment", "weight", "weight that is not loaded"):
        found[broken] = grown(broken, world), grown(broken, None) if rank == 0 else None
    found["few rows"] = of_few_rows(world), of_few_rows(None) if rank == 0 else None
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
