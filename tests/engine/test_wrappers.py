"""growkern looks through wrappers of optimizers and compiled models; torch.compile does not trace a schedule in a compiled step."""

import inspect

import pytest
import torch
from models import batch, loss_of, make
from scheduled import WIDER, optimizer, run, schedule_at

import growkern
from growkern.errors import UnsupportedModelError
from growkern.support.wrappers import unwrapped
from growkern.training.schedule import GrowthSchedule
from growkern.training.triggers import At


def test_wrappers_are_looked_through_by_name():
    class AcceleratedOptimizer:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    class LightningOptimizer:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    class LightningAdamW(LightningOptimizer, torch.optim.AdamW):
        pass

    optim = optimizer(make("llama", tied=True))

    assert unwrapped(AcceleratedOptimizer(LightningAdamW(optim))) is optim


@pytest.mark.slow
def test_a_compiled_model_is_looked_through():
    optim = optimizer(model := make("llama", tied=True, num_hidden_layers=1))
    compiled = torch.compile(model, backend="eager")
    schedule_at(1, to=WIDER).attach(compiled, optim)

    run(compiled, optim, 2)

    assert model.config.hidden_size == 48


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns while it compiles the optimizer
def test_a_schedule_is_not_traced_when_the_step_is_compiled():
    traced = []

    class Watching(At):
        def due(self, counts):
            traced.append(torch.compiler.is_compiling())
            return super().due(counts)

    optim = optimizer(model := make("llama", tied=True, num_hidden_layers=1))
    schedule = GrowthSchedule([Watching(step=9)])
    schedule.attach(model, optim)
    step = torch.compile(optim.step, backend="eager")

    for i in range(3):
        loss_of(model, batch(seed=i)).backward()
        step()

    assert traced == [False] * 3 and schedule.counts.n_steps == 3


def test_a_module_whose_forward_is_a_graph_is_refused_by_name():
    """``make_graphed_callables`` needs a GPU; it sets the attribute ``forward`` of a module to a function of ``torch.cuda.graphs``."""
    assert "func.forward = make_graphed_forward(" in inspect.getsource(torch.cuda.graphs)
    model = make("llama", tied=True)
    mlp = model.model.layers[1].mlp
    made = mlp.forward

    def graphed(x):
        return made(x)

    graphed.__module__ = torch.cuda.graphs.__name__
    mlp.forward = graphed

    with pytest.raises(UnsupportedModelError, match=r"model.layers.1.mlp: make_graphed_callables .* delete"):  # fmt: skip
        growkern.expand_inplace(model)

    del mlp.forward
    assert growkern.expand_inplace(model).target_sizes["hidden"] == 48
