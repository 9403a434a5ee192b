"""Decisions of growth methods: a width method gives index maps and stream scales, a depth method gives blocks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from growkern.model.spec import ModelSpec
from growkern.planning.index_map import IndexMap
from growkern.planning.vector import Vector


@dataclass(frozen=True)
class StreamScale:
    """Scales of a stream: activations grow as ``x'_i = w_i x_g(i)``, and readers compensate with the factor ``u_i``.

    Attributes:
        activation: ``w``, the scale of the activation, per target coordinate.
        readout: ``u``, the scale of readers, per target coordinate. For an exact growth, ``w u`` sums to 1 over the copies of a coordinate.
        pad: Activation of a coordinate that copies no source coordinate: ``"zero"``; ``"mean"`` of the others; ``"random_writer"``: its
            writers are drawn; ``"from_method"``: the method's ``rows`` gives its writers.
        reads: Readers of such a coordinate: ``"zero"`` or ``"random_reader"`` (drawn). None: ``"zero"`` for the pad ``"random_writer"``,
            else ``"random_reader"``.
        centered: True when writers are first centered: their mean over the stream's coordinates is subtracted.
    """

    activation: Vector
    readout: Vector
    pad: Literal["zero", "mean", "random_writer", "from_method"] = "zero"
    reads: Literal["zero", "random_reader"] | None = None
    centered: bool = False


@dataclass(frozen=True)
class WidthDecision:
    """Decision of a width or shrink method.

    Attributes:
        maps: Space -> index map, for every space.
        stream_scales: Stream -> stream scale, for every stream.
        noise: Strength of the twin noise on readers of copies, in standard deviations of the weight; 0 for none.
        reasons: Why the function is not preserved; empty when it is.
        drawn: Standard deviation of drawn readers or writers of pads, in standard deviations of the weight.
        norms_kept: True when gains and epsilons of norms are not corrected for a changed mean square.
        next_layer: True when writers in a block take all but the first copy of each coordinate from the next layer.
        readers: Space -> index map of its readers, where it differs from ``maps``.
        notes: Notes for the user.
        joint: Pair of spaces -> index map of their product, where it is not the product of their maps: groups of query heads that are
            divided among more kv heads.
        promised: True when the method promises to preserve the function: if it cannot, the growth is refused.
        shrink: Factor on all copied elements of matrices; see ``growkern.planning.perturbation``.
        init_std: Standard deviation of muP's initialization at the source's widths, which is added to matrices; 0 for none.
        router_std: Standard deviation of noise that is added to the router rows of copied experts; 0 for none.
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
    promised: bool = False
    shrink: float = 1.0
    init_std: float = 0.0
    router_std: float = 0.0

    @property
    def perturbs(self) -> bool:
        """True when weights are shrunk, or noise of an absolute standard deviation is added."""
        return self.shrink != 1 or self.init_std != 0 or self.router_std != 0


@dataclass(frozen=True)
class BlockRow:
    """One block of the target.

    Attributes:
        source: The source block that it copies.
        new: True for a new block; False for the source block itself.
        branch: Factor on the outputs of the block's branches, which are added to the residual stream.
    """

    source: int
    new: bool = False
    branch: float = 1.0


@dataclass(frozen=True)
class LayerOrder:
    """Decision of a depth or shrink method.

    Attributes:
        blocks: Blocks of the target, in order.
        identity: True when new blocks start as the identity.
        reasons: Why the function is not preserved; empty when it is.
        fresh: True when the model's own initialization draws the parameters of new blocks.
        notes: Notes for the user.
    """

    blocks: tuple[BlockRow, ...]
    identity: bool = False
    reasons: tuple[str, ...] = ()
    fresh: bool = False
    notes: tuple[str, ...] = ()


class WidthMethod(Protocol):
    """Interface of width methods."""

    def widen(self, spec: ModelSpec, sizes: Mapping[str, int]) -> WidthDecision:
        """Return index maps and stream scales for the target ``sizes``; raise PlanError for sizes that the method does not support."""
        ...


class ShrinkMethod(Protocol):
    """Interface of shrink methods, which choose the source coordinates and the blocks that stay."""

    def narrow(self, spec: ModelSpec, sizes: Mapping[str, int]) -> WidthDecision:
        """Return index maps and stream scales for the target ``sizes``; raise PlanError for sizes that the method does not support."""
        ...

    def keep(self, n_source: int, n_target: int) -> LayerOrder:
        """Return the blocks that stay; raise PlanError for a depth that the method does not support."""
        ...


class DepthMethod(Protocol):
    """Interface of depth methods."""

    def deepen(self, n_source: int, n_target: int) -> LayerOrder:
        """Return the blocks of the target; raise PlanError for a depth that the method does not support."""
        ...
