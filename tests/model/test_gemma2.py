"""Gemma 2 grows with its gains of ``1 + weight``, norms behind attention and MLP, and embedding multiplied by ``sqrt(hidden)``."""

import copy

import pytest
import torch
from laws import gathered, grad_scale
from models import batch, exact_norms, grow, logits, loss_of, make, train

import growkern
from growkern import depth, width
from growkern.errors import PlanError

NORMS = "layernorm.weight", "model.norm.weight"
SMALL = 1e-12  # rounding in float64


def gains(model, of=lambda p: p):
    return {n: of(p).detach().clone() for n, p in model.named_parameters() if n.endswith(NORMS)}


def scale_of(plan, name, i):
    row = next(row for row in plan.tensors if row.name == name)
    (axis,) = plan.axis_maps(row)
    return axis.index_map.indices[i], axis.weight_scale.expanded()[i]


def check_offset(plan, source, target, tolerance=SMALL):
    """Assert 1 + w' = s (1 + w) element by element."""
    moved = 0
    for name, w in target.items():
        for i in range(len(w)):
            g, s = scale_of(plan, name, i)
            assert abs(1 + float(w[i]) - s * (1 + float(source[name][g]))) < tolerance, (name, i)
            moved += s != 1
    assert moved


@pytest.mark.parametrize("backend", ["torch", None])
@pytest.mark.parametrize("to", ["2x", "1.5x"])
def test_the_sum_of_weight_and_one_is_what_grows(to, backend):
    model = make("gemma2", tied=True).double()
    source = gains(model)
    plan = growkern.plan(model, to=to)

    grow(model, plan=plan, backend=backend)

    check_offset(plan, source, gains(model))


def test_rows_whose_gain_stays_keep_their_bits():
    model = make("gemma2", tied=False)
    source = gains(model)

    grow(model, to="2x")

    for name, w in gains(model).items():
        assert torch.equal(w, source[name].repeat(2)), name


def test_averages_and_averaged_state_follow_the_sum():
    model = make("gemma2", tied=True).double()
    optim = torch.optim.ASGD(model.parameters(), lr=1e-2, t0=0)
    train(model, optim, 2)
    ema = torch.optim.swa_utils.AveragedModel(model)
    train(model, optim, 2)
    average, state = gains(ema.module), gains(model, lambda p: optim.state[p]["ax"])
    plan = growkern.plan(model, optim, to="1.5x", dynamics=None)

    grow(model, optim, plan=plan, ema=ema)

    check_offset(plan, average, gains(ema.module))
    check_offset(plan, state, gains(model, lambda p: optim.state[p]["ax"]))


def test_moments_of_gains_follow_the_law_without_the_offset():
    model = make("gemma2", tied=True).double()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optim, 2)
    plan = growkern.plan(model, optim, to="2x", width=width.Lossless(noise=1), dynamics=None)
    expected = {
        row.name: gathered(plan, row, optim.state[p]["exp_avg"]) * grad_scale(plan, row)
        for row in plan.tensors
        if row.name.endswith(NORMS) and (p := model.get_parameter(row.name)) is not None
    }

    grow(model, optim, plan=plan)

    assert len(expected) == 2 * 4 + 1
    for name, moment in expected.items():
        found = optim.state[model.get_parameter(name)]["exp_avg"]
        assert (found - moment).abs().max() < SMALL, name


def test_masters_in_full_precision_follow_the_sum():
    model = make("gemma2", tied=True).bfloat16()
    source = gains(model)
    master_weights = {p: torch.nn.Parameter(p.detach().float() + 1e-3) for p in model.parameters()}
    held = gains(model, lambda p: master_weights[p])
    optim = torch.optim.AdamW(master_weights.values(), lr=1e-3)
    plan = growkern.plan(model, to="1.5x", dynamics=None)

    grow(model, optim, plan=plan, master_weights=master_weights)

    check_offset(plan, held, gains(model, lambda p: master_weights[p]), 1e-6)
    check_offset(plan, source, gains(model), 2**-7)


