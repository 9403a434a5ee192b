"""Models with 0 blocks get their first blocks: those that a model of transformers has that is built at the target's depth."""

import copy
from dataclasses import replace

import pytest
import torch
from models import Block, Plain, batch, grow, logits, make, train
from torch import nn
from torch.optim.swa_utils import AveragedModel

import growkern
from growkern import depth, width
from growkern.errors import CommitError, PlanError, UnsupportedModelError

LAYERS = "num_hidden_layers"
FAMILIES = {
    "llama": LAYERS,
    "gpt2": "n_layer",
    "bert": LAYERS,
    "roberta": LAYERS,
    "mistral": LAYERS,
}
FAMILIES |= {"gpt_neox": LAYERS, "opt": LAYERS, "vit": LAYERS}
OWN = {"growkern_history", "n_inner"}  # a growth writes both into the config


def empty(family, **changes):
    """Make a model of 0 blocks."""
    return make(family, tied=True, **{FAMILIES[family]: 0}, **changes)


def blocks_of(model):
    return model.get_submodule(growkern.describe(model).blocks.path)


def plain_attributes(module):
    return {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | tuple)}


def everything(model, optim):
    """Collect the bits and the structure of a model and its optimizer, and the state of torch's generator."""
    tensors = [*model.state_dict().values(), torch.get_rng_state()]
    tensors += [v for s in optim.state.values() for v in s.values() if torch.is_tensor(v)]
    groups = [[id(p) for p in group["params"]] for group in optim.param_groups]
    names = [name for name, _ in model.named_modules()]
    config = getattr(model, "config", None)
    return [t.clone() for t in tensors], groups, names, config and config.to_dict()


def same(one, other):
    pairs = zip(one[0], other[0], strict=True)
    return all(torch.equal(a, b) for a, b in pairs) and one[1:] == other[1:]


@pytest.mark.parametrize("to", [{"layers": 3}, {"layers": 3, "hidden": "2x"}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_grown_model_is_built_as_transformers_builds_it_at_the_targets_size(family, to):
    model = empty(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.get_rng_state()

    report = grow(model, to=to, depth=depth.Fresh())

    assert torch.equal(torch.get_rng_state(), generator)
    config = copy.deepcopy(model.config)
    stock = type(model)(config)
    assert [(n, type(m)) for n, m in model.named_modules()] == [
        (n, type(m)) for n, m in stock.named_modules()
    ]
    for (name, module), other in zip(model.named_modules(), stock.modules(), strict=True):
        assert plain_attributes(module) == plain_attributes(other), name
        assert vars(module).get("config", model.config) is model.config, name
    shapes = [
        [(n, p.shape, p.dtype, p.requires_grad) for n, p in m.named_parameters()]
        for m in (model, stock)
    ]
    assert shapes[0] == shapes[1]
    assert {n for n, _ in model.named_buffers()} == {n for n, _ in stock.named_buffers()}
    after = dict(model.named_parameters())
    if "hidden" not in to:
        assert all(torch.equal(after[name], p) for name, p in before.items())
        wanted = type(model.config)(**{**empty(family).config.to_dict(), FAMILIES[family]: 3})
        found = [
            {k: v for k, v in c.to_dict().items() if k not in OWN} for c in (model.config, wanted)
        ]
        assert found[0] == found[1]
    assert logits(model, batch()).isfinite().all()
    assert len(report.new_blocks) == 3 and report.preserves == "nothing"
    assert report.n_params_source == sum(p.numel() for p in before.values())
    assert "layers" in str(report)


LARGE = {
    "llama": dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=320),
    "gpt2": dict(n_embd=128, n_head=4),
    "bert": dict(hidden_size=128, num_attention_heads=4, intermediate_size=320),
}  # fmt: skip


@pytest.mark.parametrize("family", LARGE)
def test_first_blocks_are_distributed_as_those_of_a_stock_model_of_the_targets_depth(family):
    """GPT-2 divides the standard deviation of its output projections by the root of twice the number of blocks."""
    model = empty(family, initializer_range=0.05, **LARGE[family])

    grow(model, to={"layers": 8}, depth=depth.Fresh())

    torch.manual_seed(1)
    stock = dict(type(model)(model.config).named_parameters())
    found = [*blocks_of(model)[0].named_parameters(), *blocks_of(model)[7].named_parameters()]
    prefix = f"{growkern.describe(model).blocks.path}.0."
    for name, p in found:
        wanted = stock[prefix + name]
        if (std := wanted.std()) == 0:
            assert torch.equal(p, wanted), name
        else:
            assert abs(p.std() / std - 1) < 0.05 and abs(p.mean()) < 5 * std / p.numel() ** 0.5, (
                name
            )
    assert not torch.equal(found[0][1], found[len(found) // 2][1]) or found[0][1].std() == 0


@pytest.mark.parametrize("memory", ["stage", "lean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_optimizer_keeps_its_state_and_trains_all_new_parameters(family, memory):
    model = empty(family)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 3)
    state = {p: copy.deepcopy(s) for p, s in optim.state.items()}

    grow(model, optim, to={"layers": 3}, depth=depth.Fresh(), memory=memory)

    assert [*map(id, optim.param_groups[0]["params"])] == [*map(id, model.parameters())]
    assert optim.state.keys() == state.keys() and all(
        torch.equal(optim.state[p][key], s[key]) for p, s in state.items() for key in s
    )
    before = [p.detach().clone() for p in blocks_of(model).parameters()]
    assert all(map(torch.isfinite, map(torch.tensor, train(model, optim, 2))))
    for p, old in zip(blocks_of(model).parameters(), before, strict=True):
        assert optim.state[p]["step"] == 2 and not torch.equal(p, old)
    assert all(optim.state[p]["step"] == 5 for p in state)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_and_a_resumed_run_goes_on(family, tmp_path):
    model, again = empty(family), empty(family, seed=1)
    optim, other = (torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, again))
    train(model, optim, 2)
    grow(model, optim, to={"layers": 2}, depth=depth.Fresh())
    train(model, optim, 1)
    model.save_pretrained(tmp_path)

    loaded = type(model).from_pretrained(tmp_path)
    growkern.resume(again, other, model.config.growkern_history)
    nan = all(p.isnan().all() for p in blocks_of(again).parameters())
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optim.state_dict()))

    assert nan and torch.equal(logits(loaded.eval(), batch()), logits(model.eval(), batch()))
    assert train(again.train(), other, 2) == train(model.train(), optim, 2)


def test_a_plan_can_be_stored_and_run_and_says_what_it_does():
    model, direct = empty("llama"), empty("llama")
    made = growkern.plan(model, to={"layers": 2}, depth=depth.Fresh())
    assert len(model.model.layers) == 0 and "initialized anew" in str(made)

    growkern.expand_inplace(model, plan=growkern.GrowthPlan.from_json(made.to_json()))
    grow(direct, to={"layers": 2}, depth=depth.Fresh())

    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), direct.parameters(), strict=True)
    )


