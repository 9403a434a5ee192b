"""``depth.Fresh`` draws new blocks as transformers does when it builds a stock model of the target's config."""

import copy

import pytest
import torch
import transformers
from models import FAMILIES, Plain, batch, grow, logits, make, spec_of, train
from torch import nn

import growkern
from growkern import depth, width
from growkern.errors import CommitError, PlanError, UnsupportedModelError

SIZES = dict(hidden_size=128, num_attention_heads=4, num_hidden_layers=2, vocab_size=66)
LARGE = {  # sizes with enough elements for a standard deviation that is right to 1 %
    "llama": SIZES | dict(num_key_value_heads=2, intermediate_size=320, head_dim=32),
    "gpt2": dict(n_embd=128, n_head=4, n_layer=2, vocab_size=66),
    "bert": SIZES | dict(intermediate_size=320),
}


def stack_of(model):
    return growkern.describe(model, spec_of(model)).blocks.path


def new_blocks(model, first):
    return {
        f"{stack_of(model)}.{i}.{name}": p
        for i, block in enumerate(model.get_submodule(stack_of(model)))
        for name, p in block.named_parameters()
        if i >= first
    }


def everything(model, optim):
    """Collect the bits of a model, its optimizer and torch's generator."""
    tensors = [*model.state_dict().values(), torch.get_rng_state()]
    tensors += [v for s in optim.state.values() for v in s.values() if torch.is_tensor(v)]
    groups = [[id(p) for p in group["params"]] for group in optim.param_groups]
    return [t.clone() for t in tensors], groups, [name for name, _ in model.named_modules()]


def same(one, other):
    pairs = zip(one[0], other[0], strict=True)
    return all(torch.equal(a, b) for a, b in pairs) and one[1:] == other[1:]


