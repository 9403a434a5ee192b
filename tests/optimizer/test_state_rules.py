"""Optimizer state grows as the optimizer would have gathered it, or by another mode of state=; averages and master weights grow too."""

import copy

import pytest
import torch
from models import batch, exact_norms, grow, logits, loss_of, make, train
from torch.optim import swa_utils

import growkern
from growkern import depth, width
from growkern.errors import GrowthError, UnsupportedModelError, UnsupportedOptimizerError
from growkern.optimizer import eight_bit as quantised

QUIET = width.Lossless(noise=0)
optims = torch.optim
STILL = {  # learning rate 0 keeps the weights, so that the grown model can gather its own state
    "ASGD": (optims.ASGD, dict(lr=0.0)),
    "Adadelta": (optims.Adadelta, dict(lr=0.0)),
    "Adafactor": (optims.Adafactor, dict(lr=0.0)),
    "Adagrad": (optims.Adagrad, dict(lr=0.0)),
    "Adam": (optims.Adam, dict(lr=0.0, amsgrad=True)),
    "AdamW": (optims.AdamW, dict(lr=0.0)),
    "Adamax": (optims.Adamax, dict(lr=0.0, eps=1e-30)),
    "Muon": (optims.Muon, dict(lr=0.0)),
    "NAdam": (optims.NAdam, dict(lr=0.0)),
    "RAdam": (optims.RAdam, dict(lr=0.0)),
    "RMSprop": (optims.RMSprop, dict(lr=0.0, momentum=0.9, centered=True, eps=1e-30)),
    "SGD": (optims.SGD, dict(lr=0.0, momentum=0.9)),
    "growkern AdamW": (growkern.optim.AdamW, dict(lr=0.0)),
}
LOOSE = {"Adadelta": ("acc_delta",)}  # acc_delta averages updates that depend on eps


def held(name, model):
    return [p for p in model.parameters() if p.dim() == 2 or name != "Muon"]


@pytest.mark.slow
@pytest.mark.parametrize("name", STILL)
def test_grown_state_is_what_the_grown_model_would_have_gathered(name, monkeypatch):
    """Growth before and growth after three steps of learning rate 0 give the same state, by autograd alone.

    Three copies tell the powers of a scale apart; of two copies, the sum is the product.
    """
    exact_norms(monkeypatch)
    kind, options = STILL[name]

    def state(grown_first: bool):
        model = make("llama", tied=False).double()
        if grown_first:
            grow(model, to="3x", width=QUIET)
        optim = kind(held(name, model), **options)
        train(model, optim, 3)
        if not grown_first:
            grow(model, optim, to="3x", width=QUIET, dynamics=None)
        return {n: dict(optim.state[p]) for n, p in model.named_parameters() if p in optim.state}

    expected, actual = state(True), state(False)

    assert actual.keys() == expected.keys()
    for parameter, found in expected.items():
        assert actual[parameter].keys() == found.keys()
        for key, value in found.items():
            if key not in LOOSE.get(name, ()):
                torch.testing.assert_close(
                    actual[parameter][key], value, rtol=1e-9, atol=1e-13, msg=f"{parameter} {key}"
                )


def test_lbfgs_starts_its_history_anew_and_goes_on():
    model = make("llama", tied=True).double()
    optim = optims.LBFGS(model.parameters(), lr=0.1, max_iter=4)

    def step(seed):
        def closure():
            optim.zero_grad()
            loss = loss_of(model, batch(seed))
            loss.backward()
            return loss

        return optim.step(closure).item()

    before = [step(0) for _ in range(3)]
    last = loss_of(model, batch(0)).item()
    assert optim._numel_cache
    report = grow(model, optim, to={"hidden": 48, "layers": 3})

    assert not any(optim.state.values()) and optim._numel_cache is None
    assert "dropped" in str(report)
    after = [step(0) for _ in range(3)]
    assert after[0] == pytest.approx(last, abs=1e-6) and after[-1] < after[0] < before[0]


