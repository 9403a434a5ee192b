"""Run every case of tests/engine/test_ddp.py in one process of a group, and save its weights, logits and errors."""

from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from models import VOCAB, Plain, loss_of
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import growkern
from growkern.commit import commit
from growkern.engine import ddp

CASES = {
    "plain": {},
    "static_graph": dict(static_graph=True),
    "find_unused_parameters": dict(find_unused_parameters=True),
    "gradient_as_bucket_view": dict(gradient_as_bucket_view=True),
    "comm_hook": {},
    "accumulate": {},
    "exact": {},
    "lean": {},
    "without dynamics": {},
    "two optimizers": {},
}
WORLDS = {2: [*CASES], 4: [*CASES][::2]}  # processes -> their cases
DOUBLED = dict(to="2x", width=growkern.width.Lossless(noise=0))
GROWTHS = {
    "exact": DOUBLED | dict(dynamics="exact"),
    "without dynamics": DOUBLED | dict(dynamics=None),
    "lean": dict(memory="lean"),
}
STEPS, AT, PER_RANK = 6, 2, 2


def joined(step: int, world: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCAB, (world * PER_RANK, 16), generator=generator)


def make() -> Plain:
    torch.manual_seed(0)
    return Plain(tied=True).double()


def optimizers_of(model: Plain, case: str) -> list[torch.optim.Optimizer]:
    params = [*model.parameters()]
    if case != "two optimizers":
        return [torch.optim.AdamW(params, lr=1e-3)]
    return [
        torch.optim.SGD(params[::2], lr=1e-2, momentum=0.9),
        torch.optim.AdamW(params[1::2], lr=1e-3),
    ]


def run(case: str, rank: int | None, world: int, *, grows: bool = True) -> dict[str, torch.Tensor]:
    """Train, with a growth where ``grows``; where ``rank`` is None, one process trains on the joined batch."""
    model = make()
    wrapped = model if rank is None else DistributedDataParallel(model, **CASES[case])
    if case == "comm_hook" and rank is not None:
        wrapped.register_comm_hook(None, allreduce_hook)
    optims = optimizers_of(model, case)
    growth = dict(to={"hidden": 48, "layers": 3}, spec=model.spec()) | GROWTHS.get(case, {})
    for step in range(STEPS):
        micros = 2 if case == "accumulate" else 1
        for micro in range(micros):
            ids = joined(10 * step + micro, world)
            ids = ids if rank is None else ids[rank * PER_RANK : (rank + 1) * PER_RANK]
            last = micro == micros - 1
            with nullcontext() if last or rank is None else wrapped.no_sync():
                (loss_of(wrapped, ids) / micros).backward()
            # In the case "accumulate", the growth comes between two micro-batches.
            if grows and step == AT and micro == 0:
                growkern.expand_inplace(wrapped if case == "plain" else model, optims, **growth)
        for optim in optims:
            optim.step()
            optim.zero_grad()
    with torch.no_grad():
        seen = {"logits": model(joined(99, world))}
    return seen | {name: p.detach() for name, p in model.named_parameters()}


def trains(rank: int | None, world: int) -> tuple[list[int], dict[str, torch.Tensor]]:
    """Train the top, then what is new, then all; return the numbers that were reduced in each step, and the weights."""
    model, reduced = make(), list[int]()
    wrapped = model if rank is None else DistributedDataParallel(model)

    def count(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        reduced[-1] += bucket.buffer().numel()
        return allreduce_hook(state, bucket)

    if rank is not None:
        wrapped.register_comm_hook(None, count)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    events = [
        growkern.At(step=2, to={"layers": 3}, trains=growkern.trains.New()),
        growkern.At(step=4, to=None),
    ]
    schedule = growkern.GrowthSchedule(events, trains=growkern.trains.Top(1))
    schedule.attach(wrapped, optim, spec=lambda model: model.spec(), check=False)
    for step in range(STEPS):
        reduced.append(0 if rank is not None else sum(p.numel() for p in model.parameters() if p.requires_grad))  # fmt: skip
        ids = joined(step, world)
        ids = ids if rank is None else ids[rank * PER_RANK : (rank + 1) * PER_RANK]
        loss_of(wrapped, ids).backward()
        optim.step()
        optim.zero_grad()
    return reduced, {name: p.detach() for name, p in model.named_parameters()}


def chosen_apart(rank: int) -> tuple[str, bool]:
    model = make()
    keep = DistributedDataParallel(model)
    try:
        growkern.trains.Top(1 + rank % 2).apply(keep, spec=model.spec())
        error = "nothing"
    except growkern.errors.PlanError as raised:
        error = str(raised)
    return error, all(p.requires_grad for p in model.parameters())


def failed(rank: int, world: int) -> tuple[str, str, bool, float]:
    model = make()
    wrapped = DistributedDataParallel(model)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = {name: p.clone() for name, p in model.named_parameters()}
    attributes = commit._attributes
    if rank == world - 1:
        commit._attributes = lambda *_: (_ for _ in ()).throw(RuntimeError("boom"))
    try:
        growkern.expand_inplace(model, optim, spec=model.spec())
        what, error = "nothing", ""
    except growkern.errors.GrowthError as raised:
        what, error = type(raised).__name__, str(raised)
    commit._attributes = attributes
    same = all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for step in range(2):
        ids = joined(step, world)[rank * PER_RANK : (rank + 1) * PER_RANK]
        loss_of(wrapped, ids).backward()
        optim.step()
        optim.zero_grad()
    return what, error, same, float(sum(p.double().sum() for p in model.parameters()))


def refused(rank: int) -> str:
    """Grow a model of which only rank 0 has an AveragedModel, without ``ema=``; return the error."""
    model = make()
    keep = DistributedDataParallel(model)
    average = torch.optim.swa_utils.AveragedModel(model) if rank == 0 else None
    try:
        growkern.expand_inplace(keep, spec=model.spec())
    except growkern.errors.GrowthError as error:
        assert average is None or rank == 0
        return str(error)
    return "nothing"


def disagree(rank: int) -> str:
    model = make()
    keep = DistributedDataParallel(model)
    try:
        growkern.expand_inplace(keep, spec=model.spec(), seed=rank)
    except growkern.errors.PlanError as error:
        return str(error)
    return "nothing"


def main(folder: Path, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    found: dict[object, object] = {}
    for case in WORLDS[world]:
        found[case] = run(case, rank, world)
        if rank == 0:
            found["alone", case] = run(case, None, world)
    if rank == 0:
        found["source"] = run("exact", None, world, grows=False)
    found["failed"], found["disagree"] = failed(rank, world), disagree(rank)
    found["refused"] = refused(rank)
    found["trains"], found["chosen apart"] = trains(rank, world), chosen_apart(rank)
    if rank == 0:
        found["alone", "trains"] = trains(None, world)
    rebuild, ddp._rebuild = ddp._rebuild, lambda wrapper: None
    check, ddp.Ranks.check = ddp.Ranks.check, lambda self: None
    found["not rebuilt"] = run("find_unused_parameters", rank, world)
    ddp._rebuild, ddp.Ranks.check = rebuild, check
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
