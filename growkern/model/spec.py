"""Description of a model: spaces, the axes that use spaces, and the metadata that a growth needs beside tensors.

A *space* is a named set of coordinates shared by axes; its name before the first dot is the user's size (``"ffn.3"`` has size
``ffn``; ``residual`` has size ``hidden``; ``group`` has ``heads / kv_heads``). A *stream* is an activation on a space, written
``"space"`` or ``"space:name"``: streams of one space share an index map, each has its own scales. An axis is a list of segments.
A segment is the row-major product of streams, fixed sizes and concatenated streams: ``("kv_heads.0", "group.0", "head_dim")``.
A spec whose head_dim can grow uses the streams ``QUERY``, ``KEY`` and ``VALUE``, because attention multiplies queries by keys.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle, islice
from math import prod
from typing import Literal

from growkern.model.size_values import (
    Component,
    Power,
    Size,
    size_name,
    size_of_space,
    size_value,
    space_of,
    space_size,
)
from growkern.model.spec_text import spec_text
from growkern.support.renamed import renamed_fields

Role = Literal["writer", "reader", "gain"]
Segment = tuple[Component, ...]
Axis = str | Segment | Sequence[Segment]

QUERY, KEY, VALUE = "head_dim:query", "head_dim:key", "head_dim:value"
RAW = {QUERY: "head_dim:raw_query", KEY: "head_dim:raw_key"}  # queries and keys before their norms
SHARE = "experts:share"  # router weight of an expert: the weights of the chosen experts sum to one


@dataclass(frozen=True)
class Norm:
    """A norm, which reads one stream of a space and writes another stream of the same space.

    Attributes:
        reads: Stream that the norm reads.
        kind: ``"rms"`` divides by the root mean square, ``"layer"`` subtracts the mean first.
        eps: Name of the module attribute that holds the epsilon; None if the epsilon cannot change, such as a number in ``forward``. A
            growth then keeps the mean square of the stream.
        offset: Constant that the module adds to its weight: the gain is ``offset + weight``.
    """

    reads: str
    kind: Literal["rms", "layer"]
    eps: str | None = "eps"
    offset: float = 0.0


@dataclass(frozen=True)
class AxisUse:
    """One axis of one tensor.

    Attributes:
        role: ``"writer"`` (fan-out, bias), ``"reader"`` (fan-in) or ``"gain"`` (of a norm: writes one stream, reads another).
        segments: Segments of the axis, in order.
        norm: Norm of a gain; None for other roles.
    """

    role: Role
    segments: tuple[Segment, ...]
    norm: Norm | None = None

    @cached_property
    def streams(self) -> list[str]:
        """Every stream on the axis."""
        parts = [c for segment in self.segments for c in segment]
        return [
            s for c in parts for s in (c if isinstance(c, tuple) else (c,)) if isinstance(s, str)
        ]

    def size(self, sizes: Mapping[str, int]) -> int:
        """Return the length of the axis at the given sizes."""
        return sum(prod(space_size(c, sizes) for c in segment) for segment in self.segments)

    def whole_heads(self, sizes: Mapping[str, int]) -> tuple[str, int]:
        """Return the name and the value of the size that the axis counts at the given sizes; heads are counted, not their dimensions."""
        parts = [[c for c in s if "head_dim" not in str(c)] for s in self.segments]
        names = [size_name(c) for segment in parts for c in segment if isinstance(c, str)]
        n = sum(prod(space_size(c, sizes) for c in segment) for segment in parts)
        return "heads" if "group" in names else "+".join(dict.fromkeys(names)), n

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
        path: Name of the ``ModuleList`` or ``Sequential``, or of the ``ModuleDict`` with the keys ``"0"``, ``"1"``, ...
        identity: Tensor of a block (name inside the block) -> constant that makes the block the identity.
        carries: For post-norm blocks: tensor that moves from a block to the last block inserted behind it -> constant that replaces
            the tensor in the block and in all other inserted blocks.
        outputs: Tensors whose multiplication by a number multiplies what the block adds to the residual stream by that number. By
            default the tensors that are 0 in ``identity``.
        first_copied: Index of the first block that new blocks may copy; earlier blocks have another structure than all others.
        reasons: Why a new block is not exactly the identity (a post-norm block is, up to the epsilon of its norms); empty when it is.
        size: Name of the size that counts the blocks.
        kinds: For blocks of several kinds, such as attention and Mamba: index of the first block of the same kind, of every block.
        next_kinds: Kinds of the places behind those of the source, in turn, again and again.

    Example:
        >>> blocks = growkern.Blocks("model.layers", identity={"self_attn.o_proj.weight": 0.0, "mlp.down_proj.weight": 0.0})
        >>> blocks == growkern.describe(model).blocks
        True
    """

    path: str
    identity: Mapping[str, float] = field(default_factory=dict[str, float])
    carries: Mapping[str, float] = field(default_factory=dict[str, float])
    outputs: tuple[str, ...] = ()
    first_copied: int = 0
    reasons: tuple[str, ...] = ()
    size: str = "layers"
    kinds: tuple[int, ...] = ()
    next_kinds: tuple[int, ...] = ()

    def kinds_at(self, n: int) -> tuple[int, ...]:
        """Return the kinds of the first ``n`` places."""
        more = max(0, n - len(self.kinds))
        return (*self.kinds, *islice(cycle(self.next_kinds), more))[:n]

    @property
    def branches(self) -> tuple[str, ...]:
        """Return ``outputs``, or by default the tensors that are 0 in ``identity``."""
        return self.outputs or tuple(name for name, value in self.identity.items() if value == 0)


