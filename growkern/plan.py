"""Growth plans: what every target tensor is made of. Arithmetic only: no tensors, no device, no dtype.

A width method gives an index map per space and a contract ``(w, u)`` per stream; a depth method gives the order of blocks.
Everything else follows from the roles of the axes (design: "weights and gradients are dual"):

    writer: weight x w, gradient x u        reader: weight x u, gradient x w
    gain of a norm from stream a to stream b: weight x w_b sqrt(f) / w_a, gradient x u_b w_a / sqrt(f)

where ``f`` is the factor by which the norm's mean square changes, which its epsilon must follow.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import isclose, prod, sqrt
from typing import Any, Literal

from growkern.errors import PlanError, raise_all
from growkern.index_map import PAD, IndexMap, Run, Vector, concat_maps, concat_vectors
from growkern.methods import BlockRow, Contract, Depth, DepthMethod, Width, WidthMethod
from growkern.spaces import AxisUse, ModelSpec, size_value, space_of
from growkern.tables import fold, table

Pad = Literal["zero", "mean", "normal"]  # what an element without an ancestor is: 0, the mean along the axis, or free noise


@dataclass(frozen=True)
class AxisMap:
    """How one axis grows. Shared by every tensor axis with the same use.

    Attributes:
        index_map: Source coordinate of each target coordinate.
        weight_scale: Factor on the weight, per target coordinate.
        grad_scale: Factor on the gradient and on first-order state (squared on second-order state).
        pad: What a weight is where nothing is copied.
        noise: Strength of the twin noise along the axis.
        centred: True when the mean along the axis is subtracted from the weight first.
    """

    index_map: IndexMap
    weight_scale: Vector
    grad_scale: Vector
    pad: Pad = "zero"
    noise: float = 0.0
    centred: bool = False

    @property
    def is_identity(self) -> bool:
        """True when the axis is left as it is."""
        return self.index_map.is_identity and self.weight_scale.uniform == 1 and self.grad_scale.uniform == 1


@dataclass(frozen=True)
class TensorRow:
    """One parameter or buffer of the target.

    Attributes:
        name: Name in the target.
        source: Name of the source tensor.
        axes: Key of the axis map (in ``GrowthPlan.axes``) of each axis.
        new: True when the tensor belongs to a new block.
        constant: The value of every element, for a tensor that copies nothing.
        state: ``"law"``: the source's optimizer state, grown. ``"fresh"``: none, so that its own step count starts at 0.
    """

    name: str
    source: str
    axes: tuple[str, ...]
    new: bool = False
    constant: float | None = None
    state: Literal["law", "fresh"] = "law"


@dataclass(frozen=True)
class GrowthPlan:
    """What a growth will do. Frozen, comparable, hashable, JSON both ways; the same inputs give the same plan everywhere.

    Attributes:
        family: Of the model.
        source_sizes: Named sizes before.
        target_sizes: Named sizes after.
        width: The width method, as text.
        depth: The depth method, as text.
        seed: Of all noise.
        state: ``"exact"`` or ``"drop"``.
        axes: Key -> axis map.
        rows: One per target tensor, in source order, block by block.
        path: Name of the module that holds the blocks.
        blocks: Target blocks in order; empty when the model has none.
        ties: Name -> name of the same parameter under its first name, in the source.
        counters: Buffers that are 0, 1, ... n - 1 along their last axis.
        attributes: ``"module.attribute"`` of the target -> value.
        eps: ``"module.attribute"`` of the target -> factor on a norm's epsilon.
        config: Config field -> value.
        config_lists: Config fields with one entry per block.
        config_eps: Config field and factor on it.
        reasons: Why the function is not preserved; empty when it is.
        notes: What the user should know.
    """

    family: str
    source_sizes: Mapping[str, int]
    target_sizes: Mapping[str, int]
    width: str
    depth: str
    seed: int
    state: str
    axes: Mapping[str, AxisMap]
    rows: tuple[TensorRow, ...]
    path: str = ""
    blocks: tuple[BlockRow, ...] = ()
    ties: Mapping[str, str] = field(default_factory=dict[str, str])
    counters: tuple[str, ...] = ()
    attributes: Mapping[str, int] = field(default_factory=dict[str, int])
    eps: Mapping[str, float] = field(default_factory=dict[str, float])
    config: Mapping[str, int] = field(default_factory=dict[str, int])
    config_lists: tuple[str, ...] = ()
    config_eps: tuple[str, float] | None = None
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __hash__(self) -> int:
        return hash(self.to_json())

    @property
    def function_preserving(self) -> bool:
        """True when the target computes what the source computed."""
        return not self.reasons

    def axis_maps(self, row: TensorRow) -> tuple[AxisMap, ...]:
        """The axis maps of a tensor."""
        return tuple(self.axes[key] for key in row.axes)

    def shapes(self, row: TensorRow) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Source and target shape of a tensor."""
        maps = [axis.index_map for axis in self.axis_maps(row)]
        return tuple(m.n_source for m in maps), tuple(m.n_target for m in maps)

    def scales(self, row: TensorRow) -> tuple[float | None, float | None]:
        """Weight scale ``s`` and gradient scale ``a`` of a tensor; None where they are not one number."""
        axes = self.axis_maps(row)
        return _product([axis.weight_scale.uniform for axis in axes]), _product([axis.grad_scale.uniform for axis in axes])

    def changes(self, row: TensorRow) -> bool:
        """True when the tensor is not left exactly as it is."""
        return row.new or row.constant is not None or not all(axis.is_identity for axis in self.axis_maps(row))

    def to_json(self) -> str:
        """Write the plan as JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "GrowthPlan":
        """Read a plan that ``to_json`` wrote."""
        data = json.loads(text)
        eps = data["config_eps"]
        data |= {name: tuple(data[name]) for name in ("config_lists", "counters", "reasons", "notes")}
        data |= {
            "axes": {key: _axis_from_json(axis) for key, axis in data["axes"].items()},
            "rows": tuple(TensorRow(**(row | {"axes": tuple(row["axes"])})) for row in data["rows"]),
            "blocks": tuple(BlockRow(**row) for row in data["blocks"]),
            "config_eps": tuple(eps) if eps else None,
        }
        return GrowthPlan(**data)

    def __str__(self) -> str:
        grown = [(k, n, self.target_sizes[k]) for k, n in self.source_sizes.items()]
        parts = [
            f"Growth plan for {self.family}: {self.width}, {self.depth}, seed {self.seed}, state {self.state!r}",
            table(["size", "source", "target", ""], [[k, a, b, f"x {b / a:g}" if b != a else ""] for k, a, b in grown]),
        ]
        if any(block.new for block in self.blocks):
            parts.append("blocks  " + " ".join(f"+{b.source}" if b.new else str(b.source) for b in self.blocks) + "   (+ new, copy of)")
        lines = dict.fromkeys(
            (fold(row.name), *map(_shape, self.shapes(row)), _scale(s) if row.constant is None else f"all {row.constant:g}", _scale(a))
            for row in self.rows
            for s, a in [self.scales(row)]
            if self.changes(row)
        )
        parts.append(table(["tensor", "source", "target", "weight s", "gradient a"], [list(line) for line in lines]))
        parts.append("function preserving" if self.function_preserving else "not function preserving: " + "; ".join(self.reasons))
        return "\n\n".join([*parts, *([("\n".join(f"note: {note}" for note in self.notes))] if self.notes else [])])


def _axis_from_json(data: dict[str, Any]) -> AxisMap:
    raw = data["index_map"]
    data["index_map"] = IndexMap(raw["n_source"], raw["n_target"], tuple(Run(*run) for run in raw["runs"]))
    for key in ("weight_scale", "grad_scale"):
        data[key] = Vector(tuple((value, n) for value, n in data[key]["pieces"]))
    return AxisMap(**data)


def _product(values: list[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return prod(numbers) if len(numbers) == len(values) else None


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _scale(value: float | None) -> str:
    return "varies" if value is None else f"{value:.6g}"


def build(
    spec: ModelSpec, sizes: Mapping[str, int], *, width: WidthMethod, depth: DepthMethod, state: str = "exact", seed: int = 0
) -> GrowthPlan:
    """Plan a growth: methods decide maps, contracts and blocks, roles decide the rest.

    Args:
        spec: Description of the source model.
        sizes: Every target size (``growkern.sizes.resolve_sizes``).
        width: Width method.
        depth: Depth method.
        state: ``"exact"`` grows the optimizer's state by the dual law, ``"drop"`` clears it.
        seed: Of all noise.

    Returns:
        The plan.

    Raises:
        PlanError: A method cannot do what is asked.
    """
    problems = [
        *([] if state in ("exact", "drop") else [f"unknown state={state!r}: 'exact' or 'drop'."]),
        *([] if type(seed) is int and 0 <= seed < 1 << 64 else [f"seed={seed!r}: an int from 0 to 2**64 - 1."]),
        *([] if hasattr(width, "widen") else [f"width: expected a width method such as Lossless(), got {width!r}."]),
        *([] if hasattr(depth, "deepen") else [f"depth: expected a depth method such as IdentityBlocks(), got {depth!r}."]),
    ]
    raise_all(PlanError, f"cannot grow {spec.family}:", problems)
    wide = width.widen(spec, sizes)
    n_layers = spec.sizes.get("layers", 0)
    deep = depth.deepen(n_layers, sizes["layers"]) if n_layers else Depth(())
    if spec.blocks is None and n_layers:
        raise_all(PlanError, f"cannot deepen {spec.family}:", ["the spec names no blocks."] if sizes["layers"] != n_layers else [])
    if deep.identity and any(b.new for b in deep.blocks) and spec.blocks and not spec.blocks.identity:
        raise PlanError(f"cannot add identity blocks to {spec.family}: its spec says not which tensors make a block the identity.")
    factors = norm_factors(spec, wide)
    unequal = [stream for stream, factor in factors.items() if factor is None]
    reasons = (*wide.reasons, *deep.reasons, *(f"the norms of {s!r} see unequal copies" for s in unequal))
    keys = {axis: str(axis) for axes in spec.tensors.values() for axis in axes}
    axes = {key: _axis_map(axis, wide, factors) for axis, key in keys.items()}
    eps = {f"{name.removesuffix('.weight')}.{norm.eps}": factors[norm.reads] or 1.0 for name, _, norm in spec.norms()}
    norm_eps = set(eps.values())
    eps_of_config = max(norm_eps, key=lambda f: f != 1) if spec.config_eps and norm_eps != {1.0} else None
    shared = f"config.{spec.config_eps} feeds norms of several widths; the live model is exact, a reload takes it for all of them"
    return GrowthPlan(
        family=spec.family,
        source_sizes=dict(spec.sizes),
        target_sizes=dict(sizes),
        width=str(width),
        depth=str(depth),
        seed=seed,
        state=state,
        axes=axes,
        rows=tuple(_rows(spec, deep, keys)),
        path=spec.blocks.path if spec.blocks else "",
        blocks=deep.blocks if spec.blocks else (),
        ties=dict(spec.ties),
        counters=spec.counters,
        attributes={
            name: index if size == "block" else size_value(size, sizes)
            for source, size in spec.attributes.items()
            for name, index in _targets(spec, deep, source)
        }
        | {
            name: axes[keys[spec.tensors[tensor][axis]]].index_map.n_target
            for source, (tensor, axis) in spec.leaves.items()
            for name, _ in _targets(spec, deep, source)
        },
        eps={name: factor for source, factor in eps.items() for name, _ in _targets(spec, deep, source) if factor != 1},
        config={name: size_value(size, sizes) for name, size in spec.config.items()},
        config_lists=spec.config_lists,
        config_eps=(spec.config_eps, eps_of_config) if spec.config_eps and eps_of_config else None,
        reasons=reasons,
        notes=(shared,) if spec.config_eps and len(norm_eps) > 1 else (),
    )


def norm_factors(spec: ModelSpec, wide: Width) -> dict[str, float | None]:
    """The factor on the mean square of every normalised stream; None where copies are unequal, so that there is no one factor."""
    factors: dict[str, float | None] = {}
    for _, _, norm in spec.norms():
        index_map, contract = wide.maps[space_of(norm.reads)], wide.contracts[norm.reads]
        if index_map.is_identity:
            factors[norm.reads] = 1.0
            continue
        weight = [0.0] * index_map.n_source
        for j, w in zip(index_map.indices, contract.w.expanded(), strict=True):
            if j != PAD:
                weight[j] += w * w
        even = all(isclose(value, weight[0], rel_tol=1e-12) for value in weight)
        factor = sum(weight) / index_map.n_target
        factors[norm.reads] = (1.0 if isclose(factor, 1, rel_tol=1e-12) else factor) if even else None
    return factors


def _axis_map(axis: AxisUse, wide: Width, factors: Mapping[str, float | None]) -> AxisMap:
    def one(component: str | int) -> tuple[IndexMap, Contract]:
        if isinstance(component, int):
            return IndexMap.identity(component), Contract(Vector.full(1, component), Vector.full(1, component))
        return wide.maps[space_of(component)], wide.contracts[component]

    maps, w, u, pads, centred = list[IndexMap](), list[Vector](), list[Vector](), set[Pad](), False
    for segment in axis.segments:
        index_map, contract = one(segment[0])
        segment_w, segment_u = contract.w, contract.u
        pads.add(contract.pad)
        centred = centred or contract.centred
        for component in segment[1:]:
            inner, inner_contract = one(component)
            index_map = index_map.product(inner)
            segment_w, segment_u = segment_w.outer(inner_contract.w), segment_u.outer(inner_contract.u)
        maps.append(index_map)
        w.append(segment_w)
        u.append(segment_u)
    index_map, w_axis, u_axis = concat_maps(maps), concat_vectors(w), concat_vectors(u)
    pad: Pad = pads.pop() if len(pads) == 1 else "zero"
    if axis.role == "writer":
        return AxisMap(index_map, w_axis, u_axis, pad, centred=centred)
    if axis.role == "reader":
        copies = any(count > 1 for count in index_map.counts)
        return AxisMap(index_map, u_axis, w_axis, "normal", noise=wide.noise if copies else 0.0)
    norm = axis.norm
    assert norm is not None, "a gain has a norm"
    root = sqrt(factors[norm.reads] or 1.0)
    back = wide.contracts[norm.reads].w.map(lambda value: root / value)
    return AxisMap(index_map, w_axis.zip(back, lambda x, y: x * y), u_axis.zip(back, lambda x, y: x / y), "mean")


def _targets(spec: ModelSpec, deep: Depth, name: str) -> Iterator[tuple[str, int]]:
    """Every name that a source name has in the target, and the index of its block."""
    place = spec.block_of(name)
    if place is None or not deep.blocks:
        yield name, 0
        return
    for index, block in enumerate(deep.blocks):
        if block.source == place[0]:
            yield f"{spec.blocks.path}.{index}.{place[1]}" if spec.blocks else name, index


def _rows(spec: ModelSpec, deep: Depth, keys: Mapping[AxisUse, str]) -> Iterator[TensorRow]:
    for source, axes in spec.tensors.items():
        if source in spec.ties:
            continue
        row = TensorRow(source, source, tuple(keys[axis] for axis in axes))
        place = spec.block_of(source)
        for name, index in _targets(spec, deep, source):
            yield _in_block(replace(row, name=name), spec, deep, index, place[1]) if place and deep.blocks else row


def _in_block(row: TensorRow, spec: ModelSpec, deep: Depth, index: int, inner: str) -> TensorRow:
    """What becomes of a tensor, called ``inner`` inside its block, in target block ``index``."""
    block, blocks = deep.blocks[index], spec.blocks
    row = replace(row, new=block.new)
    if blocks is None or not deep.identity:
        return row
    if inner in blocks.carries:
        after = deep.blocks[index + 1] if index + 1 < len(deep.blocks) else None
        moves_on = after is not None and after.new and after.source == block.source
        return replace(row, constant=blocks.carries[inner], state="fresh") if moves_on else row
    return replace(row, constant=blocks.identity.get(inner), state="fresh") if block.new else row