def grouped(model):
    """Make groups with and without weight decay, as most training scripts do."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


@pytest.mark.parametrize("family", FAMILIES)
def test_new_parameters_join_the_group_of_parameters_of_as_many_dimensions(family):
    model = empty(family)
    optim = torch.optim.AdamW(grouped(model), lr=1e-3)

    grow(model, optim, to={"layers": 2}, depth=depth.Fresh())

    for group, own in zip(optim.param_groups, grouped(model), strict=True):
        assert [*map(id, group["params"])] == [*map(id, own["params"])]


def test_named_parameters_of_an_optimizer_get_the_names_of_the_new():
    model = empty("llama")
    optim = torch.optim.AdamW(model.named_parameters(), lr=1e-3)

    grow(model, optim, to={"layers": 2}, depth=depth.Fresh())

    assert optim.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]


def test_averages_and_masters_get_the_same_first_blocks():
    model = empty("llama").bfloat16()
    average = AveragedModel(model)
    masters = {p: nn.Parameter(p.detach().float()) for p in model.parameters()}
    optim = torch.optim.AdamW(masters.values(), lr=1e-3)

    grow(model, optim, to={"layers": 2}, depth=depth.Fresh(), ema=average, master_weights=masters)

    assert {*masters} == {*model.parameters()}
    assert [*map(id, optim.param_groups[0]["params"])] == [
        id(masters[p]) for p in model.parameters()
    ]
    for p, mean in zip(model.parameters(), average.module.parameters(), strict=True):
        assert (
            p.dtype == torch.bfloat16
            and torch.equal(p, mean)
            and torch.equal(masters[p], p.float())
        )


def test_a_schedule_starts_without_blocks():
    model = empty("llama")
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = growkern.GrowthSchedule([growkern.At(step=2, to={"layers": 2}, depth=depth.Fresh())])
    schedule.attach(model, optim)

    losses = train(model, optim, 4)

    assert len(model.model.layers) == 2 and all(map(torch.isfinite, map(torch.tensor, losses)))


def test_new_blocks_checkpoint_their_activations_where_the_model_does():
    model = empty("llama").train()
    model.activation_checkpointing_enable()

    grow(model, to={"layers": 2}, depth=depth.Fresh())

    assert all(block.gradient_checkpointing for block in model.model.layers)
    logits(model, batch()).sum().backward()


def test_two_calls_of_one_seed_draw_the_same_and_a_function_may_draw():
    first, second = empty("gpt2"), empty("gpt2")
    grow(first, to={"layers": 2}, depth=depth.Fresh(), seed=5)
    grow(second, to={"layers": 2}, depth=depth.Fresh(), seed=5)
    assert all(
        torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True)
    )
    third = empty("gpt2")

    def ones(module):
        for p in module.parameters(recurse=False):
            nn.init.ones_(p)

    grow(third, to={"layers": 2}, depth=depth.Fresh(init=ones))

    assert all(p.unique().tolist() == [1] for p in third.transformer.h.parameters())


def own(n_layer=0):
    """Return a model of one's own without blocks, and a spec that describes the block that it does not have."""
    torch.manual_seed(0)
    one = Plain(n_layer=1)
    spec = replace(one.spec(), sizes={**one.spec().sizes, "layers": 0})
    one.blocks = nn.ModuleList()
    return one, spec


