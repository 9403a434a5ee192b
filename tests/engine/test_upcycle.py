"""``growkern.upcycle`` turns a dense model into a mixture of experts with equal logits, and the optimizer keeps stepping."""

import copy

import pytest
import torch
from models import EAGER, batch, exact_norms, logits, loss_of, make, train
from states import fail_at

import growkern
from growkern.commit.undo import Undo
from growkern.errors import PlanError, UnsupportedModelError
from growkern.optimizer.update_scale import scale_of

FAMILIES = {
    "llama": "MixtralForCausalLM",
    "mistral": "MixtralForCausalLM",
    "qwen3": "Qwen3MoeForCausalLM",
}


def eager(mixture):
    mixture.set_experts_implementation(EAGER)
    return mixture


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_of_copies_is_the_dense_model(family, experts, top_k, tied, monkeypatch):
    exact_norms(monkeypatch)
    model = make(family, tied=tied).double().eval()
    before = logits(model, batch()).detach()

    mixture = eager(growkern.upcycle(model, experts=experts, top_k=top_k))

    assert type(mixture).__name__ == FAMILIES[family] and not mixture.training
    assert (
        logits(mixture, batch()) - before
    ).abs().max() < 1e-6  # the router's softmax is in float32
    shared = dict(model.named_parameters(remove_duplicate=False))
    for name, p in mixture.named_parameters(remove_duplicate=False):
        assert (p is shared.get(name)) == (".mlp." not in name), name
    assert (
        mixture.config.num_local_experts == experts and mixture.config.num_experts_per_tok == top_k
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_optimizer_holds_the_experts_with_their_share_of_the_moments(family):
    model = make(family, tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 3)
    mlp = model.model.layers[1].mlp
    old = {
        name: {k: v.clone() for k, v in optim.state[p].items()}
        for name, p in mlp.named_parameters()
    }

    mixture = growkern.upcycle(model, optim, experts=4)

    experts = mixture.model.layers[1].mlp.experts
    for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
        both = torch.cat([old["gate_proj.weight"][key], old["up_proj.weight"][key]]) / 4**power
        down = old["down_proj.weight"][key] / 4**power
        for e in range(4):
            assert torch.equal(optim.state[experts.gate_up_proj][key][e], both)
            assert torch.equal(optim.state[experts.down_proj][key][e], down)
    assert optim.state[experts.down_proj]["step"] == 3
    held = [p for group in optim.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, mixture.parameters()))
    assert mixture.model.layers[1].mlp.gate.weight not in optim.state
    before = loss_of(mixture, batch()).item()
    for _ in range(10):
        train(mixture, optim, 1)  # each call trains on the batch of seed 0
    assert loss_of(mixture, batch()) < before


def test_copies_part_and_the_router_learns():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
    mixture = growkern.upcycle(model, optim, experts=4, top_k=1)
    mlp = mixture.model.layers[0].mlp
    router = mlp.gate.weight.detach().clone()

    train(mixture, optim, 3)

    down = mlp.experts.down_proj
    assert all((down[i] - down[j]).abs().max() > 1e-5 for i in range(4) for j in range(i))
    assert (mlp.gate.weight - router).abs().max() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_is_saved_loaded_and_grown(family, tmp_path):
    model = make(family, tied=True).eval()
    mixture = eager(growkern.upcycle(model, experts=4))
    mixture.save_pretrained(tmp_path)

    loaded = type(mixture).from_pretrained(tmp_path, experts_implementation=EAGER).eval()

    assert torch.equal(logits(loaded, batch()), logits(mixture, batch()))
    before = logits(loaded, batch()).detach()
    growkern.expand_inplace(loaded, to="2x")
    assert (logits(loaded, batch()) - before).abs().max() < 1e-5


@pytest.mark.slow
def test_experts_see_in_expectation_their_share_of_the_gradient():
    """Over many routers, an expert's mean gradient is 1 / experts of the dense MLP's gradient, which is the factor of the state rule."""
    model = make("llama", tied=True)
    loss_of(model, batch(n=16)).backward()
    dense = model.model.layers[0].mlp.down_proj.weight.grad.clone()
    total = torch.zeros_like(dense)
    for seed in range(60):
        mixture = growkern.upcycle(model, experts=4, top_k=2, seed=seed)
        mixture.zero_grad()
        loss_of(mixture, batch(n=16)).backward()
        total += mixture.model.layers[0].mlp.experts.down_proj.grad[0]

    assert (total / 60 - dense / 4).norm() < 0.15 * (dense / 4).norm()


