"""Rules of operations that compute every element from the elements at the same place: arithmetic, activation functions, copies."""

from torch import Tensor

from growkern.model.tracing.scalings import multiplier, power_in
from growkern.model.tracing.tape import Call, Tape, constants
from growkern.model.tracing.terms import Dim, atoms, cut, enumerated, find
from growkern.model.tracing.values import Norm, Scaling, Statistic, Stream, Value

LINEAR = {
    "clone",
    "_to_copy",
    "alias",
    "detach",
    "mul",
    "div",
    "neg",
    "lift_fresh",
    "copy",
    "contiguous",
    "positive",
    "native_dropout",
}


def uniform(t: Tensor, axis: int) -> bool:
    """True when a tensor is equal along an axis (NaN equals NaN)."""
    if t.numel() == 0 or t.shape[axis] == 1:
        return True
    first = t.select(axis, 0).unsqueeze(axis)
    return bool(((t == first) | ((t != t) & (first != first))).all())


def pointwise(tape: Tape, call: Call) -> None:
    """Rule of elementwise operations."""
    if not call.inputs or not call.outputs:
        constants(tape, call)
        return
    values = [tape.value(t) for t in call.inputs]
    out = call.outputs[0]
    weight = any(v.weight for v in values) and all(v.weight or not (v.learned or v.given) for v in values)  # fmt: skip
    dims = _broadcast(tape, call, values, out)
    result = Value(dims, weight=weight, learned=any(v.learned for v in values), given=any(v.given for v in values))  # fmt: skip
    if weight:
        _weights(call, values, result, out)
    else:
        _activations(tape, call, values, result)
    for t in call.outputs:
        if any(t is x for x in call.inputs):
            _in_place(tape, call, tape.value(t), result)
        elif t.shape == out.shape:
            tape.put(t, result)


def _broadcast(tape: Tape, call: Call, values: list[Value], out: Tensor) -> list[Dim]:
    """Return the dimensions of the result; operands have equal dimensions, and constants that differ along one fix its order."""
    n, learned = out.dim(), any(v.learned for v in values)
    order = sorted(range(len(values)), key=lambda i: (not values[i].learned, -call.inputs[i].numel()))  # fmt: skip
    dims = list[Dim]()
    for k in range(n):
        found: Dim | None = None
        for i in order:
            t, axis = call.inputs[i], k - n + call.inputs[i].dim()
            if axis < 0 or t.shape[axis] != out.shape[k]:
                continue
            dim = values[i].dims[axis]
            if found is None:
                found = dim
            elif out.shape[k] > 1 and (values[i].learned or not learned):
                tape.same(found, dim, call)
            elif out.shape[k] > 1 and atoms(found) and not uniform(t, axis):
                tape.same(found, dim, call)
                tape.keep_order(found, f"{_what(values[i])} differs along it ({call.op})")
        dims.append(found or Dim(out.shape[k]))
    return dims


def _what(value: Value) -> str:
    return "an input" if value.given else "a constant"


def _weights(call: Call, values: list[Value], result: Value, out: Tensor) -> None:
    """Elementwise arithmetic of weights gives a weight, which is on the axes of all of them."""
    for k in range(out.dim()):
        for value, t in zip(values, call.inputs, strict=True):
            axis = k - out.dim() + t.dim()
            if value.weight and axis >= 0 and t.shape[axis] == out.shape[k]:
                result.axes[k] |= value.axes[axis]
    first = next(v for v in values if v.weight)
    result.stream, result.offset = first.stream, first.offset
    if call.base == "add":
        numbers = [x for x in call.args[:2] if isinstance(x, int | float)]
        numbers += [float(t) for v, t in zip(values, call.inputs, strict=True) if not v.weight and t.dim() == 0]  # fmt: skip
        result.offset += sum(numbers)