def test_a_model_of_ones_own_takes_the_modules_of_a_given_block():
    model, spec = own()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 2)
    given = Block(24, 4)
    values = [p.detach().clone() for p in given.parameters()]

    plan = growkern.plan(model, to={"layers": 2}, depth=depth.Fresh(block=given), spec=spec)
    assert len(model.blocks) == 0 and plan.depth == "Fresh(at='top', block=Block)"
    growkern.expand_inplace(model, optim, plan=plan, depth=depth.Fresh(block=given), spec=spec)

    assert [n for n, _ in model.named_modules()] == [n for n, _ in Plain().named_modules()]
    assert all(torch.equal(p, q) for p, q in zip(given.parameters(), values, strict=True))
    assert not {*given.modules()} & {*model.modules()}
    assert not torch.equal(model.blocks[0].up.weight, given.up.weight)
    train(model, optim, 2)
    assert all(optim.state[p]["step"] == 2 for p in model.blocks.parameters())


ALONE = (
    "without blocks grows in width only together with layers. Name layers in to=; use depth=Fresh"
)
REFUSED = {
    "by a copy": (dict(to={"layers": 2}), PlanError, "no block to copy; grow by depth=Fresh"),
    "by stacking": (dict(to={"layers": 2}, depth=depth.Stack()), PlanError, "no block to copy; grow by depth=Fresh"),
    "by a factor": (dict(to="2x", depth=depth.Fresh()), PlanError, ALONE),
    "in width alone": (dict(to={"hidden": 48}, depth=depth.Fresh()), PlanError, ALONE),
    "in width by default": (dict(to={"hidden": 48}), PlanError, ALONE),
    "by a number": (dict(to={"layers": 2}, depth=depth.Fresh(block=3)), PlanError, "block: expected a torch.nn.Module, got int"),
    "by another block": (dict(to={"layers": 2}, depth=depth.Fresh(block=Block(24, 4))), UnsupportedModelError, "layers.0.*does not"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_grow_is_refused_and_changes_nothing(case):
    options, error, match = REFUSED[case]
    model = empty("llama")
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 1)
    before = everything(model, optim)

    with pytest.raises(error, match=match):
        growkern.expand_inplace(model, optim, **options)

    assert same(everything(model, optim), before)


def test_of_several_optimizers_each_takes_what_it_trains_already():
    model = empty("llama")
    optims = [torch.optim.AdamW([p], lr=1e-3) for p in model.parameters()]  # embedding, norm

    grow(model, optims, to={"layers": 2}, depth=depth.Fresh())

    for optim, own in zip(optims, grouped(model), strict=True):
        assert [*map(id, optim.param_groups[0]["params"])] == [*map(id, own["params"])]


def test_groups_that_do_not_tell_who_takes_the_new_parameters_are_refused():
    model = make("llama", tied=False, num_hidden_layers=0)
    optim = torch.optim.AdamW([{"params": [p]} for p in model.parameters()], lr=1e-3)
    before = everything(model, optim)

    with pytest.raises(PlanError, match="which param group takes the new .*: 2 of the 3 param"):
        grow(model, optim, to={"layers": 2}, depth=depth.Fresh())

    assert same(everything(model, optim), before)


def test_a_failure_while_the_blocks_are_drawn_takes_the_first_block_out_again():
    model = empty("bert")
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 2)
    before = everything(model, optim)

    def failing(module):
        raise ValueError("out of luck")

    with pytest.raises(CommitError, match="out of luck"):
        grow(model, optim, to={"layers": 2}, depth=depth.Fresh(init=failing))

    assert same(everything(model, optim), before)
    grow(model, optim, to={"layers": 2}, depth=depth.Fresh())


