"""The kernel of the fused loss equals its torch twin within rounding, at every width and teacher; nothing else is written."""

import pytest
import torch
import torch.nn.functional as F
from inherited import distillation

from growkern.inherit import fused_loss, rows, sampled, top

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS = 1, 2, 67, 1000, 4095, 4096, 4097, 9000  # around one block of columns, and three blocks
N = 5
EPS = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def problem(n_columns, dtype=torch.float32, n=N, stride=None):
    """Return logits in a buffer of a larger stride, labels, and a teacher's logits."""
    stride = stride or -(-n_columns // 16) * 16
    buffer = torch.full((n, stride), float("nan"), dtype=dtype, device=DEVICE)
    z = buffer[:, :n_columns]
    z.copy_(3 * torch.randn(n, n_columns))
    labels = torch.randint(0, n_columns, (n,), device=DEVICE)
    return z, labels, 2 * torch.randn(n, n_columns, device=DEVICE)


def teacher_of(kind, logits, labels):
    if kind == "none":
        return None, None
    if kind == "full":
        return None, (logits / 2).softmax(-1)
    k = min(10, logits.shape[1])
    index, weight = top(logits, k, 2.0) if kind == "top" else sampled(logits, k, 2.0)
    index[1, 0] = labels[1]  # one row teaches its label
    weight[2, k // 2 :] = 0.0  # one is padded
    return index, weight * (index != index.roll(1, 1))


def both(z, labels, index, weight, **options):
    from growkern.kernels.inherit import row_gradients

    alpha = 0.0 if weight is None else 0.3
    options = dict(alpha=alpha, tau=2.0, scale=1.0, cap=None) | options
    mine, other = z, z.clone()
    losses = row_gradients(mine, labels, index, weight, **options)
    return (mine, *losses), (other, *rows.row_gradients(other, labels, index, weight, **options))


def same(actual, expected, dtype=torch.float32):
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert float((a - b).float().abs().max()) <= EPS[dtype] * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("kind", ["none", "full", "top", "sampled"])
@pytest.mark.parametrize("n_columns", WIDTHS)
def test_the_kernel_is_its_twin_at_every_width(n_columns, kind):
    z, labels, logits = problem(n_columns)

    same(*both(z, labels, *teacher_of(kind, logits, labels)))


@pytest.mark.parametrize("kind", ["none", "full", "top"])
@pytest.mark.parametrize("options", [dict(scale=0.25), dict(cap=4.0), dict(scale=2.0, cap=30.0), dict(tau=1.0)], ids=str)  # fmt: skip
def test_scales_caps_and_temperatures(kind, options):
    z, labels, logits = problem(67)

    same(*both(z, labels, *teacher_of(kind, logits, labels), **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["full", "top"])
def test_low_precision_is_rounded_once(dtype, kind):
    z, labels, logits = problem(1000, dtype)

    same(*both(z, labels, *teacher_of(kind, logits, labels)), dtype)


def test_the_kernel_and_the_loss_agree_on_their_limits():
    from growkern.inherit import linear_loss
    from growkern.kernels import inherit

    assert (inherit.MAX_INDICES, inherit.ALIGNMENT) == (linear_loss.MAX_INDICES, linear_loss.ALIGNMENT)  # fmt: skip


def test_large_logits_do_not_overflow():
    z, labels, logits = problem(1000)
    z *= 1e4

    (g, *losses), expected = both(z, labels, *teacher_of("top", logits, labels))

    assert all(bool(t.isfinite().all()) for t in (g, *losses))
    torch.testing.assert_close(losses, [*expected[1:]], rtol=1e-6, atol=0)


def test_a_row_without_scratch_columns_is_written_to_its_end_and_no_further():
    buffer = torch.full((3, 70), 7.0, device=DEVICE)
    z = buffer[:2].flatten()[:134].view(2, 67)
    z.copy_(torch.randn(2, 67))
    labels = torch.tensor([3, 66], device=DEVICE)

    same(*both(z, labels, None, None))

    assert bool((buffer.flatten()[134:] == 7.0).all())


def test_more_indices_than_a_row_holds_become_weights_per_column():
    hidden, weight = torch.randn(3, 8, device=DEVICE), torch.randn(1500, 8, device=DEVICE)
    labels = torch.tensor([0, 5, 1499], device=DEVICE)
    logits = torch.randn(3, 1500, device=DEVICE)

    for k in (1023, 1024, 1500):
        loss = fused_loss(hidden, weight, labels, *top(logits, k, 2.0), alpha=1.0, backend="triton")
        twin = fused_loss(hidden, weight, labels, *top(logits, k, 2.0), alpha=1.0, backend="torch")
        torch.testing.assert_close(loss.loss, twin.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_bytes", [1 << 12, 1 << 25])
def test_the_fused_loss_by_the_kernel_is_torch_on_whole_logits(chunk_bytes, monkeypatch):
    from growkern.inherit import linear_loss

    monkeypatch.setitem(linear_loss.CHUNK_BYTES, DEVICE, chunk_bytes)
    h, w = torch.randn(40, 12, device=DEVICE), 0.5 * torch.randn(67, 12, device=DEVICE)
    labels, logits = torch.randint(0, 67, (40,), device=DEVICE), torch.randn(40, 67, device=DEVICE)
    leaves = [x.requires_grad_() for x in (h, w)]
    z = h @ w.T
    plain = 0.5 * F.cross_entropy(z, labels) + 0.5 * distillation(z, logits, 2.0)
    expected = torch.autograd.grad(plain, leaves)

    loss = fused_loss(h, w, labels, probs=(logits / 2).softmax(-1), alpha=0.5, backend="triton").loss  # fmt: skip

    torch.testing.assert_close(loss, plain, rtol=2e-6, atol=0)
    for mine, other in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["full", "top"])
def test_a_masked_column_without_teacher_adds_nothing_in_either_backend(kind):
    z, labels, logits = problem(67)
    labels.clamp_(max=65)
    z[:, 66], logits[:, 66] = -float("inf"), -float("inf")
    index, weight = teacher_of(kind, logits, labels)
    if index is not None:
        index[:, 0], weight[:, 0] = 66, 0.0

    mine, other = both(z, labels, index, weight)

    same(mine, other)
    assert all(t.isfinite().all() for t in mine)