def _activations(tape: Tape, call: Call, values: list[Value], result: Value) -> None:
    own = [v for v in values if v.activation]
    weights = [v for v in values if v.weight]
    statistic = next((v.statistic for v in own if v.statistic), None)
    full = [v for v in own if not v.statistic]
    scales = call.base in ("mul", "div")
    if call.base in ("pow", "square") or (call.base == "mul" and call.args[0] is call.args[1]):
        result.squared = own[0].stream if own and not weights else None
    if result.squared:
        result.statistic = statistic
    elif len(own) == 1 and not weights:
        _one(tape, call, own[0], result)
    elif statistic and full and (scales or call.base == "sub") and _over(full[0], statistic.over, statistic.stream):  # fmt: skip
        _normalized(tape, call, full[0], result)
    elif call.base == "mul" and len(own) == 1 and full and full[0].norm and not full[0].gained:
        norm = full[0].norm
        result.stream, result.norm, result.gained, norm.gained = full[0].stream, norm, True, True
        for w in weights:
            tape.use(w, "gain", result.stream, norm=norm)
    else:
        _combined(tape, call, full, statistic, result)


def _combined(tape: Tape, call: Call, full: list[Value], statistic: Statistic | None, result: Value) -> None:  # fmt: skip
    """Sums join streams; products of features, and numbers that are added to all features, are not linear in them."""
    if not any(v.learned for v in map(tape.value, call.inputs)):
        return
    wide = {id(tape.value(t)) for t in call.inputs if t.dim() == 0 or _spans(tape, t, result)}
    joined = [v for v in full if id(v) in wide] or full
    for v in joined:
        result.stream = v.stream.join(result.stream)
    scales = call.base in ("mul", "div")
    weights = [(v, t.numel()) for t in call.inputs if (v := tape.value(t)).weight]
    if scales and len(joined) + sum(n > 1 for _, n in weights) > 1:
        result.stream.bend("it is multiplied feature by feature")
    for v in full:
        if id(v) not in wide and joined is not full:
            v.stream.bend(f"{call.base} spreads it over features")
            if not scales:
                result.stream.bend(f"{call.base} adds one number to all features")
    if not scales and call.base not in ("add", "sub"):
        result.stream.bend(f"{call.base} acts on it")
    if statistic and full:
        statistic.stream.bend(f"a {statistic.op} of it is used")
    elif statistic:
        result.statistic = statistic
    for w, _ in weights:
        tape.use(w, "writer", result.stream)


def _spans(tape: Tape, t: Tensor, result: Value) -> bool:
    """True when a tensor has every dimension of a result that parameters have too."""
    n = len(result.dims)
    spread = [d for k, d in enumerate(result.dims) if d.size > 1 and (k - n + t.dim() < 0 or t.shape[k - n] != d.size)]  # fmt: skip
    own = {a for d in spread for a in atoms(d)}
    return not own or not any(a in own for w in tape.weights.values() for d in w.dims for a in atoms(d))  # fmt: skip


def like(tape: Tape, call: Call) -> None:
    """Rule of ``zeros_like`` and others: a constant of the shape of a tensor."""
    value = tape.value(call.args[0])
    tape.put(call.out, Value(value.dims, given=value.given))


def _one(tape: Tape, call: Call, value: Value, result: Value) -> None:
    """An operation on one activation: linear, a step of a statistic, or an activation function."""
    linear = call.base in LINEAR
    result.stream, result.statistic, result.squared = value.stream, value.statistic, value.squared
    if value.statistic:
        place = {"add": 1, "clamp_min": 1, "clamp": 1, "maximum": 1}.get(call.base)
        if place and len(call.args) > place:
            eps = call.args[place]
            number = float(eps) if isinstance(eps, int | float) or (isinstance(eps, Tensor) and eps.numel() == 1) else None  # fmt: skip
            result.statistic = value.statistic.becomes(number)
    elif linear:
        result.norm, result.centered, result.gained = value.norm, value.centered, value.gained
        factor = multiplier(call.base, call.args)
        own = power_in(value, factor) if factor and not (value.norm and value.norm.kind == "l2") else None  # fmt: skip
        if factor and own:
            result.stream = Stream()
            tape.scalings.append(Scaling(value.stream, result.stream, *own, factor, len(tape.steps)))  # fmt: skip
    else:
        value.stream.bend(f"{call.base} acts on it")


