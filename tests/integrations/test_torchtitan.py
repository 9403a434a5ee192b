"""In torchtitan's Trainer, two gloo processes grow and train as one process on the joined batch does, and resume.

The runs need torchtitan, which is no dependency of the tests (it wants datasets, wandb and a nightly torch); the tests of the shape of its
objects, which have the names and attributes of torchtitan 0.2 and 0.3, run without it.
"""

import gc
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import processes
import pytest
import torch
import torch.distributed.checkpoint as dcp
from models import batch, loss_of, make
from readme import IN_PROCESSES
from scheduled import WIDER

import growkern
from growkern.errors import UnsupportedOptimizerError


@processes.together
@pytest.mark.slow
@pytest.mark.skipif(find_spec("torchtitan") is None, reason="needs torchtitan")
@pytest.mark.parametrize("fused", [False, True])
def test_torchtitans_trainer_grows_and_resumes(fused, tmp_path):
    for world in (2, 1):
        folder, log = tmp_path / str(world), tmp_path / f"{world}.log"
        folder.mkdir()
        ranks = range(world)
        started = [
            processes.start("torchtitan_worker", folder, rank, world, fused, log=log)
            for rank in ranks
        ]
        processes.end(started, log)
    alone = torch.load(tmp_path / "1" / "0.pt")["unbroken"]

    for rank in range(2):
        found = torch.load(tmp_path / "2" / f"{rank}.pt")
        for key, n in {"unbroken": 15, "compiled": 15, ("resumed", 3): 12, ("resumed", 6): 9}.items():  # fmt: skip
            run = found[key]
            assert run["kept"] and run["saves what is live"] and run["fired"] == [5]
            assert run["rates"] == alone["rates"] and len(run["rates"]) == 2  # split by the law
            assert run["losses"] == pytest.approx(alone["losses"][-n:], rel=0, abs=1e-5)  # its loss is in float32  # fmt: skip
            assert run["weights"].keys() == alone["weights"].keys()
            for name, p in alone["weights"].items():
                torch.testing.assert_close(run["weights"][name], p, rtol=0, atol=1e-9, msg=name)