def test_a_config_with_an_entry_per_block_is_refused_by_name():
    model = make("qwen2", tied=True, num_hidden_layers=0)

    with pytest.raises(UnsupportedModelError, match="one entry of layer_types per block"):
        grow(model, to={"layers": 2}, depth=depth.Fresh())


def test_a_model_of_ones_own_says_what_it_needs():
    model, spec = own()

    with pytest.raises(PlanError, match=r"pass depth.Fresh\(block=...\) a block of the model"):
        growkern.plan(model, to={"layers": 2}, depth=depth.Fresh(), spec=spec)
    bare = {name: axes for name, axes in spec.tensors.items() if not name.startswith("blocks.")}
    shallow = replace(spec, tensors=bare, attributes={})
    with pytest.raises(
        UnsupportedModelError, match=r"does not describe blocks.0; describe this block"
    ):
        growkern.plan(model, to={"layers": 2}, depth=depth.Fresh(block=Block(24, 4)), spec=shallow)


def test_a_grown_model_of_first_blocks_grows_on():
    model = empty("llama")
    grow(model, to={"layers": 2}, depth=depth.Fresh())
    before = logits(model.double(), batch()).detach()

    report = grow(model, to={"layers": 4, "hidden": "2x"}, width=width.Lossless())

    assert report.preserves == "function"
    assert (logits(model, batch()) - before).abs().max() < 1e-4


def test_a_checkpoint_of_a_model_of_ones_own_loads_into_a_model_with_its_blocks():
    model, spec = own()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 2)
    given = depth.Fresh(block=Block(24, 4))
    report = growkern.expand_inplace(model, optim, to={"layers": 2}, depth=given, spec=spec)
    train(model, optim, 1)
    start, _ = own()
    whole = Plain()
    other = torch.optim.AdamW(whole.parameters(), lr=1e-3)

    with pytest.raises(PlanError, match="To load a checkpoint of the grown model, build the model"):
        growkern.resume(start, None, report.history, spec=lambda _: spec)
    whole.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optim.state_dict()))

    assert len(start.blocks) == 0
    assert train(whole, other, 2) == train(model, optim, 2)


def test_distributed_data_parallel_reduces_the_gradients_of_first_blocks(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        model = empty("llama")
        wrapped = nn.parallel.DistributedDataParallel(model)
        optim = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
        train(wrapped, optim, 2)

        growkern.expand_inplace(wrapped, optim, to={"layers": 2}, depth=depth.Fresh())

        train(wrapped, optim, 2)
        assert all(optim.state[p]["step"] == 2 for p in model.model.layers.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_without_blocks_does_not_shrink():
    model = empty("llama")
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = everything(model, optim)

    with pytest.raises(PlanError, match="layers: the target 0 is not a size"):
        growkern.shrink_inplace(model, optim, to={"hidden": 12, "heads": 2, "kv_heads": 1})

    assert same(everything(model, optim), before)


def test_a_checkpoint_without_blocks_is_refused_on_disk_and_says_what_grows_it(tmp_path):
    from growkern.checkpoints import grow as checkpoint

    empty("llama").save_pretrained(tmp_path / "small")

    for method, match in ((depth.Fresh(), "by from_pretrained"), (None, "grow by depth=Fresh")):
        with pytest.raises(PlanError, match=match):
            checkpoint.grow(tmp_path / "small", tmp_path / "large", to={"layers": 2}, depth=method)


def test_a_spec_of_no_blocks_for_a_model_that_has_some_is_refused():
    _, spec = own()

    with pytest.raises(UnsupportedModelError, match="blocks.*the spec does not cover this"):
        growkern.expand_inplace(Plain(), to={"layers": 3}, depth=depth.Fresh(), spec=spec)
