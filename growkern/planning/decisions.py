"""What growth methods decide: a width method gives index maps and stream scales, a depth method gives blocks. The plan does the rest."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from growkern.model.spec import ModelSpec
from growkern.planning.index_map import IndexMap
from growkern.planning.vector import Vector


@dataclass(frozen=True)
class StreamScale:
    """How the activations of a stream grow: ``x'_i = w_i x_g(i)``, and readers take them back with ``u_i``.

    Attributes:
        activation: ``w``, the scale of the activation, per target coordinate.
        readout: ``u``, the scale of its readers; over the copies of a coordinate the sum of ``w u`` is 1.
        pad: Activation of a coordinate that copies nothing: 0 or the mean of the others, and what reads it is drawn; or free (what
            writes it is drawn), and what reads it is 0; or given (the method's ``rows`` write it).
        reads: What reads such a coordinate: drawn or 0; None for what ``pad`` asks for.
        centred: True when writers give up their mean over the stream's coordinates first.
    """

    activation: Vector
    readout: Vector
    pad: Literal["zero", "mean", "random_writer", "from_method"] = "zero"
    reads: Literal["zero", "random_reader"] | None = None
    centred: bool = False


@dataclass(frozen=True)
class WidthDecision:
    """What a width method decides.

    Attributes:
        maps: Space -> index map, for every space.
        stream_scales: Stream -> stream_scale, for every stream.
        noise: Strength of the twin noise on readers of copies, in standard deviations of the weight; 0 for none.
        reasons: Why the function is not preserved; empty when it is.
        drawn: Strength of what is drawn on one side of a pad, in standard deviations of the weight.
        norms_kept: True when gains and eps of norms stay, whatever becomes of the mean square they see.
        next_layer: True when all but the first copies that a block's tensors write are taken from the next layer.
        readers: Space -> index map of its readers, where that is another one.
        notes: What the user should know.
        joint: Two spaces whose product has a map of its own: groups of query heads that more kv heads split.
    """

    maps: Mapping[str, IndexMap]
    stream_scales: Mapping[str, StreamScale]
    noise: float = 0.0
    reasons: tuple[str, ...] = ()
    drawn: float = 1.0
    norms_kept: bool = False
    next_layer: bool = False
    readers: Mapping[str, IndexMap] = field(default_factory=dict[str, IndexMap])
    notes: tuple[str, ...] = ()
    joint: Mapping[tuple[str, str], IndexMap] = field(
        default_factory=dict[tuple[str, str], IndexMap]
    )


@dataclass(frozen=True)
class BlockRow:
    """One block of the target.

    Attributes:
        source: The source block that it copies.
        new: True when that one is elsewhere too.
        branch: Factor on what its branches add to the residual stream.
    """

    source: int
    new: bool = False
    branch: float = 1.0


@dataclass(frozen=True)
class LayerOrder:
    """What a depth method decides.

    Attributes:
        blocks: Blocks of the target, in order.
        identity: True when new blocks start as the identity.
        reasons: Why the function is not preserved; empty when it is.
        fresh: True when the model initialises the parameters of new blocks itself, as it does those of a model that is built.
        notes: What the user should know.
    """

    blocks: tuple[BlockRow, ...]
    identity: bool = False
    reasons: tuple[str, ...] = ()
    fresh: bool = False
    notes: tuple[str, ...] = ()


class WidthMethod(Protocol):
    """Anything that can widen."""

    def widen(self, spec: ModelSpec, sizes: Mapping[str, int]) -> WidthDecision:
        """Give index maps and stream scales for the target ``sizes``; raise PlanError for what the method cannot do."""
        ...


class ShrinkMethod(Protocol):
    """Anything that can shrink: maps into the source that leave coordinates out, and blocks that stay."""

    def narrow(self, spec: ModelSpec, sizes: Mapping[str, int]) -> WidthDecision:
        """Give index maps and stream scales for the target ``sizes``; raise PlanError for what the method cannot do."""
        ...

    def keep(self, n_source: int, n_target: int) -> LayerOrder:
        """Give the blocks that stay; raise PlanError for what the method cannot do."""
        ...


class DepthMethod(Protocol):
    """Anything that can deepen."""

    def deepen(self, n_source: int, n_target: int) -> LayerOrder:
        """Give the blocks of the target; raise PlanError for what the method cannot do."""
        ...
