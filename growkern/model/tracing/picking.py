"""Rules of operations that read and write coordinates by number or by a mask."""

import torch
from torch import Tensor

from growkern.model.tracing.elementwise import uniform
from growkern.model.tracing.tape import Call, Tape, constants
from growkern.model.tracing.terms import Conflict, Dim, cut, enumerated
from growkern.model.tracing.values import Axes, Value

PICKED = "coordinates are picked by number"


def gathered(tape: Tape, call: Call) -> None:
    """Rule of ``index_select`` and ``gather``."""
    x, out = call.args[0], call.out
    value, axis = tape.value(x), call.axis(1)
    if value.learned:
        tape.keep_order(value.dims[axis], PICKED)
    whole = call.op == "index_select"
    moved = [k == axis or (not whole and out.shape[k] != x.shape[k]) for k in range(x.dim())]
    dims = [Dim(out.shape[k]) if m else value.dims[k] for k, m in enumerate(moved)]
    axes: list[Axes] = [frozenset() if m else value.axes[k] for k, m in enumerate(moved)]
    tape.put(out, value.carry(dims, axes if whole else []))


def indexed(tape: Tape, call: Call) -> None:
    """Rule of ``index``: by constants, which cut or enumerate an axis; by numbers; or by masks."""
    x, index = call.args[0], call.args[1]
    where = [k for k, t in enumerate(index) if t is not None]
    kinds = [index[k].dtype for k in where]
    if torch.bool in kinds or torch.uint8 in kinds:
        _masked(tape, call)
    elif len(where) == 1 and index[where[0]].dim() == 1 and not _depends(tape, index[where[0]]):
        _constant(tape, call, where[0], index[where[0]] % x.shape[where[0]])
    else:
        _numbered(tape, call, where)


def _depends(tape: Tape, t: Tensor) -> bool:
    value = tape.value(t)
    return value.given or value.learned


def _constant(tape: Tape, call: Call, axis: int, numbers: Tensor) -> None:
    x = call.args[0]
    value = tape.value(x)
    n, first, dims = len(numbers), int(numbers[0]) if len(numbers) else 0, [*value.dims]
    if torch.equal(numbers, torch.arange(first, first + n, device=numbers.device)):
        dims[axis] = cut(value.dims[axis], [first, n, x.shape[axis] - first - n])[1] or Dim(0)
    else:
        cut(value.dims[axis], [1] * x.shape[axis])
        dims[axis] = enumerated(n)
    tape.put(call.out, value.carry(dims, value.axes))


def _masked(tape: Tape, call: Call) -> None:
    """A mask takes as many axes as it has, and gives one."""
    value, dims, k, new = tape.value(call.args[0]), list[Dim](), 0, False
    for t in call.args[1]:
        if t is None:
            dims.append(value.dims[k])
            k += 1
            continue
        for dim in value.dims[k : k + (t.dim() if t.dtype in (torch.bool, torch.uint8) else 1)]:
            if value.learned:
                tape.keep_order(dim, "coordinates are picked by a mask")
            k += 1
        if not new:
            dims.append(Dim(call.out.shape[len(dims)]))
            new = True
    tape.put(call.out, value.carry([*dims, *value.dims[k:]]))


def _numbered(tape: Tape, call: Call, where: list[int]) -> None:
    x, out = call.args[0], call.out
    index = [*call.args[1], *[None] * (x.dim() - len(call.args[1]))]
    value = tape.value(x)
    longest = max((index[k] for k in where), key=lambda t: (t.dim(), t.numel()))
    first = where[0] if where == [*range(where[0], where[-1] + 1)] else 0
    rest = [k for k in range(x.dim()) if index[k] is None]
    for k in where:
        if value.learned:
            tape.keep_order(value.dims[k], PICKED)
    n = max(index[k].dim() for k in where)
    new = [
        tape.value(longest).dims[k] if longest.shape[k] == out.shape[first + k] else Dim(out.shape[first + k])
        for k in range(n)
    ]  # fmt: skip
    dims = [value.dims[k] for k in rest]
    axes: list[Axes] = [value.axes[k] for k in rest]
    none: list[Axes] = [frozenset()] * n
    tape.put(out, value.carry(dims[:first] + new + dims[first:], axes[:first] + none + axes[first:]))  # fmt: skip