@pytest.mark.parametrize("hidden", [24, 36])
def test_new_blocks_are_the_identity_through_their_post_norm_gains(hidden, monkeypatch):
    exact_norms(monkeypatch)
    model = make("gemma2", tied=True).double()
    before = logits(model, batch()).detach()
    loss_of(model, batch()).backward()
    largest = max(p.grad.norm() for p in model.parameters())
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)

    report = grow(model, optim, to={"hidden": hidden, "layers": 5})

    new = [model.model.layers[i] for i in (1, 3, 4)]
    off = (logits(model, batch()) - before).abs().max()
    assert report.function_preserving and off < (1e-10 if hidden > 24 else 1e-300)
    for layer in new:
        for post in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            assert torch.equal(post.weight, torch.full_like(post.weight, -1))
        assert layer.self_attn.o_proj.weight.any() and layer.mlp.down_proj.weight.any()
    model.zero_grad()
    loss_of(model, batch()).backward()
    assert max(p.grad.norm() for p in model.parameters()) < 10 * largest
    kinds = ["sliding_attention"] * 2 + ["full_attention"] * 3
    assert model.config.layer_types == kinds
    assert [layer.self_attn.layer_type for layer in model.model.layers] == model.config.layer_types
    train(model, optim, 3)
    assert all(not torch.equal(x.post_attention_layernorm.weight, -torch.ones(hidden)) for x in new)


def test_the_scale_of_the_embedding_follows_hidden(tmp_path):
    model = make("gemma2", tied=True).eval()
    grow(model, to={"hidden": 44, "layers": 3})
    table = model.model.embed_tokens

    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()

    assert table.scalar_embed_scale == 44**0.5 == loaded.model.embed_tokens.scalar_embed_scale
    assert torch.equal(table.embed_scale, torch.tensor(44**0.5))
    assert torch.equal(logits(loaded, batch()), logits(model, batch()))
    assert [layer.self_attn.scaling for layer in model.model.layers] == [10**-0.5] * 3


def run_of(optimizer, decay, monkeypatch, **options):
    exact_norms(monkeypatch)
    model = make("gemma2", tied=True).double()
    own = {"t0": 4} if optimizer is torch.optim.ASGD else {"eps": 1e-4}
    optim = optimizer(model.parameters(), lr=3e-3, weight_decay=decay, **own)
    train(model, optim, 5)
    source, source_optim = copy.deepcopy((model, optim))

    quiet = width.Lossless(noise=0)
    report = grow(model, optim, to="1.5x", width=quiet, dynamics="exact", **options)

    grown, expected = train(model, optim, 5, first=5), train(source, source_optim, 5, first=5)
    return max(abs(x - y) for x, y in zip(grown, expected, strict=True)), report


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize(
    "optimizer",
    [torch.optim.AdamW, torch.optim.Adam, torch.optim.ASGD, growkern.optim.AdamW],
    ids=str,
)
def test_exact_dynamics_hold_under_decay_or_it_is_said(optimizer, decay, monkeypatch):
    off, report = run_of(optimizer, decay, monkeypatch)

    said = any("not their gain" in note for note in report.notes)
    assert (off > 1e-9) == said == (decay > 0 and optimizer is growkern.optim.AdamW), off
    assert (report.preserves == "trajectory") == (not said)


def test_a_second_growth_composes(monkeypatch):
    exact_norms(monkeypatch)
    model = make("gemma2", tied=True).double()
    optim = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-4, weight_decay=0.5)
    train(model, optim, 4)
    source, source_optim = copy.deepcopy((model, optim))
    quiet = dict(width=width.Lossless(noise=0), dynamics="exact")

    grow(model, optim, to="1.5x", **quiet)
    grow(model, optim, to="2x", **quiet)

    grown, expected = train(model, optim, 6, first=4), train(source, source_optim, 6, first=4)
    assert grown == pytest.approx(expected, abs=1e-9)


def test_a_plan_with_another_offset_is_refused():
    model = make("gemma2", tied=True)
    plan = growkern.plan(model, to="2x")
    text = plan.to_json().replace('"offset": 1.0', '"offset": 0.5')

    with pytest.raises(PlanError, match="another offset"):
        grow(model, plan=growkern.GrowthPlan.from_json(text))


def test_stacked_blocks_alternate_as_their_sources_do():
    model = make("gemma2", tied=True)

    grow(model, to={"layers": 4}, depth=depth.Stack())

    assert model.config.layer_types == ["sliding_attention", "full_attention"] * 2


@pytest.mark.slow
def test_the_steps_of_rprop_are_no_gains(monkeypatch):
    exact_norms(monkeypatch)
    model = make("gemma2", tied=True).double()
    optim = torch.optim.Rprop(model.parameters(), lr=1e-3)
    train(model, optim, 5)
    source, source_optim = copy.deepcopy((model, optim))

    grow(model, optim, to="1.5x", width=width.Lossless(noise=0), dynamics="exact")

    grown, expected = train(model, optim, 5, first=5), train(source, source_optim, 5, first=5)
    assert grown == pytest.approx(expected, abs=1e-9)