@renamed_fields(
    others="extra_stacks",
    leaves="cached_sizes",
    powers="activation_scales",
    rebuilt="rebuilt_from_config",
    saved="save_requires_multiple",
)
@dataclass(frozen=True)
class ModelSpec:
    """Description of a model: names, sizes and roles, never values.

    Attributes:
        family: Name for messages.
        sizes: Every size that a user can name, e.g. ``{"hidden": 768, "layers": 12}``.
        tensors: Name of every parameter and persistent buffer -> its axes. A stack of 0 blocks is described with its block 0, as if the
            model had it.
        ties: Name of a tied tensor -> name of the tensor that is the same parameter. Both names are in ``tensors``.
        blocks: Blocks that depth growth repeats; None when the model has no blocks.
        extra_stacks: Further stacks of blocks, each with a size of its own (the decoder's blocks beside the encoder's).
        attributes: ``"module.path.attribute"`` -> size that the attribute caches. ``describe`` adds the attributes of leaf modules.
        config: Field of ``model.config`` and of every other config in the model -> size. ``"module.path.field"`` is the field of the
            config of one module.
        cached_sizes: ``"module.path.attribute"`` -> tensor and axis whose size the attribute caches; filled in by ``describe``.
        counters: Buffers that hold 0, 1, ... n - 1 along their last axis.
        config_lists: Fields of ``model.config`` that hold one entry per block.
        config_eps: Field of ``model.config`` that holds the epsilon of the norms.
        hidden_is_heads: True when the config has no field for head_dim: hidden = heads x head_dim.
        activation_scales: Stream -> power of a size by which the model multiplies the stream between its writers and its readers. A stream
            without readers (Gemma 2's embedding) is added to a stream of its space that norms read.
        rotary: Fraction of head_dim, from its start, that RoPE rotates by pairing the coordinates of its two halves; 0 without RoPE.
        rebuilt_from_config: Modules without parameters whose buffers follow from the config (rotary embeddings); rebuilt when head_dim
            grows.
        save_requires_multiple: Two sizes: transformers saves the model only if the first size is a multiple of the second.
        post_norm: True when norms write the residual stream itself: after every sum, or once after the embedding.
        fixed: Size -> why the size cannot grow in this model.
        non_affine_norms: Stream that a norm without parameters reads -> kind of the norm; None if the spec does not say. A residual
            stream that no norm in the spec reads then grows by whole multiples only, whose copies keep the mean square.
        whole_multiples: Size -> why the size grows by whole multiples only.
        summed: Streams that norms alone read, and that are sums of what tensors write, without an activation function in between.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> up, down = growkern.linear("0", reads=(4,), writes="ffn"), growkern.linear("2", reads="ffn", writes=(2,))
        >>> spec = growkern.ModelSpec("net", {"ffn": 8}, up | down)
        >>> growkern.expand_inplace(net, spec=spec, to={"ffn": 16}).target_sizes
        {'ffn': 16}
        >>> net
        Sequential(
          (0): Linear(in_features=4, out_features=16, bias=True)
          (1): ReLU()
          (2): Linear(in_features=16, out_features=2, bias=True)
        )
    """

    family: str
    sizes: Mapping[str, int]
    tensors: Mapping[str, TensorSpec]
    ties: Mapping[str, str] = field(default_factory=dict[str, str])
    blocks: Blocks | None = None
    extra_stacks: tuple[Blocks, ...] = ()
    attributes: Mapping[str, Size] = field(default_factory=dict[str, Size])
    config: Mapping[str, Size] = field(default_factory=dict[str, Size])
    cached_sizes: Mapping[str, tuple[str, int]] = field(default_factory=dict[str, tuple[str, int]])
    counters: tuple[str, ...] = ()
    config_lists: tuple[str, ...] = ()
    config_eps: str | None = None
    hidden_is_heads: bool = False
    activation_scales: Mapping[str, Power] = field(default_factory=dict[str, Power])
    rotary: float = 0.0
    rebuilt_from_config: tuple[str, ...] = ()
    save_requires_multiple: tuple[str, str] | None = None
    post_norm: bool = False
    fixed: Mapping[str, str] = field(default_factory=dict[str, str])
    non_affine_norms: Mapping[str, Literal["rms", "layer"]] | None = None
    whole_multiples: Mapping[str, str] = field(default_factory=dict[str, str])
    summed: tuple[str, ...] = ()

    def __str__(self) -> str:
        return spec_text(self)

    def shape(self, name: str, sizes: Mapping[str, int] | None = None) -> tuple[int, ...]:
        """Return the shape of a tensor at the given sizes (default: the source's)."""
        at = self.sizes if sizes is None else sizes
        return tuple(axis.size(at) for axis in self.tensors[name])

    @cached_property
    def axes(self) -> Mapping[AxisUse, str]:
        """Return every axis -> its name."""
        return {axis: str(axis) for axes in self.tensors.values() for axis in axes}

    @cached_property
    def spaces(self) -> Mapping[str, list[str]]:
        """Return every space -> its streams."""
        spaces: dict[str, list[str]] = {}
        for stream in self.streams:
            spaces.setdefault(space_of(stream), []).append(stream)
        return spaces

    @cached_property
    def streams(self) -> list[str]:
        """Return every stream, in order of appearance."""
        names: dict[str, None] = {}
        for axes in self.tensors.values():
            for axis in axes:
                names.update(dict.fromkeys(axis.streams))
                if axis.norm:
                    names[axis.norm.reads] = None
        return list(names)

    def norms(self) -> list[tuple[str, AxisUse, Norm]]:
        """Return every norm, as the name of its gain, the axis of the gain, and the norm."""
        return self._norms

    @cached_property
    def _norms(self) -> list[tuple[str, AxisUse, Norm]]:
        return [
            (name, axes[0], axes[0].norm)
            for name, axes in self.tensors.items()
            if axes and axes[0].norm
        ]

    @cached_property
    def normed(self) -> dict[str, set[str]]:
        """Stream that norms read -> kinds of these norms."""
        kinds: dict[str, set[str]] = {}
        for _, _, norm in self.norms():
            kinds.setdefault(norm.reads, set()).add(norm.kind)
        for stream, kind in (self.non_affine_norms or {}).items():
            kinds.setdefault(stream, set()).add(kind)
        return kinds

    @cached_property
    def sandwiched(self) -> bool:
        """True when a norm writes a stream that a norm reads."""
        read = {norm.reads for _, _, norm in self.norms()}
        return any(str(axis.segments[0][0]) in read for _, axis, _ in self.norms())

    @cached_property
    def squares_kept(self) -> set[str]:
        """Spaces whose streams keep their mean square in a growth, as a norm has no gain to correct, or an epsilon that cannot change."""
        fixed = {norm.reads for _, _, norm in self.norms() if norm.eps is None}
        return {space_of(stream) for stream in fixed | (self.non_affine_norms or {}).keys()}

    @cached_property
    def users(self) -> dict[str, list[str]]:
        """Stream on the residual space -> ``"norm"`` per norm that reads it, and ``"reader"``, ``"gain"`` or a writer per axis.

        A writer is a ``"bias"``, a ``"layer"``, which also reads a stream, or a ``"table"``, which does not.
        """
        users: dict[str, list[str]] = {}
        for axes in self.tensors.values():
            for axis in axes:
                for stream in filter(on_residual, axis.streams):
                    role: str = axis.role
                    if role == "writer":
                        layer = any(other.role == "reader" for other in axes)
                        role = "bias" if len(axes) == 1 else "layer" if layer else "table"
                    users.setdefault(stream, []).append(role)
                if axis.norm and on_residual(axis.norm.reads):
                    users.setdefault(axis.norm.reads, []).append("norm")
        return users

    @cached_property
    def parts(self) -> set[str]:
        """Residual streams that layers or tables write and nothing reads, as they are added to a stream that norms read."""
        unread = {s for s, roles in self.users.items() if not {"reader", "norm", "gain"} & {*roles}}
        return {s for s in unread if {"layer", "table"} & {*self.users[s]}} - self.normed.keys()

    @cached_property
    def raw(self) -> set[str]:
        """Residual streams that norms read, and linear layers read without a norm in front."""
        return {s for s in self.normed if "reader" in self.users.get(s, ())}

    @cached_property
    def activated(self) -> set[str]:
        """Streams that norms may read behind an activation function, of which a spec does not tell.

        These are the streams of heads and FFN units, and a residual stream that one linear layer alone writes (the transform before a
        head). A residual stream that several layers, a table or a norm write is their sum, and so is one that a norm adds to such a sum.
        """
        adds = {n.reads for _, axis, n in self.norms() if str(axis.segments[0][0]) in self.normed}
        sums = {s for s, roles in self.users.items() if roles.count("layer") > 1 or {"table", "gain"} & {*roles}}  # fmt: skip
        known = adds | sums | {*self.summed}
        return {s for s in self.normed if s not in known and not s.startswith("head_dim")}

    @cached_property
    def unsaid(self) -> bool:
        """True when no norm in the spec reads the residual stream, and the spec does not say whether a norm without parameters does."""
        return self.non_affine_norms is None and not any(
            space_of(stream) == "residual" for stream in self.normed
        )

    @cached_property
    def stacks(self) -> tuple[Blocks, ...]:
        """Return all stacks of blocks."""
        return (*((self.blocks,) if self.blocks else ()), *self.extra_stacks)

    def absent(self, name: str) -> bool:
        """True for a tensor or attribute of a stack without blocks, whose block 0 is described as if the model had it."""
        place = self.block_of(name)
        return place is not None and self.sizes.get(place[0].size) == 0

    def block_of(self, name: str) -> tuple[Blocks, int, str] | None:
        """Return the stack that contains a tensor or module, the block's index and the name inside the block; None if no stack does."""
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


def on_residual(stream: str) -> bool:
    """True for a stream of the residual space, or of one of several residual spaces."""
    return stream.startswith("residual") and size_of_space(space_of(stream)).startswith("hidden")


def writer_corrections(spec: ModelSpec, sizes: Mapping[str, int]) -> dict[str, float]:
    """Return stream -> factor on the writers of the stream that cancels the change of its size power (``ModelSpec.activation_scales``)."""
    return {
        stream: size_value(power, spec.sizes) / size_value(power, sizes)
        for stream, power in spec.activation_scales.items()
    }