@pytest.mark.parametrize("mode", ["copy", "asymmetric", "zero_pad", "drop"])
def test_modes_of_state(mode):
    model = make("llama", tied=False).double()
    optim = optims.AdamW(model.parameters())
    train(model, optim, 2)
    up = model.model.layers[0].mlp.up_proj.weight
    source = {k: v.clone() for k, v in optim.state[up].items()}
    n, m = up.shape

    report = grow(model, optim, to="2x", state=mode, width=QUIET)

    if mode == "drop":
        assert not optim.state and "warm" in str(report)
        return
    state = optim.state[up]
    assert state["step"] == 2
    for key in ("exp_avg", "exp_avg_sq"):
        tiles = state[key].view(2, n, 2, m).transpose(1, 2)
        law = {"exp_avg": 0.5, "exp_avg_sq": 0.25}[key] if mode == "zero_pad" else 1.0
        torch.testing.assert_close(tiles[0, 0], source[key] * law, rtol=1e-14, atol=0)
        rest = torch.stack([tiles[0, 1], tiles[1, 0], tiles[1, 1]])
        if mode == "copy":
            assert torch.equal(rest, source[key].expand_as(rest))
        else:
            assert (rest == 0).all() and "6.6 times" in str(report)


def test_new_slices_have_a_step_of_their_own_in_growkerns_adamw():
    """AdamW updates old elements as before, and new elements as a fresh AdamW does, times the re-warm-up."""
    model = make("llama", tied=False).double()
    optim = growkern.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    train(model, optim, 5)
    up = model.model.layers[0].mlp.up_proj.weight
    n, m = up.shape

    report = grow(model, optim, to="2x", state="asymmetric", width=QUIET, dynamics=None)
    before = up.detach().clone()
    train(model, optim, 1, first=5)

    assert "step of their own" in str(report)
    new = torch.ones_like(up, dtype=torch.bool)
    new[:n, :m] = False
    g = up.grad
    first = -1e-3 * (1 + 0.3 / 250) * g / (g.abs() + 1e-8)  # Adam's first update is the sign
    torch.testing.assert_close((up - before)[new], first[new], rtol=1e-6, atol=1e-12)
    m1, v1 = optim.state[up]["exp_avg"][:n, :m], optim.state[up]["exp_avg_sq"][:n, :m]
    sixth = -1e-3 * (m1 / (1 - 0.9**6)) / ((v1 / (1 - 0.999**6)).sqrt() + 1e-8)
    torch.testing.assert_close((up - before)[:n, :m], sixth, rtol=1e-6, atol=1e-12)


class Own(optims.Adam):
    """A class for which growkern has no state rules."""


