"""Wrong descriptions of models of the zoo, one axis of one tensor at a time: which of them does growkern see?

``python tests/wrong_specs.py [names]`` counts for every kind of error how many wrong descriptions the permutation test sees, how many the
check of a growth sees of the rest, and names those that pass both. A description that passes is harmless only if the output does not
depend on the tensor (a bias of keys, which the softmax ignores): autograd says so.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import transformers
import zoo
from torch import nn

import growkern
from growkern.errors import GrowthError
from growkern.model.tracing.forward import call_model, evaluated, main_output
from growkern.model.tracing.permutation import limit_of, permutation_error
from growkern.model.tracing.roles import find_roles
from growkern.model.tracing.terms import Dim, atoms, factors, find, product, segments, side_by_side
from growkern.model.tracing.traced import Trace, trace_model
from growkern.model.tracing.trial import Tensors, tolerance

SEEDS = 0, 1, 2, 3


@dataclass(frozen=True)
class Wrong:
    """A wrong description of one axis of one tensor."""

    kind: str
    tensor: str
    axis: int
    dim: Dim


def wrong_dims(found: Trace) -> Iterator[Wrong]:
    """Yield wrong descriptions of every axis that has a space which grows."""
    free = [a for a in found.spaces.names if a.size > 1]
    for name, dims in found.weights.items():
        for axis, dim in enumerate(dims):
            if not set(atoms(dim)) & {*free}:
                continue
            yield Wrong("a space forgotten", name, axis, Dim(find(dim).size))
            own, parts = factors(dim), segments(dim)
            if len(own) == 1 and own[0] in free:
                other = next((a for a in free if a.size == own[0].size and a is not own[0]), None)
                if other:
                    yield Wrong("another space of the same size", name, axis, other)
            yield from (Wrong(kind, name, axis, d) for kind, d in _reordered(own, parts, free))


def _reordered(own: list[Dim], parts: list[Dim], free: list[Dim]) -> Iterator[tuple[str, Dim]]:
    if len(parts) == 1:
        for k in (k for k in range(len(own) - 1) if {*atoms(product(own[k : k + 2]))} & {*free}):
            yield "two factors swapped", product([*own[:k], own[k + 1], own[k], *own[k + 2 :]])
        if len(own) == 2 and own[1].kind == "sum":
            blocks = side_by_side([product([own[0], part]) for part in own[1].parts])
            yield "heads inside segments instead of segments inside heads", blocks
    elif any(atoms(a) != atoms(b) for a, b in pairwise(parts)):
        yield "segments in another order", side_by_side([*parts[1:], parts[0]])
    if len(parts) > 1 and len({p.size for p in parts}) == 1:
        first = factors(parts[0])
        if len(first) > 1 and first[0] in free:
            inside = side_by_side([product(factors(p)[1:]) for p in parts])
            yield (
                "segments inside heads instead of heads inside segments",
                product([first[0], inside]),
            )


def seen_by_permutations(found: Trace, wrong: Wrong) -> bool:
    """True if the output moves under one of four permutations of the wrong description."""
    dims = [wrong.dim if i == wrong.axis else d for i, d in enumerate(found.weights[wrong.tensor])]
    own = Tensors({**found.weights, wrong.tensor: dims}, found.roles.tensors, found.roles.ties)
    error = permutation_error(found.model, found.inputs, own, found.tape.output_dims, SEEDS)
    return not error < limit_of(found.model)


def outcome_of_growth(
    found: Trace, spec: growkern.ModelSpec, wrong: Wrong, model: nn.Module
) -> str:
    """Return what a growth by the wrong description ends with: ``"refused"``, ``"exact"``, or the change of the output in words."""
    dims = [wrong.dim if i == wrong.axis else d for i, d in enumerate(found.weights[wrong.tensor])]
    names = {own[0]: own for own in found.tape.names.values()}
    weights = {**found.weights, wrong.tensor: dims}
    tape = found.tape
    roles = find_roles(found.spaces, weights, names, tape.uses, tape.norms, tape.statistics, {}, tape.scalings)  # fmt: skip
    changed = {
        name: tuple(replace(old, segments=new.segments) for old, new in zip(spec.tensors[name], roles.tensors[name], strict=True))
        for name in names[wrong.tensor]
    }  # fmt: skip
    before = zoo.output(model, found.inputs)
    spec = replace(spec, tensors={**spec.tensors, **changed})
    try:
        growkern.expand_inplace(model, to=zoo.targets(spec, 2.0), spec=spec)
    except GrowthError:
        return "refused"
    error = zoo.difference(zoo.output(model, found.inputs), before)
    return "exact" if error < tolerance(model) else f"WRONG by {error:.0e}"


def matters(model: nn.Module, inputs: object, tensor: str) -> bool:
    """True if the output depends on a tensor, by autograd."""
    own = dict(model.named_parameters(remove_duplicate=False)).get(tensor)
    if own is None:
        return True
    model.requires_grad_(True)
    with evaluated(model), torch.enable_grad():
        output = main_output(call_model(model, inputs))
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        grads = torch.autograd.grad((output * weights).sum(), [own, *model.parameters()], allow_unused=True)  # fmt: skip
    largest = max(float(g.abs().max()) for g in grads if g is not None)
    return (
        grads[0] is not None and float(grads[0].abs().max()) > 1e-7 * largest
    )  # norms round to float32


def survey(name: str) -> tuple[Counter[str], Counter[str], list[tuple[str, Wrong]]]:
    """Return by kind how many wrong descriptions there are and how many permutations see, and what became of the others."""
    model = zoo.make(name)
    spec = zoo.describe(name, model)
    found = trace_model(model, spec.example)
    total, seen, rest = Counter[str](), Counter[str](), list[tuple[str, Wrong]]()
    for wrong in wrong_dims(found):
        total[wrong.kind] += 1
        if seen_by_permutations(found, wrong):
            seen[wrong.kind] += 1
        else:
            rest.append((outcome_of_growth(found, spec, wrong, zoo.make(name)), wrong))
    return total, seen, rest


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    total, seen, refused = Counter[str](), Counter[str](), Counter[str]()
    for chosen in sys.argv[1:] or zoo.ZOO:
        try:
            own_total, own_seen, rest = survey(chosen)
            inputs = zoo.describe(chosen, zoo.make(chosen)).example
        except GrowthError as error:
            print(f"{chosen}: {error}".partition("\n")[0])
            continue
        total, seen = total + own_total, seen + own_seen
        refused += Counter(wrong.kind for outcome, wrong in rest if outcome == "refused")
        print(f"{chosen}: {own_total.total()} wrong, {own_seen.total()} seen by permutations", flush=True)  # fmt: skip
        for outcome, wrong in rest:
            if outcome != "refused":
                depends = matters(zoo.make(chosen), inputs, wrong.tensor)
                print(f"  {outcome}: {wrong.kind}, {wrong.tensor} axis {wrong.axis}; the output depends on it: {depends}")  # fmt: skip
    for kind, n in total.items():
        print(f"{kind}: {n} wrong, {seen[kind]} seen by permutations, {refused[kind]} more by the growth")  # fmt: skip
