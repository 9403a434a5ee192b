"""Every method preserves what its plan says: the logits, the gradients by autograd, or the losses of a run that does not grow."""

import copy

import drift as drifts
import pytest
import torch
from drift import STOCK, drift
from laws import gathered, grad_scale
from models import batch, exact_norms, grow, logits, loss_of, make, train

import growkern
from growkern import depth, width
from growkern.errors import PlanError

WIDTHS = [
    width.Lossless(),
    width.Lossless(noise=1),
    width.Lossless(noise=0),
    width.FPI(),
    width.FPI(maps="cyclic"),
    width.Net2Wider(noise=0.1),
    width.AKI(),
    width.AKIPro(),
    width.HyperClone(),
    width.HyperClone(noise_db=10),
    width.HyperClone(general=True),
    width.Lemon(),
    width.Lemon(alpha=0.5),
    width.FreshFeatures(),
    width.CopyAndPad(),
    width.CopyAndPad(norm="corrected"),
    width.Sparkling(),
    width.Sparkling("random", "copy"),
]
DEPTHS = [
    depth.IdentityBlocks(),
    depth.Stack(),
    depth.TopCopies(n=1),
    depth.Interpose(),
    depth.Interpose(halve_branches=True),
    depth.DepthUpscale(),
    depth.Layers((0, 1, 1)),
    depth.Fresh(),
]
FAMILIES = ["llama", "gpt2", "bert"]
NOT_POST_NORM = [width.CopyAndPad(norm="corrected"), depth.Interpose(halve_branches=True)]
SAYS = {  # method -> plan.preserves at 2x of llama, gpt2 and bert
    width.Lossless(): ("function",) * 3,
    width.Lossless(noise=1): ("function",) * 3,
    width.Lossless(noise=0): ("trajectory",) * 3,
    width.FPI(): ("nothing",) * 3,
    width.FPI(maps="cyclic"): ("trajectory",) * 3,
    width.Net2Wider(noise=0.1): ("nothing",) * 3,
    width.AKI(): ("nothing",) * 3,
    width.HyperClone(): ("trajectory",) * 3,
    width.HyperClone(noise_db=10): ("function",) * 3,
    width.HyperClone(general=True): ("trajectory",) * 3,
    width.Lemon(): ("function",) * 3,
    width.Lemon(alpha=0.5): ("trajectory",) * 3,
    width.FreshFeatures(): ("nothing",) * 3,
    width.CopyAndPad(): ("nothing",) * 3,
    width.CopyAndPad(norm="corrected"): ("function", "function", "refused"),
    width.Sparkling(): ("trajectory",) * 3,
    width.Sparkling("random", "copy"): ("nothing",) * 3,
}


PLANS = {}


def planned(family, to, method, dynamics):
    """Return the plan, made once, or None where the method refuses; test_width.py tests the errors."""
    key = family, str(to), method, dynamics
    if key not in PLANS:
        own = {"width": method} if hasattr(method, "widen") else {"depth": method}
        try:
            PLANS[key] = growkern.plan(make(family, tied=True), to=to, dynamics=dynamics, **own)
        except PlanError:
            PLANS[key] = None
    return PLANS[key]


def cases(targets, methods, dynamics, preserves):
    """Return family, method and target of every plan whose ``plan.preserves`` is one of ``preserves``."""
    found = []
    for family in FAMILIES:
        for method in methods:
            pro = isinstance(method, width.AKIPro)
            if pro and family != "llama":
                continue
            for to in targets:
                own = {"hidden": to, "heads": "2x", "kv_heads": 2} if pro else to
                plan = planned(family, own, method, dynamics)
                if plan is not None and plan.preserves in preserves:
                    found.append((family, method, own))
    return found


