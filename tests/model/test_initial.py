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
