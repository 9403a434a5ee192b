"""Code that only training mode runs: where it differs from what evaluation runs, a model is described by both."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from growkern.model.tracing.forward import Inputs, call_model, evaluated, main_output, tried
from growkern.model.tracing.tape import Step
from growkern.model.tracing.trial import Steps

# function -> position and name of the probability of dropout
DROPOUT: dict[Any, tuple[int, str]] = {
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout), (1, "p")),
    F.scaled_dot_product_attention: (4, "dropout_p"),
    F.multi_head_attention_forward: (10, "dropout_p"),
}  # fmt: skip


class _WithoutDropout(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function with dropout of probability 0."""
        given = dict(kwargs or {})
        if func in DROPOUT:
            position, name = DROPOUT[func]
            if len(args) > position:
                args = (*args[:position], 0.0, *args[position + 1 :])
            else:
                given[name] = 0.0
        return func(*args, **given)


@contextmanager
def training(model: nn.Module) -> Generator[None]:
    """Put a model into training mode, with dropout of probability 0 and equal random numbers for every call."""
    modes = {m: m.training for m in model.modules()}
    model.train()
    try:
        with _WithoutDropout(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@dataclass(frozen=True)
class BothModes:
    """Calls a model in evaluation mode, then in training mode; the two main outputs side by side are what a description keeps.

    Attributes:
        inputs: Inputs of the model.
    """

    inputs: Inputs

    def __call__(self, model: nn.Module) -> Tensor | None:
        """Return the main outputs, stacked where their shapes are equal, else in one vector."""
        first = main_output(call_model(model, self.inputs))
        with training(model):
            second = main_output(call_model(model, self.inputs))
        if first is None or second is None:
            return second if first is None else first
        if first.shape == second.shape:
            return torch.stack([first, second])
        return torch.cat([first.flatten(), second.flatten()])


def trains_by_other_code(model: nn.Module, inputs: Inputs, steps: Sequence[Step]) -> bool:
    """True if the forward in training mode, without dropout, runs other operations than those of the trace in evaluation mode.

    A model whose forward fails in training mode on these inputs (it may ask for labels) is described by evaluation mode alone.
    """
    mode = Steps()
    with evaluated(model), training(model), mode:
        if isinstance(tried(model, inputs), Exception):
            return False
    return [op for op, _ in mode.steps] != [step.op for step in steps]
