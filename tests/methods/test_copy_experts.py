"""CopyExperts adds copies of experts at an unchanged top_k, with noise on their router rows; expert_utility says which to copy."""

import copy
import json

import pytest
import torch
from models import batch, grow, loss_of, make, train
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import growkern
from growkern import GrowthPlan, width
from growkern.errors import PlanError, UnsupportedModelError
from growkern.model.describe import describe
from growkern.planning.check import check

MOE = ["mixtral", "qwen3_moe"]
CHOICES = {  # utility, number of experts after -> the experts that are copied, by hand
    "in turn": (None, 8, [0, 1, 2, 3]),
    "in turn, not all": (None, 10, [0, 1, 2, 3, 0, 1]),
    "one": ((8, 1, 1, 1), 8, [0, 0, 0, 0]),
    "by utility per copy": ((4.0, 6.0, 1.0, 0.0), 9, [1, 0, 1, 0, 1]),
}


def trained(family, **options):
    model = make(family, tied=True, **options).double()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 3)
    loss_of(model, batch()).backward()
    return model, optim


@pytest.mark.parametrize(("utility", "n", "copied"), CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("family", MOE)
def test_copies_equal_their_experts_and_state_is_divided_among_them(family, utility, n, copied):
    model, optim = trained(family)
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    states = {name: copy.deepcopy(optim.state[p]) for name, p in model.named_parameters()}
    sources = [0, 1, 2, 3, *copied]

    report = grow(model, optim, to={"experts": n}, width=width.CopyExperts(utility))

    assert report.preserves == "nothing" and report.grad_norm_factor is None
    assert "the router chooses other experts" in str(report)
    assert "equal copies stay equal" not in str(report)
    assert model.config.num_experts_per_tok == 2 and {*report.lr_factors} == {1.0}
    for name, p in model.named_parameters():
        old, state = tensors[name], optim.state[p]
        if "experts" not in name and "mlp.gate." not in name:
            assert torch.equal(p, old) and torch.equal(state["exp_avg"], states[name]["exp_avg"])
            continue
        assert len(p) == n
        for i, j in enumerate(sources):
            count = sources.count(j)  # tokens are divided among the copies of an expert
            if i < 4 or "experts" in name:
                assert torch.equal(p[i], old[j]), name
            else:
                assert 0 < (p[i] - old[j]).abs().max() < 0.0347, name  # 3.46 x 0.01
            assert torch.allclose(p.grad[i], grads[name][j] / count, rtol=1e-12, atol=0)
            for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
                wanted = states[name][key][j] / count**power
                assert torch.allclose(state[key][i], wanted, rtol=1e-12, atol=0), (name, key)


def test_noise_on_router_rows_is_normal_and_differs_between_layers():
    model = make("mixtral", tied=True).double()
    old = [layer.mlp.gate.weight.detach().clone() for layer in model.model.layers]
    grow(model, to={"experts": 64}, width=width.CopyExperts(noise=0.05))
    noise = [
        (layer.mlp.gate.weight.detach() - old[i][torch.arange(64) % 4])[4:] / 0.05
        for i, layer in enumerate(model.model.layers)
    ]

    both = torch.stack(noise)
    assert abs(both.mean()) < 6 / both.numel() ** 0.5
    assert abs(both.var() - 1) < 6 * (1.7 / both.numel()) ** 0.5
    assert abs((noise[0] * noise[1]).mean()) < 5 / noise[0].numel() ** 0.5


@pytest.mark.parametrize("family", MOE)
def test_the_router_names_copies_and_originals_and_all_copies_train_apart(family):
    model, optim = trained(family)
    chosen = list[torch.Tensor]()
    grow(model, optim, to={"experts": "2x"}, width=width.CopyExperts(noise=0.05))
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda *got: chosen.append(got[-1][-1]))
    train(model, optim, 10)

    for own in (chosen[0], chosen[1]):  # top-2 of every token, in the first step after the growth
        assert own.shape[-1] == 2
        for (
            choice
        ) in own.T:  # the first and the second expert: originals for some tokens, copies for others
            assert (choice < 4).any() and (choice >= 4).any()
    assert {*torch.cat([own.flatten() for own in chosen]).tolist()} == {*range(8)}
    for layer in model.model.layers:
        down = layer.mlp.experts.down_proj.detach()
        assert all((down[i] - down[i + 4]).abs().max() > 1e-4 for i in range(4))


def test_the_auxiliary_loss_keeps_its_strength():
    """The loss of a balanced router is top_k at any number of experts (Lossless, which grows top_k, divides its coefficient)."""
    model = make("mixtral", tied=True, router_aux_loss_coef=0.02)
    coefs = {}
    for n, to, method in (
        (8, {"experts": 8}, width.CopyExperts()),
        (8, {"experts": 8, "top_k": 4}, width.Lossless()),
    ):
        own = copy.deepcopy(model)
        grow(own, to=to, width=method)
        gate = torch.randn(20000, n, generator=torch.Generator().manual_seed(0))
        balanced = load_balancing_loss_func((gate,), n, own.config.num_experts_per_tok)
        coefs[type(method).__name__] = own.config.router_aux_loss_coef * float(balanced)
        assert own.router_aux_loss_coef == own.config.router_aux_loss_coef

    before = 0.02 * 2
    assert coefs == pytest.approx({"CopyExperts": before, "Lossless": before}, rel=0.01)


