"""Rules of operations that move elements and compute none: views, transposes, slices, concatenations, padding."""

from math import prod
from typing import Any

from torch import Tensor

from growkern.model.tracing.elementwise import pointwise, uniform
from growkern.model.tracing.tape import Call, Tape, constants
from growkern.model.tracing.terms import (
    Conflict,
    Dim,
    atoms,
    cut,
    enumerated,
    product,
    side_by_side,
    view,
)
from growkern.model.tracing.values import NONE, Axes, Stream, Value, union


def permuted(tape: Tape, call: Call) -> None:
    """Rule of ``t``, ``transpose``, ``permute``, ``squeeze`` and ``unsqueeze``."""
    x = call.args[0]
    value, n = tape.value(x), x.dim()
    order: list[int | None] = [*range(n)]
    if call.base == "t":
        order.reverse()
    elif call.base in ("transpose", "swapaxes"):
        i, j = call.args[1] % n, call.args[2] % n
        order[i], order[j] = j, i
    elif call.base == "permute":
        order = [i % n for i in call.args[1]]
    elif call.base == "unsqueeze":
        order.insert(call.args[1] % (n + 1), None)
    elif n:
        which = call.arg(1, "dim", range(n))
        gone = {i % n for i in ([which] if isinstance(which, int) else which)}
        order = [i for i in range(n) if i not in gone or x.shape[i] != 1]
    dims = [Dim(1) if i is None else value.dims[i] for i in order]
    axes: list[Axes] = [frozenset() if i is None else value.axes[i] for i in order]
    tape.put(call.out, value.carry(dims, axes))


def viewed(tape: Tape, call: Call) -> None:
    """Rule of ``view`` and ``reshape``: runs of dimensions of equal products are split and joined."""
    if call.overload == "dtype":
        pointwise(tape, call)
        return
    x: Tensor = call.args[0]
    out: Tensor = call.out
    value, old, new = tape.value(x), [*x.shape], [*out.shape]
    if x.numel() == 0:
        tape.put(out, value.carry([Dim(n) for n in new]))
        return
    dims, axes = list[Dim](), list[Axes]()
    i = j = 0
    while i < len(old) or j < len(new):
        end_i, end_j = min(i + 1, len(old)), min(j + 1, len(new))
        while (a := prod(old[i:end_i])) != (b := prod(new[j:end_j])):
            end_i, end_j = (end_i + 1, end_j) if a < b else (end_i, end_j + 1)
        if end_i - i == end_j - j == 1:
            dims.append(value.dims[i])
        else:
            dims += view(value.dims[i:end_i], new[j:end_j])
        own: Axes = union(value.axes[i:end_i])
        axes += [own if new[k] > 1 or end_j - j == 1 else NONE for k in range(j, end_j)]
        i, j = end_i, end_j
    tape.put(out, value.carry(dims, axes))


def expanded(tape: Tape, call: Call) -> None:
    """Rule of ``expand``: a new dimension holds copies."""
    x: Tensor = call.args[0]
    out: Tensor = call.out
    value, skip = tape.value(x), int(out.dim() - x.dim())
    kept = [bool(k >= skip and x.shape[k - skip] == out.shape[k]) for k in range(out.dim())]
    dims = [value.dims[k - skip] if keep else Dim(out.shape[k]) for k, keep in enumerate(kept)]
    axes = [value.axes[k - skip] if keep else NONE for k, keep in enumerate(kept)]
    tape.put(out, value.carry(dims, axes))


def repeated(tape: Tape, call: Call) -> None:
    """Rule of ``repeat``, and of ``repeat_interleave`` by one number."""
    x = call.args[0]
    value = tape.value(x)
    if call.op == "repeat":
        times = call.args[1]
        own = [Dim(1)] * (len(times) - x.dim()) + value.dims
        dims = [d if n == 1 else product([Dim(n), d]) for n, d in zip(times, own, strict=True)]
        tape.put(call.out, value.carry(dims))
    elif call.overload == "self_int" and call.arg(2, "dim") is not None:
        dims, axis = [*value.dims], call.axis(2)
        dims[axis] = product([dims[axis], Dim(call.args[1])])
        tape.put(call.out, value.carry(dims, value.axes))
    elif value.learned:
        raise Conflict("repeats that differ")
    else:
        constants(tape, call)


