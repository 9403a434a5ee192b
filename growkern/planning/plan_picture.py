"""The picture of a growth plan, for ``plan.plot()``: the plan as plain data that ``growkern.pictures`` draws."""

import re
from collections.abc import Iterator
from math import prod
from textwrap import fill
from typing import TYPE_CHECKING

from growkern.planning.decisions import BlockRow
from growkern.planning.index_map import PAD, IndexMap
from growkern.planning.plan_text import tensor_lines, title
from growkern.planning.vector import Vector

if TYPE_CHECKING:
    from growkern.pictures.figure import Picture
    from growkern.planning.growth_plan import GrowthPlan, TensorRow

MOST = 10, 40  # panels of index maps, and kinds of tensors; of more, the foot says the number
Piece = tuple[
    int, int, int, str
]  # of a map: first target, length, first source, key of ``growkern.pictures.plan.KINDS``


def plan_picture(plan: "GrowthPlan") -> "Picture":
    """Draw a plan; see ``GrowthPlan.plot``."""
    from growkern.pictures.plan import MapPanel, ScaleRow, draw

    panels = [
        MapPanel(
            f"{fill(path, 22)}\n{n_source} → {len(blocks)}",
            n_source,
            len(blocks),
            [*_blocks(blocks)],
        )
        for path, blocks, n_source in _stacks(plan)
    ]
    spaces, same = _spaces(plan)
    for name, maps in spaces.items():
        own = f" (1 of {len(maps)})" if len(maps) > 1 else ""
        first = next(iter(maps))
        sizes = f"{first.n_source:,} → {first.n_target:,}"
        panels.append(MapPanel(f"{fill(name, 22)}\n{sizes}{own}", first.n_source, first.n_target, [*_pieces(first)]))  # fmt: skip
    lines = tensor_lines(plan)
    rows = [
        ScaleRow(
            f"{name.removesuffix('.weight')}  {source}" + (f" → {target}" if target != source else ""),
            _scale(weight, None if row.drawn or row.constant is not None else _span(plan, row, "weight_scale")),
            _scale(gradient, _span(plan, row, "grad_scale")),
        )
        for (name, source, target, weight, gradient), row in lines.items()
    ]  # fmt: skip
    left_out = [
        f"{n - most} more {what}"
        for n, most, what in ((len(panels), MOST[0], "maps"), (len(rows), MOST[1], "kinds of tensors"))
        if n > most
    ]  # fmt: skip
    foot = "; ".join([plan.preserves_text, *([f"unchanged: {', '.join(same)}"] if same else []), *left_out])  # fmt: skip
    sizes = [(name, n, plan.target_sizes[name]) for name, n in plan.source_sizes.items() if n]
    return draw(title(plan), sizes, panels[: MOST[0]], rows[: MOST[1]], foot)


def _stacks(plan: "GrowthPlan") -> Iterator[tuple[str, tuple[BlockRow, ...], int]]:
    """Yield path, target blocks and number of source blocks of every stack whose blocks change."""
    for path, blocks in plan.stacks.items():
        n_source = 1 + max(block.source for block in blocks)
        if path == plan.blocks_path:
            n_source = max(n_source, plan.source_sizes.get("layers", 0))
        if [block.source for block in blocks] != [*range(n_source)]:
            yield path, blocks, n_source


def _blocks(blocks: tuple[BlockRow, ...]) -> Iterator[Piece]:
    for i, block in enumerate(blocks):
        yield i, 1, block.source, "new" if block.new else "first"


def _spaces(plan: "GrowthPlan") -> tuple[dict[str, dict[IndexMap, None]], list[str]]:
    """Return the maps of every space that changes, of equal blocks once, and the names of the spaces that stay."""
    spaces, same = dict[str, dict[IndexMap, None]](), dict[str, None]()
    for key, axis in plan.axes.items():
        name = _space(key)
        if axis.index_map.is_identity:
            same[name] = None
        else:
            spaces.setdefault(name, {})[axis.index_map] = None
    return spaces, [name for name in same if name not in spaces and not name.isdecimal()]


def _space(key: str) -> str:
    """Return the space of an axis map without role, use and numbers of blocks: ``"reader ffn.0:down"`` is of ``"ffn"``."""
    space = key.partition(" ")[2].partition(" of ")[0] or key
    return re.sub(r"\.\d+\b|:[^ ]*", "", space)


def _pieces(index_map: IndexMap) -> Iterator[Piece]:
    """Yield the runs of a map, cut where the copies of a source coordinate stop being the first ones."""
    seen = bytearray(index_map.n_source)
    for target, length, source in index_map.runs:
        if source == PAD:
            yield target, length, source, "pad"
            continue
        start = 0
        for i in range(1, length + 1):
            if i == length or seen[source + i] != seen[source + start]:
                kind = "further" if seen[source + start] else "first"
                yield target + start, i - start, source + start, kind
                start = i
        seen[source : source + length] = b"\x01" * length


def _scale(text: str, span: tuple[float, float] | None) -> tuple[str, tuple[float, float] | None]:
    """Return text and numbers of a scale, with the numbers in the text where they vary."""
    return f"{span[0]:.3g} to {span[1]:.3g}" if text == "varies" and span else text, span


def _span(plan: "GrowthPlan", row: "TensorRow", scale: str) -> tuple[float, float]:
    """Return the least and the largest scale of a tensor."""
    vectors: list[Vector] = [getattr(axis, scale) for axis in plan.axis_maps(row)]
    values = [[abs(value) for value, _ in vector.repeats] for vector in vectors]
    return prod(min(v, default=1.0) for v in values), prod(max(v, default=1.0) for v in values)
