"""The fused loss equals the plain formula: in value and in every gradient, in float64 to 1e-12, and in its special cases."""

import math

import pytest
import torch
import torch.nn.functional as F
from inherited import distillation, formula, logits_of, spread

import growkern
from growkern.errors import PlanError, UnsupportedModelError
from growkern.inherit import fused_loss, linear_loss, sampled, top

N, D, V = 40, 12, 67


def problem(dtype=torch.float64, n=N, seed=0):
    """Return hidden, weight and bias (leaves), labels with ignored rows, and a teacher's logits."""
    g = torch.Generator().manual_seed(seed)
    h, w, b, t = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((n, D), (V, D), (V,), (n, V)))  # fmt: skip
    labels = torch.randint(0, V, (n,), generator=g)
    labels[::7] = -100
    leaves = [x.to(dtype).requires_grad_() for x in (h, 0.4 * w, 0.1 * b)]
    return *leaves, labels, 2 * t.to(dtype)


def teacher_of(kind, logits, tau=2.0):
    """Return columns and weights: dense ones, or with padding, or with columns that occur twice."""
    if kind == "full":
        return None, (logits / tau).softmax(-1)
    if kind == "top":
        return top(logits, 10, tau)
    if kind == "sampled":
        return sampled(logits, 16, tau)
    index, weight = top(logits, 10, tau, renormalize=True)
    if kind == "padded":
        return torch.cat([index, -torch.ones_like(index[:, :3])], 1), F.pad(weight, (0, 3), value=9.0)  # fmt: skip
    return torch.cat([index, index[:, :4]], 1), torch.cat([weight / 2, weight[:, :4] / 2], 1)


KINDS = "full", "top", "sampled", "padded", "twice"


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.5, 3.0)], ids=["plain", "capped"])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients_are_those_of_autograd_on_the_plain_formula(
    kind, scale, cap, alpha, monkeypatch
):
    monkeypatch.setitem(linear_loss.CHUNK_BYTES, "cpu", 8 * 80 * 7)  # seven rows per chunk
    *leaves, labels, logits = problem()
    index, weight = teacher_of(kind, logits)
    dense = weight if index is None else spread(index, weight, V)
    h, w, b = leaves
    expected = formula(logits_of(h, w, b, scale, cap), labels, dense, alpha, 2.0)
    grads = torch.autograd.grad(expected, leaves)

    actual = fused_loss(h, w, labels, index, weight, alpha=alpha, bias=b, scale=scale, softcap=cap)

    assert abs(float(actual.loss.detach() - expected.detach())) < 1e-12
    for mine, other in zip(torch.autograd.grad(actual.loss, leaves), grads, strict=True):
        assert float((mine - other).abs().max()) < 1e-12 * max(1.0, float(other.abs().max()))


def test_gradients_are_finite_differences():
    h, w, b, labels, logits = problem(n=6)
    leaves = [h.detach()[:, :4], w.detach()[:15, :4], b.detach()[:15]]
    labels = torch.where(labels < 0, labels, labels % 15)
    index, weight = teacher_of("top", logits[:, :15])

    def loss(h, w, b):
        return fused_loss(h, w, labels, index, weight, alpha=0.3, bias=b, softcap=3.0).loss

    assert torch.autograd.gradcheck(loss, [x.clone().requires_grad_() for x in leaves])


def test_alpha_zero_is_cross_entropy():
    h, w, b, labels, _ = problem()

    actual = fused_loss(h, w, labels, bias=b)

    expected = F.cross_entropy(F.linear(h, w, b), labels)
    torch.testing.assert_close(actual.loss, expected, rtol=1e-14, atol=0)
    assert actual.ce == actual.loss and actual.kl == 0


def test_the_whole_distribution_is_kl_div_times_the_squared_temperature():
    h, w, b, labels, logits = problem()
    labels = labels.clamp_min(0)
    z = F.linear(h, w, b)
    for index, weight in (teacher_of("full", logits), top(logits, V, 2.0)):
        actual = fused_loss(h, w, labels, index, weight, alpha=1.0, bias=b).loss

        torch.testing.assert_close(actual, distillation(z, logits, 2.0), rtol=1e-13, atol=0)


