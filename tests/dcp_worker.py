"""One process of tests/checkpoints/test_dcp.py: save a sharded run, grow its checkpoint, or go on from it."""

import copy
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from fsdp_worker import blocks_alone
from models import VOCAB, exact_norms, loss_of, make
from readme import IN_PROCESSES
from tensor_parallel_worker import of_blocks, step_of
from torch import nn
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import growkern
from growkern.checkpoints import dcp_source, dcp_target, output

AT, STEPS, ROWS = 5, 15, 4
CASES = {  # arguments of a growth
    "width": dict(to={"hidden": 48, "ffn": 80}, dynamics=None),
    "both": dict(to={"hidden": 48, "layers": 3}, dynamics="mup"),
    "uneven": dict(to={"hidden": 36, "ffn": 41, "layers": 3}, dynamics=None),
    "stacked": dict(to={"layers": 4}, depth=growkern.depth.Stack(), dynamics=None),
}
LAYOUTS = {
    "both": "torchtitan",
    "uneven": "nested",
}  # of the checkpoint, where it is not the flattened one
ON_LOAD = {
    "exact": dict(to={"hidden": 36, "layers": 3}, dynamics="exact", width=growkern.width.Lossless(noise=0)),
    "perturbed": dict(to={"hidden": 36}, width=growkern.width.ShrinkPerturb(), state="drop", dynamics=None),
}  # fmt: skip


def adamw(model: nn.Module, lr: float = 1e-2) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)


def sharded(model: nn.Module) -> nn.Module:
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def small(device: str = "cpu", seed: int = 0) -> nn.Module:
    with torch.device(device):
        return make("llama", tied=False, seed=seed).double()


