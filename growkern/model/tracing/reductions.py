"""Rules of operations along an axis: sums and means, norms, softmax, sorting, pooling."""

from torch import Tensor

from growkern.model.tracing.elementwise import pointwise
from growkern.model.tracing.tape import Call, Tape, constants
from growkern.model.tracing.terms import Dim, atoms, view
from growkern.model.tracing.values import Norm, Statistic, Stream, Value

AVERAGES = {
    "mean",
    "var",
    "var_mean",
    "std",
    "std_mean",
}  # copies of coordinates do not change them
STATISTICS = AVERAGES | {"sum", "linalg_vector_norm", "norm"}


def _axes_of(call: Call, n: int) -> list[int]:
    """Return the axes that a reduction is over: all by default."""
    axes = call.arg(2 if call.op in ("linalg_vector_norm", "norm") else 1, "dim")
    if axes is None or isinstance(axes, bool) or axes == []:
        return [*range(n)]
    return [i % n for i in ([axes] if isinstance(axes, int) else axes)]


def reduced(tape: Tape, call: Call) -> None:
    """Rule of sums, means, extrema and vector norms."""
    x = call.args[0]
    if call.op in ("max", "min") and len(call.args) > 1 and isinstance(call.args[1], Tensor):
        pointwise(tape, call)
        return
    value, n = tape.value(x), x.dim()
    over = _axes_of(call, n)
    if value.weight:
        tape.use(value, "reader" if call.op in ("sum", "mean") else "writer", value.stream, over)
    norm = call.op in ("linalg_vector_norm", "norm") and not value.weight
    for i in over:
        if call.op not in AVERAGES and not norm:
            tape.keep_size(value.dims[i], f"a {call.op} over it")
    keep = call.outputs[0].dim() == n
    dims = [Dim(1) if i in over else d for i, d in enumerate(value.dims) if keep or i not in over]
    for t in call.outputs:
        passes = (
            call.op == "sum" and n - 1 not in over and not value.weight
        )  # such as a sum over the chosen experts
        stream = value.stream if passes else Stream()
        result = Value(dims, stream, value.learned, False, value.given)
        if value.weight:
            tape.use(value, "writer", result.stream, [i for i in range(n) if i not in over])
        counts = call.op in STATISTICS and value.activation and not passes
        if counts and any(atoms(value.dims[i]) for i in over):
            result.statistic = Statistic(
                value.squared or value.stream, [value.dims[i] for i in over], call.op
            )
            tape.statistics.append(result.statistic)
        tape.put(t, result)


def layer_norm(tape: Tape, call: Call) -> None:
    """Rule of ``native_layer_norm`` and of RMS norms that are one operation."""
    value, k = tape.value(call.args[0]), len(call.args[1])
    layer = "layer" in call.op
    weight = call.arg(2, "weight")
    bias = call.arg(3, "bias") if layer else None
    eps = call.arg(4 if layer else 3, "eps")
    norm = Norm("layer" if layer else "rms", value.stream, Stream(), value.dims[-k:], tape.module, eps)  # fmt: skip
    tape.norms.append(norm)
    _normed(tape, call, value, norm, {"gain": weight, "writer": bias}, value.dims[-k:])