def sliced(tape: Tape, call: Call) -> None:
    """Rule of ``slice``: the dimension is a sum of what comes before, the slice and the rest."""
    x: Tensor = call.args[0]
    out: Tensor = call.out
    value, axis = tape.value(x), call.axis(1, 0)
    n, step, dims = x.shape[axis], call.arg(4, "step", 1), [*value.dims]
    start, end = _bound(call.arg(2, "start"), n, 0), _bound(call.arg(3, "end"), n, n)
    if (start, end, step) == (0, n, 1):
        tape.put(out, value.carry(dims, value.axes))
        return
    if step == 1:
        end = max(start, end)
        dims[axis] = cut(dims[axis], [start, end - start, n - end])[1] or Dim(0)
    elif n % step == 0 and end == n and start < step:
        whole, part = view([dims[axis]], [n // step, step])
        cut(part, [1] * step)
        dims[axis] = whole
    else:
        raise Conflict("a slice with a step")
    tape.put(out, value.carry(dims, value.axes))


def _bound(at: int | None, n: int, default: int) -> int:
    if at is None:
        return default
    return max(0, at + n) if at < 0 else min(at, n)


def selected(tape: Tape, call: Call) -> None:
    """Rule of ``select`` and ``unbind``; a coordinate is one that stands for itself once its values are used."""
    x = call.args[0]
    value, axis = tape.value(x), call.axis(1, 0)
    n = x.shape[axis]
    dims, axes = [*value.dims], [*value.axes]
    dims.pop(axis)
    axes.pop(axis)
    if call.op == "unbind":
        if n > 1:
            cut(value.dims[axis], [1] * n)
        for t in call.out:
            tape.put(t, value.carry(dims, axes))
        return
    tape.put(call.out, value.carry(dims, axes))
    if n > 1:
        tape.picked[id(call.out)] = value.dims[axis], n


def split(tape: Tape, call: Call) -> None:
    """Rule of ``split`` and ``chunk``."""
    x = call.args[0]
    value, axis = tape.value(x), call.axis(2, 0)
    parts = cut(value.dims[axis], [t.shape[axis] for t in call.out])
    for t, part in zip(call.out, parts, strict=True):
        dims = [*value.dims]
        dims[axis] = part or Dim(0)
        tape.put(t, value.carry(dims, value.axes))


def concatenated(tape: Tape, call: Call) -> None:
    """Rule of ``cat`` and ``stack``."""
    out: Tensor = call.out
    stack = call.op == "stack"
    parts = [t for t in call.args[0] if stack or t.dim() == out.dim()]  # cat skips empty tensors
    values = [tape.value(t) for t in parts]
    axis = int(call.arg(1, "dim", 0)) % out.dim()
    learned, weight = any(v.learned for v in values), all(v.weight for v in values)
    base = next((v for v in values if v.learned), values[0])
    dims, axes = list[Dim](), list[Axes]()
    for k in range(out.dim()):
        j = k - (stack and k > axis)
        if k == axis:
            dims.append(enumerated(len(values)) if stack else side_by_side([v.dims[k] for v in values]))  # fmt: skip
        else:
            for v, t in zip(values, parts, strict=True):
                _beside(tape, call, base, v, t, j, learned)
            dims.append(base.dims[j])
        together = weight and not (stack and k == axis)
        axes.append(union([v.axes[j] for v in values]) if together else NONE)
    stream = next((v.stream for v in values if v.activation), Stream())
    for v in values:
        if v.activation:
            v.stream.join(stream)
        elif v.weight and not weight:
            tape.use(v, "writer", stream)
    result = Value(dims, base.stream if weight else stream, learned, weight, any(v.given for v in values), axes)  # fmt: skip
    if len({id(v.norm) for v in values}) == 1:
        result.norm, result.gained = values[0].norm, values[0].gained
    tape.put(out, result)


def _beside(tape: Tape, call: Call, base: Value, value: Value, t: Tensor, axis: int, learned: bool) -> None:  # fmt: skip
    if value is base:
        return
    if value.learned or not learned:
        tape.same(base.dims[axis], value.dims[axis], call)
    elif not uniform(t, axis) and atoms(base.dims[axis]):
        tape.same(base.dims[axis], value.dims[axis], call)
        tape.keep_order(base.dims[axis], f"a constant stands beside it ({call.op})")


def padded(tape: Tape, call: Call) -> None:
    """Rule of ``constant_pad_nd``: new coordinates stand before and behind, or coordinates are cut off."""
    x, pads = call.args[0], call.args[1]
    value = tape.value(x)
    dims = [*value.dims]
    for k in range(len(pads) // 2):
        before, after, i = int(pads[2 * k]), int(pads[2 * k + 1]), int(x.dim() - 1 - k)
        off = max(0, -before), max(0, -after)
        own: Any = cut(dims[i], [off[0], x.shape[i] - sum(off), off[1]])[1]
        around = [Dim(n) for n in (before,) if n > 0], [Dim(n) for n in (after,) if n > 0]
        if before or after:
            dims[i] = side_by_side([*around[0], own or Dim(0), *around[1]])
    tape.put(call.out, value.carry(dims, value.axes))


def gated(tape: Tape, call: Call) -> None:
    """Rule of ``glu``: the second half of an axis gates the first half."""
    x = call.args[0]
    value, axis = tape.value(x), call.axis(1, -1)
    first, second = cut(value.dims[axis], [x.shape[axis] // 2] * 2)
    assert first is not None and second is not None
    tape.same(first, second, call)
    value.stream.bend("glu acts on it")
    dims = [*value.dims]
    dims[axis] = first
    tape.put(call.out, value.carry(dims))


RULES = {
    **dict.fromkeys(("t", "transpose", "permute", "squeeze", "unsqueeze", "swapaxes"), permuted),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy", "_reshape_copy", "unflatten", "flatten"), viewed),
    **dict.fromkeys(("expand", "broadcast_to", "expand_as"), expanded),
    **dict.fromkeys(("repeat", "repeat_interleave"), repeated),
    **dict.fromkeys(("select", "unbind"), selected),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk"), split),
    **dict.fromkeys(("cat", "stack", "concat", "concatenate"), concatenated),
    "slice": sliced,
    "constant_pad_nd": padded,
    "glu": gated,
}  # fmt: skip
