"""A number that is not finite never spreads: a growth refuses the tensor by name and changes nothing, or keeps it where it is."""

from math import inf, nan

import pytest
import torch
from models import batch, grow, logits, loss_of, make, train

from growkern import vocab, width
from growkern.errors import CommitError
from growkern.execution import finite

EVEN = width.Lossless(noise=0)


def live(family="llama", *, dtype=torch.float32):
    """Make a model with optimizer state and without gradients."""
    model = make(family, tied=False)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 2)
    optim.zero_grad()
    if dtype != torch.float32:
        model.to(dtype)
        for state in optim.state.values():
            state.update({k: v.to(dtype) for k, v in state.items() if k != "step"})
    return model, optim


def bits_of(model, optim):
    """Copy everything to integers, so that NaN equals NaN."""
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    tensors |= {
        f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None
    }
    names = {p: name for name, p in model.named_parameters()}
    for p, state in optim.state.items():
        tensors |= {f"{names[p]} {key}": value for key, value in state.items()}
    kinds = {2: torch.int16, 4: torch.int32}
    return {name: t.clone().view(kinds[t.itemsize]) for name, t in tensors.items()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


HEAD, UP = "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
NORM, GPT_DOWN = "model.layers.0.input_layernorm.weight", "transformer.h.0.mlp.c_proj.weight"


def put(model, name, value):
    model.get_parameter(name).data.view(-1)[0] = value


def fill(model, name, value):
    model.get_parameter(name).data.fill_(value)


def fill_grad(model, name, value):
    p = model.get_parameter(name)
    p.grad = torch.full_like(p, value)


# family, dtype, how the model is broken, options of the growth, message
REFUSED = {
    "a NaN under the readers of pads": (
        "llama", torch.float32, (put, HEAD, nan), {}, rf"{HEAD}: 1 of 1584 elements is not finite.*noise.*to 1584 target"),
    "an infinity under twin noise": (
        "llama", torch.float32, (put, UP, -inf), dict(width=width.Lossless(noise=1)), rf"{UP}: 1 of 960 elements is not finite"),
    "a NaN under mean pads": (
        "gpt2", torch.float32, (put, GPT_DOWN, nan), dict(to="1.5x"), rf"{GPT_DOWN}: 1 of 2304 elements is not finite.*a mean"),
    "a NaN under centering": (
        "gpt2", torch.float32, (put, GPT_DOWN, nan), dict(to="1.5x", width=width.Lossless(norms="centre_pad")),
        rf"{GPT_DOWN}: 1 of 2304 elements is not finite"),
    "a NaN under rows of a method": (
        "llama", torch.float32, (put, HEAD, nan), dict(to={"vocab": 80}, width=vocab.MeanCov()),
        f"new rows of {HEAD}: 1 of 1584 elements is not finite"),
    "a gain beyond float16": (
        "llama", torch.float16, (fill, NORM, 60000.0), dict(to={"hidden": 36}, width=EVEN),
        rf"{NORM}: 24 target elements would exceed the largest float16, 65504"),
    "a weight beyond float16": (
        "llama", torch.float16, (put, HEAD, 65504.0), dict(width=width.Lossless(noise=900)),
        rf"(?s){HEAD}: \d+ target elements would exceed the largest float16"),
    "a gradient beyond float16": (
        "llama", torch.float16, (fill_grad, NORM, 60000.0), dict(to={"hidden": 36}),
        rf"the gradient of {NORM}: \d+ target elements would exceed the largest float16, 65504. Clear it"),
    "rows of a method beyond float16": (
        "llama", torch.float16, (put, HEAD, 65504.0), dict(to={"vocab": 80}, width=vocab.MeanCov(scale=1e6)),
        rf"{HEAD}: \d+ target elements would exceed the largest float16"),
}  # fmt: skip


@pytest.mark.parametrize("memory", ["stage", "lean"])
@pytest.mark.parametrize(
    ("family", "dtype", "damage", "options", "match"), REFUSED.values(), ids=REFUSED
)
def test_what_would_not_stay_finite_is_refused_by_name(
    family, dtype, damage, options, match, memory
):
    model, optim = live(family, dtype=dtype)
    change, name, value = damage
    change(model, name, value)
    before = bits_of(model, optim)

    with pytest.raises(CommitError, match=match):
        grow(model, optim, memory=memory, **options)

    assert same_bits(bits_of(model, optim), before)
    change(model, name, 0.5)
    grow(model, optim, to={"hidden": 48})


def test_a_weight_that_is_only_copied_keeps_its_nan_where_it_is():
    model, optim = live()
    put(model, UP, nan)

    grow(model, optim, width=EVEN)

    broken = model.get_parameter(UP).isnan().nonzero().tolist()
    assert broken == [[0, 0], [0, 24], [40, 0], [40, 24]]


def test_infinite_gradients_in_flight_grow_element_by_element():
    model, optim = live()
    loss_of(model, batch()).backward()
    model.get_parameter(HEAD).grad[3] = inf

    report = grow(model, optim)

    grad = model.get_parameter(HEAD).grad
    assert grad[3].isinf().sum() == 24 and grad.isfinite().logical_not().sum() == 24
    assert report.grad_norm_factor is None and "nan" not in str(report)


def test_second_moments_that_are_not_finite_stay_and_new_ones_take_the_mean_of_the_others():
    model, optim = live()
    state = optim.state[model.get_parameter(HEAD)]
    state["exp_avg_sq"][0, :2] = torch.tensor([inf, nan])
    source = state["exp_avg_sq"].clone()

    report = grow(model, optim)

    target = optim.state[model.get_parameter(HEAD)]["exp_avg_sq"]
    assert torch.equal(target[:, :24].isfinite(), source.isfinite())
    mean = source[source.isfinite()].mean()
    torch.testing.assert_close(target[:, 24:], mean.expand(66, 24), rtol=1e-5, atol=0)
    assert [note for note in report.notes if f"state 'exp_avg_sq' of {HEAD}: 2 of 1584" in note]


def test_second_moments_that_are_all_infinite_give_new_elements_0():
    model, optim = live()
    optim.state[model.get_parameter(HEAD)]["exp_avg_sq"].fill_(inf)

    grow(model, optim)

    target = optim.state[model.get_parameter(HEAD)]["exp_avg_sq"]
    assert target[:, :24].isinf().all() and (target[:, 24:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_second_moments_that_become_0_are_counted(dtype):
    model, optim = live(dtype=dtype)
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for state in optim.state.values():
        state["exp_avg_sq"].fill_(1)
    square = optim.state[model.get_parameter(UP)]["exp_avg_sq"]
    # the law divides by 4: 2 units become half a unit, which rounds to 0, and 3 units become 1
    square[:2, :5] = torch.tensor([0, tiny, 2 * tiny, 3 * tiny, 4 * tiny], dtype=dtype)

    report = grow(model, optim, width=EVEN)

    said = [note for note in report.notes if "became 0" in note]
    target = optim.state[model.get_parameter(UP)]["exp_avg_sq"]
    n_zero = int((target == 0).sum())
    assert n_zero == 4 * 2 * 3  # 4 copies of 2 rows, of which 0 was 0 before
    assert said and said[0].startswith("16 second moments became 0") and UP in said[0]


@pytest.mark.parametrize("options", [{}, dict(width=EVEN), dict(state="copy")], ids=str)
def test_zeros_that_were_zeros_are_not_counted(options):
    model, optim = live()
    optim.state[model.get_parameter(UP)]["exp_avg_sq"][:5] = 0

    report = grow(model, optim, **options)

    assert not [note for note in report.notes if "became 0" in note]


def test_large_numbers_that_still_fit_grow():
    model, optim = live(dtype=torch.float16)
    fill(model, NORM, 65504.0)
    put(model, HEAD, 65504.0)

    grow(model, optim, width=width.Lossless(noise=0.5), to={"ffn": "2x"})

    assert model.get_parameter(NORM).eq(65504).all() and model.get_parameter(HEAD).isfinite().all()


def test_an_average_with_a_nan_is_named():
    model, optim = live("gpt2")
    average = torch.optim.swa_utils.AveragedModel(model)
    put(average.module, GPT_DOWN, nan)
    before = bits_of(model, optim)

    with pytest.raises(CommitError, match=f"{GPT_DOWN} of an average: 1 of 2304"):
        grow(model, optim, to="1.5x", ema=average)

    assert same_bits(bits_of(model, optim), before)


def test_only_what_may_be_lost_is_compared_element_by_element(monkeypatch):
    model, optim = live()
    compared = []
    monkeypatch.setattr(finite, "_n_lost", lambda _, job: compared.append(job[0].name) or 0)
    monkeypatch.setattr(finite, "_n_zeroed", lambda _, job: compared.append(job[0].name) or 0)

    grow(model, optim)

    assert compared == []
    assert logits(model, batch()).isfinite().all()


@pytest.mark.parametrize("memory", ["stage", "lean"])
@pytest.mark.parametrize(("key", "value"), [("absmax1", float("nan")), ("absmax2", float("inf"))])
def test_a_block_of_8_bits_whose_scale_is_not_finite_is_refused(key, value, memory):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = make("llama", tied=False, hidden_size=96, num_attention_heads=4, head_dim=24, intermediate_size=200)  # fmt: skip
    optim = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-3)
    train(model, optim, 2)
    down = model.model.layers[1].mlp.down_proj.weight
    optim.state[down][key][3] = value
    codes = optim.state[down][f"state{key[-1]}"].clone()

    match = f"state 'state{key[-1]}' of model.layers.1.mlp.down_proj.weight: the scales of 1 block"
    with pytest.raises(CommitError, match=match):
        grow(model, optim, to="2x", memory=memory)

    assert model.config.hidden_size == 96 and torch.equal(
        optim.state[down][f"state{key[-1]}"], codes
    )
    optim.state[down].clear()
    grow(model, optim, to="2x", memory=memory)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_growth_under_autocast_is_the_growth_without_it(dtype):
    grown = []
    for enabled in (False, True):
        model, optim = live()
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            grow(model, optim, to="1.5x")
            assert torch.is_autocast_enabled("cpu") == enabled
        grown.append(bits_of(model, optim))

    assert same_bits(*grown)