@pytest.mark.slow
@pytest.mark.parametrize("to", [{"layers": 4}, {"hidden": 256, "layers": 4}], ids=str)
@pytest.mark.parametrize("family", LARGE)
def test_fresh_blocks_are_distributed_as_those_of_a_stock_model_of_the_target(family, to):
    model = make(family, tied=True, initializer_range=0.05, **LARGE[family])

    grow(model, to=to, depth=depth.Fresh())

    torch.manual_seed(1)
    stock = dict(type(model)(model.config).named_parameters())
    found = new_blocks(model, 2)
    assert len(found) == 2 * len(new_blocks(model, 3))
    for name, p in found.items():
        wanted = stock[name]
        assert p.shape == wanted.shape and p.dtype == wanted.dtype
        if (std := wanted.std()) == 0:
            assert torch.equal(p, wanted), name
            continue
        assert abs(p.std() / std - 1) < 0.05, name
        assert abs(p.mean()) < 5 * std / p.numel() ** 0.5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_initializes_its_own_blocks_and_keeps_the_old_ones(family):
    model = make(family, tied=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    layers = growkern.describe(model, spec_of(model)).sizes["layers"]
    generator = torch.get_rng_state()

    report = grow(model, to={"layers": layers + 2}, depth=depth.Fresh())

    assert torch.equal(torch.get_rng_state(), generator)
    assert report.preserves == "nothing" and "initialized anew" in str(report)
    assert "warm the learning rate up" in str(report)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert all(p.isfinite().all() for p in after.values())
    assert logits(model, batch()).isfinite().all()


def test_equal_seeds_draw_equal_bits_and_others_do_not():
    found = []
    for seed in (0, 0, 1):
        model = make("llama", tied=True)
        grow(model, to={"layers": 4}, depth=depth.Fresh(), seed=seed)
        torch.randn(3)  # the draws do not use the global generator
        found.append([p for p in new_blocks(model, 2).values() if p.dim() > 1])

    for one, again, other in zip(*found, strict=True):
        assert torch.equal(one, again) and not torch.equal(one, other)
    assert not torch.equal(found[0][0], found[0][len(found[0]) // 2])  # two new blocks differ


@pytest.mark.parametrize(
    ("at", "order"), [("top", "0 1 +0 +1 +0"), ("even", "0 +0 1 +1 +1")], ids=["top", "even"]
)
def test_new_blocks_go_on_top_or_between(at, order):
    model = make("llama", tied=True)

    plan = growkern.plan(model, to={"layers": 5}, depth=depth.Fresh(at))

    assert f"blocks  {order}   (+ new, initialized anew; modules of)" in str(plan)
    assert growkern.GrowthPlan.from_json(plan.to_json()) == plan


def test_alternating_layers_go_on_alternating():
    model = make("gemma2", tied=True)

    grow(model, to={"layers": 4}, depth=depth.Fresh())

    assert model.config.layer_types == ["sliding_attention", "full_attention"] * 2


def test_an_unknown_place_is_refused():
    with pytest.raises(PlanError, match="Fresh: at='bottom' is unknown; pass 'top' or 'even'"):
        growkern.plan(make("llama", tied=True), to={"layers": 4}, depth=depth.Fresh("bottom"))


@pytest.mark.parametrize("state", ["exact", "asymmetric", "drop"])
def test_the_optimizer_starts_new_parameters_from_nothing_and_trains_them(state):
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    train(model, optim, 3)

    grow(model, optim, to={"hidden": "1.5x", "layers": 4}, depth=depth.Fresh(), state=state)

    new = new_blocks(model, 2)
    held = {id(p) for group in optim.param_groups for p in group["params"]}
    assert all(id(p) in held and p not in optim.state for p in new.values())
    before = {name: p.detach().clone() for name, p in new.items()}
    losses = train(model, optim, 2)
    assert all(torch.isfinite(torch.tensor(losses)))
    for name, p in new.items():
        assert optim.state[p]["step"] == 2 and not torch.equal(p, before[name]), name


@pytest.mark.parametrize("memory", ["stage", "lean"])
def test_averages_masters_and_memory_modes_get_the_same_draws(memory):
    model = make("llama", tied=True).bfloat16()
    average = copy.deepcopy(model)
    master_weights = {p: nn.Parameter(p.detach().float()) for p in model.parameters()}
    optim = torch.optim.AdamW(master_weights.values(), lr=1e-3)
    whole = make("llama", tied=True)

    to = {"layers": 4, "ffn": "2x"}
    grow(
        model,
        optim,
        to=to,
        depth=depth.Fresh(),
        ema=average,
        master_weights=master_weights,
        memory=memory,
    )
    grow(whole, to=to, depth=depth.Fresh())

    pairs = zip(new_blocks(model, 2).items(), new_blocks(average, 2).values(), strict=True)
    for (name, p), mean in pairs:
        assert p.dtype == torch.bfloat16 and torch.equal(p, mean)
        assert torch.equal(master_weights[p], p.float())
        assert torch.equal(whole.get_parameter(name).bfloat16(), p), name


def test_buffers_of_a_block_are_copied_and_grow():
    model = make("plain", tied=True)
    for i, block in enumerate(model.blocks):
        block.register_buffer("count", torch.full((24,), float(i)))
    spec = spec_of(model)
    spec.tensors.update({f"blocks.{i}.count": spec.tensors["blocks.0.down.bias"] for i in range(2)})

    growkern.expand_inplace(model, to={"layers": 4, "hidden": 48}, depth=depth.Fresh(), spec=spec)

    assert [block.count.tolist() for block in model.blocks] == [[i] * 48 for i in (0, 1, 0, 1)]


def test_models_of_your_own_are_initialized_by_their_init_weights():
    """nanoGPT writes ``_init_weights`` in this way."""

    class Own(Plain):
        def _init_weights(self, module):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.5)

    torch.manual_seed(0)
    model = Own()

    growkern.expand_inplace(model, to={"layers": 3}, depth=depth.Fresh(), spec=model.spec())

    block = model.blocks[2]
    assert abs(block.up.weight.std() - 0.5) < 0.05
    assert 0 < block.up.bias.abs().max() <= 24**-0.5  # nn.Linear draws its bias itself


class Gain(nn.Module):
    """A norm that only its constructor initializes."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.eps = 1e-5

    def forward(self, x):
        return nn.functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


def test_blocks_that_nothing_initializes_are_refused_by_name_before_anything_changes():
    model = make("plain", tied=True)
    for block in model.blocks:
        block.ln_2 = Gain(24)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 1)
    before = everything(model, optim)

    with pytest.raises(
        UnsupportedModelError, match=r"nothing initializes ln_2.weight \(Gain\).*Stack\(\)"
    ):
        grow(model, optim, to={"layers": 3}, depth=depth.Fresh())

    assert same(everything(model, optim), before)


@pytest.mark.parametrize("block", ["of the check", "second"])
@pytest.mark.parametrize("memory", ["stage", "lean"])
def test_a_failure_while_initializing_leaves_everything_as_it_was(memory, block, monkeypatch):
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 2)
    before = everything(model, optim)
    original, calls = type(model)._init_weights, []
    n_modules = len([*model.model.layers[0].modules()])
    last = 1 if block == "of the check" else 3 * n_modules + 5  # the check or the second new block

    def failing(self, module):
        calls.append(module)
        if len(calls) == last:
            raise ValueError("out of luck")
        return original(self, module)

    monkeypatch.setattr(transformers.LlamaPreTrainedModel, "_init_weights", failing)

    with pytest.raises((UnsupportedModelError, CommitError), match="out of luck"):
        grow(model, optim, to={"hidden": "2x", "layers": 4}, depth=depth.Fresh(), memory=memory)

    assert same(everything(model, optim), before)
    monkeypatch.undo()
    grow(model, optim, to={"hidden": "2x", "layers": 4}, depth=depth.Fresh(), memory=memory)
    train(model, optim, 1)


def test_a_checkpoint_from_after_the_growth_loads_once_the_growth_is_replayed():
    model = make("gpt2", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 1)
    grow(model, optim, to={"hidden": "2x", "layers": 4}, depth=depth.Fresh(), width=width.FPI())
    train(model, optim, 1)
    again = make("gpt2", tied=True, seed=1)
    other = torch.optim.AdamW(again.parameters(), lr=1e-3)

    growkern.resume(again, other, model.config.growkern_history)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optim.state_dict()))

    assert train(again, other, 2) == train(model, optim, 2)


def test_a_plan_that_draws_a_block_of_the_source_is_refused():
    model = make("llama", tied=True)
    text = growkern.plan(model, to={"layers": 4}, depth=depth.Fresh()).to_json()
    plan = growkern.GrowthPlan.from_json(text.replace('"drawn": false', '"drawn": true'))

    with pytest.raises(PlanError, match="is initialized anew, but its block is not new"):
        growkern.expand_inplace(model, plan=plan)


def test_the_command_line_refuses_what_needs_a_live_model(tmp_path):
    from growkern.checkpoints import grow as checkpoint

    make("llama", tied=True).save_pretrained(tmp_path / "small")

    with pytest.raises(PlanError, match="load the checkpoint by from_pretrained"):
        checkpoint.grow(
            tmp_path / "small", tmp_path / "large", to={"layers": 4}, depth=depth.Fresh()
        )


def constant(module):
    """Initialize matrices to 0.25, gains to 1 and biases to 0."""
    for name, p in module.named_parameters(recurse=False):
        nn.init.constant_(p, 0.25 if p.dim() > 1 else float(name == "weight"))


def linear_layers(module):
    """Initialize linear layers, and no norm."""
    if isinstance(module, nn.Linear):
        nn.init.constant_(module.weight, 0.25)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_function_initializes_new_blocks_in_place_of_the_models_own_code(family):
    model = make(family, tied=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    grow(model, to={"layers": 4}, depth=depth.Fresh(init=constant))

    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in before.items())
    for name, p in new_blocks(model, 2).items():
        wanted = 0.25 if p.dim() > 1 else float(name.endswith("weight"))
        assert p.unique().tolist() == [wanted], name


def test_a_function_sees_every_module_of_a_copy_as_apply_does_and_draws_from_the_seed():
    model, seen = make("llama", tied=True), []

    def draw(module):
        seen.append(module)
        for p in module.parameters(recurse=False):
            nn.init.normal_(p)

    grow(model, to={"layers": 3}, depth=depth.Fresh(init=draw), seed=3)

    block = model.model.layers[2]
    kinds = []
    block.apply(lambda module: kinds.append(type(module)))  # torch's order
    assert [*map(type, seen[-len(kinds) :])] == kinds
    assert not {*seen} & {*model.modules()}
    again = make("llama", tied=True)
    grow(again, to={"layers": 3}, depth=depth.Fresh(init=draw), seed=3)
    pairs = zip(block.parameters(), again.model.layers[2].parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def test_constructors_initialize_what_a_function_leaves_out():
    model = make("plain", tied=True)

    grow(model, to={"layers": 3}, depth=depth.Fresh(init=linear_layers))

    block = model.blocks[2]
    assert block.up.weight.unique().tolist() == [0.25]
    assert block.ln_1.weight.unique().tolist() == [1] and not block.ln_1.bias.any()
    assert 0 < block.up.bias.abs().max() <= 24**-0.5  # nn.Linear draws its bias itself


def test_what_neither_a_function_nor_a_constructor_initializes_is_refused_by_name():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 1)
    before = everything(model, optim)

    with pytest.raises(UnsupportedModelError, match=r"nothing initializes input_layernorm.weight"):
        grow(model, optim, to={"layers": 3}, depth=depth.Fresh(init=linear_layers))

    assert same(everything(model, optim), before)


def failing(module):
    raise ValueError("out of luck")


def test_a_function_that_fails_leaves_everything_as_it_was():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 1)
    before = everything(model, optim)

    with pytest.raises(UnsupportedModelError, match="out of luck"):
        grow(model, optim, to={"layers": 3}, depth=depth.Fresh(init=failing))

    assert same(everything(model, optim), before)


def test_a_function_initializes_what_no_code_of_the_model_does():
    model = make("plain", tied=True)
    for block in model.blocks:
        block.ln_2 = Gain(24)

    grow(model, to={"layers": 3}, depth=depth.Fresh(init=constant))

    assert model.blocks[2].ln_2.weight.unique().tolist() == [1]


def test_a_plan_does_not_hold_the_function_and_takes_it_beside():
    model, direct, method = (
        make("llama", tied=True),
        make("llama", tied=True),
        depth.Fresh(init=constant),
    )
    text = growkern.plan(model, to={"layers": 4}, depth=method).to_json()
    plan = growkern.GrowthPlan.from_json(text)
    assert (
        plan.depth == "Fresh(at='top', init=constant)" and str(depth.Fresh()) == "Fresh(at='top')"
    )

    with pytest.raises(PlanError, match="init=constant.*pass the method as depth= beside plan="):
        growkern.expand_inplace(model, plan=plan)
    with pytest.raises(PlanError, match="plan= already says what to grow"):
        growkern.expand_inplace(model, plan=plan, depth=depth.Fresh(init=linear_layers))
    growkern.expand_inplace(model, plan=plan, depth=method)
    grow(direct, to={"layers": 4}, depth=method)

    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), direct.parameters(), strict=True)
    )


@pytest.mark.parametrize("family", ["llama", "plain"])
def test_a_growth_by_a_function_is_replayed_from_its_plan_and_trains_on(family):
    """The model's own code initializes not every parameter of the plain model, and the replay has no function."""
    models = [make(family, tied=True), make(family, tied=True, seed=1)]
    for block in (block for model in models if family == "plain" for block in model.blocks):
        block.ln_2 = Gain(24)
    model, again = models
    optim, other = (torch.optim.AdamW(m.parameters(), lr=1e-3) for m in models)
    train(model, optim, 2)
    report = grow(model, optim, to={"layers": 4}, depth=depth.Fresh(init=constant))
    train(model, optim, 1)

    growkern.resume(again, other, report.history, spec=spec_of)
    assert all(p.isnan().all() for p in new_blocks(again, 2).values())
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optim.state_dict()))

    assert '"plan"' in report.history[-1] and "init=constant" in report.history[-1]
    assert train(again, other, 2) == train(model, optim, 2)


def test_a_schedule_grows_by_a_function():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-9)
    schedule = growkern.GrowthSchedule(
        [growkern.At(step=2, to={"layers": 3}, depth=depth.Fresh(init=constant))]
    )
    schedule.attach(model, optim)

    train(model, optim, 3)

    assert "init=constant" in schedule.state_dict()["history"][0]
    assert abs(model.model.layers[2].mlp.up_proj.weight - 0.25).max() < 1e-6
