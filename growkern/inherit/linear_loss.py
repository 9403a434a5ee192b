"""Cross entropy and divergence from a teacher through a linear head, chunk by chunk: the logits of the whole batch never exist."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from growkern.errors import PlanError, UnsupportedModelError
from growkern.execution.execute import unavailable
from growkern.inherit.rows import row_gradients
from growkern.inherit.targets import Pair, Targets, merged
from growkern.support.argument_types import typed_arguments
from growkern.support.dtypes import arithmetic
from growkern.support.text import short

CHUNK_BYTES = {"cpu": 1 << 25, "cuda": 1 << 28}  # logits of a chunk
IGNORED = -100
ALIGNMENT = 16  # columns: the kernel reads rows of such a stride 16 bytes at a time
COLUMNS = torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8, torch.uint16, torch.uint32  # fmt: skip
MAX_INDICES = 1023  # more indices per row become one weight per column


class Losses(NamedTuple):
    """Losses of a batch.

    Attributes:
        loss: ``(1 - alpha) * ce + alpha * tau**2 * kl``, with a gradient.
        ce: Cross entropy with the labels, without a gradient: mean over the predicted positions of this batch, whatever ``n_items`` is.
        kl: Divergence of the student from the teacher at the temperature, a mean too, without a gradient; 0 without a teacher, and where
            ``alpha`` is 0. From sampled weights it contains the entropy of the draws, and only its gradient is right in expectation.

    Example:
        >>> hidden, weight, labels = torch.zeros(8, 16), torch.zeros(100, 16), torch.zeros(8, dtype=torch.long)
        >>> losses = growkern.inherit.fused_loss(hidden, weight, labels)
        >>> round(losses.ce.item(), 3), round(losses.kl.item(), 3)  # ln 100 of a head that knows nothing
        (4.605, 0.0)
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor


