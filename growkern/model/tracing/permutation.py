"""The test of a description on the source: all coordinates of a space are permuted in all tensors, and the function must not move.

It runs on two copies whose weights are moved by equal random numbers, because weights that are 0, 1 or equal hide wrong descriptions.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from growkern.model.tracing.forward import Inputs, call_model, evaluated, main_output
from growkern.model.tracing.naming import OUTPUT
from growkern.model.tracing.terms import Dim, atoms
from growkern.model.tracing.trial import Tensors, grown_copy, mapped, tolerance

MOVED = (
    0.05  # standard deviation of what is added to the weights, relative to their root mean square
)
ZERO = 0.3  # in place of the root mean square of a tensor of zeros
SEEDS = 0, 1


def permutation_error(
    model: nn.Module,
    inputs: Inputs,
    own: Tensors,
    output: Sequence[Dim],
    seeds: Sequence[int] = SEEDS,
) -> float:
    """Return by how much the main output moves at most when every space is permuted, relative to its largest value.

    Args:
        model: The model; it stays as it is.
        inputs: Its inputs.
        own: Its tensors.
        output: Dimensions of the main output.
        seeds: Seeds of the permutations. Two short spaces in one axis are told apart by several permutations only.

    Returns:
        The error; infinity if the forward of the permuted model fails, or there is no output to compare.
    """
    every = dict.fromkeys(a for dims in own.dims.values() for d in dims for a in atoms(d))
    free = [a for a in every if not a.keeps_order.keys() - {OUTPUT}]
    before = _output(model, inputs, own, {})
    worst = 0.0 if before is not None else float("inf")
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        maps: dict[Dim, list[int]] = {a: torch.randperm(a.size, generator=generator).tolist() for a in free}  # pyright: ignore  # fmt: skip
        try:
            after = _output(model, inputs, own, maps)
        except Exception:  # a wrong permutation may raise anything
            return float("inf")
        if before is not None:
            worst = max(worst, _distance(mapped(before, output, maps), after))
        if not worst < tolerance(model):
            break
    return worst


def _distance(before: Tensor, after: Tensor | None) -> float:
    if after is None or after.shape != before.shape:
        return float("inf")
    both = before.isfinite() & after.isfinite()
    if bool((before.isfinite() != after.isfinite()).any()) or not bool(both.any()):
        return float("inf")
    return float((after - before)[both].abs().max() / before[both].abs().max().clamp_min(1e-30))


def _output(
    model: nn.Module, inputs: Inputs, own: Tensors, maps: Mapping[Dim, Sequence[int]]
) -> Tensor | None:
    """Return the main output of a copy with moved and permuted weights."""

    def moved(name: str, t: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(_seed(name))
        noise = torch.tensor(MOVED)
        for (
            n
        ) in t.shape:  # a product of a vector per axis: cheap, and different in every coordinate
            noise = noise[..., None] * torch.randn(n, generator=draw)
        return t + noise.to(t)

    changed = grown_copy(model, own, maps, moved)
    if {p.dtype for p in changed.parameters()} & {torch.float16, torch.bfloat16}:
        changed, inputs = changed.float(), tree_map_only(Tensor, _float, inputs)
    with evaluated(changed):
        output = main_output(call_model(changed, inputs))
    return None if output is None else output.clone()


def _float(t: Tensor) -> Tensor:
    return t.float() if t.is_floating_point() else t


def _seed(name: str) -> int:
    """Return a seed for a tensor, equal on every machine."""
    return sum((i + 1) * ord(c) for i, c in enumerate(name)) * 1009 % 2**31
