"""Autograd confirms the dual law of gradients and moments, and a grown run with scaled hyperparameters is the source's run."""

import copy

import pytest
import torch
from laws import full, gathered, grad_scale
from models import FAMILIES, LLAMA_LIKE, batch, exact_norms, grow, loss_of, make, spec_of, train
from torch.optim.lr_scheduler import ConstantLR

import growkern
from growkern import width
from growkern.planning.index_map import PAD

QUIET = width.Lossless(noise=0)
LAYERED = ("gpt2", "plain", "gpt_neox")  # families with LayerNorm


def weight_scale(plan, row):
    return full(plan, row, lambda a: torch.tensor(a.weight_scale.expanded(), dtype=torch.float64))


def no_pad(plan, row):
    return full(
        plan, row, lambda a: torch.tensor([float(i != PAD) for i in a.index_map.indices])
    ).bool()


EXACT = [
    (f, to)
    for f in FAMILIES
    for to in (["2x", "3x"] if f not in LLAMA_LIKE else ["2x", "1.5x", {"hidden": 42, "ffn": 101}])
]
EXACT += [("gpt2", {"ffn": 131}), ("bert", {"ffn": 57}), ("llama", {"heads": 8})]
EXACT += [("t5", "1.5x"), ("t5", {"hidden": 42, "ffn": 101, "heads": 7})]


# every family meets tied and untied weights
TIED = [(*case, n % 2 == 0) for n, case in enumerate(EXACT)]


@pytest.mark.parametrize(("family", "to", "tied"), TIED, ids=str)
def test_every_gradient_and_moment_of_the_grown_model_follows_the_dual_law(
    family, to, tied, monkeypatch
):
    exact_norms(monkeypatch)
    model = make(family, tied=tied).double()
    optim = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    loss_of(model, batch()).backward()
    optim.step()  # at lr 0 the weights stay; exp_avg = 0.1 g, exp_avg_sq = 0.001 g^2
    source = {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }  # BERT's untied bias is unused
    plan = growkern.plan(model, optim, to=to, width=QUIET, dynamics=None, spec=spec_of(model))

    grow(model, optim, plan=plan, dynamics=None)
    in_flight = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss_of(model, batch()).backward()

    for row in plan.tensors:
        if row.name not in source:
            continue
        p = model.get_parameter(row.name)
        expected = gathered(plan, row, source[row.source]) * grad_scale(plan, row)
        size = expected.abs().max().clamp(min=1.0)
        assert (p.grad - expected).abs().max() < 1e-9 * size, row.name
        assert (in_flight[row.name] - p.grad).abs().max() < 1e-9 * size, row.name
        assert (optim.state[p]["exp_avg"] - 0.1 * p.grad).abs().max() < 1e-9 * size, row.name
        assert (
            optim.state[p]["exp_avg_sq"] - 0.001 * p.grad.square()
        ).abs().max() < 1e-9 * size**2, row.name
        assert optim.state[p]["step"] == 1


PADDED = [
    ("gpt2", {"hidden": 30}, "mean_pad"),
    ("gpt2", {"hidden": 30}, "centre_pad"),
    ("plain", {"hidden": 54}, "mean_pad"),
]
PADDED += [("llama", {"hidden": 30}, "zero_pad"), ("qwen3", {"hidden": 54}, "zero_pad")]
CASES = [(*case, QUIET.noise) for case in PADDED] + [
    (family, to, None if family in LAYERED else "zero_pad", None)
    for family in ("gpt2", "plain", "gpt_neox", "llama", "qwen3", "mixtral", "t5")
    for to in ("2x", "1.5x")
]


