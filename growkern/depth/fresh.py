"""Depth growth by blocks that the model initialises itself: not function preserving.

Bu, "Scaling depth capacity via zero/one-layer model expansion", arXiv:2511.04981 (random initialisation of new layers); "random" in
the study of Du et al., "Stacking Your Transformers", NeurIPS 2024, arXiv:2405.15319.
"""

from dataclasses import dataclass
from typing import Literal

from growkern.depth.layer_order import blocks, spread
from growkern.errors import PlanError
from growkern.planning.decisions import LayerOrder

REASON = ("new blocks are initialised anew",)
NOTE = (
    "new blocks are initialised as those of a model that is built: the loss lands above the source's; warm the learning rate up again.",
)


@dataclass(frozen=True)
class Fresh:
    """Add blocks whose parameters the model initialises itself, as it does when it is built.

    A new block has the modules of a source block. Its parameters are drawn by the model's own code: ``reset_parameters`` of every module,
    then ``_init_weights`` of the closest module around the block that has one (transformers, nanoGPT), under the target's config. The
    plan's seed decides the draws, on the CPU and in float32 at least, so that every process and every device gets the same bits, and
    torch's global generators stay as they are. The optimizer has no state for the new parameters. Persistent buffers are copied.

    Args:
        at: Where the new blocks go: on ``"top"`` of the others, or ``"even"``, spread between them.

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
        """Give the blocks of the target; raise PlanError for an unknown ``at``."""
        if self.at not in ("top", "even"):
            raise PlanError(f"Fresh: at={self.at!r}; 'top' or 'even'.")
        if n_target == n_source:
            return LayerOrder(spread(n_source, n_target))
        # on top, kinds of layers that alternate go on alternating
        order = [layer % n_source for layer in range(n_target)]
        rows = blocks(order, n_source, "Fresh") if self.at == "top" else spread(n_source, n_target)
        return LayerOrder(rows, reasons=REASON, fresh=True, notes=NOTE)