@pytest.mark.parametrize(
    ("family", "changes", "options", "error", "says"),
    [
        (
            "gpt2",
            {},
            {"experts": 4},
            UnsupportedModelError,
            "GPT2LMHeadModel has no mixture-of-experts class",
        ),
        ("llama", {"mlp_bias": True}, {"experts": 4}, UnsupportedModelError, "mlp_bias=True"),
        ("llama", {}, {"experts": 2, "top_k": 3}, PlanError, "top_k=3"),
        ("llama", {}, {"experts": 2, "std": 0.0}, PlanError, "std=0.0"),
    ],
)
def test_what_has_no_twin_is_refused(family, changes, options, error, says):
    model = make(family, tied=True, **changes)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    held = list(optim.param_groups[0]["params"])

    with pytest.raises(error, match=says):
        growkern.upcycle(model, optim, **options)

    assert all(p is q for p, q in zip(optim.param_groups[0]["params"], held, strict=True))


def test_state_that_is_no_number_per_element_is_refused():
    model = make("llama", tied=True)
    optim = torch.optim.Adafactor(model.parameters())
    train(model, optim, 1)

    with pytest.raises(growkern.errors.UnsupportedOptimizerError, match="clear the state"):
        growkern.upcycle(model, optim, experts=4)


def test_an_mlp_that_is_not_one_is_refused():
    frozen, spread = (make("llama", tied=True) for _ in range(2))
    frozen.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    up = spread.model.layers[0].mlp.up_proj.weight
    others = [p for p in spread.parameters() if p is not up]
    optim = torch.optim.AdamW([{"params": others}, {"params": [up], "lr": 1e-9}], lr=1e-3)
    part = torch.optim.AdamW(others, lr=1e-3)

    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp: has frozen and trained"):
        growkern.upcycle(frozen, experts=4)
    for one in (optim, part):
        with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp: has tensors in several"):
            growkern.upcycle(spread, one, experts=4)


def test_frozen_mlps_give_frozen_experts_and_gradients_in_flight_come_along():
    model = make("llama", tied=True)
    loss_of(model, batch()).backward()
    down = model.model.layers[0].mlp.down_proj.weight.grad.clone()

    mixture = growkern.upcycle(model, experts=4)
    experts = mixture.model.layers[0].mlp.experts
    assert torch.equal(experts.down_proj.grad, down.expand(4, -1, -1) / 4)

    frozen = make("llama", tied=True)
    frozen.model.layers[0].mlp.requires_grad_(False)
    experts = growkern.upcycle(frozen, experts=4).model.layers[0].mlp.experts
    assert not experts.gate_up_proj.requires_grad and not experts.down_proj.requires_grad


def test_a_mixture_has_the_mode_the_generation_config_and_the_names_of_the_dense_model():
    model = make("llama", tied=True)
    model.generation_config.max_new_tokens = 7
    optim = torch.optim.AdamW(model.named_parameters())
    for training in (True, False):
        one, own = copy.deepcopy((model, optim)) if training else (model, optim)

        mixture = growkern.upcycle(one.train(training), own, experts=2)

        assert {m.training for m in mixture.modules()} == {training}
        assert mixture.generation_config.max_new_tokens == 7
        names = {id(p): name for name, p in mixture.named_parameters()}
        (group,) = own.param_groups
        assert group["param_names"] == [names[id(p)] for p in group["params"]]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_has_a_router_of_its_own_and_the_attention_of_the_dense_model(family):
    model = make(family, tied=True)
    model.set_attn_implementation("eager")  # not the default

    mixture = growkern.upcycle(model, experts=4)

    one, other = (layer.mlp.gate.weight for layer in mixture.model.layers)
    assert (one - other).abs().min() > 0
    assert mixture.config._attn_implementation == "eager"


def test_factors_of_the_dense_model_are_refused_until_they_are_removed():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 1)
    growkern.expand_inplace(model, optim, to={"hidden": 48}, dynamics="exact")
    held = [*map(id, optim.param_groups[0]["params"])]

    with pytest.raises(PlanError, match=r"UpdateScale, whose factors .* call its remove\(\)"):
        growkern.upcycle(model, optim, experts=2)

    assert [*map(id, optim.param_groups[0]["params"])] == held
    scale_of(optim).remove()
    train(growkern.upcycle(model, optim, experts=2), optim, 1)


def test_an_upcycling_that_fails_leaves_the_optimizer_as_it_was(monkeypatch):
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.named_parameters())
    train(model, optim, 1)
    groups = [dict(g, params=[*g["params"]], param_names=[*g["param_names"]]) for g in optim.param_groups]  # fmt: skip
    state = {p: dict(entries) for p, entries in optim.state.items()}
    fail_at(monkeypatch, Undo, "set_dict", MemoryError(), 1)

    with pytest.raises(MemoryError):
        growkern.upcycle(model, optim, experts=2)

    monkeypatch.undo()
    for group, before in zip(optim.param_groups, groups, strict=True):
        assert group["param_names"] == before["param_names"]
        assert [*map(id, group["params"])] == [*map(id, before["params"])]
    assert optim.state.keys() == state.keys()
    train(model, optim, 1)