def test_a_one_hot_teacher_at_temperature_one_is_cross_entropy():
    h, w, _, labels, _ = problem()
    index, weight = labels.clamp_min(0)[:, None], torch.ones(N, 1, dtype=torch.float64)

    actual = fused_loss(h, w, labels, index, weight, alpha=1.0, tau=1.0)

    torch.testing.assert_close(actual.loss, F.cross_entropy(h @ w.T, labels), rtol=1e-14, atol=0)


def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient():
    h, w, b, labels, _ = problem()
    targets = teacher_of("full", F.linear(h, w, b).detach())

    loss = fused_loss(h, w, labels, *targets, alpha=1.0, bias=b).loss

    assert abs(float(loss.detach())) < 1e-14
    assert all(float(g.abs().max()) < 1e-14 for g in torch.autograd.grad(loss, (h, w, b)))


def test_the_expected_gradient_of_samples_is_the_gradient_of_the_whole_distribution():
    *leaves, labels, logits = problem()
    h, w, b = leaves

    def grads(index, weight):
        loss = fused_loss(h, w, labels, index, weight, alpha=1.0, bias=b).loss
        return torch.autograd.grad(loss, leaves)

    full, n, draws = grads(*teacher_of("full", logits)), 400, torch.Generator().manual_seed(1)
    means = [torch.zeros_like(g) for g in full]
    squares = [torch.zeros_like(g) for g in full]
    for _ in range(n):
        for g, mean, square in zip(grads(*sampled(logits, 4, 2.0, draws)), means, squares, strict=True):  # fmt: skip
            mean += g / n
            square += g**2 / n

    biased = grads(*top(logits, 4, 2.0, renormalize=True))
    for g, mean, square, other in zip(full, means, squares, biased, strict=True):
        error = ((square - mean**2) / n).sqrt()  # standard error of the mean, per element
        assert torch.equal(mean[error == 0], g[error == 0])  # positions that are not predicted
        g, mean, other, error = (x[error > 0] for x in (g, mean, other, error))
        deviations = ((mean - g) / error).abs()
        assert float(deviations.max()) < 5 and float(deviations.square().mean()) < 1.5
        assert float(((other - g) / error).square().mean()) > 20  # the test tells bias from noise


def test_positions_of_any_shape_have_weights():
    logits = torch.randn(2, 3, 10)
    flat = sampled(logits.flatten(0, 1), 4, 2.0, torch.Generator().manual_seed(0))
    assert [t.shape for t in top(logits, 4, 2.0)] == [(2, 3, 4)] * 2
    for mine, other in zip(sampled(logits, 4, 2.0, torch.Generator().manual_seed(0)), flat, strict=True):  # fmt: skip
        assert torch.equal(mine, other.view(2, 3, 4))


def test_half_precision_logits_are_divided_by_the_temperature_in_float32():
    logits = torch.randn(5, 200).bfloat16()

    weight = top(logits, 200, 3.0)[1]

    exact = (logits.double() / 3).softmax(-1).sort(-1, descending=True).values
    assert weight.dtype == sampled(logits, 4, 3.0)[1].dtype == torch.float32
    torch.testing.assert_close(weight.double(), exact, rtol=1e-6, atol=0)


def test_the_weights_of_draws_are_their_counts():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]], dtype=torch.float64).log_softmax(-1)
    index, weight = sampled(logits, 20_000, 1.0, torch.Generator().manual_seed(0))

    dense = spread(index, weight, 4)[0]

    assert len(index[weight > 0].unique()) == int((weight > 0).sum()) == 4
    error = (logits.exp() * (1 - logits.exp()) / 20_000).sqrt()[0]
    assert float(((dense - logits.exp()[0]) / error).abs().max()) < 4