@pytest.mark.parametrize(("family", "to", "norms", "noise"), CASES, ids=str)
def test_gradients_beside_pads_follow_the_law(family, to, norms, noise, monkeypatch):
    """Beside LayerNorm pads, a residual writer's gradient follows the law up to its mean over the residual axis: a direction
    in which the source's function does not change, because its norms take the mean away."""
    exact_norms(monkeypatch)
    model = make(family, tied=False).double()
    loss_of(model, batch()).backward()
    source = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    plan = growkern.plan(model, to=to, width=width.Lossless(noise, norms), spec=spec_of(model))

    grow(model, plan=plan)
    model.zero_grad()
    loss_of(model, batch()).backward()

    for row in (row for row in plan.tensors if row.source in source):
        grad, expected = (
            model.get_parameter(row.name).grad,
            gathered(plan, row, source[row.source]) * grad_scale(plan, row),
        )
        mask = no_pad(plan, row)
        if norms != "zero_pad":
            for axis, key in enumerate(row.axes):
                if key == "writer residual":
                    n = mask.sum(axis, keepdim=True).clamp(min=1)
                    grad, expected = (
                        t - (t * mask).sum(axis, keepdim=True) / n for t in (grad, expected)
                    )
        assert ((grad - expected) * mask).abs().max() < 1e-9 * expected.abs().max().clamp(
            min=1.0
        ), row.name


def test_the_law_of_a_llama_is_the_decoder_table():
    """A table written by hand gives the scales at 2x hidden, 2x heads and kv heads and 3x ffn, tied and untied."""
    d, h, kv, f = 2, 2, 2, 3
    block = {
        "self_attn.q_proj.weight": (1 / d, 1 / h),
        "self_attn.q_proj.bias": (1, 1 / h),
        "self_attn.k_proj.weight": (1 / d, 1 / kv),
        "self_attn.v_proj.bias": (1, 1 / kv),
        "self_attn.o_proj.weight": (1 / h, 1 / d),
        "self_attn.o_proj.bias": (1, 1 / d),
        "mlp.up_proj.weight": (1 / d, 1 / f),
        "mlp.gate_proj.weight": (1 / d, 1 / f),
        "mlp.down_proj.weight": (1 / f, 1 / d),
        "input_layernorm.weight": (1, 1 / d),
    }
    for tied in (True, False):
        model = make("llama", tied=tied, attention_bias=True)
        plan = growkern.plan(model, to={"hidden": 48, "ffn": 120}, width=width.Lossless(noise=1))
        found = {row.name: plan.scales(row) for row in plan.tensors}

        for name, law in block.items():
            assert found[f"model.layers.1.{name}"] == pytest.approx(law), name
        assert found["model.embed_tokens.weight"] == pytest.approx((1, 1 / d))
        assert found["model.norm.weight"] == pytest.approx((1 / d, 1) if tied else (1, 1 / d))
        assert tied or found["lm_head.weight"] == pytest.approx((1 / d, 1))


class ElementwiseAdamW:
    """AdamW in plain formulas (Loshchilov and Hutter), with lr, eps and decay per element, which torch.optim does not have."""

    def __init__(self, params, state, lr, eps, decay, betas=(0.9, 0.999)):
        self.params, self.lr, self.eps, self.decay, self.betas = params, lr, eps, decay, betas
        self.m = {n: state[p]["exp_avg"].clone() for n, p in params.items()}
        self.v = {n: state[p]["exp_avg_sq"].clone() for n, p in params.items()}
        self.t = int(next(iter(state.values()))["step"])

    def step(self, loss):
        grads = torch.autograd.grad(loss, list(self.params.values()))
        self.t += 1
        b1, b2 = self.betas
        with torch.no_grad():
            for (name, p), g in zip(self.params.items(), grads, strict=True):
                self.m[name] = b1 * self.m[name] + (1 - b1) * g
                self.v[name] = b2 * self.v[name] + (1 - b2) * g * g
                m, v = self.m[name] / (1 - b1**self.t), self.v[name] / (1 - b2**self.t)
                p -= self.lr[name] * (m / (v.sqrt() + self.eps[name]) + self.decay[name] * p)