def group_norm(tape: Tape, call: Call) -> None:
    """Rule of ``native_group_norm``."""
    x, weight, bias, *_, groups, eps = call.args[:8]
    value = tape.value(x)
    own = view([value.dims[1]], [groups, x.shape[1] // groups])[1]
    norm = Norm("layer", value.stream, Stream(), [own], tape.module, eps)
    tape.norms.append(norm)
    _normed(tape, call, value, norm, {"gain": weight, "writer": bias}, [value.dims[1]])


def _normed(tape: Tape, call: Call, value: Value, norm: Norm, params: dict[str, Tensor | None], dims: list[Dim]) -> None:  # fmt: skip
    result = Value(value.dims, norm.writes, True, False, value.given, norm=norm)
    for role, t in params.items():
        if t is None:
            continue
        own = tape.value(t)
        for a, b in zip(own.dims, dims, strict=True):
            tape.same(a, b, call)
        if role == "gain":
            tape.use(own, "gain", norm.writes, norm=norm)
            norm.gained = True
        else:
            tape.use(own, "writer", norm.writes)
        result.gained = True
    first, *others = call.outputs
    tape.put(first, result)
    for t in others:
        tape.put(t, Value([Dim(n) for n in t.shape]))


def batch_norm(tape: Tape, call: Call) -> None:
    """Rule of batch norms: every channel by itself."""
    value = tape.value(call.args[0])
    result = Value(value.dims, Stream(), True, False, value.given)
    value.stream.bend("a batch norm acts on it")
    tape.statistics.append(Statistic(value.stream, [value.dims[1]], "batch norm"))
    for t in call.args[1:5]:
        if isinstance(t, Tensor):
            tape.same(tape.value(t).dims[0], value.dims[1], call)
            tape.use(tape.value(t), "writer", result.stream)
    for i, t in enumerate(call.outputs):
        tape.put(t, result if i == 0 else Value([Dim(n) for n in t.shape]))


def softmax(tape: Tape, call: Call) -> None:
    """Rule of softmax: coordinates may be permuted."""
    value = tape.value(call.args[0])
    tape.keep_size(value.dims[call.axis(1, -1)], "a softmax over it")
    value.stream.bend("a softmax acts on it")
    for t in call.outputs:
        tape.put(t, Value(value.dims, Stream(), value.learned, value.weight, value.given, value.axes))  # fmt: skip


def ordered(tape: Tape, call: Call) -> None:
    """Rule of operations for which the order of coordinates matters: cumulative sums, sorting, flips, triangles."""
    x = call.args[0]
    value, n = tape.value(x), x.dim()
    if call.base in ("triu", "tril"):
        over = [n - 2, n - 1]
    elif call.base == "flip":
        over = call.args[1]
    elif call.base == "roll":
        over = call.arg(2, "dims") or [*range(n)]
    else:
        axis = call.arg(1, "dim", -1)
        over = [axis if isinstance(axis, int) and not isinstance(axis, bool) else call.arg(2, "dim", -1)]  # fmt: skip
    for i in over:
        tape.keep_order(value.dims[i], f"{call.op} along it")
    for t in call.outputs:
        if not any(t is y for y in call.inputs):
            tape.put(t, value.carry(value.dims, value.axes))


def top_k(tape: Tape, call: Call) -> None:
    """Rule of ``topk``: coordinates become numbers."""
    value, axis = tape.value(call.args[0]), call.axis(2, -1)
    tape.keep_order(value.dims[axis], "top-k over it: coordinates become numbers")
    chosen = Dim(call.outputs[0].shape[axis])
    dims = [chosen if i == axis else d for i, d in enumerate(value.dims)]
    for t in call.outputs:
        tape.put(t, Value(dims, Stream(), value.learned, False, value.given))


def spatial(tape: Tape, call: Call) -> None:
    """Rule of pooling and resampling of the last axes."""
    value, k = tape.value(call.args[0]), 1 if "1d" in call.op else 3 if "3d" in call.op else 2
    for dim in value.dims[-k:]:
        tape.keep_order(dim, f"{call.op} over it")
    for t in call.outputs:
        dims = [*value.dims[:-k], *(Dim(n) for n in t.shape[-k:])]
        tape.put(t, value.carry(dims, value.axes))


def loss(tape: Tape, call: Call) -> None:
    """Rule of the negative log likelihood."""
    value = tape.value(call.args[0])
    tape.keep_order(value.dims[1 if len(value.dims) > 1 else 0], "a loss picks from it")
    for t in call.outputs:
        tape.put(t, Value([Dim(n) for n in t.shape], learned=True, given=True))


RULES = {
    **dict.fromkeys(
        ("mean", "sum", "amax", "amin", "max", "min", "var", "var_mean", "std", "std_mean", "linalg_vector_norm", "norm", "logsumexp",
         "prod", "any", "all", "argmax", "argmin"),
        reduced,
    ),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm", "rms_norm"), layer_norm),
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "_batch_norm_no_update"), batch_norm
    ),
    **dict.fromkeys(("_softmax", "_safe_softmax", "_log_softmax", "softmax"), softmax),
    **dict.fromkeys(
        ("cumsum", "cumprod", "sort", "argsort", "flip", "roll", "triu", "tril", "cummax", "logcumsumexp"), ordered
    ),
    **dict.fromkeys(
        ("upsample_bicubic2d", "upsample_bilinear2d", "upsample_nearest2d", "upsample_linear1d", "_upsample_bicubic2d_aa",
         "_upsample_bilinear2d_aa", "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool2d_with_indices", "max_pool2d",
         "_adaptive_avg_pool2d", "adaptive_avg_pool1d", "reflection_pad1d"),
        spatial,
    ),
    **dict.fromkeys(("nll_loss_forward", "nll_loss2d_forward"), loss),
    **dict.fromkeys(("aminmax", "_local_scalar_dense", "nonzero", "_is_all_true", "equal", "allclose"), constants),
    "native_group_norm": group_norm,
    "topk": top_k,
}  # fmt: skip
