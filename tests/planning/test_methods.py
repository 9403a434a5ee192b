"""Every method preserves what its plan says: the logits, the gradients by autograd, or the losses of a run that does not grow."""

import copy
from functools import cache

import drift
import pytest
import torch
from laws import gathered, grad_scale
from models import batch, exact_norms, grow, logits, loss_of, make, train
from pairwise import pairwise

import growkern
from growkern import depth, width
from growkern.errors import PlanError

WIDTHS = [
    width.Lossless(),
    width.Lossless(noise=1),
    width.Lossless(noise=0),
    width.FPI(),
    width.FPI(maps="cyclic"),
    width.Net2Wider(maps="cyclic", noise=0.1),
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
    depth.Middle(),
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
    width.Net2Wider(maps="cyclic", noise=0.1): ("function",) * 3,
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


def planned(family, to, method, dynamics):
    """Return the plan, or None where the method refuses; test_width.py tests the errors."""
    own = {"width": method} if hasattr(method, "widen") else {"depth": method}
    try:
        return growkern.plan(make(family, tied=True), to=to, dynamics=dynamics, **own)
    except PlanError:
        return None


REFUSED = [  # at 1.5x, of llama and gpt2; of bert, whose hidden grows by whole multiples; of bert at any width or depth
    (width.HyperClone(), width.HyperClone(noise_db=10)),
    (width.Lossless, width.HyperClone, width.Lemon),
    (width.CopyAndPad(norm="corrected"), depth.Interpose(halve_branches=True)),
]


def is_refused(family, method, to):
    """Whether the method refuses, by the table ``REFUSED``, which was written by hand."""
    copies_alone, whole_multiples, not_post_norm = REFUSED
    if family != "bert":
        return to == "1.5x" and method in copies_alone
    return (to == "1.5x" and isinstance(method, whole_multiples)) or method in not_post_norm


# Plans are not made here: every worker of xdist would make them all.
ALL = [(family, method, to) for to in ("2x", "1.5x") for family in FAMILIES for method in WIDTHS]
ALL += [(family, method, {"ffn": "2x"}) for family in FAMILIES for method in WIDTHS[:-4]]
ALL += [
    (family, method, {"layers": 3 if isinstance(method, depth.Layers) else 4})
    for family in FAMILIES
    for method in DEPTHS
]
ALL = [  # AKIPro keeps the kv heads
    (family, method, to)
    if not isinstance(method, width.AKIPro)
    else (family, method, {"hidden": to, "heads": "2x", "kv_heads": 2})
    for family, method, to in ALL
    if not isinstance(method, width.AKIPro) or (family == "llama" and isinstance(to, str))
]
# each family meets each method, and each of both meets each size; all families at 2x are in the table of drifts
CASES = pairwise([case for case in ALL if not is_refused(*case)])
TRAJECTORIES = [
    (family, method, "2x")
    for method, says in SAYS.items()
    for family, one in zip(FAMILIES, says, strict=True)
    if one == "trajectory"
]


@pytest.mark.slow
def test_what_is_refused():
    refused = [case for case in ALL if is_refused(*case)]

    assert refused and not any(
        planned(family, to, method, "exact") for family, method, to in refused
    )


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method", "to"), CASES, ids=str)
def test_a_method_preserves_what_it_says_and_no_less(family, method, to, monkeypatch):
    exact_norms(monkeypatch)
    model = make(family, tied=True, layer_norm_eps=1e-12).double()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 1)
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
@pytest.mark.parametrize(("family", "method", "to"), TRAJECTORIES, ids=str)
def test_exact_methods_carry_the_moments_that_the_grown_model_would_have(
    family, method, to, monkeypatch
):
    """After one step at learning rate 0 and a growth, ``exp_avg`` is a tenth of the grown model's gradient, by autograd."""
    exact_norms(monkeypatch)
    model = make(family, tied=True).double()
    optim = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    loss_of(model, batch()).backward()
    optim.step()

    report = grow(model, optim, plan=planned(family, to, method, None), dynamics=None)
    model.zero_grad()
    loss_of(model, batch()).backward()

    assert report.preserves == "gradient"
    for name, p in model.named_parameters():
        if p.grad is not None:
            size = p.grad.abs().max().clamp(min=1)
            assert (optim.state[p]["exp_avg"] - 0.1 * p.grad).abs().max() < 1e-9 * size, name
            second = 0.001 * p.grad.square()
            assert (optim.state[p]["exp_avg_sq"] - second).abs().max() < 1e-9 * size, name


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method", "to"), TRAJECTORIES, ids=str)
def test_a_trajectory_that_is_promised_is_kept(family, method, to, monkeypatch):
    exact_norms(monkeypatch)
    model, optim = trainable(family)
    train(model, optim, 3)
    plan = planned(family, to, method, "exact")
    assert plan.preserves == "trajectory"

    grow(model, optim, plan=plan, dynamics="exact")
    losses = train(model, optim, 5, first=3)

    assert max(abs(a - b) for a, b in zip(losses, losses_of(family)[3:], strict=True)) < 1e-9


def trainable(family):
    model = make(family, tied=True).double()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)


@cache
def losses_of(family):
    """Return the losses of eight steps that no growth interrupts."""
    return train(*trainable(family), 8)


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
@pytest.mark.parametrize("family", drift.STOCK)
def test_every_family_drifts_by_no_method_that_preserves_it(family, monkeypatch):
    exact_norms(monkeypatch)
    methods = [*drift.WIDTHS, *drift.DEPTHS]
    found = dict(zip(map(str, methods), drift.drifts(family, methods), strict=True))

    refused = {name for name, one in found.items() if one is None}
    wrong = {
        name: one
        for name, one in found.items()
        if one is not None and (one[0] == 0.0) != (one[1] != "nothing")
    }
    assert not wrong and refused <= {str(one) for one in NOT_POST_NORM}, (wrong, refused)
