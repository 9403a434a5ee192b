"""Train operators on a copy of the target: each step writes the operators' weights into the copy's parameters, and gradients back."""

import logging
from collections.abc import Callable, Iterator
from math import isfinite
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from growkern.analysis.comparison import Loss
from growkern.engine.report import Learned
from growkern.errors import CommitError, PlanError
from growkern.learning.operators import Operators, Values
from growkern.support.names import named_parameters
from growkern.support.progress import SECONDS

logger = logging.getLogger("growkern")


def learn_operators(
    target: nn.Module,
    operators: Operators,
    sources: Values,
    loss: Loss,
    batches: Iterator[Any],
    steps: int,
    lr: float,
    on_step: Callable[[int, float], object] | None = None,
) -> Learned:
    """Train operators in place.

    Args:
        target: Copy of the target in the closed form. It ends with the learned weights.
        operators: The operators at their start.
        sources: Parameters of the source.
        loss: Function of a model and a batch.
        batches: One batch per step, and at least one.
        steps: Number of steps.
        lr: Learning rate of the first step; it falls linearly to 0.
        on_step: Called after every step with the number of steps and the step's loss.

    Raises:
        PlanError: The loss is no scalar tensor, or has no gradient in the tensors that the operators change.
        CommitError: A loss is not finite.
    """
    began = logged = perf_counter()
    with torch.enable_grad():
        learner = _Learner(target, operators, sources, loss)
        first = next(batches)
        closed = learner.measure(first)
        learner.write()
        before, losses = learner.measure(first), list[float]()
        optim = torch.optim.AdamW(operators.parameters.values(), lr=lr, weight_decay=0.0)
        for i in range(steps):
            batch = next(batches) if i else first
            optim.param_groups[0]["lr"] = lr * (1 - i / steps)
            losses.append(learner.gradients(batch))
            if not isfinite(losses[-1]):
                raise CommitError(
                    f"the loss of step {i + 1} of {steps} is {losses[-1]}: pass a smaller lr or noise. Nothing was changed."
                )
            optim.step()
            optim.zero_grad()
            learner.write()
            if on_step is not None:
                on_step(i + 1, losses[-1])
            if (now := perf_counter()) - logged > SECONDS:
                logged = now
                logger.info("learning: step %d of %d, loss %.4g", i + 1, steps, losses[-1])
        after = learner.measure(first) if steps else before
    return Learned(
        operators.tie, operators.n_numbers, steps, closed, before, after, tuple(losses), 0, perf_counter() - began,
        operators.n_frozen,
    )  # fmt: skip


class _Learner:
    """A target whose parameters are functions of operators."""

    def __init__(
        self, target: nn.Module, operators: Operators, sources: Values, loss: Loss
    ) -> None:
        params = dict(named_parameters(target, remove_duplicate=False))
        self.target, self.operators, self.sources, self.loss = target, operators, sources, loss
        self.params = {name: params[name] for name in operators.pieces}
        self.closed = {name: p.detach().clone() for name, p in self.params.items()}

    def write(self) -> None:
        """Write the closed form and what the operators change into the parameters."""
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(self.closed[name] + self.operators.change(name, self.sources))

    def measure(self, batch: Any) -> float:
        """Return the loss of a batch in evaluation mode."""
        training = [module for module in self.target.modules() if module.training]
        self.target.eval()
        with torch.no_grad():
            value = float(self._loss(batch))
        for module in training:
            module.training = True
        return value

    def gradients(self, batch: Any) -> float:
        """Add the gradients of a batch to the operators; return its loss. Tensor by tensor, so that no graph spans all of them."""
        self.target.zero_grad(set_to_none=True)
        value = self._loss(batch)
        if value.requires_grad:
            value.backward()  # pyright: ignore[reportUnknownMemberType]
        grads = {name: p.grad for name, p in self.params.items() if p.grad is not None}
        if not grads:
            raise PlanError(
                "the loss has no gradient in any tensor that the operators change: loss= must compute it by the model that it is given (a "
                "copy of the grown model), and some of these parameters must require gradients. Nothing was changed."
            )
        for name, grad in grads.items():
            change = self.operators.change(name, self.sources)
            change.backward(grad.to(change.dtype))  # pyright: ignore[reportUnknownMemberType]
        return float(value.detach())

    def _loss(self, batch: Any) -> Tensor:
        value: Any = self.loss(self.target, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise PlanError(
                "loss: expected a function of model and batch that returns a scalar tensor."
            )
        return value
