"""The table of rules: ATen operation -> what it does to dimensions, streams and the uses of parameters.

An operation without a rule that is elementwise (``torch.Tag.pointwise``) has the rule of elementwise operations. Any other keeps the
order of all dimensions that it sees, with the name of the operation as the reason.
"""

from collections.abc import Mapping

from torch import nn

from growkern.model.tracing import elementwise, picking, products, reductions, shapes
from growkern.model.tracing.forward import Inputs
from growkern.model.tracing.tape import Rule, Tape, record

RULES: Mapping[str, Rule] = {
    **elementwise.RULES,
    **shapes.RULES,
    **products.RULES,
    **reductions.RULES,
    **picking.RULES,
}


def trace(model: nn.Module, inputs: Inputs) -> Tape:
    """Run a model once and apply the rules."""
    return record(Tape(model, RULES, elementwise.pointwise), model, inputs)