ALL = "nothing", "function", "gradient", "trajectory"
CASES = cases(["2x", "1.5x"], WIDTHS, "exact", ALL)
CASES += cases([{"ffn": "2x"}], WIDTHS[:-4], "exact", ALL)
CASES += cases([{"layers": 4}], DEPTHS, "exact", ALL)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method", "to"), CASES, ids=str)
def test_a_method_preserves_what_it_says_and_no_less(family, method, to, monkeypatch):
    exact_norms(monkeypatch)
    model = make(family, tied=True, layer_norm_eps=1e-12).double()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 3)
    source, before = copy.deepcopy(model), logits(model, batch()).detach()
    plan = planned(family, to, method, "exact")

    report = grow(model, optim, plan=plan, dynamics="exact")

    assert report.preserves == plan.preserves
    off = (logits(model, batch()) - before).abs().max()
    if plan.preserves == "nothing":
        assert off > 1e-9
        assert report.reasons and report.reasons[0] in str(report)
        return
    assert off < 1e-10
    if plan.preserves == "function":
        return
    for one in (source, model):
        one.zero_grad()
        loss_of(one, batch()).backward()
    grads = {name: p.grad for name, p in source.named_parameters()}
    for row in plan.tensors:
        if (grad := grads.get(row.source)) is not None:
            expected = gathered(plan, row, grad) * grad_scale(plan, row)
            found = model.get_parameter(row.name).grad
            assert (found - expected).abs().max() < 1e-9 * expected.abs().max().clamp(min=1), (
                row.name
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "method", "to"), cases(["2x"], WIDTHS, None, ["gradient"]), ids=str
)
def test_exact_methods_carry_the_moments_that_the_grown_model_would_have(
    family, method, to, monkeypatch
):
    """After one step at learning rate 0 and a growth, ``exp_avg`` is a tenth of the grown model's gradient, by autograd."""
    exact_norms(monkeypatch)
    model = make(family, tied=True).double()
    optim = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    loss_of(model, batch()).backward()
    optim.step()

    grow(model, optim, plan=planned(family, to, method, None), dynamics=None)
    model.zero_grad()
    loss_of(model, batch()).backward()

    for name, p in model.named_parameters():
        if p.grad is not None:
            size = p.grad.abs().max().clamp(min=1)
            assert (optim.state[p]["exp_avg"] - 0.1 * p.grad).abs().max() < 1e-9 * size, name
            second = 0.001 * p.grad.square()
            assert (optim.state[p]["exp_avg_sq"] - second).abs().max() < 1e-9 * size, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "method", "to"), cases(["2x"], WIDTHS, "exact", ["trajectory"]), ids=str
)
def test_a_trajectory_that_is_promised_is_kept(family, method, to, monkeypatch):
    exact_norms(monkeypatch)
    runs = []
    for grown in (False, True):
        model = make(family, tied=True).double()
        optim = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        train(model, optim, 5)
        if grown:
            grow(model, optim, plan=planned(family, to, method, "exact"), dynamics="exact")
        runs.append(train(model, optim, 10, first=5))

    assert max(abs(a - b) for a, b in zip(*runs, strict=True)) < 1e-9


@pytest.mark.parametrize("at", range(3), ids=FAMILIES)
def test_what_methods_say_at_twice_the_width(at):
    """``plan.preserves`` is the value in the table ``SAYS``, which was written by hand."""
    found = {}
    for method in WIDTHS:
        if not isinstance(method, width.AKIPro):
            plan = planned(FAMILIES[at], "2x", method, "exact")
            found[method] = plan.preserves if plan else "refused"
    assert found == {method: one[at] for method, one in SAYS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", STOCK)
def test_every_family_drifts_by_no_method_that_preserves_it(family, monkeypatch):
    exact_norms(monkeypatch)
    found = {str(one): drift(family, one) for one in (*drifts.WIDTHS, *drifts.DEPTHS)}

    refused = {name for name, one in found.items() if one is None}
    wrong = {
        name: one
        for name, one in found.items()
        if one is not None and (one[0] == 0.0) != (one[1] != "nothing")
    }
    assert not wrong and refused <= {str(one) for one in NOT_POST_NORM}, (wrong, refused)
