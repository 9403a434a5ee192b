"""growkern finds live optimizers, modules and schedulers, constructed, copied or loaded, behind gc.freeze too, and never scans the heap."""

import copy
import gc
import inspect
import io
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from models import batch, grow, make, train
from torch import nn

import growkern
from growkern.errors import PlanError, UnsupportedModelError, UnsupportedOptimizerError
from growkern.support.live_registry import Live, mid_step


def constructed(things):
    return things


def unpickled(things):
    return pickle.loads(pickle.dumps(things))


def loaded(things):
    torch.save(things, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = (constructed, copy.deepcopy, unpickled, loaded)


@pytest.fixture
def frozen():
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_an_optimizer_is_found_behind_gc_freeze(way, request):
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 1)
    model, optim = way((model, optim))
    request.getfixturevalue("frozen")

    with pytest.raises(UnsupportedOptimizerError, match="another live optimizer has state"):
        grow(model, to="2x")

    grow(model, optim, to="2x")
    train(model, optim, 1)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_module_outside_is_found_behind_gc_freeze(way, request):
    model = make("llama", tied=True)
    head = nn.Linear(1, 1)
    head.weight = model.get_input_embeddings().weight
    model, head = way((model, head))
    request.getfixturevalue("frozen")

    with pytest.raises(UnsupportedModelError, match=r"modules outside the model have .*Linear"):
        grow(model, to="2x")

    del head
    grow(model, to="2x")


@pytest.mark.parametrize(
    "way", (constructed, copy.deepcopy, unpickled), ids=lambda way: way.__name__
)
@pytest.mark.parametrize("name", ("ConstantLR", "ReduceLROnPlateau", "SequentialLR"))
def test_a_scheduler_is_found_behind_gc_freeze(way, name, request):
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    kinds = torch.optim.lr_scheduler
    schedulers = {
        "ConstantLR": lambda: kinds.ConstantLR(optim),
        "ReduceLROnPlateau": lambda: kinds.ReduceLROnPlateau(optim),
        "SequentialLR": lambda: kinds.SequentialLR(optim, [kinds.ConstantLR(optim)], []),
    }
    model, optim, scheduler = way((model, optim, schedulers[name]()))
    request.getfixturevalue("frozen")

    assert any(scheduler is s for s in Live.now().schedulers)
    grow(model, optim, to="2x", scheduler=kinds.ConstantLR(optim, 1.0))

    # a scheduler that was not handed over would not follow a split
    assert len(optim.param_groups) == 1


@pytest.mark.parametrize("handed", [False, True])
def test_groups_are_split_only_where_the_scheduler_was_handed_over(handed):
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optim, 1.0) if handed else None
    grow(model, optim, to="2x", scheduler=scheduler)
    assert (len(optim.param_groups) > 1) == handed