TRAJECTORIES = [
    ("gpt2", "2x"),
    ("bert", "2x"),
    ("plain", {"ffn": 131}),
    ("llama", "2x"),
    ("llama", "1.5x"),
    ("qwen3", {"hidden": 42}),
    ("gemma2", "1.5x"),
    ("t5", {"hidden": 30, "heads": 6}),
]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("family", "to"), TRAJECTORIES, ids=str)
def test_the_grown_run_is_the_source_run_under_scaled_hyperparameters(
    family, to, tied, monkeypatch
):
    exact_norms(monkeypatch)
    lr, eps = 3e-3, 1e-6
    decay = 0.0 if family == "gemma2" else 0.1  # decay pulls w to 0, and Gemma's gain is 1 + w
    model = make(family, tied=tied).double()
    optim = torch.optim.AdamW(model.parameters(), lr=lr, eps=eps, weight_decay=decay)
    train(model, optim, 5)
    source, source_optim = copy.deepcopy((model, optim))
    plan = growkern.plan(model, optim, to=to, width=QUIET, dynamics=None, spec=spec_of(model))

    grow(model, optim, plan=plan, dynamics=None)
    params = {name: p for name, p in model.named_parameters() if optim.state[p]}
    rows = {row.name: row for row in plan.tensors if row.name in params}
    target = ElementwiseAdamW(
        params,
        optim.state,
        lr={n: lr * weight_scale(plan, r) for n, r in rows.items()},
        eps={n: eps * grad_scale(plan, r) for n, r in rows.items()},
        decay={n: decay / weight_scale(plan, r) for n, r in rows.items()},
    )

    expected = train(source, source_optim, 10, first=5)
    for i, loss_source in enumerate(expected, 5):
        loss = loss_of(model, batch(seed=i))
        assert abs(loss.item() - loss_source) < 1e-9, i
        target.step(loss)
    assert abs(expected[0] - expected[-1]) > 1e-3  # the run moved


PLAIN = {
    "SGD": dict(lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "ASGD": dict(lr=5e-2, lambd=0.1, t0=10, weight_decay=0.1),
}


@pytest.mark.parametrize("name", PLAIN)
def test_sgd_follows_with_its_own_learning_rate_law(name):
    """dynamics="mup" with a scheduler splits the param groups by lr s/a per tensor and keeps the decay per step, so that torch's own SGD
    and ASGD continue the source's run."""
    model = make("plain", tied=False).double()
    optim = getattr(torch.optim, name)(model.parameters(), **PLAIN[name])
    train(model, optim, 10)
    source, source_optim = copy.deepcopy((model, optim))

    grow(model, optim, to="2x", width=QUIET, scheduler=ConstantLR(optim, factor=1))

    assert len(optim.param_groups) > 1
    assert train(model, optim, 20, first=10) == pytest.approx(
        train(source, source_optim, 20, first=10), abs=1e-9
    )


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["moments dropped", "moments unscaled", "learning rate unscaled"])
def test_each_omission_would_show(wrong):
    """The trajectory test can fail: each of three omissions moves the losses by far more than the test's tolerance."""
    model = make("plain", tied=False).double()
    optim = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-12, weight_decay=0.0)
    train(model, optim, 5)
    source, source_optim = copy.deepcopy((model, optim))
    exact = copy.deepcopy((model, optim))

    grow(*exact, to="2x", width=QUIET)
    grow(
        model,
        optim,
        to="2x",
        width=QUIET,
        state="drop" if wrong == "moments dropped" else "exact",
        dynamics=None if "rate" in wrong else "mup",
    )
    if wrong == "moments unscaled":
        for p in (
            block_weight
            for block in model.blocks
            for block_weight in (block.up.weight, block.down.weight)
        ):
            state = optim.state[p]  # the law halves exp_avg and quarters exp_avg_sq of both
            state["exp_avg"].mul_(2)
            state["exp_avg_sq"].mul_(4)

    expected = train(source, source_optim, 10, first=5)
    right, off = train(*exact, 10, first=5), train(model, optim, 10, first=5)
    assert max(abs(x - y) for x, y in zip(right, expected, strict=True)) < 1e-7
    assert max(abs(x - y) for x, y in zip(off, expected, strict=True)) > 1e-3
