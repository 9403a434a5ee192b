"""Depth growth by copies next to their layers, or by any order of layers: not function preserving.

Interpose: staged training (Shen et al., ICML 2022, arXiv:2203.06211), called "interleaved" in AquilaMoE: target layer ``l`` copies
source layer ``l // k``. DepthUpscale: SOLAR (Kim et al., NAACL 2024, arXiv:2312.15166): ``[0 .. n - m - 1] + [m .. n - 1]``.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from growkern.depth.layer_order import around, between, blocks
from growkern.errors import PlanError, raise_all
from growkern.planning.argument_checks import wrong_flag, wrong_layer
from growkern.planning.decisions import LayerOrder
from growkern.support.text import short

REASON = ("copied blocks compute their function twice",)


@dataclass(frozen=True)
class Interpose:
    """Put the copies of a layer next to it, spread evenly if the target depth is no whole multiple of the source depth.

    Args:
        halve_branches: Divide what each copy of a layer adds to the residual stream by the number of copies: nearly exact.
        ignore_first: Layers at the bottom that are not repeated.
        ignore_last: Layers at the top that are not repeated.

    Preserves:
        Nothing; with ``halve_branches=True`` nearly the function.

    Example:
        >>> plan = growkern.plan(model, to={"layers": 4}, depth=depth.Interpose())
        >>> [block.source for block in plan.blocks]
        [0, 0, 1, 1]

    Reference:
        Shen et al., "Staged Training for Transformer Language Models", ICML 2022, arXiv:2203.06211.
    """

    halve_branches: bool = False
    ignore_first: int = 0
    ignore_last: int = 0

    def deepen(self, n_source: int, n_target: int) -> LayerOrder:
        """Return the blocks of the target; raise PlanError if the ignored layers leave none to repeat."""
        raise_all(
            PlanError,
            "cannot deepen by Interpose:",
            [*wrong_flag("halve_branches", self.halve_branches)],
        )
        n, m = between(n_source, n_target, self.ignore_first, self.ignore_last, "Interpose")
        order = around(
            [layer * n // m for layer in range(m)], n_source, self.ignore_first, self.ignore_last
        )
        counts = Counter(order)
        branch = [1 / counts[source] for source in order] if self.halve_branches else ()
        return LayerOrder(
            blocks(order, n_source, "Interpose", branch), reasons=REASON if m > n else ()
        )


@dataclass(frozen=True)
class DepthUpscale:
    """Stack a copy of the model on the model: the lower one loses its last ``m`` layers, the copy its first ``m`` layers.

    ``m`` follows from the target depth.

    Preserves:
        Nothing.

    Example:
        >>> plan = growkern.plan(model, to={"layers": 4}, depth=depth.DepthUpscale())
        >>> [block.source for block in plan.blocks]
        [0, 1, 0, 1]

    Reference:
        Kim et al., "SOLAR 10.7B: Scaling Large Language Models with Simple yet Effective Depth Up-Scaling", NAACL 2024,
        arXiv:2312.15166.
    """

    def deepen(self, n_source: int, n_target: int) -> LayerOrder:
        """Return the blocks of the target; ``m`` follows from the target depth.

        Raises:
            PlanError: The target depth is not ``2 (n - m)`` with ``0 <= m <= n / 2``, so that every source layer stays.
        """
        if n_target == n_source:
            return LayerOrder(blocks(range(n_source), n_source, "DepthUpscale"))
        m, odd = divmod(2 * n_source - n_target, 2)
        if odd or not 0 <= m <= n_source // 2:
            raise PlanError(
                f"DepthUpscale: {n_source} layers grow to an even number up to {2 * n_source}, not to {n_target}; use Interpose() or "
                f"Stack(), which reach {n_target}."
            )
        order = [*range(n_source - m), *range(m, n_source)]
        return LayerOrder(blocks(order, n_source, "DepthUpscale"), reasons=REASON)


@dataclass(frozen=True)
class Layers:
    """Copy source layers in any order.

    Args:
        order: Index of the source layer that each target layer copies, e.g. ``(0, 1, 1, 2)``.

    Preserves:
        Nothing.

    Example:
        >>> plan = growkern.plan(model, to={"layers": 3}, depth=depth.Layers((0, 1, 1)))
        >>> [block.source for block in plan.blocks]
        [0, 1, 1]

    Reference:
        All orders of Du et al., NeurIPS 2024, arXiv:2405.15319, have this form.
    """

    order: tuple[int, ...]

    def deepen(self, n_source: int, n_target: int) -> LayerOrder:
        """Return the blocks of the target; raise PlanError for an ``order`` of another length or one that ``blocks`` refuses."""
        order: Any = self.order
        if not hasattr(order, "__len__") or any(map(wrong_layer, order)):
            raise PlanError(
                f"Layers: order={short(order)} is not valid; pass the index of a source layer for each target layer, such as (0, 1, 1)."
            )
        if len(self.order) != n_target:
            raise PlanError(
                f'Layers: the order has {len(self.order)} layers, and the target {n_target}; pass to={{"layers": {len(self.order)}}}.'
            )
        return LayerOrder(
            blocks(self.order, n_source, "Layers"), reasons=REASON if n_target > n_source else ()
        )
