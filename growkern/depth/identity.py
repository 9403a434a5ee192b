"""Depth growth by blocks that start as the identity: exact.

Wu et al., "LLaMA Pro: Progressive LLaMA with Block Expansion", ACL 2024, arXiv:2401.02415: copies of blocks whose attention
output and down projections are zero, spread evenly. Post-norm blocks take over the last norm of the block before them instead.
"""

from dataclasses import dataclass

from growkern.depth.layer_order import spread
from growkern.planning.decisions import LayerOrder


@dataclass(frozen=True)
class IdentityBlocks:
    """Insert copies of blocks that compute the identity, spread evenly (LLaMA-Pro's positions where they divide).

    The attention output and the down projection of a new block are 0; its other weights are those of the block before it.

    Preserves:
        The function; in post-norm models up to the epsilon of the norms.

    Example:
        >>> growkern.plan(model, to={"layers": 4}, depth=depth.IdentityBlocks()).preserves
        'function'

    Reference:
        Wu et al., "LLaMA Pro: Progressive LLaMA with Block Expansion", ACL 2024, arXiv:2401.02415.
    """

    def deepen(self, n_source: int, n_target: int) -> LayerOrder:
        """Give the blocks of the target: after source block ``i``, as many new ones as keep the spread even."""
        return LayerOrder(spread(n_source, n_target), identity=True)