class Terms(NamedTuple):
    """How the two terms of the loss are weighted, and what the head does to its logits."""

    alpha: float = 0.0
    tau: float = 2.0
    scale: float = 1.0
    cap: float | None = None
    backend: str | None = None
    dtype: torch.dtype | None = None  # of the logits; None: as autocast and the tensors say


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, targets: Targets | None, terms: Terms,
        n_items: Tensor | float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dtype = _compute_dtype(hidden, weight, terms.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
            math_dtype = arithmetic(dtype)
            gh = torch.empty_like(hidden, dtype=dtype) if ctx.needs_input_grad[0] else None
            gw = torch.zeros_like(w, dtype=math_dtype) if ctx.needs_input_grad[1] else None
            gb = torch.zeros_like(b, dtype=math_dtype) if b is not None and ctx.needs_input_grad[2] else None  # fmt: skip
            ce, kl = (torch.empty(len(hidden), dtype=math_dtype, device=hidden.device) for _ in range(2))  # fmt: skip
            for rows, z in _chunks(len(hidden), len(w), dtype, hidden.device):
                h = hidden[rows].to(dtype)
                torch.mm(h, w.t(), out=z) if b is None else torch.addmm(b, h, w.t(), out=z)
                ce[rows], kl[rows] = _row_gradients(z, labels[rows], targets and targets(rows), terms)  # fmt: skip
                if gh is not None:
                    torch.mm(z, w, out=gh[rows])
                if gw is not None:
                    gw.addmm_(z.t(), h) if gw.dtype == dtype else gw.add_(z.t() @ h)
                if gb is not None:
                    gb.add_(z.sum(0, dtype=math_dtype))
        if gw is not None and weight.dtype != torch.float16:  # sums over positions overflow float16
            gw = gw.to(weight.dtype)
        ctx.save_for_backward(gh, gw, gb, torch.as_tensor(n_items))
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        n_own, (cross, divergence) = max(len(hidden), 1), (ce.sum(), kl.sum())
        loss = ((1 - terms.alpha) * cross + terms.alpha * terms.tau**2 * divergence) / n_items
        cross, divergence = cross / n_own, divergence / n_own
        ctx.mark_non_differentiable(cross, divergence)
        return loss, cross, divergence

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():
            raise UnsupportedModelError(
                "the fused loss has no second derivative, and create_graph=True asks for it: compute F.cross_entropy and F.kl_div there."
            )
        *grads, n_items = ctx.saved_tensors
        factor = upstream[0] / n_items.to(upstream[0].device)
        scaled = [
            None if g is None else (g * factor).to(dtype)
            for g, dtype in zip(grads, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None, None


def linear_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, terms: Terms, n_items: Tensor | int | None,
    targets_of: Callable[[Tensor], Targets] | None, ignore_index: int = IGNORED,
) -> Losses:  # fmt: skip
    """Return the losses of the predicted positions: hidden (..., D), head weight (V, D), labels (...,).

    Args:
        hidden: Input of the head.
        weight: Weight of the head.
        bias: Bias of the head.
        labels: Label of every position.
        terms: Weights of the terms; scale and softcap of the head.
        n_items: Denominator; None: the number of predicted positions. A tensor's 0, of a step without a predicted position, counts as 1.
        targets_of: Function from the flat positions that are predicted to the teacher's targets; None: there is no teacher.
        ignore_index: Label of positions that are not predicted.

    Raises:
        PlanError: The shapes do not fit, or a label is outside the vocabulary.
    """
    fits = hidden.dim() and weight.dim() == 2 and hidden.shape == (*labels.shape, weight.shape[1])
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        raise PlanError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, bias {bias if bias is None else tuple(bias.shape)} and labels "
            f"{tuple(labels.shape)} do not fit; pass hidden (..., D), weight (V, D), bias (V,) and labels (...,)."
        )
    if labels.is_floating_point() or labels.is_complex():
        raise PlanError(f"labels: {labels.dtype} is no dtype of tokens; pass int64.")
    flat = labels.flatten().long()
    keep = (flat != ignore_index).nonzero().squeeze(1)
    kept = flat[keep]
    if bool(((kept < 0) | (kept >= len(weight))).any()):
        raise PlanError(
            f"labels: a label is outside 0 ... {len(weight) - 1} and is not {ignore_index}, which marks positions that are not predicted; "
            "check the tokenizer, or pass ignore_index=."
        )
    targets = None if targets_of is None else targets_of(keep)
    rows = hidden.reshape(-1, hidden.shape[-1])[keep]
    if isinstance(n_items, int) and not n_items and len(keep):
        raise PlanError(f"n_items: 0, and this batch alone has {len(keep)} predicted positions; pass count(batches).")  # fmt: skip
    n = n_items.reshape(()).clamp_min(1) if isinstance(n_items, Tensor) else max(len(keep) if n_items is None else n_items, 1)  # fmt: skip
    return Losses(*_LinearLoss.apply(rows, weight, bias, kept, targets, terms, n))  # pyright: ignore


@typed_arguments(PlanError)
def fused_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    index: Tensor | None = None,
    probs: Tensor | None = None,
    *,
    alpha: float = 0.0,
    tau: float = 2.0,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    n_items: Tensor | int | None = None,
    backend: str | None = None,
) -> Losses:
    """Compute cross entropy and distillation through a linear head, without the logits of the whole batch.

    ``loss = ((1 - alpha) * sum(CE) + alpha * tau**2 * sum(KL(teacher || student))) / n_items``, over the positions whose label is not
    ``ignore_index``; both distributions of the divergence have the temperature ``tau``. A chunk of logits turns into its gradient in
    place: by a Triton kernel on a GPU, by torch on a CPU. Letters: N positions, D hidden size, V vocabulary, K weights per position.

    Args:
        hidden: Input of the head (..., D).
        weight: Weight of the head (V, D).
        labels: Next tokens (...,), not shifted further.
        index: Columns of the teacher's weights (..., K); -1 is padding; equal columns add up. None: ``probs`` is (..., V).
        probs: Weights of the teacher's distribution, (..., K) or (..., V), not negative; their sum may be below 1. None: no teacher.
        alpha: Share of the divergence, from 0 to 1.
        tau: Temperature.
        bias: Bias of the head (V,).
        scale: Factor of the logits (Cohere's ``logit_scale``, 1 / Granite's ``logits_scaling``).
        softcap: Gemma 2's cap: ``softcap * tanh(scale * logits / softcap)``.
        ignore_index: Label of positions that are not predicted.
        n_items: Denominator: number of predicted positions of the whole accumulated batch; None: of this batch. A tensor of 0 counts
            as 1, so that a step without a predicted position has the loss 0 and gradients of 0.
        backend: ``"triton"``, ``"torch"`` or None: triton on a GPU, torch elsewhere and for float64.

    Returns:
        The loss, the cross entropy and the divergence; only the loss has a gradient.

    Raises:
        PlanError: Shapes do not fit, K exceeds V, an index is outside the vocabulary, or a number is out of range.

    Example:
        >>> hidden, weight = torch.randn(8, 16), torch.randn(100, 16)
        >>> labels, logits = torch.randint(0, 100, (8,)), torch.randn(8, 100)
        >>> index, probs = growkern.inherit.sampled(logits, 50, tau=2.0)
        >>> growkern.inherit.fused_loss(hidden, weight, labels, index, probs, alpha=0.5).loss.shape
        torch.Size([])

    Reference:
        Qin et al., "Knowledge Inheritance for Pre-trained Language Models", NAACL 2022, arXiv:2105.13880.
    """
    check_numbers(alpha, tau, scale, softcap)
    if backend not in (None, "torch") and (reasons := unavailable(backend, hidden.device)):
        raise PlanError(f"fused_loss: {'; '.join(reasons)}.")
    if alpha and probs is None:
        raise PlanError(
            f"fused_loss: alpha is {alpha}, and there is no teacher; pass probs=, or alpha=0."
        )
    if not -(1 << 63) <= ignore_index < 1 << 63:
        raise PlanError(f"ignore_index: {ignore_index} is no int64; pass -100, or another negative one.")  # fmt: skip
    check_items(n_items)

    def targets_of(keep: Tensor) -> Targets:
        assert probs is not None
        return given_targets(index, probs, keep, len(weight), labels.shape, "fused_loss")

    terms = Terms(alpha, float(tau), float(scale), softcap and float(softcap), backend)
    return linear_loss(hidden, weight, bias, labels, terms, n_items, targets_of if alpha else None, ignore_index)  # fmt: skip