@pytest.mark.slow
def test_resume_replays_the_growth():
    model = make("qwen3_moe", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 3)
    utility = growkern.expert_utility(model, optim)
    grow(model, optim, to={"experts": 7}, width=width.CopyExperts(utility))
    train(model, optim, 2, first=3)
    saved = copy.deepcopy((model.state_dict(), optim.state_dict()))

    fresh = make("qwen3_moe", tied=True, seed=1)
    again = torch.optim.AdamW(fresh.parameters(), lr=1e-3)
    growkern.resume(fresh, again, model.config.growkern_history)
    fresh.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert train(fresh, again, 3, first=5) == train(model, optim, 3, first=5)


ROUTER = "model.layers.0.mlp.gate.weight"
EDITS = {
    "claim": (lambda data: data | {"reasons": []}, "claims to preserve the function"),
    "gradients": (lambda data: data | {"gradients_exact": True}, "gradients_exact should be False"),
    "from": ({"noise_from": 0}, "perturbs weights under state='exact'"),
    "no index": ({"noise_from": -1}, "out of range"),
    "no int": ({"noise_from": True}, "out of range"),
}


@pytest.mark.parametrize(("change", "match"), EDITS.values(), ids=EDITS)
def test_a_plan_is_json_and_an_edited_one_is_refused(change, match):
    model = make("mixtral", tied=False)
    plan = growkern.plan(model, to={"experts": 6}, width=width.CopyExperts((1, 2, 3, 4)))
    data = json.loads(plan.to_json())
    assert GrowthPlan.from_json(plan.to_json()) == plan
    assert str(plan).count("1 + N(0, 0.01^2) on copies") == 1  # blocks are alike
    check(plan, describe(model))
    if callable(change):
        data = change(data)
    else:
        next(row for row in data["tensors"] if row["name"] == ROUTER).update(change)

    with pytest.raises(PlanError, match=match):
        check(GrowthPlan.from_json(json.dumps(data)), describe(model))


REFUSED = {
    "no experts": ("llama", {"hidden": "2x"}, {}, "llama has no experts; growkern.upcycle"),
    "none to add": ("mixtral", {"layers": 4}, {}, "there is none to add to 4"),
    "top_k": ("mixtral", {"experts": 8, "top_k": 4}, {}, "top_k: CopyExperts does not grow it"),
    "hidden": ("mixtral", {"experts": 8, "hidden": 48}, {}, "hidden: CopyExperts does not grow it"),
    "no noise": ("mixtral", {"experts": 8}, {"noise": 0}, "Equal router rows tie"),
    "short": ("mixtral", {"experts": 8}, {"utility": (1, 2)}, "pass 4 finite numbers, one per expert"),
    "negative": ("mixtral", {"experts": 8}, {"utility": (1, 2, 3, -1)}, "pass 4 finite numbers"),
    "zeros": ("mixtral", {"experts": 8}, {"utility": [0] * 4}, "not all 0"),
    "nan": ("mixtral", {"experts": 8}, {"utility": [1, 2, 3, float("nan")]}, "finite"),
    "text": ("mixtral", {"experts": 8}, {"utility": "1234"}, "finite"),
}  # fmt: skip


@pytest.mark.parametrize(("family", "to", "options", "match"), REFUSED.values(), ids=REFUSED)
def test_what_it_cannot_copy_is_refused(family, to, options, match):
    with pytest.raises(PlanError, match=match):
        growkern.plan(make(family, tied=True), to=to, width=width.CopyExperts(**options))


@pytest.mark.parametrize("family", MOE)
def test_utility_is_the_sum_of_squared_gradients_or_second_moments(family):
    model, optim = trained(family)
    gradients, moments = [0.0] * 4, [0.0] * 4
    for layer in model.model.layers:
        for p in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            for i in range(4):
                gradients[i] += float((p.grad[i] ** 2).sum())
                moments[i] += float(optim.state[p]["exp_avg_sq"][i].sum())

    assert growkern.expert_utility(model) == pytest.approx(gradients, rel=1e-12)
    assert growkern.expert_utility(model, optim) == pytest.approx(moments, rel=1e-12)
    optim.zero_grad()
    with pytest.raises(PlanError, match="between backward.. and step"):
        growkern.expert_utility(model)
    with pytest.raises(PlanError, match="no second moments"):
        growkern.expert_utility(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(UnsupportedModelError, match="has no experts"):
        growkern.expert_utility(make("llama", tied=True))
