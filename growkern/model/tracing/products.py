"""Rules of operations that sum over products: matrix products, attention, convolutions, embeddings."""

from collections.abc import Sequence

from torch import Tensor

from growkern.model.tracing.elementwise import uniform
from growkern.model.tracing.tape import Call, Tape
from growkern.model.tracing.terms import Conflict, Dim, atoms, view
from growkern.model.tracing.values import Stream, Value

MEET = "activations meet in a product over it"
COMBINED = "a matrix that the forward computes from several weights, such as W + B @ A, is multiplied with it"


def contract(tape: Tape, call: Call, a: Value, b: Value, axis_a: int, axis_b: int, out: Stream) -> None:  # fmt: skip
    """Sum products over one axis of each of two tensors, and note what the other axes of weights write."""
    tape.same(a.dims[axis_a], b.dims[axis_b], call)
    if a.learned and b.learned:
        if a.weight and b.weight:  # a learned input of a layer, such as a query
            tape.use(a, "writer", a.stream)
        if b.weight:
            tape.use(b, "reader", a.stream, [axis_b])
        elif a.weight:
            tape.use(a, "reader", b.stream, [axis_a])
        else:
            tape.keep_size(a.dims[axis_a], MEET if a.given and b.given else COMBINED)
    else:
        constant, own, axis = (a, b, axis_b) if b.learned else (b, a, axis_a)
        if own.weight:
            tape.use(own, "reader", constant.stream, [axis])
        what = "an input" if constant.given else "a constant"
        tape.keep_order(own.dims[axis], f"{what} is multiplied with it ({call.op})")
    for value, axis in ((a, axis_a), (b, axis_b)):
        if value.weight and not (value is a and b.weight):
            tape.use(value, "writer", out, [i for i in range(len(value.dims)) if i != axis])


def matmul(tape: Tape, call: Call) -> None:
    """Rule of ``mm``, ``bmm``, ``addmm``, ``baddbmm``, ``mv``, ``addmv`` and ``dot``."""
    biased = call.op in ("addmm", "baddbmm", "addmv")
    a, b = (tape.value(t) for t in (call.args[1:3] if biased else call.args[:2]))
    stream = Stream()
    batched = call.op in ("bmm", "baddbmm")
    if batched:
        tape.same(a.dims[0], b.dims[0], call)
    i, j = len(a.dims) - 1, 1 if batched else 0
    contract(tape, call, a, b, i, j, stream)
    dims = [d for k, d in enumerate(a.dims) if k != i] + [d for k, d in enumerate(b.dims) if k > j]
    out = Value(dims, stream, a.learned or b.learned, False, a.given or b.given)
    if a.activation and b.activation:
        tape.products.append((a.dims[:1] if batched else [], a.dims[i]))
    tape.put(call.out, out)
    if biased and call.kwargs.get("beta", 1) != 0:
        _added(tape, call, call.args[0], out)


def grouped_matmul(tape: Tape, call: Call) -> None:
    """Rule of ``_grouped_mm`` of rows that are sorted by their group, and a matrix per group, as experts have them."""
    a, b, stream = tape.value(call.args[0]), tape.value(call.args[1]), Stream()
    if (len(a.dims), len(b.dims)) != (2, 3):
        raise Conflict("matrices that are grouped along the summed axis")
    tape.keep_order(b.dims[0], "matrices are chosen by number")
    contract(tape, call, a, b, 1, 1, stream)
    out = Value([a.dims[0], b.dims[2]], stream, a.learned or b.learned, False, a.given or b.given)
    tape.put(call.out, out)
    bias = call.arg(3, "bias")
    if bias is not None:
        _added(tape, call, bias, out)


def _added(tape: Tape, call: Call, bias: Tensor, out: Value) -> None:
    own = tape.value(bias)
    for k in range(1, len(own.dims) + 1):
        if own.dims[-k].size == 1 and out.dims[-k].size > 1:
            continue
        if own.learned:
            tape.same(own.dims[-k], out.dims[-k], call)
        elif atoms(out.dims[-k]) and not uniform(bias, bias.dim() - k):
            tape.same(own.dims[-k], out.dims[-k], call)
            tape.keep_order(out.dims[-k], f"a constant differs along it ({call.op})")
    if own.weight:
        tape.use(own, "writer", out.stream)
    elif own.learned:
        own.stream.join(out.stream)


def linear(tape: Tape, call: Call) -> None:
    """Rule of ``linear`` where it is one operation."""
    x, w = tape.value(call.args[0]), tape.value(call.args[1])
    stream = Stream()
    contract(tape, call, x, w, len(x.dims) - 1, 1, stream)
    out = Value([*x.dims[:-1], w.dims[0]], stream, True, False, x.given)
    tape.put(call.out, out)
    bias = call.arg(2, "bias")
    if bias is not None:
        _added(tape, call, bias, out)


def embedding(tape: Tape, call: Call) -> None:
    """Rule of ``embedding``."""
    w, ids = tape.value(call.args[0]), tape.value(call.args[1])
    stream = Stream()
    if w.learned:
        tape.keep_order(w.dims[0], "rows are looked up by number")
    tape.use(w, "writer", stream)
    tape.put(call.out, Value([*ids.dims, *w.dims[1:]], stream, w.learned, False, True))