@pytest.mark.slow
def test_what_was_made_before_the_import_is_found():
    """Two processes, forked before the import: in one of them, what was made before is frozen."""
    code = """
import gc, os, torch
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Embedding(8, 16), torch.nn.Linear(16, 24), torch.nn.Linear(24, 8))
optim = torch.optim.AdamW(model.parameters())
model(torch.zeros(1, 4, dtype=int)).sum().backward()
optim.step()
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
else:
    gc.freeze()
class Meta(type):
    def __eq__(cls, other):
        return cls is other  # and no hash


class Odd(metaclass=Meta):
    pass


odd = [Odd()]
import growkern
tensors = growkern.embedding("0", rows="vocab", writes="residual") | growkern.linear("1", reads="residual", writes="ffn")
tensors |= growkern.linear("2", reads="ffn", writes="vocab")
spec = growkern.ModelSpec(family="plain", sizes=dict(vocab=8, hidden=16, ffn=24), tensors=tensors)
try:
    growkern.expand_inplace(model, spec=spec)
except growkern.errors.UnsupportedOptimizerError as error:
    assert "AdamW" in str(error)
    assert bool(gc.get_freeze_count()) is (not child)
    growkern.expand_inplace(model, optim, spec=spec)
    print("found", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "found\nfound\n", done.stderr


def test_a_growth_does_not_scan_the_heap(monkeypatch):
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 1)
    for name in ("get_objects", "get_referrers", "collect"):
        monkeypatch.setattr(gc, name, lambda *_, name=name: pytest.fail(f"gc.{name}"))

    grow(model, optim, to="2x")

    assert model.config.hidden_size == 48


def test_what_has_died_is_not_registered():
    made = nn.Bilinear(1, 1, 1)
    assert any(m is made for m in Live.now().modules)
    del made
    assert not any(isinstance(m, nn.Bilinear) for m in Live.now().modules)


def test_mid_step_ends_with_the_steps_own_work():
    model = make("llama", tied=True)
    optim = torch.optim.SGD(model.parameters(), lr=1e-3)
    seen = []
    optim.register_step_post_hook(lambda *_: seen.append(("post", mid_step(optim))))
    optim.register_step_pre_hook(lambda *_: seen.append(("pre", mid_step(optim))))
    for _ in range(2):
        optim.step(lambda: seen.append(("closure", mid_step(optim))))
    assert seen == [("pre", True), ("closure", True), ("post", False)] * 2

    def fails():
        raise ValueError("in a closure")

    with pytest.raises(ValueError, match="in a closure"):
        optim.step(fails)
    assert not mid_step(optim)
    grow(model, optim, to="2x")  # an optimizer whose step has failed can grow


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap",
    (
        lambda model: model,
        lambda model: torch.compile(model, backend="eager"),
        nn.DataParallel,
        Wrapper,
    ),
    ids=("plain", "compiled", "DataParallel", "wrapper"),
)
def test_an_average_of_a_wrapped_model_is_found(wrap):
    model = make("llama", tied=True)
    average = torch.optim.swa_utils.AveragedModel(wrap(model))

    with pytest.raises(UnsupportedModelError, match="AveragedModel of a LlamaForCausalLM"):
        grow(model, to="2x")

    del average
    grow(model, to="2x")


def test_other_threads_may_make_modules_meanwhile():
    stop, made = threading.Event(), []

    def build():
        while not stop.is_set():
            made[:] = [nn.Linear(1, 1) for _ in range(100)]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=build)
    kept = [nn.Linear(1, 1) for _ in range(3000)]
    thread.start()
    try:
        for _ in range(100):
            assert len(Live.now().modules) >= len(kept)
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)


class Unhashable(torch.optim.SGD):
    def __eq__(self, other):
        return self is other


def test_an_optimizer_without_a_hash_or_with_hooks_of_its_own_steps():
    model = make("llama", tied=True)
    optim = Unhashable(model.parameters(), lr=1e-3)
    train(model, optim, 1)

    def closure():
        with pytest.raises(PlanError, match="would change half a step"):
            grow(model, optim, to="2x")

    optim.step(closure)
    grow(model, optim, to="2x")

    optim = torch.optim.SGD(model.parameters(), lr=1e-3)
    optim._optimizer_step_post_hooks = {}
    train(model, optim, 1)


def test_a_step_that_raised_is_over_in_the_step_of_another_optimizer():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    other = torch.optim.SGD([torch.zeros(1, requires_grad=True)])

    def fails():
        raise ValueError("in a closure")

    other.register_step_post_hook(lambda *_: grow(model, optim, to={"ffn": "2x"}))
    for _ in range(5):  # Python reuses the address of the failed step's frame
        with pytest.raises(ValueError, match="in a closure"):
            optim.step(fails)
        other.step()
    assert model.config.intermediate_size == 40 * 32


def test_upcycling_inside_a_step_is_refused():
    model = make("llama", tied=True)
    optim = torch.optim.SGD(model.parameters(), lr=1e-3)

    def closure():
        growkern.upcycle(model, optim, experts=4)

    with pytest.raises(PlanError, match="would change half a step"):
        optim.step(closure)


def test_torchs_classes_work_as_before():
    class Named:  # the mixin's __new__ takes the arguments
        def __new__(cls, *args, **kwargs):
            self = super().__new__(cls)
            self.arguments = args, kwargs
            return self

    class Own(torch.optim.SGD, Named):
        pass

    class Halving(torch.optim.lr_scheduler.LRScheduler):
        def get_lr(self):
            return [lr / 2 for lr in self.base_lrs]

    assert [*inspect.signature(Halving).parameters][:2] == ["optimizer", "last_epoch"]
    assert [*inspect.signature(nn.Linear).parameters][:2] == ["in_features", "out_features"]
    with pytest.raises(TypeError, match="unexpected keyword argument 'rate'"):
        torch.optim.SGD([], rate=4)

    linear = nn.Linear(2, 2)
    x = torch.ones(1, 2)
    for other in (torch.fx.symbolic_trace(linear), copy.copy(linear)):
        assert torch.equal(other(x), linear(x))
    optim = Own(linear.parameters(), lr=1.0)
    assert optim.arguments[1] == {"lr": 1.0}
    scheduler = Halving(optim)
    assert optim.param_groups[0]["lr"] == 0.5
    assert scheduler.optimizer is optim


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_and_a_module_made_while_compiling():
    model = make("llama", tied=True, num_hidden_layers=1)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 1)
    weight = nn.Parameter(torch.ones(2))

    @torch.compile(backend="eager")
    def build_and_step(x):
        inner = torch.optim.SGD([weight], lr=0.1)
        y = (x * weight).sum()
        y.backward()
        inner.step()
        return y.detach()

    assert build_and_step(torch.ones(2)) == 2 and torch.equal(weight, torch.full((2,), 0.9))

    layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    @torch.compile(backend="eager", fullgraph=True)
    def forward(x):
        for layer in layers[:1]:  # slicing makes a new ModuleList
            x = layer(x)
        return x

    assert torch.equal(forward(torch.ones(1, 2)), layers[0](torch.ones(1, 2)))
    model(batch()).logits.sum().backward()
    torch.compile(optim.step, backend="eager")()
    grow(model, optim, to="2x")


@pytest.mark.parametrize("place", ["tensor", "grad", "module", "forward", "pre"])
def test_a_growth_inside_a_forward_or_a_backward_is_refused_and_the_pass_goes_on(place):
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    layer, weight, refused = model.model.layers[0].mlp, model.model.layers[1].mlp.up_proj.weight, []

    def grows(*_):
        with pytest.raises(PlanError, match="a growth inside a (forward|backward) would break"):
            growkern.expand_inplace(model, optim)
        refused.append(place)

    {
        "tensor": lambda: weight.register_hook(grows),
        "grad": lambda: weight.register_post_accumulate_grad_hook(grows),
        "module": lambda: layer.register_full_backward_hook(grows),
        "forward": lambda: layer.register_forward_hook(grows),
        "pre": lambda: layer.register_forward_pre_hook(grows),
    }[place]()
    train(model, optim, 1)

    assert refused == [place] and model.config.hidden_size == 24


def test_a_growth_inside_the_forward_of_a_module_around_the_model_is_no_pass_of_the_model():
    class Loop(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make("llama", tied=True)

        def forward(self, ids):
            self.inner(input_ids=ids, labels=ids).loss.backward()
            optim.step()
            return growkern.expand_inplace(self.inner, optim)

    loop = Loop()
    optim = torch.optim.AdamW(loop.parameters(), lr=1e-3)

    assert loop(batch()).target_sizes["hidden"] == 48


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_parameters_of_new_blocks_that_lack_the_hooks_of_their_sources_are_noted(kind):
    model = make("llama", tied=True)
    plain = grow(copy.deepcopy(model), to={"layers": 3})
    for p in model.model.layers[1].parameters():
        getattr(p, kind)(lambda grad: None)

    report = grow(model, to={"layers": 3})

    n = len([*model.model.layers[1].parameters()])
    assert any(f"{n} parameters of new blocks are copies of parameters with hooks" in note for note in report.notes)  # fmt: skip
    assert not any("with hooks" in note for note in plain.notes)