def check_items(n_items: Tensor | int | None) -> None:
    """Raise PlanError for a denominator that is no count, or a tensor of several; the value of a tensor on a GPU is not read."""
    if isinstance(n_items, Tensor):
        is_count = n_items.numel() == 1 and n_items.dtype != torch.bool and not n_items.is_complex()
        if is_count and n_items.device.type == "cpu":  # to read a value of a GPU would wait for it
            is_count = 0 <= float(n_items.detach()) < math.inf
    else:
        value: Any = n_items
        is_count = value is None or (type(value) is int and 0 <= value < 1 << 63)
    if not is_count:
        raise PlanError(
            f"n_items: {short(n_items)} is no number of positions; pass one integer, 0 or more."
        )


def check_numbers(alpha: float, tau: float, scale: float = 1.0, softcap: float | None = None) -> None:  # fmt: skip
    """Raise PlanError for a share outside [0, 1], or a temperature, scale or cap that is not positive and finite."""
    if not 0 <= alpha <= 1:
        raise PlanError(f"alpha: {alpha} is no share; pass a number from 0 to 1.")
    for name, value in (("tau", tau), ("scale", scale), ("softcap", softcap)):
        if value is not None and not (0 < value < math.inf):
            raise PlanError(f"{name}: {value} is not positive and finite; pass such a number.")


