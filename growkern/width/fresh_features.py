"""Width growth by features whose readers are 0: the function changes only through norms.

``Sparkling("random", "zero")`` (arXiv:2602.02472) draws and zeroes the same elements, but multiplies every reader by ``sqrt(d / d')``, so
that the function jumps. GradMax (Evci et al., ICLR 2022, arXiv:2201.05125) adds such units to one layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from growkern.model.size_values import space_of
from growkern.model.spec import ModelSpec
from growkern.planning.decisions import StreamScale, WidthDecision
from growkern.planning.index_map import IndexMap
from growkern.planning.method_spaces import positions, refuse, solve_ties, spaces, tied_streams
from growkern.planning.vector import Vector

REASON = ("norms see new features",)


@dataclass(frozen=True)
class FreshFeatures:
    """Append new coordinates whose writers are drawn and whose readers are 0; all weights of old coordinates keep their values.

    Rows that write a new coordinate are normal with the standard deviation of their tensor; columns that read a new coordinate start at 0.
    New coordinates of a space that no norm reads (ffn, heads) do not change the function. On the residual stream, the mean square of a
    norm includes them, and gains and epsilons stay: the function is nearly preserved if new activations are about as large as old ones.
    A tied head shares the drawn rows of the embedding and cannot be 0, so the gain and the bias of the norm before the head are 0 instead.

    Preserves:
        The function if no norm reads a space that grows (``ffn``, ``heads``), else nothing.

    Example:
        >>> growkern.plan(model, to={"ffn": "2x"}, width=width.FreshFeatures()).preserves
        'function'

    Reference:
        Evci et al., "GradMax: Growing Neural Networks using Gradient Information", ICLR 2022, arXiv:2201.05125.
    """

    def widen(self, spec: ModelSpec, sizes: Mapping[str, int]) -> WidthDecision:
        """Return index maps and stream scales for the target ``sizes``; raise PlanError for a size that the method does not grow."""
        refuse(spec, sizes, "FreshFeatures")
        maps: dict[str, IndexMap] = {}
        stream_scales: dict[str, StreamScale] = {}
        seen = False
        for space in spaces(spec, sizes):
            tail = maps[space.name] = IndexMap.tail(space.n_source, space.n_target)
            ones = Vector.full(1.0, space.n_target)
            free = StreamScale(ones, ones, "random_writer")
            own = positions(tail) if space.name == "positions" else free
            stream_scales |= dict.fromkeys(space.streams, own)
            seen = seen or bool(space.norms and not space.same)
        solve_ties(spec, sizes, maps, stream_scales)
        for stream in {stream for stream, _ in tied_streams(spec)} - spec.normed.keys():
            old = maps[space_of(stream)].per_copy(float, pad=0.0)
            w = stream_scales[stream].activation.zip(old, lambda x, y: x * y)
            stream_scales[stream] = replace(stream_scales[stream], activation=w, pad="zero")
        return WidthDecision(maps, stream_scales, reasons=REASON if seen else (), norms_kept=True)