class OptimizersContainer(torch.optim.Optimizer):
    """An optimizer around a list of optimizers, with the param groups of all and without state."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = [*optimizers]
        super().__init__([p for o in optimizers for g in o.param_groups for p in g["params"]], {})

    def step(self, closure=None) -> None:
        for optim in self.optimizers:
            optim.step()


class LRSchedulersContainer:
    """A list of schedulers with the method ``step``."""

    def __init__(self, optimizers: OptimizersContainer) -> None:
        self.schedulers = [
            torch.optim.lr_scheduler.LambdaLR(optim, lambda step: 0.9**step)
            for optim in optimizers.optimizers
        ]

    def step(self) -> None:
        for scheduler in self.schedulers:
            scheduler.step()


class ModelWrapper:
    """What torchtitan 0.2 saves of a model: the state dict of the time when the wrapper was made."""

    def __init__(self, model: list[torch.nn.Module]) -> None:
        self.model = model
        self.cache_state_dict = {k: v for part in model for k, v in part.state_dict().items()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.cache_state_dict


def contained(model: torch.nn.Module) -> tuple[OptimizersContainer, LRSchedulersContainer]:
    params = [*model.parameters()]
    several = OptimizersContainer(*(torch.optim.AdamW(part, lr=1e-2) for part in (params[:5], params[5:])))  # fmt: skip
    return several, LRSchedulersContainer(several)


@pytest.mark.parametrize("steps", [0, 2])
def test_containers_of_torchtitan_grow_as_lists_do(steps):
    ends = []
    for as_container in (True, False):
        model = make("llama", tied=False)
        several, rates = contained(model)
        for step in range(steps + 2):
            if step == steps:
                optim, scheduler = (several, rates) if as_container else (several.optimizers, rates.schedulers)  # fmt: skip
                growkern.expand_inplace(model, optim, to=WIDER | {"layers": 3}, scheduler=scheduler)
            loss = loss_of(model, batch())
            loss.backward()
            several.step()
            rates.step()
            model.zero_grad()
        held = {id(p) for o in several.optimizers for g in o.param_groups for p in g["params"]}
        assert held == {id(p) for p in model.parameters()}
        ends.append([model.state_dict(), [s.get_last_lr() for s in rates.schedulers]])
    torch.testing.assert_close(*ends, rtol=0, atol=0)
    assert len(ends[0][1][1]) == 2  # a group was split


def test_a_schedule_attaches_to_containers():
    model = make("llama", tied=False)
    several, rates = contained(model)
    schedule = growkern.GrowthSchedule([growkern.At(step=1, to=WIDER)])
    schedule.attach(model, several, rates)

    loss_of(model, batch()).backward()
    several.step()

    assert schedule.fired == [1] and schedule.attachment.optims == several.optimizers
    assert schedule.attachment.schedulers == rates.schedulers


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_readmes_trainer_grows_and_resumes(tmp_path):
    class Trainer:
        """What the example uses of torchtitan's trainer."""

        def __init__(self, config) -> None:
            self.model_parts = [make("llama", tied=False)]
            self.optimizers, self.lr_schedulers = contained(self.model_parts[0])
            self.checkpointer = SimpleNamespace(states={}, folder=tmp_path)

    names = {"torchtitan": SimpleNamespace(trainer=SimpleNamespace(Trainer=Trainer)), "dcp": dcp}
    names |= {"growkern": growkern, "llama3": None}  # the family is known
    exec(IN_PROCESSES["torchtitan"].replace('step=1000, to="2x"', f"step=1, to={WIDER}"), names)
    config = SimpleNamespace(checkpoint=SimpleNamespace(load_step=-1))
    trainer = names["GrowingTrainer"](config)
    loss_of(trainer.model_parts[0], batch()).backward()
    trainer.optimizers.step()
    dcp.save(trainer.checkpointer.states, checkpoint_id=tmp_path / "step-1")

    config.checkpoint.load_step = 1
    resumed = names["GrowingTrainer"](config)

    shapes = [[p.shape for p in each.model_parts[0].parameters()] for each in (trainer, resumed)]
    assert shapes[0] == shapes[1] and shapes[0] != [p.shape for p in make("llama", tied=False).parameters()]  # fmt: skip


def test_a_container_of_things_that_are_no_optimizers_is_refused():
    model = make("llama", tied=False)
    container = OptimizersContainer(torch.optim.AdamW(model.parameters()))
    container.optimizers.append("adam")
    with pytest.raises(UnsupportedOptimizerError, match=r"optim\[1\]"):
        growkern.expand_inplace(model, container, to=WIDER)


def test_the_state_dict_that_torchtitan_caches_is_made_anew(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchtitan", ModuleType("torchtitan"))
    model, other = make("llama", tied=False), make("llama", tied=False)
    cache, apart = ModelWrapper([model]), ModelWrapper([other])
    kept = apart.cache_state_dict

    growkern.expand_inplace(model, to=WIDER | {"layers": 3})
    assert_live(cache, model)
    growkern.shrink_inplace(model, to={"layers": 2})
    assert_live(cache, model)
    assert apart.cache_state_dict is kept


def test_the_heap_is_not_searched_without_torchtitan(monkeypatch):
    monkeypatch.delitem(sys.modules, "torchtitan", raising=False)
    monkeypatch.setattr(gc, "get_objects", lambda: pytest.fail("searched"))
    growkern.expand_inplace(make("llama", tied=False), to=WIDER)


def assert_live(cache: ModelWrapper, model: torch.nn.Module) -> None:
    saved, live = cache.state_dict(), model.state_dict()
    assert saved.keys() == live.keys()
    assert all(saved[name].data_ptr() == live[name].data_ptr() for name in live)


def test_a_config_that_takes_no_new_field_grows():
    """torchtitan's configs are dataclasses with slots and a method ``to_dict``: the record of the growth stays with the process."""

    @dataclass(slots=True)
    class Config:
        dim: int

        def to_dict(self) -> dict[str, int]:
            return {"dim": self.dim}

    model = make("plain", tied=False)
    spec = model.spec()
    model.config = Config(24)
    report = growkern.expand_inplace(model, to={"layers": 3}, spec=spec)
    assert model.config.dim == 24 and len(report.history) == 1