def test_rules_say_how_unknown_state_grows():
    def grown(kind, **options):
        model = make("llama", tied=False)
        optim = kind(model.parameters(), lr=1e-3)
        train(model, optim, 2)
        grow(model, optim, to="2x", dynamics=None, **options)
        return [{k: v for k, v in optim.state[p].items()} for p in model.parameters()]

    known = grown(optims.Adam)
    told = grown(Own, state_rules={"step": None, "exp_avg": 1, "exp_avg_sq": 2})

    for a, b in zip(known, told, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    with pytest.raises(UnsupportedOptimizerError, match="unknown state 'exp_avg_sq'"):
        grown(Own, state_rules={"step": None, "exp_avg": 1})
    with pytest.raises(
        UnsupportedOptimizerError, match="has the state exp_avrg; the parameters have exp_avg, "
    ):
        grown(Own, state_rules={"step": None, "exp_avg": 1, "exp_avg_sq": 2, "exp_avrg": 1})
    with pytest.raises(UnsupportedOptimizerError, match="'exp_avg' has the order 3"):
        grown(Own, state_rules={"step": None, "exp_avg": 3, "exp_avg_sq": 2})


@pytest.mark.parametrize("memory", ["stage", "lean"])
@pytest.mark.parametrize("averaged", [True, False], ids=["AveragedModel", "module"])
def test_an_average_grows_by_the_same_plan_depth_too(averaged, memory):
    """The average keeps its own function, and averages the grown weights afterwards."""
    model = make("llama", tied=True)
    optim = optims.AdamW(model.parameters(), lr=1e-2)
    ema = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    module = ema.module
    for t in range(3):
        train(model, optim, 1, first=t)
        ema.update_parameters(model)
    before, ids = logits(module, batch()).detach(), [id(p) for p in module.parameters()]
    apart = [(a - b).norm() for a, b in zip(module.parameters(), model.parameters(), strict=True)]

    grow(
        model,
        optim,
        to={"hidden": 48, "layers": 3},
        ema=ema if averaged else [module],
        memory=memory,
    )

    assert torch.allclose(logits(module, batch()), before, atol=1e-5)
    assert set(ids) <= {id(p) for p in module.parameters()}
    assert int(ema.n_averaged) == 3 and module.config.num_hidden_layers == 3
    old = [p for n, p in module.named_parameters() if "layers.1." not in n]
    new = [p for n, p in model.named_parameters() if "layers.1." not in n]
    # equal noise keeps average and model as close
    for a, b, distance in zip(old, new, apart, strict=True):
        assert (a - b).norm() <= 2.01 * distance + 1e-6
    expected = [
        0.9 * a + 0.1 * b for a, b in zip(module.parameters(), model.parameters(), strict=True)
    ]
    ema.update_parameters(model)
    for p, q in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(p, q)


def test_an_average_that_was_not_handed_over_is_refused():
    model = make("llama", tied=True)
    ema = swa_utils.AveragedModel(model)

    with pytest.raises(UnsupportedModelError, match="pass the average as ema="):
        grow(model, to={"layers": 4})

    assert model.config.num_hidden_layers == 2
    grow(model, to={"layers": 4}, ema=())
    assert ema.module.config.num_hidden_layers == 2


def test_an_average_of_another_shape_changes_nothing():
    model, other = make("llama", tied=True), make("llama", tied=True, num_hidden_layers=3)

    with pytest.raises(GrowthError):
        grow(model, to="2x", ema=other)

    assert model.config.hidden_size == 24 and other.config.hidden_size == 24


def test_dead_parameters_are_counted_and_named():
    model = make("llama", tied=False)
    optim = optims.AdamW([(n, p) for n, p in model.named_parameters()])
    train(model, optim, 1)
    model.lm_head = torch.nn.Linear(24, 66, bias=False)  # the optimizer does not hold the new head

    with pytest.raises(UnsupportedOptimizerError, match=r"has 1 parameters .*lm_head\.weight"):
        grow(model, optim, to="2x")

    assert model.config.hidden_size == 24


def test_parameters_beside_the_model_are_not_dead():
    model = make("llama", tied=False)
    temperature = torch.nn.Parameter(torch.ones(()))
    optim = optims.AdamW([*model.parameters(), temperature])
    train(model, optim, 1)

    grow(model, optim, to="2x")

    assert any(p is temperature for g in optim.param_groups for p in g["params"])


def test_stacked_blocks_bring_state_of_any_optimizer():
    model = make("llama", tied=True)
    optim = optims.Adafactor(model.parameters())
    train(model, optim, 2)

    grow(model, optim, to={"layers": 4}, depth=depth.Stack())

    one, two = (model.model.layers[i].mlp.up_proj.weight for i in (0, 2))
    assert torch.equal(optim.state[one]["row_var"], optim.state[two]["row_var"])
    assert copy.deepcopy(optim.state[two]["step"]) == 2
    train(model, optim, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "memory"), [("AdamW8bit", "stage"), ("Adam8bit", "lean")])