def train(model: nn.Module, optim: torch.optim.Optimizer, steps: range, rank: int, world: int) -> list[float]:  # fmt: skip
    losses = []
    for step in steps:
        ids = torch.randint(0, VOCAB, (ROWS, 16), generator=torch.Generator().manual_seed(step))
        loss = loss_of(model, ids[rank * ROWS // world : (rank + 1) * ROWS // world])
        loss.backward()
        optim.step()
        optim.zero_grad()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(float(mean) / world)
    return losses


def state_dict(model: nn.Module, optim: torch.optim.Optimizer, layout: str = "flat") -> dict:
    options = None if layout == "nested" else StateDictOptions(flatten_optimizer_state_dict=True)
    own, states = get_model_state_dict(model), get_optimizer_state_dict(model, optim, options=options)  # fmt: skip
    if layout == "app":
        return {"app": {"model": own, "optim": states}}
    if layout == "torchtitan":
        others = {"dataloader": {"seen": [3, 1, 4]}, "lr_scheduler": {"base_lrs": [1e-2]}}
        return {**own, "optimizer": states, "train_state": {"step": torch.tensor(AT)}, **others}
    return {"model": own, "optim": states}


def fill(model: nn.Module, optim: torch.optim.Optimizer, path: Path, layout: str = "flat") -> None:
    """Load a checkpoint as a loop of torch does."""
    found = state_dict(model, optim, layout)
    if layout == "torchtitan":
        found["train_state"] = {"step": torch.tensor(0)}
    dcp.load(found, checkpoint_id=path)
    options = None if layout == "nested" else StateDictOptions(flatten_optimizer_state_dict=True)
    if layout == "torchtitan":
        assert int(found["train_state"]["step"]) == AT and found["dataloader"]["seen"] == [3, 1, 4]
    states = found["optimizer" if layout == "torchtitan" else "optim"]
    set_optimizer_state_dict(model, optim, states, options=options)


def whole(t: object) -> object:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def at_growth(model: nn.Module, optim: torch.optim.Optimizer) -> dict[tuple[str, str], torch.Tensor]:  # fmt: skip
    """Return weights and state; state of zeros is what the first step makes of no state."""
    found = {}
    for name, p in model.named_parameters():
        found[name, ""] = whole(p.detach()).clone()
        for key, value in optim.state.get(p, {}).items():
            if (value := whole(value)).any():
                found[name, key] = value.clone()
    return found


def save(folder: Path, rank: int, world: int) -> dict:
    """Train, save the checkpoint in every layout, and go on with every growth in the live run."""
    found = {}
    for case, growth in (CASES | ON_LOAD).items():
        model = sharded(small())
        optim = adamw(model)
        train(model, optim, range(AT), rank, world)
        if case == "width":
            for layout in ("flat", "nested", "torchtitan"):
                dcp.save(state_dict(model, optim, layout), checkpoint_id=folder / layout)
        growkern.expand_inplace(model, optim, **growth)
        begun = at_growth(model, optim)
        found[case] = begun, train(model, optim, range(AT, STEPS), rank, world)
    return found


def grow(folder: Path, rank: int, world: int) -> dict:
    """Grow the checkpoint on disk by every case."""
    for case, growth in CASES.items():
        model = small("meta")
        done = []
        report = growkern.dcp.grow(
            folder / LAYOUTS.get(case, "flat"), folder / f"{case}-{world}", model, adamw(model, lr=1.0),
            on_progress=lambda *n, done=done: done.append(n), **growth,
        )  # fmt: skip
        assert done[-1][0] == done[-1][1] and report.n_bytes[1] > report.n_bytes[0], done[-1]
    return {}


def target(case: str, path: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return an unfilled model of a grown checkpoint, and its optimizer: from the config, or by a replay of the history."""
    config = transformers.AutoConfig.from_pretrained(path)
    if CASES[case]["dynamics"] is None:
        model = sharded(transformers.LlamaForCausalLM(config).double())
        return model, adamw(model)
    model = sharded(small(seed=1))
    optim = adamw(model)
    growkern.resume(model, optim, config.growkern_history)
    return model, optim


def go_on(folder: Path, rank: int, world: int, grown_by: int) -> dict:
    """Go on from the checkpoints that ``grown_by`` processes have grown, and save in the middle."""
    found = {}
    for case in CASES:
        path, layout = folder / f"{case}-{grown_by}", LAYOUTS.get(case, "flat")
        model, optim = target(case, path)
        fill(model, optim, path, layout)
        begun = at_growth(model, optim)
        middle = (AT + STEPS) // 2
        losses = train(model, optim, range(AT, middle), rank, world)
        dcp.save(state_dict(model, optim, layout), checkpoint_id=folder / f"{case}-{grown_by}-{world}")  # fmt: skip
        found[case] = begun, losses + train(model, optim, range(middle, STEPS), rank, world)
    return found


def finish(folder: Path, rank: int, world: int, grown_by: int, was: int) -> dict:
    """Go on from what ``go_on`` has saved on ``was`` processes."""
    found = {}
    for case in CASES:
        model, optim = target(case, folder / f"{case}-{grown_by}")
        fill(model, optim, folder / f"{case}-{grown_by}-{was}", LAYOUTS.get(case, "flat"))
        found[case] = train(model, optim, range((AT + STEPS) // 2, STEPS), rank, world)
    return found


@contextmanager
def counted(found: list[int]):
    """Count the elements that are read from checkpoints."""
    fill = dcp_source.Source._fill

    def counting(self, key, items, into, n):
        found.append(n)
        return fill(self, key, items, into, n)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcp_source.Source, "_fill", counting)
        yield


def load(folder: Path, rank: int, world: int) -> dict:
    """Grow the checkpoint while it is loaded, and go on."""
    found, read = {}, list[int]()
    for case, growth in (CASES | ON_LOAD).items():
        blank = small("meta")
        plan = growkern.plan(blank, **growth)
        growkern.expand_inplace(blank, adamw(blank), plan=plan, backend="nan")
        model = sharded(transformers.LlamaForCausalLM(blank.config).double())
        optim = adamw(model, lr=1.0)
        read.clear()
        with counted(read):
            growkern.dcp.load(model, optim, folder / LAYOUTS.get(case, "flat"), plan=plan)
        found["read", case] = sum(read)
        begun = at_growth(model, optim)
        found[case] = begun, train(model, optim, range(AT, STEPS), rank, world)
    return found


def load_parallel(folder: Path, rank: int, world: int) -> dict:
    """Grow the checkpoint while it is loaded into a model that tensor parallelism and ``fully_shard`` split."""
    found = {}
    grid = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    for case in ("width", "both"):
        blank = small("meta")
        plan = growkern.plan(blank, **CASES[case])
        growkern.expand_inplace(blank, adamw(blank), plan=plan, backend="nan")
        model = transformers.LlamaForCausalLM(blank.config).double()
        of_blocks(grid["tp"], model)
        blocks_alone(model, "llama", mesh=grid["dp"])
        optim = adamw(model, lr=1.0)
        growkern.dcp.load(model, optim, folder / LAYOUTS.get(case, "flat"), plan=plan)
        begun, losses = at_growth(model, optim), []
        for step in range(AT, STEPS):
            ids = torch.randint(0, VOCAB, (ROWS, 16), generator=torch.Generator().manual_seed(step))
            parts = ids.chunk(world // 2)
            loss = step_of(model, optim, parts[grid["dp"].get_local_rank()], world // 2)
            losses.append(loss)
        found[case] = begun, losses
    return found


MOMENTS = {  # of a growth: function whose call of this number is the moment
    "first tensor": (dcp_target.GrowthPlanner, "resolve_data", 1),
    "a tensor": (dcp_target.GrowthPlanner, "resolve_data", 20),
    "metadata": (filesystem.FileSystemWriter, "finish", 1),
    "config": (growkern.dcp, "restrict", 1),
    "rename": (output, "_move", 1),
}


def readme(folder: Path, rank: int, world: int) -> dict:
    """Run README's examples on a checkpoint of this run: grown on disk and loaded, and grown at load."""
    run = sharded(make("llama", tied=False))
    adam = torch.optim.AdamW(run.parameters(), lr=1e-3)
    train(run, adam, range(2), rank, world)
    dcp.save(state_dict(run, adam), checkpoint_id=folder / "run" / "step-1000")
    config, kind = copy.deepcopy(run.config), type(make("llama", tied=False))
    mesh = init_device_mesh("cpu", (world,))
    names = {"torch": torch, "growkern": growkern, "LlamaForCausalLM": kind, "config": config}
    names["fully_shard"] = partial(fully_shard, mesh=mesh)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(IN_PROCESSES["dcp.grow"], names)
        exec(IN_PROCESSES["dcp.load"], names)
    model = sharded(kind(type(config).from_pretrained(folder / "run" / "grown")))
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    fill(model, optim, folder / "run" / "grown")
    growkern.expand_inplace(run, adam, to="2x", dynamics=None)
    return {
        "hidden": model.config.hidden_size,
        "losses": [train(*pair, range(2, 6), rank, world) for pair in ((run, adam), (model, optim))],
        "loaded": train(names["model"], names["optim"], range(2, 3), rank, world),
    }  # fmt: skip


def hit(patch: pytest.MonkeyPatch, moment: str, act: Callable[[], object]) -> None:
    """Act at a moment, before the function runs."""
    owner, name, number = MOMENTS[moment]
    sound, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            act()
        return sound(*args, **kwargs)

    patch.setattr(owner, name, counted)


def grow_once(folder: Path, out: str) -> None:
    model = small("meta")
    growkern.dcp.grow(folder / "flat", folder / out, model, adamw(model), **CASES["width"])


def killed(folder: Path, rank: int, world: int, moment: str, victim: int) -> None:
    """Grow the checkpoint; one process is killed."""
    with pytest.MonkeyPatch.context() as patch:
        if rank == victim:
            hit(patch, moment, processes.kill)
        grow_once(folder, f"killed-{moment}-{world}-{victim}")


def broken() -> None:
    raise OSError("boom")


def failed(folder: Path, rank: int, world: int, moment: str, victim: int) -> str:
    """Grow the checkpoint; a function of one process fails."""
    with pytest.MonkeyPatch.context() as patch:
        if rank == victim:
            hit(patch, moment, broken)
        try:
            grow_once(folder, f"failed-{moment}-{victim}")
        except growkern.errors.CheckpointError as error:
            return str(error)
    return "nothing"


def apart(folder: Path, rank: int, world: int, what: str) -> str:
    """Grow the checkpoint with another argument in every process."""
    model, options = small("meta"), dict(CASES["width"])
    options |= {"to": dict(to={"hidden": 48 + 24 * rank}), "seed": dict(seed=rank)}.get(what, {})
    target = folder / (f"mixed-{rank}" if what == "target" else "mixed")
    try:
        growkern.dcp.grow(folder / "flat", target, model, adamw(model), **options)
    except growkern.errors.PlanError as error:
        return str(error)
    return "nothing"


def failed_load(folder: Path, rank: int, world: int, place: str, victim: int) -> tuple[str, bool]:
    """Load the checkpoint; one process fails before or while the checkpoint is read. Return the error, and whether all is as before."""
    blank = small("meta")
    plan = growkern.plan(blank, **CASES["width"])
    growkern.expand_inplace(blank, plan=plan, backend="nan")
    model = sharded(transformers.LlamaForCausalLM(blank.config).double())
    optim = adamw(model)
    if rank == victim and place == "plan":
        plan = growkern.plan(small("meta"), to={"ffn": 48}, dynamics=None)
    before = at_growth(model, optim)
    with pytest.MonkeyPatch.context() as patch:
        if rank == victim and place == "read":
            patch.setattr(growkern.dcp.Filling, "read", lambda _: broken())
        try:
            growkern.dcp.load(model, optim, folder / "flat", plan=plan)
            error = "nothing"
        except (growkern.errors.GrowthError, OSError) as raised:
            error = str(raised)
    after = at_growth(model, optim)
    same = before.keys() == after.keys()
    return error, same and (
        place == "read" or all(torch.equal(before[k], after[k]) for k in before)
    )


def main(folder: Path, what: str, rank: int, world: int, *options: object) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    name = "-".join(map(str, (what, world, *options)))
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder / ('store-' + name)}", rank=rank, world_size=world,
            timeout=timedelta(seconds=120),
        )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        exact_norms(patch)
        found = globals()[what](folder, rank, world, *options)
    torch.save(found, folder / f"{name}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()