def scattered(tape: Tape, call: Call) -> None:
    """Rule of ``index_add``, ``index_copy`` and ``scatter``: rows are written by number."""
    x = call.args[0]
    value, axis = tape.value(x), call.axis(1)
    source = call.arg(3, "source")
    learned, stream = value.learned, value.stream
    if isinstance(source, Tensor):
        own = tape.value(source)
        for k in range(x.dim()):
            if k != axis and k < source.dim() and source.shape[k] == x.shape[k]:
                tape.same(value.dims[k], own.dims[k], call)
        if own.learned:
            learned, stream = True, own.stream.join(value.stream)
    if value.learned or learned:
        tape.keep_order(value.dims[axis], "rows are written by number")
    _written(tape, call, x, Value(value.dims, stream, learned, False, True))


def put(tape: Tape, call: Call) -> None:
    """Rule of ``index_put``."""
    x, index, source = call.args[:3]
    value, own, k = tape.value(x), tape.value(source), len(call.args[1])
    for i in range(1, x.dim() - k + 1):
        if i <= source.dim() and source.shape[-i] == x.shape[-i]:
            tape.same(value.dims[-i], own.dims[-i], call)
    if own.learned or value.learned:
        for i in range(k):
            if index[i] is not None:
                tape.keep_order(value.dims[i], "rows are written by number")
    stream = own.stream.join(value.stream) if own.learned else value.stream
    _written(tape, call, x, Value(value.dims, stream, value.learned or own.learned, False, True))


def mask_scattered(tape: Tape, call: Call) -> None:
    """Rule of ``masked_scatter``, where the mask does not differ along the last axis."""
    x, mask, source = call.args[:3]
    value, own = tape.value(x), tape.value(source)
    if not source.dim() or source.shape[-1] != x.shape[-1] or not uniform(mask, mask.dim() - 1):
        raise Conflict("a mask that differs along features")
    tape.same(value.dims[-1], own.dims[-1], call)
    if own.learned:
        own.stream.join(value.stream)
    _written(tape, call, x, Value(value.dims, value.stream, value.learned or own.learned, False, True))  # fmt: skip


def _written(tape: Tape, call: Call, x: Tensor, result: Value) -> None:
    for t in call.outputs:
        if t is x:
            value = tape.value(x)
            value.learned, value.given, value.stream = result.learned, True, result.stream
        else:
            tape.put(t, result)


def windows(tape: Tape, call: Call) -> None:
    """Rule of ``unfold``."""
    x = call.args[0]
    value, axis = tape.value(x), call.axis(1)
    tape.keep_order(value.dims[axis], "windows along it")
    dims = [Dim(call.out.shape[axis]) if k == axis else d for k, d in enumerate(value.dims)]
    tape.put(call.out, value.carry([*dims, Dim(call.out.shape[-1])], [*value.axes, frozenset()]))


RULES = {
    **dict.fromkeys(("index_select", "gather", "take_along_dim"), gathered),
    **dict.fromkeys(("index_add", "index_copy", "scatter_add", "scatter", "scatter_reduce"), scattered),
    **dict.fromkeys(("index_put", "_unsafe_index_put"), put),
    **dict.fromkeys(("index", "_unsafe_index"), indexed),
    **dict.fromkeys(
        ("new_zeros", "new_empty", "new_ones", "new_full", "zeros", "empty", "full", "ones", "arange", "scalar_tensor", "empty_strided",
         "new_empty_strided", "eye", "linspace", "randn", "rand", "histc", "bincount", "one_hot", "_unique2", "searchsorted", "bucketize",
         "tril_indices", "triu_indices", "_fused_sdp_choice"),
        constants,
    ),
    "masked_scatter": mask_scattered,
    "unfold": windows,
}  # fmt: skip
