"""Collect the live tensors of a model and of its optimizers by name."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from growkern.distributed.gather import reduced
from growkern.model.spec import ModelSpec
from growkern.optimizer.state_rules import MASTER, MASTER_GRAD
from growkern.support.named_tensors import Tensors
from growkern.support.names import named_buffers, named_parameters


def tensors_of(
    model: nn.Module,
    optims: Sequence[Optimizer],
    spec: ModelSpec,
    master_weights: Mapping[nn.Parameter, nn.Parameter] | None = None,
) -> Tensors:
    """Collect live tensors by name: parameters, buffers, gradients in flight, optimizer state, master weights and their gradients."""
    tensors = Tensors()
    for name, p in named_parameters(model, remove_duplicate=False):
        if name in spec.ties:
            continue
        tensors.values[name] = p.detach()
        if p.grad is not None:
            tensors.grads[name] = p.grad.detach()
        held = (master_weights or {}).get(p, p)
        state = {key: value for optim in optims for key, value in optim.state.get(held, {}).items()}
        if held is not p:
            state[MASTER] = held.detach()
            if held.grad is not None:
                state[MASTER_GRAD] = held.grad.detach()
        if state:
            tensors.states[name] = state
    tensors.values |= {name: b for name, b in named_buffers(model) if name in spec.tensors}
    return tensors


def reduce_grads(tensors: Tensors, vote: Callable[[], object]) -> None:
    """Sum the gradients of which every process has a summand, as of replicated parameters in sequence parallel.

    Args:
        tensors: Live tensors by name; summed gradients take the place of the live ones, which do not change.
        vote: Called before every collective.
    """
    for name, grad in tensors.grads.items():
        tensors.grads[name] = reduced(grad, vote)
    for state in tensors.states.values():
        if isinstance(grad := state.get(MASTER_GRAD), Tensor):
            state[MASTER_GRAD] = reduced(grad, vote)
