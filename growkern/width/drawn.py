"""Width growth that draws all new weights: what a ramp masks, and where it ends."""

from collections.abc import Mapping
from dataclasses import dataclass

from growkern.model.spec import ModelSpec
from growkern.planning.argument_checks import STRONGEST, wrong_number
from growkern.planning.decisions import StreamScale, WidthDecision
from growkern.planning.index_map import IndexMap
from growkern.planning.method_spaces import positions, refuse, solve_ties, spaces
from growkern.planning.vector import Vector


@dataclass(frozen=True)
class Drawn:
    """Keep every weight in place, and draw all weights that write or read a new coordinate; gains and epsilons of norms stay.

    ``ramp=`` of an event grows by this method in place of ``CopyAndPad(norm="corrected")``, and masks the new coordinates.

    Args:
        std: Standard deviation of drawn weights, in standard deviations of the tensor.

    Preserves:
        Nothing.

    Reference:
        Yao et al., "Masked Structural Growth for 2x Faster Language Model Pre-training", ICLR 2024, arXiv:2305.02869.
    """

    std: float = 1.0

    def widen(self, spec: ModelSpec, sizes: Mapping[str, int]) -> WidthDecision:
        """Return index maps and stream scales for the target ``sizes``; raise PlanError for a size that the method does not grow."""
        refuse(spec, sizes, "Drawn", wrong_number("std", self.std, 0, STRONGEST, above=True))
        maps: dict[str, IndexMap] = {}
        stream_scales: dict[str, StreamScale] = {}
        for space in spaces(spec, sizes):
            tail = maps[space.name] = IndexMap.tail(space.n_source, space.n_target)
            ones = Vector.full(1.0, space.n_target)
            drawn = StreamScale(ones, ones, "random_writer", "random_reader")
            own = positions(tail) if space.name == "positions" else drawn
            stream_scales |= dict.fromkeys(space.streams, own)
        solve_ties(spec, sizes, maps, stream_scales)
        reasons = ("new coordinates are drawn, and readers see them",)
        return WidthDecision(maps, stream_scales, reasons=reasons, drawn=self.std, norms_kept=True)
