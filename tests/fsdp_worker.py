"""Run every case of tests/distributed/test_fsdp.py in one process of a group, and save what each ended with."""

import copy
import os
import signal
from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import VOCAB, exact_norms, loss_of, make
from readme import IN_PROCESSES
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.utils import clip_grad_norm_

import growkern
from growkern.commit import commit
from growkern.distributed import fsdp
from growkern.distributed import shards as shard_storage
from growkern.execution import execute
from growkern.model import describe

STEPS, AT, PER_RANK = 15, 5, 2
WIDER, BOTH = {"hidden": 48, "ffn": 80}, {"hidden": 48, "ffn": 80, "layers": 3}
ADAMW = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h", "gemma2": "model.layers"}


def blocks_alone(model: nn.Module, family: str, **options: object) -> None:
    for block in model.get_submodule(BLOCKS[family]):
        fully_shard(block, **options)
    fully_shard(model, **options)


def nested(model: nn.Module, family: str, **options: object) -> None:
    for block in model.get_submodule(BLOCKS[family]):
        fully_shard(block.self_attn, **options)
    blocks_alone(model, family, **options)


def grouped(model: nn.Module, family: str, **options: object) -> None:
    fully_shard([model.model.norm, model.lm_head], **options)
    blocks_alone(model, family, **options)


def by_column(p: nn.Parameter) -> Shard | None:
    return Shard(1) if p.dim() == 2 and p.shape[1] % 2 == 0 else None


def two_kinds(params: Iterable[nn.Parameter]) -> list[torch.optim.Optimizer]:
    params = list(params)
    gains, matrices = ([p for p in params if p.dim() == n] for n in (1, 2))
    return [torch.optim.SGD(gains, lr=1e-2, momentum=0.9), ADAMW(matrices)]


def sliced(params: Iterable[nn.Parameter]) -> growkern.optim.AdamW:
    params = list(params)
    optim = growkern.optim.AdamW(params, lr=1e-3, weight_decay=0.1)
    optim.set_slices(params[0], lr_rows=torch.linspace(0.5, 1.5, params[0].shape[0]))
    return optim


CASES = {  # growth; then family, optimizer, wrap, mesh, options of fully_shard
    "wider": (dict(to=WIDER), {}),
    "both": (dict(to=BOTH), {}),
    "doubled": (dict(to={"hidden": 48, "layers": 4}), dict(family="gpt2")),
    "uneven": (dict(to={"hidden": 36, "ffn": 41}, dynamics=None), {}),
    "stacked": (dict(to={"layers": 4}, depth=growkern.depth.Stack()), {}),
    "exact": (dict(to={"hidden": 36, "ffn": 60, "layers": 3}, dynamics="exact", width=growkern.width.Lossless(noise=0)), {}),
    "offset gains": (dict(to={"hidden": 36}, dynamics="exact", width=growkern.width.Lossless(noise=0)), dict(family="gemma2")),
    "dropped": (dict(to=WIDER, state="drop"), {}),
    "asymmetric": (dict(to=WIDER, state="asymmetric"), {}),
    "kept gathered": (dict(to=BOTH), dict(options=dict(reshard_after_forward=False))),
    "nested": (dict(to=BOTH), dict(wrap=nested)),
    "grouped": (dict(to=BOTH), dict(wrap=grouped)),
    "columns": (dict(to=BOTH), dict(options=dict(shard_placement_fn=by_column))),
    "momentum": (dict(to=BOTH), dict(optim=partial(torch.optim.SGD, lr=1e-2, momentum=0.9))),
    "fused": (dict(to=BOTH), dict(optim=partial(ADAMW, fused=True))),
    "offloaded": (dict(to=BOTH), dict(options=dict(offload_policy=CPUOffloadPolicy(pin_memory=False)))),
    "lean": (dict(to=BOTH, memory="lean"), {}),
    "checked": (dict(to=BOTH, check=torch.arange(32).view(2, 16)), {}),
    "averaged": (dict(to=BOTH), dict(averaged=True)),
    "fresh": (dict(to=BOTH, depth=growkern.depth.Fresh()), {}),
    "perturbed": (dict(to=BOTH, width=growkern.width.ShrinkPerturb(), state="drop"), {}),
    "masters": (dict(to=BOTH), dict(masters=True)),
    "first": (dict(to=BOTH, depth=growkern.depth.Fresh()), dict(changes=dict(num_hidden_layers=0), masters=True)),
    "two optimizers": (dict(to=BOTH), dict(optim=two_kinds)),
    "own AdamW": (dict(to={"hidden": 36, "ffn": 41, "layers": 3}, state="asymmetric"), dict(optim=sliced)),
    "accumulated": (dict(to=BOTH), dict(accumulates=True)),
    "hybrid": (dict(to=BOTH), dict(mesh=(2, 2))),
}  # fmt: skip
WORLDS = {
    2: [case for case in CASES if case != "hybrid"],
    4: ["both", "uneven", "exact", "lean", "hybrid"],
}