def test_state_in_eight_bits_grows_in_its_codes(kind, memory):
    """Codes grow byte for byte where rows are whole blocks, and within one step of the code elsewhere; training continues."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    sizes = dict(
        hidden_size=256, num_attention_heads=4, num_key_value_heads=2, intermediate_size=200
    )
    model = make("llama", tied=False, head_dim=64, **sizes)
    optim = getattr(bitsandbytes.optim, kind)(model.parameters(), lr=1e-3)
    train(model, optim, 3)
    layer = model.model.layers[0]
    up, down = layer.mlp.up_proj.weight, layer.mlp.down_proj.weight
    source = {
        p: {k: torch.as_tensor(v).clone() for k, v in optim.state[p].items()} for p in (up, down)
    }
    values = quantised.decoded(source[down], "state2")[0]

    grow(model, optim, to="2x", width=QUIET, memory=memory)

    for key, a in (("state1", 0.5), ("state2", 0.25)):
        codes, absmax = optim.state[up][key], optim.state[up][f"absmax{key[-1]}"]
        before, scale = source[up][key], source[up][f"absmax{key[-1]}"]
        assert codes.dtype == torch.uint8 and codes.shape == up.shape
        assert torch.equal(codes, before.repeat(2, 2))
        assert torch.equal(absmax.view(400, 2), a * scale.view(200, 1).repeat(2, 2))
    grown, expected = quantised.decoded(optim.state[down], "state2")[0], values.repeat(2, 2) * 0.25
    assert (grown - expected).abs().max() <= 0.02 * expected.abs().max()
    norm = optim.state[model.model.norm.weight]["state1"]
    assert norm.dtype == torch.float32 and norm.shape == (512,)
    assert train(model, optim, 3, first=3)[-1] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "twin", "keys"),
    [
        ("AdamW", "torch.optim.AdamW", ("exp_avg", "exp_avg_sq")),
        ("AdamW32bit", "torch.optim.AdamW", ("exp_avg", "exp_avg_sq")),
        ("Adam32bit", "torch.optim.Adam", ("exp_avg", "exp_avg_sq")),
        ("Lion", "lion_pytorch.Lion", ("exp_avg",)),
    ],
)
def test_bitsandbytes_in_32_bits_grows_as_the_optimizer_that_it_computes(kind, twin, keys):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    module, _, name = twin.rpartition(".")
    runs = []
    for of in (bitsandbytes.optim, pytest.importorskip(module)):
        model = make("llama", tied=True)
        optim = getattr(of, kind if of is bitsandbytes.optim else name)(
            model.parameters(), lr=1e-3, weight_decay=0.01 if "W" in kind else 0.0
        )
        train(model, optim, 3)
        grow(model, optim, to="2x", seed=0)
        losses = train(model, optim, 1, first=3)
        runs.append((model, optim, losses))
    (own, optim, losses), (other, twin_optim, expected) = runs

    assert losses == pytest.approx(expected, abs=1e-5)
    for p, q in zip(own.parameters(), other.parameters(), strict=True):
        for i, key in enumerate(keys, 1):
            state, wanted = optim.state[p][f"state{i}"], twin_optim.state[q][key]
            assert state.shape == wanted.shape == p.shape
            assert (state - wanted).abs().max() <= 1e-3 * wanted.abs().max()
    assert train(own, optim, 3, first=4)[-1] > 0


@pytest.mark.parametrize("memory", ["stage", "lean"])
def test_masters_grow_with_the_weights_they_are_copies_of(memory):
    """bfloat16 weights with float32 master weights grow as a float32 model does, new blocks too."""

    def step(model, master_weights, optim, seed):
        loss_of(model, batch(seed)).backward()
        for p, master in master_weights.items():
            master.grad, p.grad = p.grad.float(), None
        optim.step()
        optim.zero_grad()
        with torch.no_grad():
            for p, master in master_weights.items():
                p.copy_(master)

    model = make("llama", tied=True).bfloat16()
    master_weights = {p: torch.nn.Parameter(p.detach().float()) for p in model.parameters()}
    optim = optims.AdamW(master_weights.values(), lr=1e-3)
    for seed in range(3):
        step(model, master_weights, optim, seed)
    whole = make("llama", tied=True)
    other = optims.AdamW(whole.parameters(), lr=1e-3)
    train(whole, other, 1)
    with torch.no_grad():
        for (p, master), q in zip(master_weights.items(), whole.parameters(), strict=True):
            q.copy_(master)
            q.grad = None
            other.state[q] = {k: v.clone() for k, v in optim.state[master].items()}
            assert p.dtype == torch.bfloat16
    ids = {id(p): id(master) for p, master in master_weights.items()}
    how = dict(to={"hidden": 48, "layers": 3}, memory=memory, width=width.Lossless(noise=0))

    report = grow(model, optim, master_weights=master_weights, **how)
    grow(whole, other, **how)

    assert (
        report.lr_applied
        and {id(p): id(m) for p, m in master_weights.items()}.items() >= ids.items()
    )
    assert {id(p) for p in master_weights} == {id(p) for p in model.parameters()}
    for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        master = master_weights[p]
        torch.testing.assert_close(master, q, rtol=1e-6, atol=1e-7, msg=name)
        torch.testing.assert_close(p, master.bfloat16(), rtol=1e-2, atol=0)
        assert optim.state.get(master, {}).keys() == other.state.get(q, {}).keys()
        for key, value in other.state.get(q, {}).items():
            torch.testing.assert_close(optim.state[master][key], value, rtol=1e-6, atol=0)
    rates = {id(p): g["lr"] for g in optim.param_groups for p in g["params"]}
    expected = {id(p): g["lr"] for g in other.param_groups for p in g["params"]}
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        assert rates[id(master_weights[p])] == expected[id(q)]
    step(model, master_weights, optim, 3)


def test_masters_that_nobody_spoke_of_are_refused():
    model = make("llama", tied=True).bfloat16()
    master_weights = {p: torch.nn.Parameter(p.detach().float()) for p in model.parameters()}
    optim = optims.AdamW(master_weights.values(), lr=1e-3)

    with pytest.raises(
        UnsupportedOptimizerError, match="has no parameter of this.*master_weights="
    ):
        grow(model, optim, to="2x")
    with pytest.raises(
        UnsupportedOptimizerError, match="(?s)master_weights:.*has shape .*its copy"
    ):
        grow(
            model,
            optim,
            to="2x",
            master_weights={p: torch.nn.Parameter(torch.zeros(3)) for p in master_weights},
        )

    assert model.config.hidden_size == 24


def test_gradient_checkpointing_goes_on_in_new_blocks():
    model = make("llama", tied=True)
    model.activation_checkpointing_enable()
    model.train()
    optim = optims.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 1)
    before = loss_of(model, batch()).item()

    grow(model, optim, to={"hidden": 48, "layers": 3})

    assert loss_of(model, batch()).item() == pytest.approx(before, abs=1e-5)
    layers = model.model.layers
    assert layers[1].gradient_checkpointing and layers[1]._gradient_checkpointing_func is not None
    train(model, optim, 2)


def test_torch_func_sees_the_grown_shapes():
    model = make("plain", tied=True)
    grow(model, to="2x")

    grads = torch.func.grad(
        lambda params: torch.func.functional_call(model, params, (batch(),)).square().mean()
    )(dict(model.named_parameters()))

    assert all(grads[name].shape == p.shape for name, p in model.named_parameters())


def test_masters_that_are_incomplete_or_wrong_change_nothing():
    model = make("llama", tied=True).bfloat16()
    master_weights = {p: torch.nn.Parameter(p.detach().float()) for p in model.parameters()}
    optim = optims.AdamW(master_weights.values(), lr=1e-3)
    first = next(iter(master_weights))
    alien = torch.nn.Parameter(master_weights[first].detach().clone())

    for wrong, match in (
        ({p: m for p, m in master_weights.items() if p is not first}, "more have no copy"),
        (master_weights | {first: alien}, "must have the copy"),
        ({"model.norm.weight": master_weights[first]}, "is no parameter of the model"),
        (list(master_weights.items()), "expected a dict"),
    ):
        with pytest.raises(UnsupportedOptimizerError, match=f"(?s)master_weights:.*{match}"):
            grow(model, optim, to="2x", master_weights=wrong)
    assert model.config.hidden_size == 24 and master_weights[first].shape == first.shape


def test_an_average_that_is_the_model_is_refused():
    model = make("llama", tied=True)

    for wrong, match in (
        (model, "shares parameters"),
        ("foo", "expected an AveragedModel or another module, got str"),
    ):
        with pytest.raises(GrowthError, match=match):
            grow(model, to={"layers": 3}, ema=wrong)
    assert model.config.num_hidden_layers == 2


def test_dropped_state_has_no_births():
    model = make("llama", tied=True)
    optim = growkern.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 5)
    grow(model, optim, to="2x", state="asymmetric")
    assert any("born_rows" in state for state in optim.state.values())

    grow(model, optim, to={"ffn": 100}, state="drop")

    assert not any("born_rows" in s or "rewarm" in s for s in optim.state.values())
    train(model, optim, 2)


def test_a_replaced_head_is_found_while_others_hold_the_old_one():
    model = make("llama", tied=False)
    held = list(model.parameters())
    optim = optims.AdamW(held)
    model.lm_head = torch.nn.Linear(24, 66, bias=False)

    with pytest.raises(UnsupportedOptimizerError, match="has 1 parameters"):
        grow(model, optim, to="2x")


def test_masters_grow_beside_a_history_that_starts_anew():
    model = make("llama", tied=True).bfloat16()
    master_weights = {p: torch.nn.Parameter(p.detach().float()) for p in model.parameters()}
    optim = optims.LBFGS(master_weights.values())

    grow(model, optim, to="2x", master_weights=master_weights)

    for p, master in master_weights.items():
        assert master.shape == p.shape
        torch.testing.assert_close(p, master.bfloat16(), rtol=1e-2, atol=1e-3)


def test_state_of_the_parameters_shape_cannot_be_kept_as_it_is():
    """``fused=True`` would read and write beyond it in the next step."""
    model = make("llama", tied=True)
    optim = optims.AdamW(model.parameters(), lr=1e-3, fused=True)
    train(model, optim, 1)

    with pytest.raises(
        UnsupportedOptimizerError, match="'exp_avg_sq' has the shape of the parameter"
    ):
        grow(model, optim, to="2x", state_rules={"exp_avg_sq": None})

    grow(model, optim, to="2x", state_rules={"exp_avg_sq": None}, state="drop")
    train(model, optim, 1)