def given_targets(
    index: Tensor | None, probs: Tensor, keep: Tensor, width: int, shape: torch.Size, who: str
) -> Targets:
    """Check a teacher's columns and weights, (..., K) each, and return those of the positions ``keep``.

    Raises:
        PlanError: The shapes do not fit the labels' ``shape``, K exceeds the vocabulary, or a column or a weight is out of range.
    """
    if not probs.is_floating_point() or (index is not None and index.dtype not in COLUMNS):
        raise PlanError(
            f"{who}: the teacher's columns are {index if index is None else index.dtype} and its weights {probs.dtype}; pass columns of "
            "integers (int64), and weights of floats."
        )
    flat = probs.reshape(-1, probs.shape[-1] if probs.dim() else 1)
    k = flat.shape[1]
    if k > width:
        raise PlanError(
            f"{who}: the teacher has {k} weights per position, more than the vocabulary of {width}; pass at most {width}."
        )
    fits = len(flat) == shape.numel() and (probs.shape == index.shape if index is not None else k == width)  # fmt: skip
    if not fits:
        raise PlanError(
            f"{who}: the teacher's columns {index if index is None else tuple(index.shape)} and weights {tuple(probs.shape)} do not fit "
            f"{tuple(shape)} positions and a vocabulary of {width}; pass both as (*positions, K), or weights (*positions, {width}) alone."
        )
    place, dtype = keep.to(flat.device), arithmetic(flat.dtype)
    if index is None:
        lowest, highest = (bound[place] for bound in flat.aminmax(dim=1))
        _refuse(bool(((lowest >= 0) & highest.isfinite()).all()), who, width)
        _refuse_sum(flat.sum(1, dtype=dtype)[place], flat.dtype, who)
        return lambda rows: (None, flat[place[rows]].to(keep.device, dtype))
    at = index.reshape(-1, k).to(keep.device, torch.int64)[keep]
    kept = flat[place].to(keep.device, dtype).masked_fill(at == -1, 0.0)
    _refuse(bool(((at >= -1) & (at < width) & (kept >= 0) & kept.isfinite()).all()), who, width)
    _refuse_sum(kept.sum(1), flat.dtype, who)
    at, kept = merged(at.clamp_min(0), kept)
    return lambda rows: (at[rows], kept[rows])


def _refuse(is_sound: bool, who: str, width: int) -> None:
    if not is_sound:
        raise PlanError(
            f"{who}: a column of the teacher is outside 0 ... {width - 1} (-1 is padding), or a weight is negative or not finite; "
            "check that teacher and student have the same tokenizer."
        )


def _refuse_sum(total: Tensor, dtype: torch.dtype, who: str) -> None:
    most = float(total.max()) if total.numel() else 0.0
    if most > 1 + max(1e-3, 4 * torch.finfo(dtype).eps):  # weights and their sum are rounded
        raise PlanError(
            f"{who}: the teacher's weights of a position add up to {most:.4g}, more than a probability; pass probabilities, no logits."
        )


def _compute_dtype(hidden: Tensor, weight: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of the logits. float16 becomes float32: small gradients would vanish before a GradScaler multiplies them."""
    device = hidden.device.type
    if dtype is None and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if dtype is None:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return torch.float32 if dtype == torch.float16 else dtype


def _chunks(n_rows: int, n_columns: int, dtype: torch.dtype, device: torch.device) -> Any:
    """Yield slices of rows, with a buffer for the logits of each."""
    stride = -(-n_columns // ALIGNMENT) * ALIGNMENT
    limit = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
    n_chunks = max(1, -(-n_rows * stride * dtype.itemsize // limit))
    size = max(1, -(-n_rows // n_chunks))
    buffer = torch.empty(min(size, n_rows), stride, dtype=dtype, device=device)
    for start in range(0, n_rows, size):
        rows = slice(start, min(start + size, n_rows))
        yield rows, buffer[: rows.stop - start, :n_columns]


def _row_gradients(
    z: Tensor, labels: Tensor, pair: Pair | None, terms: Terms
) -> tuple[Tensor, Tensor]:
    index, weight = pair or (None, None)
    if index is not None and weight is not None and index.shape[1] > MAX_INDICES:
        dense = torch.zeros(z.shape, dtype=weight.dtype, device=z.device)
        index, weight = None, dense.scatter_add_(1, index, weight)
    run = row_gradients
    if _wants_triton(z, terms.backend):
        from growkern.kernels.inherit import row_gradients as run
    return run(z, labels, index, weight, alpha=terms.alpha, tau=terms.tau, scale=terms.scale, cap=terms.cap)  # fmt: skip


def _wants_triton(z: Tensor, backend: str | None) -> bool:
    if z.dtype == torch.float64 and backend == "triton":
        raise PlanError("the triton backend has no float64; pass backend='torch' or None.")
    suits = z.is_cuda and z.dtype != torch.float64 and not unavailable("triton", z.device)
    return backend == "triton" or (backend is None and suits)