def attention(tape: Tape, call: Call) -> None:
    """Rule of scaled dot-product attention."""
    q, k, v = (tape.value(t) for t in call.args[:3])
    for a, b in ((q, k), (k, v)):
        for x, y in zip(a.dims[:-2], b.dims[:-2], strict=True):
            if x.size == y.size:
                tape.same(x, y, call)
            else:  # grouped queries: each key is of several query heads
                many, few = (x, y) if x.size > y.size else (y, x)
                tape.same(view([many], [few.size, many.size // few.size])[0], few, call)
    tape.same(q.dims[-1], k.dims[-1], call)
    tape.same(k.dims[-2], v.dims[-2], call)
    mask = call.kwargs.get("attn_mask", next((t for t in call.args[3:] if isinstance(t, Tensor)), None))  # fmt: skip
    if mask is not None:
        _masked(tape, call, mask, [*q.dims[:-1], k.dims[-2]])
    if call.kwargs.get("is_causal") or any(a is True for a in call.args[3:]):
        for dim in (q.dims[-2], k.dims[-2]):
            tape.keep_order(dim, "attention is causal along it")
    tape.keep_size(q.dims[-1], MEET)
    tape.products.append((q.dims[1:-2] if len(q.dims) > 3 else q.dims[:1], q.dims[-1]))
    for i, t in enumerate(call.outputs):
        tape.put(t, Value([*q.dims[:-1], v.dims[-1]] if i == 0 else [Dim(n) for n in t.shape], Stream(), i == 0, False, True))  # fmt: skip


def _masked(tape: Tape, call: Call, mask: Tensor, dims: Sequence[Dim]) -> None:
    own = tape.value(mask)
    for i in range(1, len(own.dims) + 1):
        if own.dims[-i].size == 1 or own.dims[-i].size != dims[-i].size:
            continue
        if own.learned:
            tape.same(own.dims[-i], dims[-i], call)
        elif not uniform(mask, mask.dim() - i):
            tape.keep_order(dims[-i], "the attention mask differs along it")
    if own.weight:
        tape.use(own, "writer", Stream())


def convolution(tape: Tape, call: Call) -> None:
    """Rule of convolutions: without groups, with one group per channel, or with groups of channels."""
    x, w, bias = tape.value(call.args[0]), tape.value(call.args[1]), call.arg(2, "bias")
    transposed, groups = call.arg(6, "transposed", False), call.arg(8, "groups", 1)
    channels, n = x.dims[1].size, len(x.dims)
    taps, stream = [*range(2, n)], Stream()
    if groups == 1:
        written, read = (1, 0) if transposed else (0, 1)
        tape.same(x.dims[1], w.dims[read], call)
        if not x.learned:
            tape.keep_order(w.dims[read], "the input is multiplied with it (convolution)")
        tape.use(w, "reader", x.stream, [read, *taps])
        tape.use(w, "writer", stream, [written])
        out = w.dims[written]
    elif transposed:
        raise Conflict("a transposed convolution with groups")
    elif groups == channels == w.dims[0].size:
        tape.same(x.dims[1], w.dims[0], call)
        tape.use(w, "writer", stream)
        x.stream.bend("it is multiplied feature by feature")
        out = w.dims[0]
    else:
        group, own = view([x.dims[1]], [groups, channels // groups])
        tape.same(group, view([w.dims[0]], [groups, w.dims[0].size // groups])[0], call)
        tape.same(own, w.dims[1], call)
        tape.use(w, "reader", x.stream, [1])
        tape.use(w, "writer", stream, [0, *taps])
        out = w.dims[0]
    for i in taps:
        tape.keep_order(w.dims[i], "taps of a convolution")
    if bias is not None:
        tape.same(tape.value(bias).dims[0], out, call)
        tape.use(tape.value(bias), "writer", stream)
    places = [Dim(s) for s in call.out.shape[2:]]
    for dim in places:
        tape.keep_order(dim, "a convolution slides along it")
    tape.put(call.out, Value([x.dims[0], out, *places], stream, True, False, x.given))


def solve_triangular(tape: Tape, call: Call) -> None:
    """Rule of ``linalg_solve_triangular``."""
    a, b = tape.value(call.args[0]), tape.value(call.args[1])
    tape.same(a.dims[-1], a.dims[-2], call)
    tape.same(a.dims[-1], b.dims[-2], call)
    for x, y in zip(a.dims[:-2], b.dims[:-2], strict=True):
        tape.same(x, y, call)
    tape.put(call.out, Value(b.dims, Stream(), a.learned or b.learned, False, a.given or b.given))


RULES = {
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot"), matmul),
    **dict.fromkeys(("convolution", "_convolution", "mkldnn_convolution"), convolution),
    **dict.fromkeys(
        ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention", "_scaled_dot_product_attention_math",
         "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention", "scaled_dot_product_attention"),
        attention,
    ),
    "_grouped_mm": grouped_matmul,
    "linear": linear,
    "embedding": embedding,
    "linalg_solve_triangular": solve_triangular,
}  # fmt: skip
