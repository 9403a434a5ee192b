"""A trace that also notes which activations are queries and keys, and by which number attention multiplies their products."""

from typing import Any

from torch import nn

from growkern.model.tracing import elementwise, products
from growkern.model.tracing.forward import Inputs
from growkern.model.tracing.rules import RULES
from growkern.model.tracing.tape import Call, Tape, record
from growkern.model.tracing.terms import Dim
from growkern.model.tracing.values import Stream


class ScoreTape(Tape):
    """A tape with the scores of attention.

    Attributes:
        scores: For every product of two activations: the dimension that is summed over, their streams, and the number.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.scores: list[tuple[Dim, Stream, Stream, float]] = []

    def _apply(self, call: Call) -> None:
        rule = self.rules.get(call.op)
        if rule is products.attention:
            q, k = (self.value(t) for t in call.args[:2])
            scale = call.kwargs.get("scale") or q.dims[-1].size ** -0.5
            self.scores.append((q.dims[-1], q.stream, k.stream, scale))
        elif rule is products.matmul and call.op == "bmm":
            a, b = (self.value(t) for t in call.args[:2])
            self.scores.append((a.dims[-1], a.stream, b.stream, 1.0))
        super()._apply(call)


def trace_scores(model: nn.Module, inputs: Inputs) -> ScoreTape:
    """Run a model once and apply the rules."""
    tape = ScoreTape(model, RULES, elementwise.pointwise)
    record(tape, model, inputs)
    return tape
