"""Types and ranges of the fields of a growth plan, which may come from a file: what no plan has is refused before anything reads it."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any
from unicodedata import category

from growkern.planning.decisions import BlockRow
from growkern.planning.options import DYNAMICS, STATES
from growkern.planning.sizes import digits, limit_of
from growkern.support.text import short

if TYPE_CHECKING:
    from growkern.planning.growth_plan import AxisMap, GrowthPlan, TensorRow

MAX_SEED = (1 << 64) - 1
MAX_FACTOR = float(1 << 40)  # factors of growths are ratios of sizes, and powers of these
MAX_AXIS = 1 << 31  # longest axis of a source; above, an index does not fit in 32 bits
MAX_NAME, MAX_TEXT = 1 << 10, 1 << 16  # characters: Layers names up to 4096 layers
PADS = "zero", "mean", "random_reader", "random_writer", "from_method"


def problems_of(plan: "GrowthPlan") -> Iterator[str]:
    """Yield a problem for every field of a type or range that no plan has."""
    names = ("family", "blocks_path")
    yield from _no_texts("a name", [getattr(plan, name) for name in names], MAX_NAME)
    listed = ("config_lists", "counters", "rebuilt_modules")
    texts = ("reasons", "notes")
    for name in (*listed, *texts):
        entries: Any = getattr(plan, name)
        if not isinstance(entries, tuple):
            yield f"{name} is no sequence of texts."
        else:
            yield from _no_texts(name, entries, MAX_NAME if name in listed else MAX_TEXT)  # pyright: ignore[reportUnknownArgumentType]
    yield from _no_texts("a method", (plan.width, plan.depth), MAX_TEXT)
    if plan.state not in [*STATES] or plan.dynamics not in [*DYNAMICS]:
        yield f"its state {short(plan.state)} or dynamics {short(plan.dynamics)} is not known."
    if not is_int(plan.seed, 0, MAX_SEED):
        yield f"seed is {short(plan.seed)}, and not an int from 0 to 2**64 - 1."
    if type(plan.gradients_exact) is not bool:
        yield "gradients_exact is neither true nor false."
    yield from sizes_problems(plan.source_sizes, plan.target_sizes)
    for name in ("attributes", "eps", "config", "ties"):
        yield from _no_mapping(name, getattr(plan, name), text=name == "ties")
    eps: Any = plan.config_eps
    if eps is not None and not (
        type(eps) is tuple and len(eps) == 2 and is_text(eps[0], MAX_NAME) and is_factor(eps[1])  # pyright: ignore[reportUnknownArgumentType]
    ):
        yield "config_eps is no field and factor."
    yield from _of_axes(plan.axes)
    yield from _of_blocks(plan)
    yield from _of_rows(plan.tensors, plan.axes)


def is_int(value: object, low: int, high: int) -> bool:
    """True for an int, and no bool, from ``low`` to ``high``."""
    return type(value) is int and low <= value <= high


def is_factor(value: object) -> bool:
    """True for a finite number, and no bool, of a magnitude that growths have."""
    return type(value) in (int, float) and -MAX_FACTOR <= value <= MAX_FACTOR  # pyright: ignore[reportOperatorIssue, reportUnknownVariableType]


def is_text(value: object, limit: int) -> bool:
    """True for a text of at most ``limit`` characters without control characters, which a terminal would obey."""
    if not isinstance(value, str) or len(value) > limit:
        return False
    return value.isprintable() or not any(
        category(character) in ("Cc", "Cs") for character in {*value} - {"\n", "\t"}
    )


def sizes_problems(source: object, target: object) -> Iterator[str]:
    """Yield a problem for sizes that are no positive ints by name, and for targets above the limit."""
    if not isinstance(source, Mapping) or not isinstance(target, Mapping):
        yield "its sizes are no mapping from names to numbers."
        return
    both: tuple[Mapping[Any, Any], Mapping[Any, Any]] = source, target  # pyright: ignore[reportUnknownVariableType]
    if both[0].keys() != both[1].keys() or not all(is_text(k, MAX_NAME) for k in both[0]):
        yield "its sizes are not those of a model."
        return
    if not all(type(n) is int for n in (*both[0].values(), *both[1].values())):
        yield "its sizes are not those of a model: one is no int."
        return
    for name, n in both[0].items():
        limit = limit_of(name)
        if not (not name.endswith("layers")) <= n <= MAX_AXIS:  # a model may start without layers
            yield f"{name}: the source {digits(n)} is no size."
        elif not 1 <= both[1][name] <= max(limit, n):
            yield f"{name}: the target {digits(both[1][name])} is not from 1 to {limit:,}."


def _no_texts(name: str, values: Iterable[object], limit: int) -> Iterator[str]:
    for value in values:
        if not is_text(value, limit):
            yield f"{name} is {short(value)}, and not a text of at most {limit:,} printable characters."
            return


def _no_mapping(name: str, mapping: object, *, text: bool = False) -> Iterator[str]:
    """Yield a problem for anything but a mapping from names to numbers, or to names."""
    what = f"{name} is no mapping from names to {'names' if text else 'numbers'}"
    if not isinstance(mapping, Mapping):
        yield f"{what}."
        return
    known: Mapping[Any, Any] = mapping  # pyright: ignore[reportUnknownVariableType]
    for key, value in known.items():
        fits = is_text(value, MAX_NAME) if text else is_factor(value)
        if not (is_text(key, MAX_NAME) and fits):
            yield f"{what}: {short(key)} is {short(value)}."
            return


def _of_axes(axes: "Mapping[str, AxisMap]") -> Iterator[str]:
    if not isinstance(axes, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        yield "axes is no mapping from names to axis maps."
        return
    known = dict[int, bool]()  # most axes of blocks share an axis map
    for key, axis in axes.items():
        if id(axis) not in known:
            known[id(axis)] = _is_axis(axis)
        if not is_text(key, MAX_TEXT) or not known[id(axis)]:
            yield f"the axis {short(key)} has a field of a wrong type, or a number that is out of range."
            return


def _is_axis(axis: "AxisMap") -> bool:
    """True when every field of an axis map has its type, and every number a range; ``__post_init__`` checks that the fields agree."""
    index_map, vectors = axis.index_map, (axis.weight_scale, axis.grad_scale)
    numbers = [value for vector in vectors for value, _ in vector.repeats]
    counts = chain(*index_map.runs, (n for vector in vectors for _, n in vector.repeats))
    return (
        is_int(index_map.n_source, 0, MAX_AXIS)
        and is_int(index_map.n_target, 0, MAX_AXIS)
        and {*map(type, counts)} <= {int}
        and {*map(type, numbers)} <= {int, float}
        and all(is_factor(value) for value in {*numbers})
        and all(is_factor(strength) and strength >= 0 for strength in (axis.noise, axis.drawn))
        and type(axis.centered) is bool
        and axis.pad in [*PADS]
    )


def _of_blocks(plan: "GrowthPlan") -> Iterator[str]:
    stacks: Mapping[Any, Any] = plan.extra_stacks
    if not isinstance(stacks, Mapping) or not all(is_text(path, MAX_NAME) for path in stacks):  # pyright: ignore[reportUnnecessaryIsInstance]
        yield "extra_stacks is no mapping from names to blocks."
        return
    for blocks in (plan.blocks, *stacks.values()):
        if not isinstance(blocks, tuple) or not all(map(_is_block, blocks)):  # pyright: ignore[reportUnknownArgumentType]
            yield "a block has no source block, or a factor that is no number."
            return


def _is_block(block: Any) -> bool:
    return (
        isinstance(block, BlockRow)
        and is_int(block.source, 0, MAX_AXIS)
        and type(block.new) is bool
        and is_factor(block.branch)
    )


def _of_rows(rows: "tuple[TensorRow, ...]", axes: "Mapping[str, AxisMap]") -> Iterator[str]:
    if not isinstance(rows, tuple):  # pyright: ignore[reportUnnecessaryIsInstance]
        yield "tensors is no sequence of rows."
        return
    for row in rows:
        names = (
            row.name,
            row.source,
            row.source if row.next_layer_source is None else row.next_layer_source,
        )
        numbers = (
            row.factor,
            row.grad_factor,
            row.offset,
            0 if row.constant is None else row.constant,
        )
        if not (
            all(is_text(name, MAX_NAME) for name in names)
            and all(map(is_factor, numbers))
            and is_int(row.next_layer_axis, 0, len(row.axes))
            and (type(row.new), type(row.drawn)) == (bool, bool)
            and row.state in ["law", "fresh"]
            and isinstance(row.axes, tuple)  # pyright: ignore[reportUnnecessaryIsInstance]
            and all(isinstance(key, str) for key in row.axes)  # pyright: ignore[reportUnnecessaryIsInstance]
        ):
            yield f"the row {short(row.name)} has a field of a wrong type, or a number that is out of range."
            return
        if not axes.keys() >= {*row.axes}:
            yield f"{row.name}: has shape {short(row.axes)}, of axes that the plan does not have."
            return
