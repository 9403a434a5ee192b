"""Depth growth by blocks that the model's own code, or a function, initializes: not function preserving.

Bu, "Scaling depth capacity via zero/one-layer model expansion", arXiv:2511.04981 (random initialization of new layers); Du et al.,
"Stacking Your Transformers", NeurIPS 2024, arXiv:2405.15319 (the method called "random").
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from growkern.depth.layer_order import blocks, spread
from growkern.errors import PlanError
from growkern.planning.decisions import BlockRow, LayerOrder
from growkern.support.text import short

REASON = ("new blocks are initialized anew",)
NOTE = (
    "new blocks are initialized, not copied: the loss lands above the source's; warm the learning rate up again.",
)


@dataclass(frozen=True)
class Fresh:
    """Add blocks whose parameters are initialized by the model's own code, as in a newly built model, or by a function.

    A new block has the modules of a source block. ``reset_parameters`` of every module draws its parameters, then ``_init_weights`` of
    the closest module around the block that has this method (transformers, nanoGPT), under the target's config. The draws depend on the
    plan's seed and run on the CPU in at least float32, so that every process and every device gets the same bits; the state of torch's
    global generators does not change. The optimizer has no state for the new parameters. Persistent buffers are copied.

    A model that has 0 blocks gets its first blocks: "zero-layer" progressive training. Their parameters join the param group of the
    model's other parameters, or of several groups the one that holds parameters of as many dimensions.

    In a sharded model, every process draws a new block whole, on the CPU, and keeps its part. The first blocks of a model take the
    settings of ``fully_shard`` from the closest module around them; a model of ``parallelize_module`` without blocks is refused.

    A parameter that no code initializes is an error. A plan holds no function: pass the method as ``depth=`` beside ``plan=`` again. On
    record, a growth by ``init`` has its whole plan, and ``resume`` leaves the new blocks NaN until the checkpoint is loaded.

    Args:
        at: Position of the new blocks: ``"top"`` puts them above all source blocks, ``"even"`` spreads them between the source blocks.
        init: Function that initializes a module in place; it replaces ``_init_weights`` and, as in ``nn.Module.apply``, is called for
            every module of a copy of the block, children first, the block last; also before anything changes, for a copy of
            every source block that is copied. None for the model's own ``_init_weights``.
        block: Block for a model that has 0 blocks: a ``torch.nn.Module`` whose modules new blocks copy, but not its values. None to build
            the block from the config (transformers), as a model of the target's depth has it. Ignored in a model that has blocks.

    Preserves:
        Nothing.

    Example:
        >>> growkern.plan(model, to={"layers": 12}, depth=depth.Fresh()).preserves
        'nothing'
        >>> def draw(module):
        ...     for p in module.parameters(recurse=False):
        ...         torch.nn.init.trunc_normal_(p, std=0.02) if p.dim() > 1 else torch.nn.init.ones_(p)
        >>> growkern.expand_inplace(model, to={"layers": 4}, depth=depth.Fresh(init=draw)).new_blocks
        ('model.layers.2', 'model.layers.3')

    Reference:
        Bu, "Scaling depth capacity via zero/one-layer model expansion", arXiv:2511.04981.
    """

    at: Literal["top", "even"] = "top"
    init: Callable[[Any], object] | None = None
    block: object | None = None

    def __repr__(self) -> str:
        """Return the same text in every process: a function by its name, a block by that of its class."""
        init: Any = self.init
        names = {} if init is None else {"init": getattr(init, "__qualname__", type(init).__name__)}
        names |= {} if self.block is None else {"block": type(self.block).__name__}
        return f"Fresh({', '.join([f'at={self.at!r}', *map('='.join, names.items())])})"

    def deepen(self, n_source: int, n_target: int) -> LayerOrder:
        """Return the blocks of the target; raise PlanError for an unknown ``at``, an ``init`` that is no function, or no ``block``."""
        if self.init is not None and not callable(self.init):
            raise PlanError(
                f"Fresh: init={short(self.init)} is no function; pass a function that initializes the module that it gets, or None."
            )
        if self.at not in ("top", "even"):
            raise PlanError(f"Fresh: at={self.at!r} is unknown; pass 'top' or 'even'.")
        if self.block is not None and not hasattr(self.block, "named_modules"):
            raise PlanError(
                f"Fresh: block={short(self.block)} is no block; pass a torch.nn.Module, or None."
            )
        if n_source == 0:
            rows = (BlockRow(0, new=True),) * n_target
            return LayerOrder(rows, reasons=REASON, fresh=True, notes=NOTE)
        if n_target == n_source:
            return LayerOrder(spread(n_source, n_target))
        # on top, alternating layer types continue to alternate
        order = [layer % n_source for layer in range(n_target)]
        rows = blocks(order, n_source, "Fresh") if self.at == "top" else spread(n_source, n_target)
        return LayerOrder(rows, reasons=REASON, fresh=True, notes=NOTE)
