"""Other ways to double the width of a model, as baselines of ``bench_models``: two published ones, and gathers.

- *state_dict double* (staged-training): the growth operator doubles every weight and both moments into new zero tensors; the
  target model and its AdamW are built, and load the doubled state dicts;
- *repeat and divide* (HyperCloning): the target model is built, and every weight is repeated, divided and copied into the target. The
  published method drops the optimizer;
- *index_selects*: every weight and both moments are gathered along each axis that grows, as scripts that grow a checkpoint do, without
  scales and without a new model.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import AdamW

DOUBLE, REPEAT, SELECT = "state_dict double", "repeat and divide", "index_selects"
MOMENTS = ("exp_avg", "exp_avg_sq")


def doubling(
    name: str, source: Tensor, shape: tuple[int, ...], tied: bool
) -> tuple[list[int], int]:
    """Return the doubled axes, and the divisor of the weight: 2 if the input axis is doubled."""
    axes = [axis for axis, n in enumerate(source.shape) if n != shape[axis]]
    if source.dim() == 1:  # a tied head reads the output of the final norm
        return axes, 2 if tied and name.startswith(("transformer.ln_f", "model.norm")) else 1
    if "wte" in name or "wpe" in name or "embed_tokens" in name:
        return axes, 1
    reads = 0 if any(part in name for part in ("c_attn", "c_proj", "c_fc")) else 1
    return axes, 2 if reads in axes else 1


def segments(name: str, source: Tensor) -> tuple[Tensor, ...]:
    """Split a fused q, k, v tensor into three tensors."""
    return source.chunk(3, -1) if "c_attn" in name else (source,)


def doubled(name: str, source: Tensor, order: int = 0) -> Tensor:
    """Double a tensor as staged-training's growth operator does: a matrix becomes two blocks on the diagonal.

    ``order``: 0 for a weight, k for a moment of order k, which is divided by 2**k. (Li et al., arXiv:2203.06211,
    ``tools/growth_operator.py`` of allenai/staged-training.)
    """
    if "c_attn.weight" in name:
        parts = segments(name, source)
        y, width = source.new_zeros([2 * n for n in source.shape]), 2 * parts[0].shape[1]
        for i, part in enumerate(parts):
            y[:, i * width : (i + 1) * width] = doubled("", part, order).detach().clone()
        return y
    if "c_attn.bias" in name:
        parts = [doubled("", part, order) for part in segments(name, source)]
        return torch.cat(parts)
    table = any(part in name for part in ("wte", "wpe", "embed_tokens", "lm_head"))
    y = source.new_zeros(
        [n if table and axis == 0 else 2 * n for axis, n in enumerate(source.shape)]
    )
    first, last = [
        tuple(slice(n) for n in source.shape),
        tuple(slice(-n, None) for n in source.shape),
    ]
    y[first] = source.detach().clone()
    y[last] = source.detach().clone()
    final = name.startswith(("transformer.ln_f", "model.norm"))
    if order and not final:
        y /= 2.0**order
    elif final and not order:
        y /= 2.0
    return y


def repeated(name: str, source: Tensor, axes: list[int], divisor: float) -> Tensor:
    """Double a tensor as HyperCloning does."""
    times = [2 if axis in axes else 1 for axis in range(source.dim())]
    parts = [part.repeat(times) / divisor for part in segments(name, source)]
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


def fresh(model: nn.Module, config: object) -> nn.Module:
    """Build a new model of the target's size, of the source's device and dtype."""
    p = next(model.parameters())
    with p.device:
        return type(model)(config).to(p.dtype)


def state_dict_double(model: nn.Module, optim: AdamW, config: object) -> tuple[nn.Module, AdamW]:
    """Double the state dicts of model and optimizer, build the target model and its optimizer, and load both."""
    names = {id(p): name for name, p in model.named_parameters()}
    order = [names[id(p)] for group in optim.param_groups for p in group["params"]]
    weights = {name: doubled(name, t) for name, t in model.state_dict().items()}
    loaded = optim.state_dict()
    for index, name in enumerate(order):
        state = dict(loaded["state"][index])
        for power, key in enumerate(MOMENTS, 1):
            state[key] = doubled(name, state[key], power)
        loaded["state"][index] = state
    target = fresh(model, config)
    target.load_state_dict(weights)
    grown = AdamW(target.parameters(), lr=1e-3)
    grown.load_state_dict(loaded)
    return target.eval(), grown


@torch.no_grad()
def repeat_and_divide(
    model: nn.Module, config: object, shapes: Mapping[str, tuple[int, ...]]
) -> nn.Module:
    """Build the target, and copy every weight, repeated and divided, into the target."""
    tied = model.config.tie_word_embeddings
    target = fresh(model, config)
    into = dict(target.named_parameters())
    for name, p in model.named_parameters():
        into[name].copy_(repeated(name, p, *doubling(name, p, shapes[name], tied)))
    return target.eval()


@torch.no_grad()
def index_selects(work: Sequence[tuple[Tensor, tuple[int, ...]]]) -> list[Tensor]:
    """Gather every source to the shape of its target, axis by axis."""
    targets: list[Tensor] = []
    for source, shape in work:
        t = source
        for axis, n in enumerate(shape):
            if n != t.shape[axis]:
                t = t.index_select(axis, torch.arange(n, device=t.device) % t.shape[axis])
        targets.append(t)
    return targets
