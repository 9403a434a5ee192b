"""What a model is made of: spaces, the axes that use them, and the data a growth needs beside tensors.

A *space* is a named set of coordinates shared by axes; its name before the first dot is the user's size (``"ffn.3"`` has size
``ffn``; ``residual`` has size ``hidden``; ``group`` has ``heads / kv_heads``). A *stream* is an activation on a space, written
``"space"`` or ``"space:name"``: streams of one space share an index map, each has its own scales. An axis is a list of
segments, each the row-major product of streams, fixed sizes and streams side by side: ``("kv_heads.0", "group.0", "head_dim")``.
A head_dim that can grow tells ``QUERY``, ``KEY`` and ``VALUE`` apart: the first two meet in a product.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from math import prod
from typing import Literal

Role = Literal["writer", "reader", "gain"]
Component = str | int | tuple[str, ...]
Segment = tuple[Component, ...]
Axis = str | Segment | Sequence[Segment]

QUERY, KEY, VALUE = "head_dim:query", "head_dim:key", "head_dim:value"
RAW = {QUERY: "head_dim:raw_query", KEY: "head_dim:raw_key"}  # before norms of their own
SHARE = "experts:share"  # what the router gives an expert: the shares of the chosen sum to one
SIZE_OF_SPACE = {"residual": "hidden"}  # every other space is named after its size
EXACT_EPS = (
    1e-10  # an epsilon below changes what is normalised twice by less than rounding in float32
)


@dataclass(frozen=True)
class Norm:
    """How a normalisation joins two streams of one space.

    Attributes:
        reads: The stream it normalises.
        kind: ``"rms"`` divides by the root mean square, ``"layer"`` subtracts the mean first.
        eps: Name of the module attribute that holds its epsilon.
        offset: What the module adds to its parameter: the gain is ``offset + weight``.
    """

    reads: str
    kind: Literal["rms", "layer"]
    eps: str = "eps"
    offset: float = 0.0


@dataclass(frozen=True)
class AxisUse:
    """One axis of one tensor.

    Attributes:
        role: ``"writer"`` (fan-out, bias), ``"reader"`` (fan-in) or ``"gain"`` (of a norm: writes one stream, reads another).
        segments: What the axis holds, in order.
        norm: The norm, for a gain.
    """

    role: Role
    segments: tuple[Segment, ...]
    norm: Norm | None = None

    @property
    def streams(self) -> list[str]:
        """Every stream on it."""
        parts = [c for segment in self.segments for c in segment]
        return [
            s for c in parts for s in (c if isinstance(c, tuple) else (c,)) if isinstance(s, str)
        ]

    def size(self, sizes: Mapping[str, int]) -> int:
        """Its length at the given sizes."""
        return sum(prod(space_size(c, sizes) for c in segment) for segment in self.segments)

    def __str__(self) -> str:
        text = " + ".join(" x ".join(map(str, segment)) for segment in self.segments)
        return f"{self.role} {text}" + (
            f" of {self.norm.kind}({self.norm.reads})" if self.norm else ""
        )


TensorSpec = tuple[AxisUse, ...]


@dataclass(frozen=True)
class Blocks:
    """The blocks that depth growth repeats: ``path.0``, ``path.1``, ...

    Attributes:
        path: Name of the ``ModuleList``.
        identity: Tensors of a block (names inside it) and the constant that turns the block into the identity.
        carries: For post-norm blocks: tensors that move on to the inserted block, and the constant that stays behind.
        outputs: Tensors whose product with a number is that number times what the block adds; by default those that are 0 in
            the identity.
        first_copied: The first block that new ones may copy; those before it are unlike all others.
        reasons: Why a new block is not quite the identity (a post-norm block is, up to the epsilon of its norms); empty when it is.
        size: Name of the size that is their number.
    """

    path: str
    identity: Mapping[str, float] = field(default_factory=dict[str, float])
    carries: Mapping[str, float] = field(default_factory=dict[str, float])
    outputs: tuple[str, ...] = ()
    first_copied: int = 0
    reasons: tuple[str, ...] = ()
    size: str = "layers"

    @property
    def branches(self) -> tuple[str, ...]:
        """See ``outputs``."""
        return self.outputs or tuple(name for name, value in self.identity.items() if value == 0)


@dataclass(frozen=True)
class Power:
    """A size to a power, such as the ``head_dim ** -0.5`` of attention: ``factor * (size / base) ** exponent``."""

    size: str
    exponent: float
    factor: float = 1.0
    base: int = 1


ROOT = Power("head_dim", -0.5)  # of attention scores
Size = (
    str | tuple[str, ...] | Power
)  # a size name, or a product of them; "block" is the index of the block


@dataclass(frozen=True)
class ModelSpec:
    """What growkern knows of a model: names, sizes and roles, never values.

    Attributes:
        family: Name for messages.
        sizes: Every size that a user can name, e.g. ``{"hidden": 768, "layers": 12}``.
        tensors: For every parameter and persistent buffer, how its axes use the spaces.
        ties: Name -> name of the same parameter under its first name. Both are in ``tensors``.
        blocks: What depth growth repeats; None when the model has no blocks.
        others: Further stacks of blocks, each with a size of its own (a decoder's beside the encoder's).
        attributes: ``"module.path.attribute"`` -> size; what modules cache. Sizes of leaf modules follow by themselves.
        config: Field of ``model.config``, and of every other config in the model, -> size; ``"module.path.field"`` where the config
            of one module differs.
        leaves: ``"module.path.attribute"`` -> tensor and axis whose size it caches; ``describe`` fills it in from module types.
        counters: Buffers that hold 0, 1, ... n - 1 along their last axis.
        config_lists: Fields of ``model.config`` that hold one entry per block.
        config_eps: Field of ``model.config`` that holds the epsilon of the norms.
        hidden_is_heads: True when the model has no head_dim of its own: hidden = heads x head_dim.
        powers: Stream -> the power of a size that the model multiplies it with, between what writes it and what reads it. A stream
            that nothing reads joins those of its space that norms read.
        rotary: The share of head_dim, from its start, whose halves are turned in pairs (RoPE); 0 for none.
        rebuilt: Modules without parameters whose buffers follow from the config (rotary embeddings): made anew when head_dim grows.
        saved: A size and its unit: transformers saves the model only where the first is a multiple of the second.
        post_norm: True when norms write the residual stream itself: after every sum, or once after the embedding.
        fixed: Size -> why it cannot grow in this model.
    """

    family: str
    sizes: Mapping[str, int]
    tensors: Mapping[str, TensorSpec]
    ties: Mapping[str, str] = field(default_factory=dict[str, str])
    blocks: Blocks | None = None
    others: tuple[Blocks, ...] = ()
    attributes: Mapping[str, Size] = field(default_factory=dict[str, Size])
    config: Mapping[str, Size] = field(default_factory=dict[str, Size])
    leaves: Mapping[str, tuple[str, int]] = field(default_factory=dict[str, tuple[str, int]])
    counters: tuple[str, ...] = ()
    config_lists: tuple[str, ...] = ()
    config_eps: str | None = None
    hidden_is_heads: bool = False
    powers: Mapping[str, Power] = field(default_factory=dict[str, Power])
    rotary: float = 0.0
    rebuilt: tuple[str, ...] = ()
    saved: tuple[str, str] | None = None
    post_norm: bool = False
    fixed: Mapping[str, str] = field(default_factory=dict[str, str])

    def shape(self, name: str, sizes: Mapping[str, int] | None = None) -> tuple[int, ...]:
        """Shape of a tensor at the given sizes (default: the source's)."""
        at = self.sizes if sizes is None else sizes
        return tuple(axis.size(at) for axis in self.tensors[name])

    @cached_property
    def axes(self) -> Mapping[AxisUse, str]:
        """Every axis, and its name."""
        return {axis: str(axis) for axes in self.tensors.values() for axis in axes}

    @cached_property
    def spaces(self) -> Mapping[str, list[str]]:
        """Every space and its streams."""
        spaces: dict[str, list[str]] = {}
        for stream in self.streams:
            spaces.setdefault(space_of(stream), []).append(stream)
        return spaces

    @cached_property
    def streams(self) -> list[str]:
        """Every stream, in order of appearance."""
        names: dict[str, None] = {}
        for axes in self.tensors.values():
            for axis in axes:
                names.update(dict.fromkeys(axis.streams))
                if axis.norm:
                    names[axis.norm.reads] = None
        return list(names)

    def norms(self) -> list[tuple[str, AxisUse, Norm]]:
        """Every norm: the name of its gain, the gain's axis, the norm."""
        return [
            (name, axes[0], axes[0].norm)
            for name, axes in self.tensors.items()
            if axes and axes[0].norm
        ]

    @cached_property
    def stacks(self) -> tuple[Blocks, ...]:
        """All stacks of blocks."""
        return (*((self.blocks,) if self.blocks else ()), *self.others)

    def block_of(self, name: str) -> tuple[Blocks, int, str] | None:
        """The stack a tensor or module lies in, the index of its block, and its name inside the block."""
        if name not in self._places:
            self._places[name] = self._place(name)
        return self._places[name]

    @cached_property
    def _places(self) -> dict[str, tuple[Blocks, int, str] | None]:
        return {}

    def _place(self, name: str) -> tuple[Blocks, int, str] | None:
        for stack in self.stacks:
            if name.startswith(f"{stack.path}."):
                index, _, rest = name.removeprefix(f"{stack.path}.").partition(".")
                return stack, int(index), rest
        return None

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {n}" for name, n in self.sizes.items())
        return f"{self.family}: {sizes}; {len(self.tensors)} tensors, {len(self.ties)} tied"


def space_of(stream: str) -> str:
    """The space a stream lives on."""
    return stream.partition(":")[0]


def space_size(component: Component, sizes: Mapping[str, int]) -> int:
    """Size of a space (or a fixed size, or spaces side by side) under the given named sizes."""
    if isinstance(component, int):
        return component
    if isinstance(component, tuple):
        return sum(space_size(one, sizes) for one in component)
    name = _size_name(component)
    return sizes["heads"] // sizes["kv_heads"] if name == "group" else sizes[name]


@cache
def _size_name(component: str) -> str:
    name = space_of(component).partition(".")[0]
    return SIZE_OF_SPACE.get(name, name)


def size_value(size: Size, sizes: Mapping[str, int]) -> float:
    """Value of an attribute or config field: a size, a product of sizes, or a power of one (a float)."""
    if isinstance(size, Power):
        return size.factor * (space_size(size.size, sizes) / size.base) ** size.exponent
    return prod(space_size(name, sizes) for name in ([size] if isinstance(size, str) else size))


def writer_corrections(spec: ModelSpec, sizes: Mapping[str, int]) -> dict[str, float]:
    """Stream -> factor on what writes it, so that the powers of sizes that the model multiplies it with change nothing."""
    return {
        stream: (space_size(power.size, sizes) / space_size(power.size, spec.sizes))
        ** -power.exponent
        for stream, power in spec.powers.items()
    }


def post_norm_eps_reason(eps: float) -> tuple[str, ...]:
    """Why a new post-norm block with norms of this epsilon is not the identity: it normalises what is normalised already."""
    return (
        (f"new post-norm blocks are the identity only up to the epsilon of their norms, {eps:g}",)
        if eps > EXACT_EPS
        else ()
    )
