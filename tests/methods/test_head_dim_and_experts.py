"""Growth of head_dim and of experts preserves the function; larger heads train, copied experts diverge, and checkpoints reload."""

import copy

import pytest
import torch
import transformers
from laws import gathered, grad_scale
from models import (
    EAGER,
    POST_NORM,
    batch,
    exact_norms,
    grow,
    inputs,
    logits,
    loss_of,
    make,
    spec_of,
    train,
)

import growkern
from growkern import width
from growkern.errors import PlanError

ROPE = ["gemma2", "llama", "mistral", "qwen2", "mixtral"]
NORMED = ["qwen3", "qwen3_moe"]  # families with norms of queries and keys
LEARNED = ["t5", "gpt2", "opt", "bert", "roberta", "vit", "encoder", "encoder_post"]
ROPE_OF_HIDDEN = ["gpt_neox", "modernbert"]
HEADS = [*ROPE, *NORMED, *LEARNED, *ROPE_OF_HIDDEN]
MOE = ["mixtral", "qwen3_moe"]
TARGETS = {
    "3x": {"head_dim": "3x"},
    "2x-and-hidden": {"head_dim": "2x", "hidden": "2x"},
    "deeper": {"head_dim": "2x", "layers": 4},
}


def model_of(family):
    """Make a model; of GPT-NeoX, RoPE rotates half of the eight coordinates of a head."""
    if family != "gpt_neox":
        return make(family, tied=True)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return make(family, tied=True, hidden_size=32, rope_parameters=rope)


def eager(family):
    """Return the options of ``from_pretrained`` that choose the tests' implementation of experts."""
    return {"experts_implementation": EAGER} if family in MOE else {}


@pytest.fixture
def exact_routers(monkeypatch):
    """Let the routers of transformers compute in the input's dtype."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(
        torch.nn.functional, "softmax", lambda x, dim, dtype=None, **_: softmax(x, dim=dim)
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", HEADS)
def test_larger_heads_compute_what_they_computed(family, target, monkeypatch, exact_routers):
    exact_norms(monkeypatch)
    model = model_of(family).double().eval()
    before = logits(model, batch()).detach()

    report = grow(model, to=TARGETS[target])

    assert report.function_preserving
    assert (logits(model, batch()) - before).abs().max() < 1e-10


@pytest.mark.parametrize("family", [f for f in LEARNED if f not in POST_NORM])
def test_heads_without_rope_grow_to_any_size(family):
    model = make(family, tied=True).double().eval()
    before = logits(model, batch()).detach()

    grow(model, to={"head_dim": 7})

    assert (logits(model, batch()) - before).abs().max() < 1e-10


@pytest.mark.parametrize("family", HEADS)
def test_everything_in_larger_heads_trains_within_two_steps(family, monkeypatch):
    exact_norms(monkeypatch)
    model = model_of(family).double()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 2)
    source = copy.deepcopy(model)

    grow(model, optim, to={"head_dim": "2x"})
    found = growkern.verify(source, model, inputs(model, batch(n=16)), optim)

    keys = ("k_proj.bias", "key.bias", "c_attn.bias", "in_proj_bias", "query_key_value.bias")
    dead = {name: n for name, n in found.dead.items() if not name.endswith(keys)}
    assert not (dead or found.copies or found.state or found.unheld), str(found)
    assert found.same_function, str(found)


@pytest.mark.parametrize("family", [*ROPE, *LEARNED, *ROPE_OF_HIDDEN])
def test_gradients_of_what_is_kept_follow_the_law(family, monkeypatch, exact_routers):
    """Autograd gives the law's gradient where its scale is not 0; elsewhere, as in zeroed queries, the gradient breaks the symmetry."""
    exact_norms(monkeypatch)
    model = model_of(family).double()
    loss_of(model, batch()).backward()
    source = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    quiet = width.Lossless(noise=0)
    plan = growkern.plan(model, to={"head_dim": "2x"}, width=quiet, spec=spec_of(model))

    grow(model, plan=plan)
    model.zero_grad()
    loss_of(model, batch()).backward()

    for row in plan.tensors:
        if row.name not in source:
            continue
        scale = grad_scale(plan, row)
        error = (
            model.get_parameter(row.name).grad - gathered(plan, row, source[row.name]) * scale
        ).abs()
        assert error[(scale != 0).expand_as(error)].max() < 1e-9, row.name


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "mixtral", "gpt2", "bert", "modernbert", "vit"]
)
def test_larger_heads_are_saved_and_loaded(family, tmp_path):
    model = model_of(family).eval()
    grow(model, to={"head_dim": "2x"})

    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, **eager(family)).eval()

    assert torch.equal(logits(loaded, batch()), logits(model, batch()))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox", "mixtral"])
