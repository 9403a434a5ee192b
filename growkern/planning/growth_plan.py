"""Growth plans: the source tensors, index maps and scales of every target tensor. Plans hold data only: no tensor, device or dtype."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from math import prod
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal

from growkern.errors import PlanError, raise_all
from growkern.planning.axis_map import AxisMap
from growkern.planning.decisions import BlockRow
from growkern.planning.index_map import IndexMap, Run
from growkern.planning.plan_fields import (
    is_int,
    problems_of,
    renamed_from_0_1,
    tuple_of,
)
from growkern.planning.plan_picture import plan_picture
from growkern.planning.plan_text import plan_html, plan_text
from growkern.planning.vector import Vector
from growkern.support.renamed import renamed_attribute, renamed_fields
from growkern.support.text import short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERSION = 1  # of the JSON format
JSON_NAMES = {  # fields of another name in the JSON
    "centered": "centred",
    "extra_stacks": "others",
    "rebuilt_modules": "rebuilt",
    "repeats": "pieces",
}
FIELD_NAMES = {name: field for field, name in JSON_NAMES.items()}
# not in the JSON at these values, so that digests of older records hold
OMITTED = {"shrink": 1.0, "noise_std": 0.0, "noise_from": 0}
UNREADABLE = AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError
Preserves = Literal["nothing", "function", "gradient", "trajectory"]
KEPT: Mapping[Preserves, str] = {
    "function": "preserves the function",
    "gradient": "preserves the function and its gradients",
    "trajectory": "preserves the function, its gradients and every step to come",
}


@dataclass(frozen=True)
class TensorRow:
    """One parameter or buffer of the target.

    Attributes:
        name: Name in the target.
        source: Name of the source tensor.
        axes: Key of the axis map (in ``GrowthPlan.axes``) of each axis.
        new: True when the tensor belongs to a new block.
        constant: Value of every element of a tensor that copies no source tensor; None for a tensor that does.
        drawn: True when the model's own initialization draws the tensor, if it is a parameter; a buffer is copied.
        state: ``"law"``: the source's optimizer state, grown. ``"fresh"``: no optimizer state; the tensor's step count starts at 0.
        factor: Factor on the weight, besides the weight scales of the axes.
        grad_factor: Factor on the gradient, besides the gradient scales of the axes.
        next_layer_source: Name of the source tensor, of the same shape as ``source``, of all but the first copies along
            ``next_layer_axis``; None if ``source`` is the source of all copies.
        next_layer_axis: See ``next_layer_source``.
        offset: Constant that the model adds to the tensor; the scales apply to the sum.
        shrink: Factor on the weight alone; learning rates and optimizer state do not follow it.
        noise_std: Standard deviation of noise, in units of the target's weight; it is added last.
        noise_from: First coordinate along the first axis that gets this noise.
    """

    name: str
    source: str
    axes: tuple[str, ...]
    new: bool = False
    constant: float | None = None
    state: Literal["law", "fresh"] = "law"
    factor: float = 1.0
    grad_factor: float = 1.0
    next_layer_source: str | None = None
    next_layer_axis: int = 0
    offset: float = 0.0
    drawn: bool = False
    shrink: float = 1.0
    noise_std: float = 0.0
    noise_from: int = 0

    @property
    def is_perturbed(self) -> bool:
        """True when the weight is shrunk, or noise of ``noise_std`` is added."""
        return self.shrink != 1 or self.noise_std != 0

    upper = renamed_attribute("next_layer_source")
    upper_axis = renamed_attribute("next_layer_axis")


@renamed_fields(others="extra_stacks", rebuilt="rebuilt_modules")
@dataclass(frozen=True)
class GrowthPlan:
    """Everything a growth will do. Plans are frozen, comparable, hashable and convert to and from JSON; equal inputs give equal plans.

    Attributes:
        family: Family of the model.
        source_sizes: Named sizes before.
        target_sizes: Named sizes after.
        width: The width method, as text.
        depth: The depth method, as text.
        seed: Seed of the noise and of all drawn weights.
        state: Mode of the optimizer state: one of ``growkern.planning.options.STATES``.
        dynamics: Mode of the learning rates: ``"mup"``, ``"exact"`` or None.
        axes: Key -> axis map.
        tensors: One row per target tensor, in source order, block by block.
        blocks_path: Name of the module that holds the blocks.
        blocks: Target blocks in order; empty when the model has none.
        extra_stacks: Further stacks: name of the module that holds the blocks -> its target blocks in order.
        ties: Name of a tied parameter -> first name of the same parameter, in the source.
        counters: Buffers that are 0, 1, ... n - 1 along their last axis.
        attributes: ``"module.attribute"`` of the target -> value.
        rebuilt_modules: Modules whose buffers are recomputed from the target's config.
        eps: ``"module.attribute"`` of the target -> factor on a norm's epsilon.
        config: Config field -> value.
        config_lists: Config fields with one entry per block.
        config_eps: Config field and factor on it.
        gradients_exact: True when every gradient is the source's, copied and scaled, without noise, pads or scales of 0. New blocks do not
            count.
        reasons: Why the function is not preserved; empty when it is.
        notes: Notes for the user.

    Example:
        >>> plan = growkern.plan(model, optim, to={"hidden": 48, "layers": 3})
        >>> plan.shapes(plan.tensors[0]), plan.scales(plan.tensors[0])
        (((66, 24), (66, 48)), (1.0, 1.0))
        >>> growkern.GrowthPlan.from_json(plan.to_json()) == plan
        True
    """

    family: str
    source_sizes: Mapping[str, int]
    target_sizes: Mapping[str, int]
    width: str
    depth: str
    seed: int
    state: str
    axes: Mapping[str, AxisMap]
    tensors: tuple[TensorRow, ...]
    blocks_path: str = ""
    blocks: tuple[BlockRow, ...] = ()
    extra_stacks: Mapping[str, tuple[BlockRow, ...]] = field(
        default_factory=dict[str, tuple[BlockRow, ...]]
    )
    ties: Mapping[str, str] = field(default_factory=dict[str, str])
    counters: tuple[str, ...] = ()
    attributes: Mapping[str, float] = field(default_factory=dict[str, float])
    rebuilt_modules: tuple[str, ...] = ()
    eps: Mapping[str, float] = field(default_factory=dict[str, float])
    config: Mapping[str, float] = field(default_factory=dict[str, float])
    config_lists: tuple[str, ...] = ()
    config_eps: tuple[str, float] | None = None
    dynamics: str | None = "mup"
    gradients_exact: bool = False
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    lawful = renamed_attribute("gradients_exact")
    kept = renamed_attribute("preserves_text")
    path = renamed_attribute("blocks_path")
    rows = renamed_attribute("tensors")

    def __hash__(self) -> int:
        return hash(self.to_json())

    @property
    def stacks(self) -> dict[str, tuple[BlockRow, ...]]:
        """Name of every module that holds blocks -> its target blocks."""
        return {**({self.blocks_path: self.blocks} if self.blocks else {}), **self.extra_stacks}

    @property
    def new_blocks(self) -> tuple[str, ...]:
        """Names of the blocks of the target that the source lacks."""
        return tuple(
            f"{path}.{i}"
            for path, blocks in self.stacks.items()
            for i, block in enumerate(blocks)
            if block.new
        )

    @property
    def shrinks(self) -> bool:
        """True when a size gets smaller, in a plan for ``shrink_inplace``."""
        return any(self.target_sizes[name] < n for name, n in self.source_sizes.items())

    @property
    def noisy(self) -> bool:
        """True when twin noise is added or an axis has pads, so that the law does not fully determine the gradient norm."""
        return any(axis.noise or axis.index_map.has_pads for axis in self.axes.values())

    @property
    def drawn(self) -> frozenset[str]:
        """Names of the tensors that the model's own initialization draws."""
        return frozenset(row.name for row in self.tensors if row.drawn)

    @property
    def function_preserving(self) -> bool:
        """True when the target computes the same function as the source."""
        return not self.reasons

    @property
    def preserves_text(self) -> str:
        """``preserves`` as text, with the reasons if the function is not preserved."""
        return KEPT.get(self.preserves, "not function preserving: " + "; ".join(self.reasons))

    @property
    def preserves(self) -> Preserves:
        """The strongest property of the source that the growth preserves; each property implies the ones before it.

        ``"function"``: the target computes the same function. ``"gradient"``: every gradient is the source's, copied and scaled by
        ``grad_scale``; drawn or zero weights rule this out. ``"trajectory"``: optimizer state and hyperparameters match too, so that
        every later step is the source's.
        """
        if self.reasons:
            return "nothing"
        if not self.gradients_exact or any(
            b.new for blocks in self.stacks.values() for b in blocks
        ):
            return "function"
        return "trajectory" if self.state == self.dynamics == "exact" else "gradient"

    def axis_maps(self, row: TensorRow) -> tuple[AxisMap, ...]:
        """Return the axis maps of a tensor; the first one includes the tensor's own factors.

        Args:
            row: One of ``tensors``.
        """
        axes = tuple(self.axes[key] for key in row.axes)
        if row.factor == row.grad_factor == 1 or not axes:
            return axes
        return axes[0].times(row.factor, row.grad_factor), *axes[1:]

    def shapes(self, row: TensorRow) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return source and target shape of a tensor.

        Args:
            row: One of ``tensors``.
        """
        if (known := self._shapes.get(row.axes)) is None:
            maps = [self.axes[key].index_map for key in row.axes]
            known = tuple(m.n_source for m in maps), tuple(m.n_target for m in maps)
            self._shapes[row.axes] = known
        return known

    @cached_property
    def _shapes(self) -> dict[tuple[str, ...], tuple[tuple[int, ...], tuple[int, ...]]]:
        return {}  # by axes

    def scales(self, row: TensorRow) -> tuple[float | None, float | None]:
        """Return weight scale ``s`` and gradient scale ``a`` of a tensor; None for a scale that is not uniform.

        Args:
            row: One of ``tensors``.
        """
        key = row.axes, row.factor, row.grad_factor
        if key not in self._scales:
            axes = self.axis_maps(row)
            weights, grads = [a.weight_scale for a in axes], [a.grad_scale for a in axes]
            self._scales[key] = _product(weights), _product(grads)
        return self._scales[key]

    @cached_property
    def _scales(self) -> dict[object, tuple[float | None, float | None]]:
        return {}  # by axes and factors

    def changes(self, row: TensorRow) -> bool:
        """True when the growth changes the tensor or makes a new one.

        Args:
            row: One of ``tensors``.
        """
        return (
            row.new
            or row.constant is not None
            or row.is_perturbed
            or not all(axis.is_identity for axis in self.axis_maps(row))
        )

    def to_json(self) -> str:
        """Return the plan as JSON."""
        return json.dumps({"version": VERSION} | _fields(self), sort_keys=True, default=_fields)

    @staticmethod
    def from_json(text: str) -> "GrowthPlan":
        """Return the plan that ``to_json`` of this or an earlier version wrote; a missing field takes its default.

        Args:
            text: What ``to_json`` returned.

        Raises:
            PlanError: The text is not a plan, or the plan is of a later version, has an unknown field, or lacks a field without default.
        """
        try:
            data = json.loads(text)
            version = data.pop("version", 0)  # growkern 0.1 wrote no version
            if not is_int(version, 0, VERSION):
                raise PlanError(
                    f"this plan is of version {short(version)}, and this growkern reads versions up to {VERSION}: install the growkern "
                    "that wrote it, or a later one."
                )
            data = renamed_from_0_1(data) if version == 0 else data
            data = {FIELD_NAMES.get(key, key): value for key, value in data.items()}
            plan = GrowthPlan(**{k: FIELDS.get(k, _same)(value) for k, value in data.items()})
            raise_all(PlanError, "a plan has fields of other types:", [*problems_of(plan)])
            return plan
        except PlanError as error:
            raise PlanError(f"cannot read the plan: {error}") from None
        except UNREADABLE as error:
            raise PlanError(
                f"cannot read the plan: {short(error, 300)}; pass text that GrowthPlan.to_json wrote."
            ) from None

    def plot(self) -> "Figure":
        """Draw the plan: sizes, the blocks and the index map of every space (who copies whom), and the scales of every kind of tensor.

        Returns:
            Figure of matplotlib on a transparent background, which light and dark pages show. Equal layers are drawn once.

        Raises:
            ModuleNotFoundError: matplotlib is missing; the message has the pip command.

        Example:
            >>> growkern.plan(model, to={"hidden": "2x"}).plot().savefig("plan.png")
        """
        return plan_picture(self)

    def __str__(self) -> str:
        return plan_text(self)

    def _repr_html_(self) -> str:
        return plan_html(self)


def _fields(record: Any) -> dict[str, Any]:
    keys, values_of, omitted = _keys(record.__class__)
    values: dict[str, Any] = dict(zip(keys, values_of(record), strict=True))
    for key in omitted:
        if values[key] == OMITTED[key]:
            del values[key]
    return values


@cache
def _keys(kind: Any) -> tuple[list[str], Callable[[Any], tuple[Any, ...]], list[str]]:
    """Return the JSON keys of all fields of a class, a function that returns their values, and the keys that may be left out."""
    names = [field.name for field in fields(kind)]
    keys = [JSON_NAMES.get(name, name) for name in names]
    several = attrgetter(*names, names[0])  # of a single name it would return no tuple
    return keys, lambda record: several(record)[:-1], [key for key in keys if key in OMITTED]


def _same(value: Any) -> Any:
    return value


def _tensors_from_json(tensors: list[dict[str, Any]]) -> tuple[TensorRow, ...]:
    for row in tensors:
        row["axes"] = tuple_of(row["axes"])
    return tuple(TensorRow(**row) for row in tensors)


def _blocks_from_json(blocks: list[dict[str, Any]]) -> tuple[BlockRow, ...]:
    return tuple(BlockRow(**block) for block in blocks)


def _axes_from_json(axes: dict[str, Any]) -> dict[str, AxisMap]:
    made: dict[
        str, AxisMap
    ] = {}  # axes of different blocks share one object if they are equal, as in ``axis_maps``
    return {key: made.get(t := repr(d)) or made.setdefault(t, _axis_from_json(d)) for key, d in axes.items()}  # fmt: skip


def _axis_from_json(data: dict[str, Any]) -> AxisMap:
    runs = tuple(Run(*run) for run in data["index_map"]["runs"])
    read: dict[str, Any] = {"index_map": IndexMap(**data["index_map"] | {"runs": runs})}
    for key in ("weight_scale", "grad_scale"):
        (repeats,) = data[key].values()
        read[key] = Vector(tuple((value, n) for value, n in repeats))
    return AxisMap(**{FIELD_NAMES.get(key, key): value for key, value in (data | read).items()})


FIELDS: dict[str, Callable[[Any], Any]] = {  # decoders of types that JSON lacks
    **dict.fromkeys(("config_lists", "counters", "rebuilt_modules", "reasons", "notes"), tuple_of),
    "axes": _axes_from_json,
    "tensors": _tensors_from_json,
    "blocks": _blocks_from_json,
    "extra_stacks": lambda stacks: {path: _blocks_from_json(s) for path, s in stacks.items()},
    "config_eps": lambda eps: None if eps is None else tuple_of(eps),
}


def _product(scales: list[Vector]) -> float | None:
    factors = [factor for scale in scales if (factor := scale.uniform) is not None]
    return prod(factors) if len(factors) == len(scales) else None
