"""``dz = (1 - alpha) * (softmax(z) - onehot(y)) + alpha * tau * (sum(q) * softmax(z / tau) - q)``, in place, with both losses of a row.

``z = cap * tanh(scale * logit / cap)``, or ``scale * logit`` without a cap; the gradient is with respect to the logit. ``q`` is the
teacher's distribution: K indices with weights, or one weight per column. One pass finds both sums and the maximum, which serves both
softmaxes, because ``max(z / tau) = max(z) / tau``; a second pass writes the gradient. No probability is kept.
Bytes: every logit is read twice and written once; weights per column are read twice.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # columns per step, 16 per thread; half of it beside a dense teacher, to stay within 64 registers
N_WARPS = 8
ALIGNMENT = 16  # columns: rows whose stride is a multiple are read 16 bytes at a time
MAX_INDICES = 1023  # indices per row; with the label a row has at most 1024


@triton.jit
def _scaled(x, scale, cap, CAPPED: tl.constexpr):
    """Return scaled and capped logits, in float32."""
    x = x.to(tl.float32) * scale
    if CAPPED:
        x = cap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * x / cap)))  # tanh
    return x


@triton.jit
def _gradient(
    x, y, q, mass, hard, soft, inverse_tau, lse, lse_tau, scale, cap, SOFT: tl.constexpr, CAPPED: tl.constexpr
):  # fmt: skip
    """Return the gradient with respect to logits; ``y``: 1 at the label, ``q``: weights of the teacher."""
    g = hard * (tl.exp(x - lse) - y)
    if SOFT:
        g += soft * (mass * tl.exp(x * inverse_tau - lse_tau) - q)
    return g * (scale * (1.0 - (x / cap) * (x / cap))) if CAPPED else g * scale


@triton.jit
def _sums(
    z_ptr, dense_ptr, n_columns, n_padded, inverse_tau, scale, cap,
    BLOCK: tl.constexpr, SOFT: tl.constexpr, DENSE: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Return, of a row, the maximum, both sums of exponentials less the maximum, and the mass and the cross term of a dense teacher."""
    largest = -float("inf")
    cold, hot, mass, kl = 0.0, 0.0, 0.0, 0.0
    for start in range(0, n_columns, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = _scaled(tl.load(z_ptr + i, mask=i < n_padded, other=0.0), scale, cap, CAPPED)
        x = tl.where(i < n_columns, x, -float("inf"))
        new = tl.maximum(largest, tl.max(x, 0))
        cold = cold * tl.exp(largest - new) + tl.sum(tl.exp(x - new), 0)
        if SOFT:
            hot = hot * tl.exp((largest - new) * inverse_tau)
            hot += tl.sum(tl.exp((x - new) * inverse_tau), 0)
        if DENSE:
            p = tl.load(dense_ptr + i, mask=i < n_columns, other=0.0)
            mass += tl.sum(p, 0)
            taught = p > 0  # 0 log 0 = 0
            terms = tl.log(tl.where(taught, p, 1.0)) - tl.where(taught, x, 0.0) * inverse_tau
            kl += tl.sum(p * terms, 0)
        largest = new
    return largest, cold, hot, mass, kl


@triton.jit
def inherit_kernel(
    z_ptr, at_ptr, weight_ptr, dense_ptr, special_ptr, ce_ptr, kl_ptr,
    n_columns, n_padded, stride, dense_stride,
    hard, soft, inverse_tau, scale, cap,
    N_AT: tl.constexpr, BLOCK: tl.constexpr, SOFT: tl.constexpr, DENSE: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """A program turns one row into its gradient, and computes the gradient at the label and the teacher's indices apart."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride
    k = row * N_AT + tl.arange(0, N_AT)
    at = tl.load(at_ptr + k)
    q = tl.load(weight_ptr + k)
    label = tl.load(at_ptr + row * N_AT + (N_AT - 1))
    # read before the first reduction, whose barrier no store of the second pass can overtake
    x_at = _scaled(tl.load(z_ptr + at), scale, cap, CAPPED)
    x_label = _scaled(tl.load(z_ptr + label), scale, cap, CAPPED)
    if DENSE:
        dense_ptr += row * dense_stride
        q += tl.load(dense_ptr + at)

    largest, cold, hot, mass, kl = _sums(
        z_ptr, dense_ptr, n_columns, n_padded, inverse_tau, scale, cap, BLOCK, SOFT, DENSE, CAPPED
    )
    lse = largest + tl.log(cold)
    lse_tau = largest * inverse_tau
    if SOFT:
        lse_tau += tl.log(hot)
        if not DENSE:
            mass = tl.sum(q, 0)
            taught = tl.where(q > 0, x_at, 0.0) * inverse_tau
            terms = q * (tl.log(tl.where(q > 0, q, 1.0)) - taught)
            kl = tl.sum(terms, 0)
            q = tl.where(at == label, tl.sum(tl.where(at == label, q, 0.0), 0), q)
        kl += mass * lse_tau

    tl.store(ce_ptr + row, lse - x_label)
    tl.store(kl_ptr + row, kl)
    for start in range(0, n_columns, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = _scaled(tl.load(z_ptr + i, mask=i < n_padded, other=0.0), scale, cap, CAPPED)
        p = 0.0
        if DENSE:
            p = tl.load(dense_ptr + i, mask=i < n_columns, other=0.0)
        g = _gradient(
            x, 0.0, p, mass, hard, soft, inverse_tau, lse, lse_tau, scale, cap, SOFT, CAPPED
        )
        tl.store(z_ptr + i, g, mask=i < n_padded)
    y = tl.where(at == label, 1.0, 0.0)
    g = _gradient(x_at, y, q, mass, hard, soft, inverse_tau, lse, lse_tau, scale, cap, SOFT, CAPPED)
    tl.store(special_ptr + k, g)


def launch_options(n_columns: int, n_at: int, soft: bool, dense: bool, capped: bool) -> dict[str, Any]:  # fmt: skip
    """Options that a launch is specialized on."""
    block = min(BLOCK // 2 if dense else BLOCK, triton.next_power_of_2(n_columns))
    return dict(N_AT=n_at, BLOCK=block, SOFT=soft, DENSE=dense, CAPPED=capped, num_warps=N_WARPS)


def row_gradients(
    z: Tensor, labels: Tensor, index: Tensor | None, weight: Tensor | None, *, alpha: float, tau: float, scale: float, cap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Replace logits by their gradient; return cross entropy and divergence of each row, both (n,) in float32.

    Args:
        z: Logits (n, V), of unit stride along a row; where the stride of a row exceeds V, the columns up to the stride are scratch.
        labels: Correct columns, int64 (n,).
        index: Columns of the teacher's weights (n, K), K <= MAX_INDICES, unique in a row where the weight is positive; None: ``weight``
            has a column for each of ``z``.
        weight: Weights of the teacher (n, K) or (n, V); None: there is no teacher, and ``alpha`` is 0.
        alpha: Share of the divergence.
        tau: Temperature of teacher and student.
        scale: Factor of the logits.
        cap: Softcap of the scaled logits.
    """
    (n, n_columns), dense = z.shape, index is None and weight is not None
    n_at = 1 if index is None else triton.next_power_of_2(index.shape[1] + 1)
    at = labels[:, None].repeat(1, n_at)
    sparse = torch.zeros(n, n_at, dtype=torch.float32, device=z.device)
    if index is not None and weight is not None:
        k = index.shape[1]
        at[:, :k] = torch.where(weight > 0, index, at[:, :k])
        sparse[:, :k] = weight
    every = weight.float().contiguous() if dense and weight is not None else sparse
    special = torch.empty(n, n_at, dtype=z.dtype, device=z.device)
    ce, kl = (torch.empty(n, dtype=torch.float32, device=z.device) for _ in range(2))
    n_padded = min(-(-n_columns // ALIGNMENT) * ALIGNMENT, z.stride(0))
    if n:
        with torch.cuda.device_of(z):
            inherit_kernel[(n,)](
                z, at, sparse, every, special, ce, kl,
                n_columns, n_padded, z.stride(0), every.stride(0),
                1.0 - alpha, alpha * tau, 1.0 / tau, scale, cap or 1.0,
                **launch_options(n_columns, n_at, weight is not None, dense, cap is not None),
            )  # fmt: skip
        z.scatter_(1, at, special)  # columns of equal index get equal values
    return ce, kl
