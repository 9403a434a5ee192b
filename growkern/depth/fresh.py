"""Depth growth by blocks that the model initializes itself: not function preserving.

Bu, "Scaling depth capacity via zero/one-layer model expansion", arXiv:2511.04981 (random initialization of new layers); Du et al.,
"Stacking Your Transformers", NeurIPS 2024, arXiv:2405.15319 (the method called "random").
"""

from dataclasses import dataclass
from typing import Literal

from growkern.depth.layer_order import blocks, spread
from growkern.errors import PlanError
from growkern.planning.decisions import LayerOrder

REASON = ("new blocks are initialized anew",)
NOTE = (
    "new blocks are initialized as those of a model that is built: the loss lands above the source's; warm the learning rate up again.",
)


@dataclass(frozen=True)
class Fresh:
    """Add blocks whose parameters are initialized by the model's own code, as in a newly built model.

    A new block has the modules of a source block. ``reset_parameters`` of every module draws its parameters, then ``_init_weights`` of
    the closest module around the block that has this method (transformers, nanoGPT), under the target's config. The draws depend on the
    plan's seed and run on the CPU in at least float32, so that every process and every device gets the same bits; the state of torch's
    global generators does not change. The optimizer has no state for the new parameters. Persistent buffers are copied.

    Args:
        at: Position of the new blocks: ``"top"`` puts them above all source blocks, ``"even"`` spreads them between the source blocks.

    Preserves:
        Nothing.

    Example:
        >>> growkern.plan(model, to={"layers": 12}, depth=depth.Fresh()).preserves
        'nothing'

    Reference:
        Bu, "Scaling depth capacity via zero/one-layer model expansion", arXiv:2511.04981.
    """

    at: Literal["top", "even"] = "top"

    def deepen(self, n_source: int, n_target: int) -> LayerOrder:
        """Return the blocks of the target; raise PlanError for an unknown ``at``."""
        if self.at not in ("top", "even"):
            raise PlanError(f"Fresh: at={self.at!r} is unknown; pass 'top' or 'even'.")
        if n_target == n_source:
            return LayerOrder(spread(n_source, n_target))
        # on top, alternating layer types continue to alternate
        order = [layer % n_source for layer in range(n_target)]
        rows = blocks(order, n_source, "Fresh") if self.at == "top" else spread(n_source, n_target)
        return LayerOrder(rows, reasons=REASON, fresh=True, notes=NOTE)