def test_larger_heads_generate_with_a_cache_what_they_generated(family):
    model = model_of(family).eval()
    ids = batch(n=1)[:, :4]
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    before = model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    grow(model, to={"head_dim": "2x"})

    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **options), before)


def test_a_pair_keeps_its_angle():
    """RoPE turns coordinate j of a half of 3, and coordinate 2 j of a half of 6, by the same theta ** (-j / 3)."""
    model = make("llama", tied=True)
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone().view(4, 2, 3, 24)

    grow(model, to={"head_dim": 12}, width=width.Lossless(noise=0))

    after = model.model.layers[0].self_attn.q_proj.weight.detach().view(4, 2, 6, 24)
    assert torch.allclose(after[:, :, ::2], before * 2**0.5)
    assert not after[:, :, 1::2].any()
    frequencies = 1 / 10000 ** (torch.arange(6) / 6)
    assert torch.allclose(model.model.rotary_emb.inv_freq, frequencies)


@pytest.mark.parametrize(
    ("family", "to", "says"),
    [
        ("llama", {"head_dim": 9}, "whole multiples of 6 only, not at 9; nearest: 6, 12"),
        ("plain", {"head_dim": 12}, "does not tell queries from keys"),
        ("mixtral", {"experts": 8}, "needs top_k=4, not 2"),
        ("mixtral", {"experts": 6, "top_k": 3}, "nearest whole multiples: 4, 8"),
        ("mixtral", {"top_k": 4}, "needs top_k=2, not 4"),
    ],
)
def test_what_no_map_gives_is_refused_with_what_does(family, to, says):
    model = make(family, tied=True)
    before = {name: p.clone() for name, p in model.named_parameters()}

    with pytest.raises(PlanError, match=says):
        grow(model, to=to)

    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_rope_that_depends_on_head_dim_is_refused():
    yarn = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(PlanError, match="RoPE of type 'yarn' depends on it"):
        grow(make("llama", tied=True, rope_parameters=yarn), to={"head_dim": 12})


@pytest.mark.parametrize(
    "method", [width.FPI(), width.HyperClone(), width.Lemon(), width.CopyAndPad()]
)
def test_other_methods_say_which_one_grows_heads_and_experts(method):
    for to in ({"head_dim": 12}, {"experts": 8, "top_k": 4}):
        with pytest.raises(PlanError, match=r"width\.Lossless"):
            grow(make("mixtral", tied=True), to=to, width=method)


@pytest.mark.parametrize(
    "to", [{"experts": 8, "top_k": 4}, {"experts": 12, "top_k": 6, "hidden": 48}]
)
@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("family", MOE)
def test_copied_experts_share_what_one_was_given(
    family, norm_topk_prob, to, monkeypatch, exact_routers
):
    exact_norms(monkeypatch)
    changes = {"norm_topk_prob": norm_topk_prob} if family == "qwen3_moe" else {}
    model = make(family, tied=True, **changes).double().eval()
    before = logits(model, batch()).detach()

    report = grow(model, to=to)

    assert report.function_preserving and f"{to['top_k']} experts, not 2" in str(report)
    assert (logits(model, batch()) - before).abs().max() < 1e-10
    assert model.config.num_experts_per_tok == to["top_k"]


