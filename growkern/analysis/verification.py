"""Verify a growth: outputs, gradients, equal copies and optimizer state. The arguments are not changed."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from growkern.distributed.shards import refuse_shards
from growkern.engine.forward_check import TOLERANCE
from growkern.errors import PlanError, UnsupportedModelError
from growkern.optimizer.describe import Optimizers, optimizers
from growkern.support.argument_types import typed_arguments
from growkern.support.text import fold, table

STEP = 1e-2  # root mean square of each trial step over all elements: far from zero, far from divergence


@dataclass(frozen=True)
class Verification:
    """Result of ``verify``; ``print`` it.

    Attributes:
        logits_error: Largest absolute difference of the outputs; nan when their shapes differ (a backbone's hidden states).
        logits_scale: Largest absolute output of the source.
        tolerance: Relative error that rounding in the model's dtype explains.
        dead: Tensor -> number of elements without gradient in two steps, except embedding rows that the batch does not use.
        copies: Tensor -> number of rows and columns that equal another one, bit for bit, after two steps: they will stay equal.
        state: Optimizer state whose shape does not fit its parameter.
        unheld: Trainable parameters in no param group.

    Example:
        >>> import copy
        >>> source, report = copy.deepcopy(model), growkern.expand_inplace(model, optim)
        >>> checked = growkern.verify(source, model, batch, optim)
        >>> checked.same_function, checked.dead, checked.copies, checked.ok
        (True, {}, {}, True)
    """

    logits_error: float
    logits_scale: float
    tolerance: float
    dead: dict[str, int]
    copies: dict[str, int]
    state: tuple[str, ...]
    unheld: tuple[str, ...]

    @property
    def same_function(self) -> bool:
        """True when ``logits_error`` is at most ``tolerance`` times ``logits_scale``, or times 1, as after rounding."""
        return self.logits_error <= self.tolerance * max(1.0, self.logits_scale)

    @property
    def ok(self) -> bool:
        """True when the function is the same, every element trains and the optimizer fits. Equal copies do not count as failure."""
        return self.same_function and not (self.dead or self.state or self.unheld)

    def __str__(self) -> str:
        def count(tensors: dict[str, int]) -> str:
            folded: dict[str, int] = {}
            for name, n in tensors.items():
                folded[fold(name)] = folded.get(fold(name), 0) + n
            return ", ".join(f"{name} {n:,}" for name, n in folded.items()) or "none"

        def some(names: tuple[str, ...]) -> str:
            return (
                ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
                if names
                else "none"
            )

        rows = [
            (
                "logits error",
                f"{self.logits_error:.2e} of {self.logits_scale:.3g}",
                "ok"
                if self.same_function
                else "NOT COMPARABLE"
                if isnan(self.logits_error)
                else "DIFFERENT",
            ),
            ("without gradient in two steps", count(self.dead), "ok" if not self.dead else "DEAD"),
            (
                "copies equal after two steps",
                count(self.copies),
                "" if not self.copies else "STAY EQUAL",
            ),
            (
                "optimizer state that does not fit",
                some(self.state),
                "ok" if not self.state else "WRONG",
            ),
            (
                "parameters in no group",
                some(self.unheld),
                "ok" if not self.unheld else "NOT TRAINED",
            ),
        ]
        return table(["check", "found", ""], rows)


@typed_arguments(PlanError, "optim", source=UnsupportedModelError, target=UnsupportedModelError)
def verify(
    source: nn.Module,
    target: nn.Module,
    batch: Tensor | Mapping[str, object],
    optim: Optimizers = None,
) -> Verification:
    """Compare a grown model with its source, and check that every element of the grown model trains.

    Args:
        source: A copy of the model from before the growth.
        target: The grown model.
        batch: Input of both: keyword arguments, or a tensor. With ``labels``, the model's own loss is used.
        optim: Optimizer of ``target``, or a list of optimizers; if passed, state and param groups are checked too.

    Returns:
        The result; ``print`` it. Gradients come from two steps of plain gradient descent on a copy of ``target``, in evaluation mode.

    Raises:
        PlanError: ``optim`` is not an optimizer, or a list of them.
        UnsupportedModelError: ``source`` or ``target`` is no module, or is sharded.

    Example:
        >>> import copy
        >>> source, report = copy.deepcopy(model), growkern.expand_inplace(model, optim)
        >>> print(growkern.verify(source, model, batch, optim))
        check                              found
        ---------------------------------  ----------------  --
        logits error                       ... of 2.08  ok
        without gradient in two steps      none              ok
        copies equal after two steps       none
        optimizer state that does not fit  none              ok
        parameters in no group             none              ok
    """
    optims = optimizers(optim)
    for model in (source, target):
        refuse_shards(model, "verify")
    with torch.no_grad():
        before, after = (_run(model, batch)[0] for model in (source, target))
    error = float((before - after).abs().max()) if before.shape == after.shape else float("nan")
    dtype = next(target.parameters()).dtype
    dead, copies = _trial(target, batch)
    state, unheld = _state_and_unheld(target, optims) if optims else ((), ())
    return Verification(
        logits_error=error,
        logits_scale=float(before.abs().max()),
        tolerance=TOLERANCE.get(dtype, 1e-4),
        dead=dead,
        copies=copies,
        state=state,
        unheld=unheld,
    )


def _run(model: nn.Module, batch: Tensor | Mapping[str, object]) -> tuple[Tensor, Tensor]:
    """Return outputs and a loss in evaluation mode, and restore the training mode."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        out = model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        for module, mode in training.items():
            module.training = mode
    named = [
        getattr(out, name, None) for name in ("logits", "prediction_logits", "last_hidden_state")
    ]
    tensors = [t for t in (out, *named) if isinstance(t, Tensor)]
    logits = tensors[0] if tensors else next(t for t in out if isinstance(t, Tensor) and t.dim())
    loss = getattr(out, "loss", None)
    return (
        logits.detach() if not torch.is_grad_enabled() else logits,
        logits.float().square().mean() if loss is None else loss,
    )


def _trial(
    model: nn.Module, batch: Tensor | Mapping[str, object]
) -> tuple[dict[str, int], dict[str, int]]:
    """Train a copy for two steps; count, per tensor, elements without gradient, and rows and columns that are equal afterwards."""
    trial = copy.deepcopy(model)
    embeddings = [m for m in trial.modules() if isinstance(m, nn.Embedding)]
    tables = {
        name for name, p in trial.named_parameters() if any(p is m.weight for m in embeddings)
    }
    params = {name: p for name, p in trial.named_parameters() if p.requires_grad}
    dead = {name: torch.ones_like(p, dtype=torch.bool) for name, p in params.items()}
    for _ in range(2):
        trial.zero_grad(set_to_none=True)
        _run(trial, batch)[1].backward()  # pyright: ignore[reportUnknownMemberType]
        grads = {name: p.grad for name, p in params.items() if p.grad is not None}
        n = sum(grad.numel() for grad in grads.values())
        rms = float(sum(grad.float().square().sum() for grad in grads.values()) / max(1, n)) ** 0.5
        with torch.no_grad():
            for name, grad in grads.items():
                dead[name] &= grad == 0
                params[name].add_(grad, alpha=-STEP / (rms or 1.0))
    for name in tables & set(dead):
        dead[name] &= ~dead[name].all(1, keepdim=True)
    copies = {name: n for name, p in params.items() if p.dim() > 1 and (n := _n_copies(p.detach()))}
    return {name: n for name, mask in dead.items() if (n := int(mask.sum()))}, copies


def _n_copies(weight: Tensor) -> int:
    matrix = weight.reshape(weight.shape[0], -1)
    return _equal_rows(matrix) + _equal_rows(matrix.T)


def _equal_rows(matrix: Tensor) -> int:
    """Count rows that equal another row bit for bit; a random projection finds candidates. Constant rows (zeros) do not count."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(matrix.shape[1], dtype=torch.float64, generator=generator).to(
        matrix.device
    )
    order = (matrix.double() @ direction).argsort()
    near = matrix[order]
    same = (near[1:] == near[:-1]).all(1) & (near[1:] != near[1:, :1]).any(1)
    return int((torch.cat([same, same.new_zeros(1)]) | torch.cat([same.new_zeros(1), same])).sum())


def _state_and_unheld(
    model: nn.Module, optims: Sequence[Optimizer]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the state that does not fit its parameter, and the trainable parameters that no optimizer holds."""
    held = {id(p) for optim in optims for group in optim.param_groups for p in group["params"]}
    state = [
        f"{name}: {key} {tuple(value.shape)}"
        for name, p in model.named_parameters()
        for optim in optims
        for key, value in optim.state.get(p, {}).items()
        if isinstance(value, Tensor) and value.dim() and value.shape != p.shape
    ]
    return tuple(state), tuple(
        name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held
    )
