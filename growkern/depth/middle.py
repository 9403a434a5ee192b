"""Depth growth by copies of the middle block of layers: not function preserving.

MIDAS (Saunshi et al., NeurIPS 2024, arXiv:2409.19044): a model of ``n`` blocks of equal size grows to ``n + 1`` blocks by a copy of block
``ceil(n / 2)``, counted from 1, behind this block.
"""

from dataclasses import dataclass

from growkern.depth.layer_order import blocks
from growkern.errors import PlanError
from growkern.planning.argument_checks import wrong_layer
from growkern.planning.decisions import LayerOrder
from growkern.support.text import short

REASON = ("middle blocks compute their function twice",)


@dataclass(frozen=True)
class Middle:
    """Insert a copy of the middle block of layers behind this block, once per stage (MIDAS).

    A stage divides the model into ``n`` blocks of ``size`` layers and adds a copy of block ``ceil(n / 2)``: the order of the target is the
    blocks below, the middle block twice, the blocks above. Growth by several blocks is as many stages, one after the other. In MIDAS the
    model trains after each stage: grow by one block per call, or per event of a ``GrowthSchedule``.

    Args:
        size: Number of layers of a block; a divisor of the source depth and of the number of added layers. None for the number of added
            layers, which is one stage.

    Preserves:
        Nothing.

    Example:
        >>> plan = growkern.plan(model, to={"layers": 3}, depth=depth.Middle())
        >>> [block.source for block in plan.blocks]
        [0, 0, 1]

    Reference:
        Saunshi et al., "On the Inductive Bias of Stacking Towards Improving Reasoning", NeurIPS 2024, arXiv:2409.19044.
    """

    size: int | None = None

    def deepen(self, n_source: int, n_target: int) -> LayerOrder:
        """Return the blocks of the target; raise PlanError unless ``size`` divides the source depth and the number of added layers."""
        n_new = n_target - n_source
        size = max(1, n_new) if self.size is None else self.size
        if wrong_layer(size) or not size >= 1 or n_source % size or n_new % size:
            fitting = [k for k in range(1, n_source + 1) if not (n_source % k or n_new % k)]
            raise PlanError(
                f"Middle: size={short(size)} is not the size of equal blocks of {n_source} layers that reach {n_target}; pass "
                f"{', '.join(map(str, fitting))}."
            )
        order = [*range(n_source)]
        while len(order) < n_target:
            middle = (len(order) // size - 1) // 2 * size
            order[middle + size : middle + size] = order[middle : middle + size]
        return LayerOrder(blocks(order, n_source, "Middle"), reasons=REASON if n_new else ())