@pytest.mark.parametrize("family", MOE)
def test_a_mixture_of_twice_as_many_experts_is_the_run_it_was(family, monkeypatch, exact_routers):
    """The losses stay equal only if moments, learning rates, eps and decay of copied experts are all right."""
    exact_norms(monkeypatch)
    models, optims = [], []
    for _ in range(2):
        model = make(family, tied=True).double()
        optim = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        train(model, optim, 5)
        models.append(model)
        optims.append(optim)

    grow(
        models[1],
        optims[1],
        to={"experts": 8, "top_k": 4},
        width=width.Lossless(noise=0),
        dynamics="exact",
    )
    source, grown = (train(m, o, 10, first=5) for m, o in zip(models, optims, strict=True))

    assert max(abs(a - b) for a, b in zip(source, grown, strict=True)) < 1e-9


def test_noise_parts_the_copies_of_an_expert():
    model = make("mixtral", tied=True).double()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    grow(model, optim, to={"experts": 8, "top_k": 4})
    train(model, optim, 2)

    for name, p in model.named_parameters():
        if ".mlp." in name:
            assert (p[:4] - p[4:]).abs().flatten(1).amax(1).min() > 1e-6, name


def test_experts_are_saved_and_loaded(tmp_path):
    model = make("mixtral", tied=True).eval()
    grow(model, to={"experts": 8, "top_k": 4, "head_dim": 12})

    model.save_pretrained(tmp_path)
    auto = transformers.AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path, **eager("mixtral")).eval()

    assert torch.equal(logits(loaded, batch()), logits(model, batch()))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "t5"])
def test_no_second_moment_is_zero_under_an_old_step(family):
    """Queries that start at 0 copy no source element; a second moment of 0 would make their first updates many times too large."""
    model = make(family, tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 3)
    squares = {n: optim.state[p]["exp_avg_sq"] for n, p in model.named_parameters()}
    seen = {name for name, square in squares.items() if square.all()}

    grow(model, optim, to={"head_dim": "2x"})

    params = dict(model.named_parameters())
    assert seen and all(optim.state[params[name]]["exp_avg_sq"].all() for name in seen)
    for name, p in params.items():
        if name.endswith("q_proj.weight"):
            new = (p == 0).all(1)
            # a norm of queries reads copies, so that only Llama has queries that start at 0
            assert new.sum() == (len(p) // 2 if family == "llama" else 0)
            assert not optim.state[p]["exp_avg"][new].any()


@pytest.mark.parametrize("family", MOE)
def test_the_routers_own_loss_is_what_it_was(family, monkeypatch, exact_routers):
    """Under ``output_router_logits``, the auxiliary loss's coefficient falls as the number of experts rises, in model and config."""
    exact_norms(monkeypatch)
    runs = []
    for grown in (False, True):
        model = make(
            family, tied=True, output_router_logits=True, router_aux_loss_coef=0.5
        ).double()
        optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for step in range(6):
            if grown and step == 2:
                to = {"experts": 8, "top_k": 4}
                grow(model, optim, to=to, width=width.Lossless(noise=0), dynamics="exact")
                assert (model.num_experts, model.num_experts_per_tok) == (8, 4)
                assert model.config.router_aux_loss_coef == model.router_aux_loss_coef == 0.25
            loss = model(batch(seed=step), labels=batch(seed=step)).loss
            optim.zero_grad()
            loss.backward()
            optim.step()
            losses.append(loss.item())
        runs.append(losses)

    assert max(abs(a - b) for a, b in zip(*runs, strict=True)) < 1e-9


@pytest.mark.parametrize("kind", ["SGD", "ASGD", "Adam"])
@pytest.mark.parametrize("dynamics", ["mup", "exact"])
def test_any_optimizer_steps_after_heads_have_grown(kind, dynamics):
    model = make("llama", tied=True).double()
    optim = getattr(torch.optim, kind)(model.parameters(), lr=1e-3)
    train(model, optim, 2)

    grow(model, optim, to={"head_dim": "2x"}, dynamics=dynamics)

    assert all(torch.isfinite(torch.tensor(train(model, optim, 3))))
