"""Run every case of tests/distributed/test_tensor_parallel.py in one process of a group, and save what each ended with."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fsdp_worker import (
    ADAMW,
    AT,
    BOTH,
    STEPS,
    blocks_alone,
    joined,
    joins,
    sliced,
    whole,
    with_masters,
)
from models import exact_norms, make
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

import growkern

COLUMNS = [*(f"self_attn.{k}_proj" for k in "qkv"), "mlp.gate_proj", "mlp.up_proj"]
ROWS = ["self_attn.o_proj", "mlp.down_proj"]
WIDE = dict(hidden_size=48, num_attention_heads=8, num_key_value_heads=4, intermediate_size=80)


REPLICATED = ColwiseParallel(output_layouts=Replicate())
PARALLEL_LOSS = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)


def of_blocks(mesh: DeviceMesh, model: nn.Module, head: ColwiseParallel = REPLICATED) -> None:
    plan = dict.fromkeys(COLUMNS, ColwiseParallel()) | dict.fromkeys(ROWS, RowwiseParallel())
    for block in model.model.layers:
        parallelize_module(block, mesh, plan)
    ends = {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate())}
    parallelize_module(model, mesh, ends | {"lm_head": head})


def sequences(mesh: DeviceMesh, model: nn.Module) -> None:
    """The norms are sequence parallel: their gains are replicated ``DTensor``s."""
    plan = dict.fromkeys(COLUMNS, ColwiseParallel())
    plan |= dict.fromkeys(ROWS, RowwiseParallel(output_layouts=Shard(1)))
    plan |= dict.fromkeys(["input_layernorm", "post_attention_layernorm"], SequenceParallel())
    plan["self_attn"] = PrepareModuleInput(
        input_kwarg_layouts={"hidden_states": Shard(1)}, desired_input_kwarg_layouts={"hidden_states": Replicate()}
    )  # fmt: skip
    plan["mlp"] = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
    for block in model.model.layers:
        parallelize_module(block, mesh, plan)
    ends = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, ends)


def tied_again(mesh: DeviceMesh, model: nn.Module) -> None:
    """``parallelize_module`` makes two parameters of a tied one."""
    of_blocks(mesh, model)
    model.lm_head.weight = model.model.embed_tokens.weight


parallel_loss = partial(of_blocks, head=PARALLEL_LOSS)  # every process has a part of the logits
EXACT = dict(dynamics="exact", width=growkern.width.Lossless(noise=0))


CASES = {  # growth; then the sizes of the mesh (data, tensor), the model, and how it is parallelized
    "both": (dict(to=BOTH), dict(mesh=(1, 2))),
    "by 1.5": (dict(to={"hidden": 72}, **EXACT), dict(mesh=(1, 2), changes=WIDE)),
    "momentum": (dict(to=BOTH), dict(mesh=(1, 2), optim=partial(torch.optim.SGD, lr=1e-2, momentum=0.9))),
    "parallel loss": (dict(to=BOTH, check=torch.arange(32).view(2, 16)), dict(mesh=(1, 2), parallelize=parallel_loss)),
    "sequences": (dict(to=BOTH), dict(mesh=(1, 2), parallelize=sequences)),
    "in flight": (dict(to=BOTH), dict(mesh=(1, 2), in_flight=True, parallelize=sequences)),
    "own AdamW": (dict(to=BOTH, state="asymmetric"), dict(mesh=(1, 2), optim=sliced, parallelize=sequences)),
    "four": (dict(to={"hidden": 96, "ffn": 120, "layers": 3}), dict(mesh=(1, 4), changes=WIDE)),
    "sharded": (dict(to=BOTH), dict(mesh=(2, 2))),
    "sharded by 1.5": (dict(to={"hidden": 72}, **EXACT), dict(mesh=(2, 2), changes=WIDE)),
    "sharded stack": (dict(to={"layers": 4}, depth=growkern.depth.Stack()), dict(mesh=(2, 2))),
    "masters": (dict(to=BOTH), dict(mesh=(1, 2), masters=True)),
    "tied again": (dict(to=BOTH), dict(mesh=(1, 2), tied=True, parallelize=tied_again)),
    "untied": (dict(to=BOTH), dict(mesh=(1, 2), tied=True)),
    "fresh": (dict(to=BOTH, depth=growkern.depth.Fresh()), dict(mesh=(2, 1, 2))),  # and replicated
    "perturbed": (dict(to=BOTH, width=growkern.width.ShrinkPerturb(), state="drop"), dict(mesh=(2, 2))),
    "sharded odd": (dict(to=dict(hidden=25, heads=4, kv_heads=2, ffn=54), dynamics=None), dict(mesh=(2, 2))),
}  # fmt: skip
WORLDS = {n: [case for case, (_, how) in CASES.items() if prod(how["mesh"]) == n] for n in (2, 4)}
REFUSED = {
    "heads": ({"hidden": 36, "heads": 6, "kv_heads": 3}, "kv_heads=3 does not divide over the 2 ranks of mesh dim 'tp'; nearest: 2, 4."),
    "ffn": ({"ffn": 41}, "ffn=41 does not divide over the 2 ranks of mesh dim 'tp'; nearest: 40, 42."),
}  # fmt: skip


def made(rank, mesh, changes=None, parallelize=of_blocks, tied=False) -> tuple[nn.Module, int, int]:
    """Return a model, and which part of how many of the joined batch it trains on."""
    model = make("llama", tied=tied, **(changes or {})).double()
    if rank is None:
        if tied and parallelize is not tied_again:
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        return model, 0, 1
    grid = init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "dp", "tp")[-len(mesh) :])
    parallelize(grid["tp"], model)
    data = grid[("replicate", "dp")] if len(mesh) == 3 else grid["dp"]
    if data.size() > 1:
        blocks_alone(model, "llama", mesh=data)
    return model, rank // mesh[-1], data.size()


def step_of(
    model,
    optim,
    ids: torch.Tensor,
    n_parts: int,
    *,
    parallel: bool = False,
    grow: Callable[[], None] = lambda: None,
) -> float:
    """Take a step on a part of the joined batch, and grow when it has gradients; return the mean loss of all parts."""
    positions = torch.arange(ids.shape[1])[None]  # in sequence parallel, the model sees some
    with loss_parallel() if parallel else nullcontext():
        logits = model(input_ids=ids, position_ids=positions).logits[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        loss.backward()
    loss = whole(loss.detach())
    grow()
    optim.step()
    optim.zero_grad()
    mean = loss.clone()
    if n_parts > 1:
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return float(mean)


def run(case: str, rank: int | None) -> dict[str, object]:
    """Train with a growth; where ``rank`` is None, one process trains on the joined batch."""
    growth, how = CASES[case]
    how = dict(how)
    in_flight = how.pop("in_flight", False)
    optim_of, masters, with_copies = how.pop("optim", ADAMW), {}, how.pop("masters", False)
    model, part, n_parts = made(rank, **how)
    parallel = rank is not None and how.get("parallelize") is parallel_loss
    if with_copies:
        masters, optim = with_masters(model)
        growth = growth | dict(master_weights=masters)
    else:
        optim = optim_of(model.parameters())
    before, losses, found = {id(p) for p in model.parameters()}, list[float](), dict[str, object]()

    def grow() -> None:
        report = growkern.expand_inplace(model, optim, **growth)
        found["kept"] = before <= {id(p) for p in model.parameters()}
        found["preserves"], found["norm"] = report.preserves, report.grad_norm_factor
        state = [
            (name, key, value)
            for name, p in model.named_parameters()
            for key, value in optim.state.get(masters.get(p, p), {}).items()
        ]
        state += [
            (name, "grad", p.grad) for name, p in model.named_parameters() if p.grad is not None
        ]
        found["state"] = {(name, key): whole(value).clone() for name, key, value in state}
        found["grown"] = {name: [whole(p.detach()).clone()] for name, p in model.named_parameters()}
        found["notes"], found["new"] = report.notes, report.new_blocks
        found["managed"] = sum(isinstance(m, FSDPModule) for m in model.modules())

    for step in range(STEPS):
        ids = joined(step, 2).chunk(n_parts)[part]
        options = dict(grow=grow) if step == AT + 1 and in_flight else {}
        losses.append(step_of(model, optim, ids, n_parts, parallel=parallel, **options))
        if step == AT and not in_flight:
            grow()
    weights = {name: whole(p.detach()) for name, p in model.named_parameters()}
    return found | {"losses": losses, "weights": weights}


def refused(what: str, rank: int) -> dict[str, object]:
    """Ask for a growth that does not divide, by hand and in the second event of a schedule."""
    model, _, n_parts = made(rank, (1, 2))
    optim = ADAMW(model.parameters())
    step_of(model, optim, joined(0, 2), n_parts)
    before = [whole(p.detach()).clone() for p in model.parameters()]
    to, errors = REFUSED[what][0], list[str]()
    events = [growkern.At(step=1, to={"layers": 3}), growkern.At(step=2, to=to, dynamics=None)]
    schedule = growkern.GrowthSchedule(events)
    by_hand = partial(growkern.expand_inplace, to=to, dynamics=None)
    for grow in (by_hand, schedule.attach):
        try:
            grow(model, optim)
        except growkern.errors.PlanError as error:
            errors.append(str(error))
    after = [whole(p.detach()) for p in model.parameters()]
    return {"errors": errors, "same": all(map(torch.equal, before, after))}


def refused_first(rank: int) -> str:
    model, *_ = made(rank, (1, 2), changes=dict(num_hidden_layers=0))
    with pytest.raises(growkern.errors.PlanError) as raised:
        growkern.expand_inplace(model, to={"layers": 2}, depth=growkern.depth.Fresh())
    assert len(model.model.layers) == 0
    return str(raised.value)


def main(folder: Path, rank: int, world: int) -> None:
    joins(folder, rank, world)
    found: dict[object, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        exact_norms(patch)
        for case in WORLDS[world]:
            found[case] = run(case, rank)
            if rank == 0:
                found["alone", case] = run(case, None)
    if world == 2:
        found["first"] = refused_first(rank)
    for what in REFUSED if world == 2 else ():
        found["refused", what] = refused(what, rank)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