def test_a_denominator_of_the_whole_batch_makes_micro_batches_add_up():
    h, w, b, labels, logits = problem()
    labels[:12] = -100  # micro-batches of unequal counts
    index, weight = teacher_of("top", logits)
    whole = fused_loss(h, w, labels, index, weight, alpha=0.4, bias=b).loss
    n = int((labels != -100).sum())

    parts = [
        fused_loss(h[s], w, labels[s], index[s], weight[s], alpha=0.4, bias=b, n_items=n).loss
        for s in (slice(0, 20), slice(20, 40))
    ]

    torch.testing.assert_close(sum(parts), whole, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_close_to_float64_as_the_stock_head_is(dtype):
    *leaves, labels, logits = problem(dtype, n=200)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    targets = teacher_of("full", logits.double())
    stock = logits_of(*leaves).float()
    h, w, b = exact
    expected = fused_loss(h, w, labels, *targets, alpha=0.5, bias=b).loss
    wanted = torch.autograd.grad(expected, exact)
    kept = labels != -100
    plain = 0.5 * F.cross_entropy(stock, labels)
    plain = plain + 0.5 * distillation(stock[kept], logits[kept].float(), 2.0)
    theirs = torch.autograd.grad(plain, leaves)

    h, w, b = leaves
    ours = fused_loss(h, w, labels, *targets, alpha=0.5, bias=b).loss

    def error(a, b):
        return float((a.double() - b).norm() / b.norm())

    value, true = float(ours.detach()), float(expected.detach())
    assert abs(value - true) <= (1e-6 if dtype == torch.float32 else 1e-3) * true
    for mine, other, true in zip(torch.autograd.grad(ours, leaves), theirs, wanted, strict=True):
        assert mine.dtype == dtype
        assert error(mine, true) <= 1.5 * error(other, true) + 1e-6


def test_small_float16_gradients_survive_until_a_scaler_multiplies_them():
    *leaves, labels, _ = problem(torch.float16)
    h, w, b = leaves

    loss = fused_loss(h, w, labels, bias=b, n_items=10**6).loss
    grads = torch.autograd.grad(loss * 2.0**16, leaves)

    exact = [x.detach().double().requires_grad_() for x in leaves]
    z = F.linear(*exact)
    true = torch.autograd.grad(F.cross_entropy(z, labels, reduction="sum") * 2**16 / 1e6, exact)
    assert all(float((g.double() - t).norm() / t.norm()) < 2e-3 for g, t in zip(grads, true, strict=True))  # fmt: skip


def test_float16_gradients_that_sum_over_many_positions_do_not_overflow():
    h = torch.full((4000, 4), 40.0, dtype=torch.float16)
    w = torch.zeros(9, 4, dtype=torch.float16, requires_grad=True)

    fused_loss(h, w, torch.zeros(4000, dtype=torch.int64)).loss.backward()

    expected = torch.full((9, 4), 40.0 / 9)
    expected[0] -= 40.0
    torch.testing.assert_close(w.grad.float(), expected, rtol=1e-3, atol=0)


def test_autocast_gives_gradients_in_the_dtype_of_the_weights():
    h, w, b, labels, logits = problem(torch.float32)
    index, weight = teacher_of("top", logits)

    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_loss(h, w, labels, index, weight, alpha=0.5, bias=b).loss
    loss.backward()

    plain = fused_loss(h, w, labels, index, weight, alpha=0.5, bias=b).loss
    assert w.grad.dtype == torch.float32
    assert 0 < abs(float(loss.detach() - plain.detach())) < 0.02 * float(plain.detach())


def test_no_gradient_is_made_of_a_frozen_head_or_of_no_predicted_position():
    h, w, _, labels, _ = problem()
    w.requires_grad_(False)

    fused_loss(h, w, torch.full_like(labels, -100)).loss.backward()

    assert w.grad is None and float(h.grad.abs().max()) == 0


def test_logits_of_the_whole_batch_never_exist(monkeypatch):
    monkeypatch.setitem(linear_loss.CHUNK_BYTES, "cpu", 1 << 14)
    seen = []
    run = linear_loss.row_gradients
    monkeypatch.setattr(
        linear_loss, "row_gradients", lambda z, *a, **k: seen.append(len(z)) or run(z, *a, **k)
    )
    h, w, _, labels, _ = problem(n=400)

    fused_loss(h, w, labels)

    assert max(seen) * 80 * 8 <= 1 << 14 and sum(seen) == int((labels != -100).sum())


H, W, L = torch.randn(4, 8), torch.randn(10, 8), torch.tensor([1, 2, -100, 3])
AT, P = torch.zeros(4, 2, dtype=torch.int64), torch.full((4, 2), 0.5)
REFUSED = {
    "more weights than columns": (dict(probs=torch.ones(4, 11), alpha=1.0), "11 weights per position, more than the vocabulary of 10"),
    "a column outside": (dict(index=AT + 10, probs=P, alpha=1.0), "outside 0 ... 9"),
    "a column below": (dict(index=AT - 2, probs=P, alpha=1.0), "outside 0 ... 9"),
    "a negative weight": (dict(index=AT, probs=-P, alpha=1.0), "negative or not finite"),
    "a weight that is none": (dict(index=AT, probs=P * math.nan, alpha=1.0), "negative or not finite"),
    "another number of positions": (dict(index=AT[:3], probs=P[:3], alpha=1.0), r"do not fit \(4,\) positions"),
    "no columns": (dict(probs=P, alpha=1.0), r"weights \(\*positions, 10\) alone"),
    "no teacher": (dict(alpha=0.5), "there is no teacher; pass probs="),
    "a share above 1": (dict(alpha=1.5), "pass a number from 0 to 1"),
    "no temperature": (dict(tau=0.0), "tau: 0.0 is not positive"),
    "no cap": (dict(softcap=-1.0), "softcap: -1.0 is not positive"),
    "an unknown backend": (dict(backend="cuda"), "backend='cuda' is unknown"),
    "a label tensor of another shape": (dict(labels=L[:3]), r"labels \(3,\) do not fit"),
    "a hidden size of another head": (dict(weight=W[:, :4]), r"weight \(10, 4\)"),
    "a label outside": (dict(labels=L + 8), "a label is outside 0 ... 9 and is not -100"),
    "labels that are no tokens": (dict(labels=L.float()), "torch.float32 is no dtype of tokens"),
    "a bias of another head": (dict(bias=W[0]), r"bias \(8,\)"),
    "no positions": (dict(n_items=0), "n_items: 0, and this batch alone has 3 predicted positions"),
    "a string": (dict(tau="2"), "tau: expected number, got '2'"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "match"), REFUSED.values(), ids=REFUSED)
def test_arguments_that_do_not_fit_are_refused(changes, match):
    with pytest.raises(PlanError, match=match):
        fused_loss(**dict(hidden=H, weight=W, labels=L) | changes)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda z: top(z, 11, 2.0), "k: 11 is no number of weights here; pass 1 to 10"),
        (lambda z: top(z, 0, 2.0), "pass 1 to 10"),
        (lambda z: top(z, 3, 0.0), "tau: 0.0 is not positive"),
        (lambda z: top(z, "3", 2.0), "k: expected int, got '3'"),
        (lambda z: sampled(z, 0, 2.0), "n: 0 is no number"),
        (lambda z: sampled(z[0, 0], 3, 2.0), r"logits: \(\)"),
        (lambda z: sampled(z.long(), 3, 2.0), "pass floats"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(call, match):
    with pytest.raises(PlanError, match=match):
        call(torch.randn(4, 10))


def test_the_public_name_is_this_function():
    assert growkern.inherit.fused_loss is fused_loss


@pytest.mark.parametrize("kind", ["full", "top"])
def test_a_column_that_nobody_gives_probability_adds_nothing(kind):
    h, w, b, labels, logits = problem()
    labels, logits = labels.clamp(-100, V - 2), logits.clone()
    masked = b.detach().clone()
    masked[-1], logits[:, -1] = -math.inf, -math.inf
    index, weight = teacher_of(kind, logits)
    if kind == "top":
        index[:, 0], weight[:, 0] = V - 1, 0.0

    actual = fused_loss(h, w, labels, index, weight, alpha=0.5, bias=masked)

    dense = weight if index is None else spread(index, weight, V)
    h2, w2 = h.detach().requires_grad_(), w.detach().requires_grad_()
    z = logits_of(h2, w2, b.detach(), 1.0, None)
    expected = formula(z[:, :-1], labels, dense[:, :-1], 0.5, 2.0)
    torch.testing.assert_close(actual.loss, expected, rtol=1e-12, atol=0)
    for mine, other in zip(torch.autograd.grad(actual.loss, [h, w]), torch.autograd.grad(expected, [h2, w2]), strict=True):  # fmt: skip
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_a_second_derivative_is_refused():
    h, w, _, labels, _ = problem()
    with pytest.raises(UnsupportedModelError, match="no second derivative"):
        torch.autograd.grad(fused_loss(h, w, labels).loss, [h], create_graph=True)
