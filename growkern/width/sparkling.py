"""SPARKLING, "signal preservation and symmetry breaking" (ICML 2026, arXiv:2602.02472)."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Literal

from growkern.model.spec import ModelSpec
from growkern.planning.decisions import StreamScale, WidthDecision
from growkern.planning.index_map import IndexMap
from growkern.planning.method_spaces import positions, refuse, solve_ties, spaces
from growkern.planning.vector import Vector

Side = Literal["copy", "random", "zero"]
SIDES = ("copy", "random", "zero")


@dataclass(frozen=True)
class Sparkling:
    """Keep the size of signals, not the function: new rows and columns are copied, random or zero, and readers scaled to match.

    Copies on both sides at whole multiples of the width keep the function too.
    With ``c`` new coordinates per old one, readers are scaled by ``1 / sqrt(1 + 3c)`` (``1 / (1 + c)`` above c = 1) if both sides are
    copies, else by ``sqrt(d / d')``; writers are not scaled. Norms do not change. The method is meant for ``state="asymmetric"`` and
    ``growkern.optim.AdamW``, which warms up the learning rate of new rows and columns.

    Args:
        fan_out: Initialization of the writers of new coordinates.
        fan_in: Initialization of the readers of new coordinates.

    Preserves:
        The trajectory with copies on both sides at whole multiples, else nothing.

    Example:
        >>> growkern.plan(model, to="2x", width=width.Sparkling("random", "zero")).preserves
        'nothing'

    Reference:
        "SPARKLING: signal preservation and symmetry breaking", ICML 2026, arXiv:2602.02472.
    """

    fan_out: Side = "copy"
    fan_in: Side = "copy"

    def widen(self, spec: ModelSpec, sizes: Mapping[str, int]) -> WidthDecision:
        """Return index maps and stream scales for the target ``sizes``; raise PlanError for zeros on both sides."""
        problems = [
            f"{name}={side!r} is unknown; pass {', '.join(map(repr, SIDES))}."
            for name, side in (("fan_out", self.fan_out), ("fan_in", self.fan_in))
            if side not in SIDES
        ]
        if self.fan_out == self.fan_in == "zero":
            problems.append(
                "fan_out='zero', fan_in='zero': new coordinates with both never train; pass 'copy' or 'random' for one of the two."
            )
        refuse(spec, sizes, "Sparkling", problems)
        maps: dict[str, IndexMap] = {}
        readers: dict[str, IndexMap] = {}
        stream_scales: dict[str, StreamScale] = {}
        inexact = False
        for space in spaces(spec, sizes):
            tail = IndexMap.tail(space.n_source, space.n_target)
            cyclic = IndexMap.cyclic(space.n_source, space.n_target)
            if space.name == "positions":
                maps[space.name] = tail
                stream_scales |= dict.fromkeys(space.streams, positions(tail))
                continue
            maps[space.name] = cyclic if self.fan_out == "copy" else tail
            readers[space.name] = cyclic if self.fan_in == "copy" else tail
            ones = Vector.full(1.0, space.n_target)
            factor = Vector.full(self.factor(space.n_source, space.n_target), space.n_target)
            stream_scale = StreamScale(
                ones,
                factor,
                "random_writer" if self.fan_out == "random" else "zero",
                reads="random_reader" if self.fan_in == "random" else "zero",
            )
            stream_scales |= dict.fromkeys(space.streams, stream_scale)
            exact = self.fan_out == self.fan_in == "copy" and space.n_target % space.n_source == 0
            inexact = inexact or not (exact or space.same)
        solve_ties(spec, sizes, maps, stream_scales)
        reasons = ("signals keep their size, not their values",) if inexact else ()
        dead = (
            "new rows are zero: what multiplies two of them (queries with keys, gates with values) never trains.",
        )
        return WidthDecision(
            maps, stream_scales, reasons=reasons, norms_kept=True, readers=readers,
            notes=dead if self.fan_out == "zero" else (),
        )  # fmt: skip

    def factor(self, n_source: int, n_target: int) -> float:
        """Return the factor on readers of a space that grows from ``n_source`` to ``n_target`` coordinates."""
        if self.fan_out == self.fan_in == "copy":
            c = n_target / n_source - 1
            return 1 / sqrt(1 + 3 * c) if c <= 1 else 1 / (1 + c)
        return sqrt(n_source / n_target)