def _over(value: Value, over: list[Dim], stream: Stream) -> bool:
    """True when a statistic of a stream is one over dimensions that the value has."""
    own = {a for d in value.dims for a in atoms(d)}
    return value.stream.find() is stream.find() and {a for d in over for a in atoms(d)} <= own


def _normalized(tape: Tape, call: Call, value: Value, result: Value) -> None:
    """The mean is subtracted from a stream, or the stream is divided by a statistic of itself."""
    statistic = next(v.statistic for t in call.inputs if (v := tape.value(t)).statistic)
    assert statistic is not None
    (statistic.origin or statistic).of_norm = True
    if call.base == "sub":
        stream = value.stream.find()
        result.stream = tape.centers.setdefault(stream, Stream())
        result.centered = stream
        return
    kind = "layer" if value.centered or "var" in statistic.op or "std" in statistic.op else "rms"
    if statistic.op in ("sum", "linalg_vector_norm", "norm"):
        kind = "l2"
    result.stream = Stream()
    norm = Norm(kind, value.centered or value.stream, result.stream, statistic.over, tape.module, statistic.eps)  # fmt: skip
    tape.norms.append(norm)
    result.norm = norm


def _in_place(tape: Tape, call: Call, old: Value, result: Value) -> None:
    for a, b in zip(old.dims, result.dims, strict=True):
        if find(a) is not find(b):
            tape.same(a, b, call)
    old.learned, old.given = old.learned or result.learned, old.given or result.given
    old.statistic, old.norm, old.gained = result.statistic, result.norm, result.gained
    if result.learned and not result.weight:
        old.weight, old.stream = False, result.stream


def copy_into(tape: Tape, call: Call) -> None:
    """Rule of ``copy_``: a tensor, and the tensor that it is a view of, hold what is written into them."""
    target, source = call.args[0], call.args[1]
    if not isinstance(source, Tensor):
        return
    value, own = tape.value(target), tape.value(source)
    for i in range(1, min(source.dim(), target.dim()) + 1):
        if source.shape[-i] != target.shape[-i]:
            continue
        if own.learned or not value.learned:
            tape.same(value.dims[-i], own.dims[-i], call)
        elif atoms(value.dims[-i]) and not uniform(source, source.dim() - i):
            tape.keep_order(value.dims[-i], "a constant is written into it")
    if own.learned:
        value.learned, value.given, value.stream = True, value.given or own.given, own.stream
        value.norm, value.gained = own.norm, own.gained
        if own.weight:
            tape.use(own, "writer", value.stream)
        _written(tape, target)
    if call.out is not target:
        tape.put(call.out, value.carry(value.dims))


def _written(tape: Tape, target: Tensor) -> None:
    """Mark the tensor that a written tensor is a view of, and its other views, as learned."""
    base = target
    while base._base is not None:
        base = base._base
    for t in tape.alive:
        if (t is base or t._base is base) and id(t) in tape.values:
            tape.values[id(t)].learned = True


def complex_pairs(tape: Tape, call: Call) -> None:
    """Rule of ``view_as_complex`` and ``view_as_real``: the last axis holds two numbers that are no coordinates."""
    value = tape.value(call.args[0])
    if call.op == "view_as_complex":
        cut(value.dims[-1], [1, 1])
        tape.put(call.out, value.carry(value.dims[:-1], value.axes[:-1]))
    else:
        tape.put(call.out, value.carry([*value.dims, enumerated(2)], [*value.axes, frozenset()]))


RULES = {"copy": copy_into, "view_as_complex": complex_pairs, "view_as_real": complex_pairs} | dict.fromkeys(
    ("clone", "_to_copy", "alias", "detach", "lift_fresh", "contiguous", "native_dropout", "where", "masked_fill", "fill", "zero",
     "nan_to_num", "clamp", "bernoulli", "isin", "conj",
     "_conj", "resolve_conj", "bitwise_not", "polar", "complex", "real", "imag", "angle", "logical_not"),
    pointwise,
) | dict.fromkeys(("rand_like", "randn_like", "zeros_like", "ones_like", "empty_like", "full_like"), like)  # fmt: skip
