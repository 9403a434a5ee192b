"""Models whose blocks are compiled or wrapped grow as bare models do, and new blocks are compiled or wrapped as their sources are."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from models import Plain, batch, logits, loss_of, make, train
from torch import nn
from torch._dynamo.eval_frame import innermost_fn
from torch._dynamo.utils import counters
from torch.distributed._composable import checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    checkpoint_wrapper,
    offload_wrapper,
)
from transformers.models.llama.modeling_llama import LlamaMLP
from wraps import Counted, compiled, keyed

import growkern
from growkern import depth, trains
from growkern.advice.observed import observed
from growkern.errors import CheckpointError, PlanError, UnsupportedModelError
from growkern.inherit.store import weights_hash
from growkern.support.compiled import decorator_of
from growkern.support.names import canonical, named_parameters
from growkern.support.wrappers import unwrapped
from growkern.training.trains import flops_per_token

# dynamo looks at ``grad`` of the inputs of a block
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
BLOCKS = {"llama": "model.layers", "plain": "blocks"}
BOTH = {"hidden": 48, "layers": 3}
Wrap = Callable[[nn.Module, object], nn.Module]


def part_compiled(block: nn.Module, backend: object) -> nn.Module:
    name = "mlp" if hasattr(block, "mlp") else "up"
    setattr(block, name, torch.compile(getattr(block, name), backend=backend))
    return block


def layer_checkpointed(block: nn.Module, _: object) -> nn.Module:
    owner, name = (block.mlp, "up_proj") if hasattr(block, "mlp") else (block, "up")
    setattr(owner, name, checkpoint_wrapper(getattr(owner, name)))
    return block


WRAPS: dict[str, Wrap] = {
    "compiled": compiled,
    "in a compiled module": lambda block, backend: torch.compile(block, backend=backend),
    "checkpointed": lambda block, backend: checkpoint_wrapper(block),
    "offloaded": lambda block, backend: offload_wrapper(block),
    "checkpointed and compiled": lambda block, backend: compiled(checkpoint_wrapper(block), backend),
    "compiled and checkpointed": lambda block, backend: checkpoint_wrapper(torch.compile(block, backend=backend)),
    "composable": lambda block, backend: checkpoint(block),
    "a part compiled": part_compiled,
    "a layer checkpointed": layer_checkpointed,
}  # fmt: skip


def some(*names: str) -> object:
    """Return cases, of which those that compile are slow."""
    return [pytest.param(n, marks=[pytest.mark.slow] if "compiled" in n else []) for n in names]


NO_CHANGE: Wrap = lambda block, backend: block  # noqa: E731


def made(
    wrap: Wrap = NO_CHANGE, family: str = "llama", backend: object = "eager", **changes: object
) -> nn.Module:
    """Make a model in float64 and wrap its blocks."""
    torch.compiler.reset()
    own = dict(use_cache=False) if family == "llama" else {}
    model = make(family, tied=family == "plain", **own | changes).double().train()
    blocks = model.get_submodule(BLOCKS[family])
    for i, block in enumerate([*blocks]):
        blocks[i] = wrap(block, backend)
    return model


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.named_parameters(), lr=1e-3)


def run(model: nn.Module, **growth: object) -> list[float]:
    """Train, grow and train; return the losses."""
    spec = Plain.spec(copy.deepcopy(model)) if isinstance(model, Plain) else None
    losses = train(model, optim := adamw(model), 2)
    growkern.expand_inplace(model, optim, spec=spec, **{"to": BOTH} | growth)
    return losses + train(model, optim, 3, first=2)


@pytest.mark.parametrize("wrap", some(*WRAPS))
@pytest.mark.parametrize("family", BLOCKS)
def test_a_wrapped_model_grows_and_trains_as_the_bare_one(family, wrap):
    model = made(WRAPS[wrap], family)

    losses = run(model)

    assert losses == pytest.approx(run(made(family=family)), rel=0, abs=1e-12)
    first, _, new = model.get_submodule(BLOCKS[family])
    assert [type(m) for m in new.modules()] == [type(m) for m in first.modules()]


@pytest.mark.slow
def test_modules_around_and_beside_the_blocks_may_be_wrapped():
    model = made()
    model.model = torch.compile(model.model, backend="eager")
    model.lm_head = checkpoint_wrapper(model.lm_head)

    assert run(model) == pytest.approx(run(made()), rel=0, abs=1e-12)
    assert isinstance(model.lm_head, CheckpointWrapper)


def test_buffers_of_wrapped_modules_grow():
    def wrap(block: nn.Module, _: object) -> nn.Module:
        bias = block.down._parameters.pop("bias")
        block.down.register_buffer("bias", bias.detach())
        block.down = checkpoint_wrapper(block.down)
        return checkpoint_wrapper(block)

    spec = Plain.spec(made(family="plain"))
    model = made(wrap, "plain")
    before = logits(model, batch()).detach()

    growkern.expand_inplace(model, to={"hidden": 48, "layers": 4}, spec=spec)

    biases = [block.down.bias for block in model.blocks]
    assert [(len(b), bool(b.any())) for b in biases] == [(48, True), (48, False)] * 2
    assert (logits(model, batch()) - before).abs().max() < 1e-12


def test_the_configs_of_wrapped_stacks_are_those_of_a_bare_model():
    configs = []
    for wrap in (checkpoint_wrapper, lambda stack: stack):
        model = make("t5", tied=True)
        model.encoder, model.decoder = wrap(model.encoder), wrap(model.decoder)
        growkern.expand_inplace(model, to={"hidden": 48, "layers": 3, "decoder_layers": 4})
        configs.append([m.config.to_dict() for m in (model, model.encoder, model.decoder)])

    assert configs[0] == configs[1]
    assert configs[0][1]["d_model"] == 48


def test_parameters_that_were_in_no_optimizer_are_refused_later():
    model = made(WRAPS["checkpointed"])
    optim = torch.optim.AdamW(model.lm_head.parameters(), lr=1e-3)
    growkern.expand_inplace(model, optim, to={"hidden": 48})
    optim.add_param_group({"params": [*model.model.layers[0].parameters()]})

    with pytest.raises(PlanError, match=r"such as model.layers.0.self_attn.q_proj.weight\)"):
        train(model, optim, 1)


def test_every_new_block_is_wrapped_as_its_own_source():
    model = made()
    model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])

    growkern.expand_inplace(model, to={"layers": 4}, depth=depth.Stack())

    wrapped = [isinstance(block, CheckpointWrapper) for block in model.model.layers]
    assert wrapped == [False, True, False, True]


@pytest.mark.parametrize("method", [depth.Stack(), depth.Fresh()], ids=repr)
@pytest.mark.parametrize(
    "wrap",
    some("compiled", "in a compiled module", "checkpointed and compiled", "a layer checkpointed"),
)
def test_new_blocks_of_every_method_have_the_values_of_a_bare_model(wrap, method):
    growth = dict(to={"layers": 4}, depth=method)
    bare, model = made(), made(WRAPS[wrap])

    losses = run(model, **growth)

    assert losses == pytest.approx(run(bare, **growth), rel=0, abs=1e-12)
    for (name, p), q in zip(named_parameters(model), bare.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    "wrap", some("compiled", "in a compiled module", "checkpointed and compiled")
)
def test_a_new_block_runs_its_compiled_graph(wrap):
    model = made(WRAPS[wrap], backend=(counted := Counted()))
    growkern.expand_inplace(model, to=BOTH)

    with counted.count(LlamaMLP), torch.no_grad():
        logits(model, batch())

    assert (counted.n, counted.forwards) == (3, 0)


@pytest.mark.slow
def test_a_model_that_is_compiled_as_a_whole_stays_so():
    model = made()
    model.compile(backend=(counted := Counted()), fullgraph=True)

    losses = run(model)

    assert losses == pytest.approx(run(made()), rel=0, abs=1e-12)
    assert counted.n == 5


@pytest.mark.slow
def test_a_new_block_is_compiled_with_the_arguments_of_its_source():
    """``fullgraph=True`` makes a graph break an error: one that the new block alone has."""
    model = made(partial(compiled, fullgraph=True, dynamic=False))

    growkern.expand_inplace(model, to=BOTH)

    *sources, new = model.model.layers
    assert decorator_of(new) in [decorator_of(source) for source in sources]
    new.mlp.act_fn = BreaksGraph()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        logits(model, batch())


class BreaksGraph(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x


@pytest.mark.slow
def test_compiled_blocks_of_many_growths_never_use_up_the_recompilations_that_dynamo_allows():
    """Every block has a graph of its own here, as its cache reads ``layer_idx``; ``fullgraph=True`` makes the limit an error."""
    model = made(partial(compiled, fullgraph=True), use_cache=True)
    with torch._dynamo.config.patch(recompile_limit=4), torch.no_grad():
        for n in (2, 3, 4):
            growkern.expand_inplace(model, to={"layers": n, "hidden": 24 * n})
            logits(model, batch())

    assert len(model.model.layers) == 4


def test_a_block_whose_compilation_is_disabled_stays_so():
    model = made(partial(compiled, disable=True))

    assert run(model) == run(made())
    assert model.model.layers[2]._compiled_call_impl == model.model.layers[2]._call_impl


def test_a_compiled_call_of_unknown_arguments_is_refused():
    model = made()
    model.model.layers[1]._compiled_call_impl = lambda *args, **kwargs: None

    with pytest.raises(UnsupportedModelError, match=r"layers\.1 is: its _compiled_call_impl does"):
        growkern.expand_inplace(model, to={"layers": 4}, depth=depth.Stack())

    assert len(model.model.layers) == 2


@pytest.mark.slow
def test_hooks_of_a_compiled_module_are_copied_with_it():
    model, seen = made(WRAPS["in a compiled module"]), []
    for block in model.model.layers:
        block.register_forward_hook(lambda *_: seen.append(1))

    growkern.expand_inplace(model, to={"layers": 3})
    logits(model, batch())

    assert len(seen) == 3
    source, _, new = model.model.layers
    assert new.get_compiler_config() == source.get_compiler_config()
    assert innermost_fn(new) == new._orig_mod.forward  # as of a module that torch.compile has made
    assert innermost_fn(source) == source._orig_mod.forward


def test_gradient_checkpointing_of_transformers_is_on_in_new_blocks():
    model, counted = made(), Counted()
    model.activation_checkpointing_enable({"use_reentrant": False})

    losses = run(model)
    with counted.count(LlamaMLP):
        train(model, adamw(model), 1)

    assert losses == pytest.approx(run(made()), rel=0, abs=1e-12)
    assert counted.forwards == 2 * 3


@pytest.mark.parametrize("wrap", some("checkpointed", "composable"))
def test_a_new_block_is_computed_again_in_the_backward(wrap):
    model, counted = made(WRAPS[wrap]), Counted()

    growkern.expand_inplace(model, to=BOTH)
    with counted.count(LlamaMLP):
        train(model, adamw(model), 1)

    assert counted.forwards == 2 * 3


@pytest.mark.parametrize("wrap", some("in a compiled module", "checkpointed"))
def test_param_names_are_those_of_the_wrapped_model(wrap):
    model = made(WRAPS[wrap])
    optim = adamw(model)

    growkern.expand_inplace(model, optim, to={"hidden": 48, "layers": 4})

    names = {id(p): name for name, p in model.named_parameters()}
    for group in optim.param_groups:
        assert group["param_names"] == [names[id(p)] for p in group["params"]]


@pytest.mark.parametrize("wrap", some("compiled", "in a compiled module", "checkpointed"))
def test_a_run_that_is_saved_goes_on_in_a_bare_model(wrap):
    whole = made(WRAPS[wrap])
    run_of = adamw(whole)
    train(whole, run_of, 1)
    growkern.expand_inplace(whole, run_of, to=BOTH)
    train(whole, run_of, 1, first=1)
    saved = copy.deepcopy(({canonical(n): t for n, t in whole.state_dict().items()}, run_of.state_dict()))  # fmt: skip
    history = whole.config.growkern_history

    model = made()
    optim = adamw(model)
    growkern.resume(model, optim, history)
    model.load_state_dict(saved[0])
    optim.load_state_dict(saved[1])

    assert train(model, optim, 3, first=2) == pytest.approx(
        train(whole, run_of, 3, first=2), rel=0, abs=1e-12
    )


@pytest.mark.parametrize("wrap", some("compiled", "in a compiled module", "checkpointed"))
def test_a_checkpoint_from_before_a_growth_in_depth_is_refused(wrap):
    model = made(WRAPS[wrap])
    before = model.state_dict()
    growkern.expand_inplace(model, to={"layers": 3})

    with pytest.raises(CheckpointError, match="from before growth 1"):
        model.load_state_dict(before, strict=False)


@pytest.mark.slow
def test_a_run_is_resumed_in_a_wrapped_model():
    bare = made()
    run(bare)

    model = made(WRAPS["checkpointed and compiled"])
    growkern.resume(model, adamw(model), bare.config.growkern_history)
    model.load_state_dict(bare.state_dict())

    assert torch.equal(logits(model, batch()), logits(bare, batch()))
    assert model.model.layers[2]._compiled_call_impl is not None


@pytest.mark.parametrize("wrap", some("compiled", "in a compiled module", "checkpointed"))
def test_an_average_grows_and_a_check_runs_through_wrappers(wrap):
    model = made(WRAPS[wrap])
    average = torch.optim.swa_utils.AveragedModel(made())
    logits(model, batch())
    before, n_graphs = logits(average.module, batch()), counters["stats"]["unique_graphs"]

    growkern.expand_inplace(model, to=BOTH, ema=average, check=batch())

    assert (logits(average.module, batch()) - before).abs().max() < 1e-5
    assert len(average.module.model.layers) == 3
    assert counters["stats"]["unique_graphs"] == n_graphs  # the check has compiled nothing


@pytest.mark.parametrize("who", [trains.New(), trains.Top(1)], ids=repr)
@pytest.mark.parametrize("wrap", some("compiled", "in a compiled module", "checkpointed"))
def test_who_trains_can_be_chosen_in_a_wrapped_model(wrap, who):
    def losses(model: nn.Module) -> list[float]:
        schedule = growkern.GrowthSchedule([growkern.At(step=1, to={"layers": 3}, trains=who)])
        schedule.attach(model, optim := adamw(model))
        return train(model, optim, 4)

    model, bare = made(WRAPS[wrap]), made()

    assert losses(model) == pytest.approx(losses(bare), rel=0, abs=1e-12)
    flags = [p.requires_grad for p in bare.parameters()]
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not all(flags)


def test_reentrant_checkpoint_wrappers_are_refused_where_not_everything_trains():
    model = made(lambda block, _: checkpoint_wrapper(block, CheckpointImpl.REENTRANT))

    with pytest.raises(UnsupportedModelError, match="is under reentrant gradient checkpointing"):
        trains.Top(1).apply(model)


def test_a_ramp_goes_through_wrappers():
    def losses(model: nn.Module) -> list[float]:
        wide = growkern.width.CopyAndPad(norm="corrected")
        event = growkern.At(step=1, to={"hidden": 48, "layers": 4}, depth=depth.Stack(), ramp=3, width=wide)  # fmt: skip
        growkern.GrowthSchedule([event]).attach(model, optim := adamw(model))
        return train(model, optim, 6)

    assert losses(made(WRAPS["checkpointed"])) == pytest.approx(losses(made()), rel=0, abs=1e-12)


def test_a_mixture_of_a_wrapped_model_is_that_of_the_bare_one():
    bare, model = made().float(), made(WRAPS["checkpointed"]).float()

    mixtures = [growkern.upcycle(m, experts=2).eval() for m in (bare, model)]

    assert torch.equal(*(logits(mixture, batch()) for mixture in mixtures))


def test_a_whole_model_in_a_checkpoint_wrapper_is_looked_through():
    wrapped = checkpoint_wrapper(model := made())

    growkern.expand_inplace(wrapped, to=BOTH)

    assert unwrapped(wrapped) is model
    assert model.config.hidden_size == 48


@pytest.mark.parametrize("wrap", some("checkpointed", "compiled", "checkpointed and compiled"))
@pytest.mark.parametrize("deep", [depth.IdentityBlocks(), depth.Stack(), depth.Fresh()], ids=repr)
def test_blocks_in_a_module_dict_grow_as_those_in_a_list(deep, wrap):
    plain = made(family="plain")
    model, spec = keyed(made(WRAPS[wrap], "plain"))
    growth = dict(to={"hidden": 48, "layers": 4}, depth=deep, spec=spec)
    losses = []
    for each in (plain, model):
        run_of = train(each, optim := adamw(each), 2)
        growkern.expand_inplace(each, optim, **growth)
        losses.append(run_of + train(each, optim, 3, first=2))

    assert losses[1] == pytest.approx(losses[0], rel=0, abs=1e-12)
    assert [*model.blocks] == ["0", "1", "2", "3"]


def test_a_module_dict_shrinks():
    model, spec = keyed(made(family="plain"))
    before = logits(model, batch())
    growkern.expand_inplace(model, to={"layers": 4}, spec=spec)

    described = growkern.describe(model, grow_spec := Plain.spec(listed(model)))
    growkern.shrink_inplace(model, to={"layers": 2}, spec=grow_spec)

    assert described.sizes["layers"] == 4
    assert [*model.blocks] == ["0", "1"]
    assert logits(model, batch()).shape == before.shape


def listed(model: nn.Module) -> nn.Module:
    """Return a copy with its blocks in a list, which ``Plain.spec`` reads."""
    twin = copy.deepcopy(model)
    twin.blocks = nn.ModuleList(twin.blocks.values())
    return twin


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["1", "0"], "has the keys 1, 0; name the blocks by their numbers, in order: 0, 1"),
        (["0", "1", "x"], "has 3 blocks, the spec says layers=2; set it to 3"),
    ],
)
def test_other_keys_are_refused(keys, message):
    model, spec = keyed(made(family="plain"))
    blocks = model.blocks
    model.blocks = nn.ModuleDict({k: blocks[k] if k in blocks else nn.Identity() for k in keys})

    with pytest.raises(UnsupportedModelError, match=message):
        growkern.expand_inplace(model, to={"layers": 3}, spec=spec)


def test_a_module_dict_grows_from_nothing():
    model, spec = keyed(made(family="plain", n_layer=1))
    block = copy.deepcopy(model.blocks["0"])
    model.blocks = nn.ModuleDict()
    spec = replace(spec, sizes={**spec.sizes, "layers": 0})

    growkern.expand_inplace(model, to={"layers": 2}, depth=depth.Fresh(block=block), spec=spec)

    assert [*model.blocks] == ["0", "1"]
    assert logits(model, batch()).isfinite().all()


@pytest.mark.parametrize("wrap", some("in a compiled module", "checkpointed"))
def test_notes_counts_and_hashes_are_those_of_the_bare_model(wrap):
    found = []
    for model in (made(WRAPS[wrap], "plain"), made(family="plain")):
        spec = Plain.spec(copy.deepcopy(model))
        model.blocks[0].attention.seen_width = 24
        for p in model.blocks[1].parameters():
            p.register_hook(lambda grad: None)
        schedule = growkern.GrowthSchedule([growkern.At(step=9, to=BOTH, trains=trains.Top(1))])
        schedule.attach(model, optim := adamw(model), spec=spec)
        schedule.observe(tokens=32, loss=4.0)
        flops = flops_per_token(model, spec, trains.Top(1).frozen(spec, ()))
        counts = flops, weights_hash(model), observed(schedule).n_params
        loss_of(model, batch()).backward()
        report = growkern.expand_inplace(model, optim, to=BOTH, spec=spec)
        found.append((report.notes, report.new_blocks, report.grad_norm_factor, counts))

    assert found[0] == found[1]
    notes = " ".join(found[0][0])
    assert "attention.seen_width = 24" in notes and "copies of parameters with hooks" in notes