def joined(step: int, world: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCAB, (world * PER_RANK, 16), generator=generator)


def sharded(model: nn.Module, world: int, *, family="llama", wrap=blocks_alone, mesh=(), options=None) -> nn.Module:  # fmt: skip
    names = ("replicate", "shard")[-len(mesh or (world,)) :]
    made = init_device_mesh("cpu", mesh or (world,), mesh_dim_names=names)
    wrap(model, family, mesh=made, **(options or {}))
    return model


def whole(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def held(t: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this process holds."""
    return (t.to_local() if hasattr(t, "to_local") else t).detach()


def backward(model: nn.Module, step: int, rank: int | None, world: int) -> float:
    ids = joined(step, world)
    loss = loss_of(model, ids if rank is None else ids[rank * PER_RANK : (rank + 1) * PER_RANK])
    loss.backward()
    mean = loss.detach().clone()
    if rank is not None:
        dist.all_reduce(mean)
        mean /= world
    return float(mean)


def step_of(model: nn.Module, optim: torch.optim.Optimizer, step: int, rank: int | None, world: int) -> float:  # fmt: skip
    loss = backward(model, step, rank, world)
    optim.step()
    optim.zero_grad()
    return loss


def with_masters(
    model: nn.Module,
) -> tuple[dict[nn.Parameter, nn.Parameter], torch.optim.Optimizer]:
    """Return copies of the parameters, and an optimizer that trains the copies and writes them into the parameters."""
    masters = {p: nn.Parameter(p.detach().clone()) for p in model.parameters()}
    optim = ADAMW(masters.values())

    def take(*_: object) -> None:
        for p, master in masters.items():
            master.grad, p.grad = p.grad, None

    @torch.no_grad()
    def give(*_: object) -> None:
        for p, master in masters.items():
            p.copy_(master)

    optim.register_step_pre_hook(take)
    optim.register_step_post_hook(give)
    return masters, optim


def accumulated(model: nn.Module, step: int, rank: int | None, world: int) -> str:
    """Add the gradients of another batch, not yet reduced, and try to grow then; return the error."""
    if rank is not None:
        model.set_requires_gradient_sync(False)
    backward(model, 100 + step, rank, world)
    try:
        error = growkern.expand_inplace(model, to=BOTH) if rank is not None and step == AT else ""
    except growkern.errors.PlanError as raised:
        error = raised
    if rank is not None:
        model.set_requires_gradient_sync(True)
    return str(error)


def first_fails(
    model: nn.Module, optim: torch.optim.Optimizer, rank: int, growth: dict
) -> list[str]:
    """Plan first blocks, fail in the first process to make them, then to commit them; return the errors.

    The model is evaluated before each call, so that the parameters of the root are gathered.
    """

    def evaluate() -> None:
        with torch.no_grad():
            loss_of(model, joined(0, 1))

    evaluate()
    growkern.plan(model, optim, **growth)
    errors = []
    given = growth | (dict(depth=growkern.depth.Fresh(block=3)) if rank == 0 else {})
    for options, place in ((given, None), (growth, PLACES["commit"])):
        evaluate()
        with broken(*place, raises) if place and rank == 0 else nullcontext():
            try:
                growkern.expand_inplace(model, optim, **options)
            except growkern.errors.GrowthError as error:
                errors.append(str(error))
    return errors


def of_masters(rank: int | None, world: int) -> dict[str, list[torch.Tensor]]:
    """Grow a model in bfloat16 and its float32 master weights; return both."""
    model = make("llama", tied=False).bfloat16()
    if rank is not None:
        sharded(model, world)
    masters = {p: nn.Parameter(p.detach().float() * 1.001) for p in model.parameters()}
    optim = ADAMW(masters.values())
    growkern.expand_inplace(model, optim, to=BOTH, master_weights=masters)
    return {
        name: [whole(t.detach()) for t in (p, masters[p])] for name, p in model.named_parameters()
    }


def run(case: str, rank: int | None, world: int) -> dict[str, object]:
    """Train with a growth; where ``rank`` is None, one process trains on the joined batch."""
    growth, how = CASES[case]
    how = dict(how)
    family, optim_of, changes = (
        how.get("family", "llama"), how.pop("optim", ADAMW), how.pop("changes", {}),
    )  # fmt: skip
    accumulates, masters = how.pop("accumulates", False), {}
    models = [
        make(family, tied=family == "gpt2", **changes).double()
        for _ in range(1 + how.pop("averaged", False))
    ]
    with_copies = how.pop("masters", False)
    for each in models if rank is not None else ():
        sharded(each, world, **how)
    model, *averages = models
    if with_copies:
        masters, optims = with_masters(model)
        growth = growth | dict(master_weights=masters)
    else:
        optims = optim_of(model.parameters())
    several = optims if isinstance(optims, list) else [optims]
    kept, losses, found = {id(p) for p in model.parameters()}, list[float](), dict[str, object]()
    for step in range(STEPS):
        if accumulates:
            found["waiting", step] = accumulated(model, step, rank, world)
        losses.append(backward(model, step, rank, world))
        for optim in several:
            optim.step()
            optim.zero_grad()
        for average in averages:
            torch._foreach_lerp_(
                [held(p) for p in average.parameters()], [held(p) for p in model.parameters()], 0.1
            )
        if step == AT:
            if averages:
                losses += [float(loss_of(m, joined(0, world)).detach()) for m in averages]
                growth = growth | dict(ema=averages)
            if case == "first" and rank is not None:
                found["errors"] = first_fails(model, optims, rank, growth)
            report = growkern.expand_inplace(model, optims, **growth)
            own = {id(p) for p in model.parameters()}
            found |= {"kept": kept <= own, "preserves": report.preserves}
            found["norm"] = report.grad_norm_factor
            found["state"] = {
                (name, key): whole(value).clone()
                for name, p in model.named_parameters()
                for optim in several
                for key, value in optim.state.get(masters.get(p, p), {}).items()
            }
            grown = {name: (p, masters.get(p, p)) for name, p in model.named_parameters()}
            found["grown"] = {
                name: [whole(t.detach()).clone() for t in ts] for name, ts in grown.items()
            }
            found["new"] = report.new_blocks
            managed = [m for m in model.modules() if isinstance(m, FSDPModule)]
            found["managed"] = len(managed)
            if case == "both":
                found["resharded"] = resharded(model, joined(step, world))
    states = [m._get_fsdp_state() for m in model.modules() if isinstance(m, FSDPModule)]
    found["roots"] = sum(bool(state._is_root) for state in states)
    for average in averages:  # its forward gathers the parameters of new blocks too
        losses.append(float(loss_of(average, joined(0, world)).detach()))
    weights = {
        f"{i} {name}": whole(p.detach())
        for i, m in enumerate(models)
        for name, p in m.named_parameters()
    }
    return found | {"losses": losses, "weights": weights}


def resharded(model: nn.Module, ids: torch.Tensor) -> list[bool]:
    """Return, per block, whether its parameters are sharded again after a forward; those of a root of its own would not be."""
    with torch.no_grad():
        model(ids)
    return [all(hasattr(p, "full_tensor") for p in block.parameters()) for block in model.model.layers]  # fmt: skip


SCHEDULES = {
    "twice": [growkern.At(step=2, to=WIDER), growkern.At(step=5, to={"layers": 3})],
    "top": [
        growkern.At(step=2, to={"layers": 4}, depth=growkern.depth.Stack(), trains=growkern.trains.Top(2)),
        growkern.At(step=4, to=WIDER, trains=growkern.trains.Top(1)),
        growkern.At(step=6, to=None),
    ],
}  # fmt: skip


def scheduled(which: str, rank: int | None, world: int) -> dict[str, object]:
    """Grow in hooks of the optimizer, where gradients are in flight, under clipping and a cosine."""
    model = make("llama", tied=False).double()
    if rank is not None:
        sharded(model, world)
    optim = ADAMW(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optim, 20)
    schedule = growkern.GrowthSchedule(SCHEDULES[which])
    schedule.attach(model, optim, scheduler)
    losses = []
    for step in range(STEPS):
        losses.append(backward(model, step, rank, world))
        clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        scheduler.step()
        optim.zero_grad()
    weights = {name: whole(p.detach()) for name, p in model.named_parameters()}
    found = {"kept": True, "preserves": None, "state": {}, "norm": 1.0}
    return found | {"losses": losses, "weights": weights, "fired": schedule.fired}


def refilled(rank: int, world: int, policy: MixedPrecisionPolicy) -> list[tuple[float, float]]:
    """Grow, and build the target anew with the grown shards; return the losses of both from then on."""
    how = dict(options=dict(mp_policy=policy))
    grown = sharded(make("llama", tied=False), world, **how)
    optim = ADAMW(grown.parameters())
    for step in range(3):
        step_of(grown, optim, step, rank, world)
    growkern.expand_inplace(grown, optim, to=BOTH, dynamics=None)

    fresh = sharded(type(grown).__mro__[2](copy.deepcopy(grown.config)), world, **how)
    other = ADAMW(fresh.parameters())
    with torch.no_grad():
        for p, q in zip(fresh.parameters(), grown.parameters(), strict=True):
            p.to_local().copy_(q.to_local())
            other.state[p] = {k: v.clone() for k, v in optim.state[q].items()}
    return [(step_of(grown, optim, i, rank, world), step_of(fresh, other, i, rank, world)) for i in range(10)]  # fmt: skip


def from_readme(world: int) -> tuple[int, int]:
    """Run the loop of README; return the width of the grown model, and the number of its managed modules."""
    model = make("llama", tied=False)
    names = {"model": model, "batches": [joined(i, 1) for i in range(4)], "growkern": growkern}
    mesh = init_device_mesh("cpu", (world,))
    exec(
        IN_PROCESSES["fsdp"].replace("1000", "2"),
        names | {"torch": torch, "fully_shard": partial(fully_shard, mesh=mesh)},
    )
    return model.config.hidden_size, sum(isinstance(m, FSDPModule) for m in model.modules())


def resumed(rank: int, world: int) -> list[tuple[float, float]]:
    """Save a grown run by torch, load it into a model of the starting sizes, and return the losses of both from then on."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    whole = sharded(make("llama", tied=False), world)
    optim = ADAMW(whole.parameters())
    step_of(whole, optim, 0, rank, world)
    growkern.expand_inplace(whole, optim, to=BOTH)
    step_of(whole, optim, 1, rank, world)
    saved = copy.deepcopy(get_state_dict(whole, optim))
    history = whole.config.growkern_history

    model = sharded(make("llama", tied=False, seed=1), world)
    other = ADAMW(model.parameters())
    growkern.resume(model, other, history)
    set_state_dict(model, other, model_state_dict=saved[0], optim_state_dict=saved[1])
    return [(step_of(whole, optim, i, rank, world), step_of(model, other, i, rank, world)) for i in range(2, 6)]  # fmt: skip


def raises(*_: object, **__: object) -> None:
    raise RuntimeError("boom")


def runs_out(*_: object, **__: object) -> None:
    raise MemoryError("boom")


def interrupts(*_: object, **__: object) -> None:
    """Press Ctrl-C; the signal arrives at once, or is held back until all can be taken back."""
    os.kill(os.getpid(), signal.SIGINT)


KINDS = {"error": raises, "no memory": runs_out, "Ctrl-C": interrupts}


@contextmanager
def broken(owner: object, name: str, how: Callable[..., None]):
    sound = getattr(owner, name)

    def wrong(*args: object, **kwargs: object) -> object:
        how()
        return sound(*args, **kwargs)

    setattr(owner, name, wrong)
    try:
        yield
    finally:
        setattr(owner, name, sound)


REFUSED = {  # what, and the error
    "ahead": "hidden=49, heads=7 at step 2: .*the target 7 is smaller than the source 8",
    "a plain parameter": "norm.weight: is not sharded, and other parameters are",
    "an unknown torch": "attribute fsdp_placement is missing",
    "waiting": "gradients wait to be reduced",
    "average": "ema: model.embed_tokens.weight of the average is not sharded as the model's is",
    "masters": "the copy of model.embed_tokens.weight is not sharded as the parameter is",
    "one group": "apply fully_shard to every block before the model",
}
PLACES = {
    "describe": (describe, "_misshapen"), "execute": (execute, "_run"), "commit": (commit, "_attributes"), "copy": (commit, "copied"),
}  # fmt: skip
FAILURES = {  # memory, place, kind, and the process that fails
    2: [*product(("stage", "lean"), PLACES, KINDS, (0, 1))],
    4: [*product(("stage", "lean"), ("execute", "commit"), ["Ctrl-C"], (2,))],
}


def shards(model: nn.Module, optim: torch.optim.Optimizer) -> list[torch.Tensor]:
    state = [v for p in model.parameters() for v in optim.state[p].values()]
    return [held(t).clone() for t in (*model.parameters(), *state)]


def failed(rank: int, world: int) -> dict[object, dict[str, object]]:
    """Fail in one process at one place, in one way, in every combination; after each, take a step as if nothing had been tried."""
    model, found = sharded(make("llama", tied=False).double(), world), {}
    optim = ADAMW(model.parameters())
    twin = sharded(make("llama", tied=False).double(), world)
    other = ADAMW(twin.parameters())
    for step, case in enumerate(FAILURES[world]):
        losses = [step_of(*pair, step, rank, world) for pair in ((model, optim), (twin, other))]
        memory, where, kind, at = case
        before, error = shards(model, optim), "nothing"
        with broken(*PLACES[where], KINDS[kind]) if rank == at else nullcontext():
            try:
                growkern.expand_inplace(model, optim, to=BOTH, memory=memory)
            except (
                growkern.errors.GrowthError,
                RuntimeError,
                MemoryError,
                KeyboardInterrupt,
            ) as raised:
                error = f"{type(raised).__name__}: {raised}"
        same = all(torch.equal(p, q) for p, q in zip(before, shards(model, optim), strict=True))
        found[case] = {"error": error, "same": same, "equal": losses[0] == losses[1]}
    return found


def refused(rank: int, world: int, what: str) -> str:
    model, options = make("llama", tied=False), dict(to=BOTH)
    if what == "a plain parameter":
        gain = model.model.norm.weight
        sharded(model, world, options=dict(ignored_params={gain}))
    else:
        whole_model = lambda m, _, **o: fully_shard(m, **o)  # noqa: E731
        sharded(model, world, wrap=whole_model if what == "one group" else blocks_alone)
    optim = ADAMW(model.parameters())
    if what == "waiting":
        model.set_requires_gradient_sync(False)
        backward(model, 0, rank, world)
    if what == "an unknown torch":
        for state in (m._get_fsdp_state() for m in model.modules() if isinstance(m, FSDPModule)):
            for group in fsdp._groups(state):
                del group.fsdp_params[0].fsdp_placement
    if what == "ahead":
        to = {"hidden": 49, "heads": 7}
        events = [growkern.At(step=1, to=WIDER), growkern.At(step=2, to=to)]
        try:
            growkern.GrowthSchedule(events).attach(model, optim)
        except growkern.errors.PlanError as error:
            return str(error)
    if what == "average":
        average = torch.optim.swa_utils.AveragedModel(make("llama", tied=False))
        options["ema"] = average
    if what == "masters":
        options["master_weights"] = {p: nn.Parameter(held(p).clone()) for p in model.parameters()}
        optim = ADAMW(options["master_weights"].values())
    try:
        growkern.expand_inplace(model, optim, **options)
    except growkern.errors.GrowthError as error:
        return str(error)
    return "nothing"


def pinned(world: int) -> str:
    """Grow shards as if they were pinned; return the error of torch, which has no pinned memory without a GPU."""
    model = sharded(make("llama", tied=False), world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_storage, "is_pinned", lambda t: True)
        with pytest.raises(growkern.errors.CommitError) as raised:
            growkern.expand_inplace(model, to=BOTH)
    return str(raised.value)


SPLIT = {  # of rank and history: a call with other arguments in another process, and the error
    "resume": (lambda model, optim, rank, history: growkern.resume(model, optim, history if rank else []), "agree on the history"),
    "schedule": (
        lambda model, optim, rank, _: growkern.GrowthSchedule([growkern.At(step=1 + rank, to=BOTH)]).attach(model, optim),
        "agree on the schedule"),
    "check": (
        lambda model, optim, rank, _: growkern.expand_inplace(model, optim, to=BOTH, check=[None, joined(0, 1)][min(rank, 1)]),
        "agree on check="),
    "size": (lambda model, optim, rank, _: growkern.expand_inplace(model, optim, to={"ffn": 80 + rank}), "agree on the plan"),
}  # fmt: skip
ALONE = {  # functions that need the whole model
    "verify": lambda model, optim: growkern.verify(model, model, joined(0, 1)),
    "compare": lambda model, optim: growkern.compare(model, optim, methods=[growkern.depth.Stack()], batch=joined(0, 1), to={"layers": 4}),
    "upcycle": lambda model, optim: growkern.upcycle(model, optim, experts=4),
    "dcp.grow": lambda model, optim: growkern.dcp.grow("tests", "nothing", model, optim),
}  # fmt: skip


def apart(rank: int, world: int) -> dict[str, str]:
    """Call with other arguments in another process, and what a sharded model cannot do; return the errors."""
    small = make("llama", tied=False)
    history = growkern.expand_inplace(small, to=BOTH).history
    model = sharded(make("llama", tied=False), world)
    optim = ADAMW(model.parameters())
    before, errors = shards(model, optim), dict[str, str]()
    calls = {name: (call, (rank, history)) for name, (call, _) in SPLIT.items()}
    for name, (call, given) in ({name: (call, ()) for name, call in ALONE.items()} | calls).items():
        try:
            call(model, optim, *given)
        except growkern.errors.GrowthError as error:
            errors[name] = str(error)
    assert all(map(torch.equal, before, shards(model, optim)))
    return errors


def left_alone(folder: Path, rank: int, world: int, where: str) -> None:
    """The last process ends in the middle of a growth; the others save what they have raised, and whether all is as before."""
    model = sharded(make("llama", tied=False).double(), world)
    optim = ADAMW(model.parameters())
    step_of(model, optim, 0, rank, world)
    before, error = shards(model, optim), "nothing"
    owner, name = PLACES[where]
    with broken(owner, name, partial(os._exit, 0)) if rank == world - 1 else nullcontext():
        try:
            growkern.expand_inplace(model, optim, to=BOTH)
        except growkern.errors.CommitError as raised:
            error = str(raised)
    same = all(torch.equal(p, q) for p, q in zip(before, shards(model, optim), strict=True))
    torch.save({"error": error, "same": same}, folder / f"{rank}.pt")
    os._exit(0)  # a process group without one of its processes cannot be destroyed


def joins(folder: Path, rank: int, world: int) -> None:
    """Join the process group; a process that waits for another in vain fails."""
    torch.set_num_threads(1)
    store, patience = f"file://{folder / 'store'}", timedelta(seconds=300)
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world, timeout=patience
    )


def main(folder: Path, rank: int, world: int, dies: str = "") -> None:
    joins(folder, rank, world)
    if dies:
        left_alone(folder, rank, world, dies)
    found: dict[object, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        exact_norms(patch)
        for case in WORLDS[world]:
            found[case] = run(case, rank, world)
            if rank == 0:
                found["alone", case] = run(case, None, world)
        for which in SCHEDULES:
            found[which] = scheduled(which, rank, world)
            if rank == 0:
                found["alone", which] = scheduled(which, None, world)
    found["failed"] = failed(rank, world)
    for name, policy in {"fp32": {}, "bf16": dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}.items():  # fmt: skip
        found["refilled", name] = refilled(rank, world, MixedPrecisionPolicy(**policy))
    for what in REFUSED:
        found["refused", what] = refused(rank, world, what)
    found["pinned"] = "" if torch.cuda.is_available() else pinned(world)
    found["of masters"] = of_masters(rank, world)
    if rank == 0:
        found["of masters", "alone"] = of_masters(None, world)
    found["apart"] = apart(rank, world)
    found["resumed"] = resumed(rank, world)
    found["README"] = from_readme(world)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
