"""Dimensions as products and sums of sizes: what an attribute or a config field of the same value may be."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from math import prod

from growkern.model.size_values import Ratio, Sum
from growkern.model.tracing.naming import Spaces
from growkern.model.tracing.tape import Tape
from growkern.model.tracing.terms import Dim, atoms, factors, find, inner, segments

WORDS = {  # size -> words in the names of attributes that cache the size
    "group": r"(kv|key_value)_groups|n_rep|group_size",
    "kv_heads": r"kv|key_value|query_groups",
    "heads": r"head(?!_?(dim|size))",
    "ffn": r"ffn|inter|inner|mlp|feed",
    "hidden": r"emb|hidden|dim|d_model|width|channels|features|size|split|shape",
}
Expression = tuple[str | int, ...] | Sum | Ratio


def expression(dim: Dim, spaces: Spaces) -> Expression | None:
    """Return a dimension as a product of sizes and numbers, or a sum of products; None for a product with a sum of unlike segments."""
    result: list[str | int] = []
    own_factors = factors(dim)
    for factor in own_factors:
        own = find(factor)
        if own.kind == "atom":
            result.append(spaces.size_of(own) or own.size)
            continue
        parts = segments(own)
        first = expression(parts[0], spaces) if parts[0].kind != "sum" else (own.size,)
        if all(a not in spaces.names for a in atoms(own)):
            result.append(own.size)
        elif first is None or any(expression(part, spaces) != first for part in parts[1:]):
            return _sum([expression(part, spaces) for part in parts]) if len(own_factors) == 1 else None  # fmt: skip
        else:
            result += [len(parts), *first]
    number = 1
    for x in result:
        number *= x if isinstance(x, int) else 1
    names = tuple(x for x in result if isinstance(x, str))
    if names[:2] == ("kv_heads", "group"):
        names = ("heads", *names[2:])
    return (*names, number) if number > 1 or not names else names


def _sum(parts: Sequence[Expression | None]) -> Sum | None:
    """Return the sum of products; the numbers in it are added up, and equal sizes are counted."""
    counts: dict[tuple[str, ...], int] = {}
    for part in parts:
        if part is None or isinstance(part, Sum | Ratio):
            return None
        names = tuple(x for x in part if isinstance(x, str))
        counts[names] = counts.get(names, 0) + prod(x for x in part if isinstance(x, int))
    return Sum(tuple((*names, n) if n > 1 or not names else names for names, n in counts.items()))


def fit(name: str, e: Expression) -> int:
    """Return how well the name of an attribute fits an expression."""
    for size, pattern in WORDS.items():
        if re.search(pattern, name.lower()):
            kinds = {str(x).rstrip("0123456789") for x in e}
            near = size == "kv_heads" and "heads" in kinds  # of a model without groups
            return (2 if size in kinds else int(near)) - (len(e) > 1)
    return 0


def expressions(tape: Tape, spaces: Spaces) -> dict[str, dict[int, Counter[Expression]]]:  # fmt: skip
    """Return module -> length -> expressions of the dimensions of that length in the module, with their numbers."""
    result: dict[str, dict[int, Counter[Expression]]] = defaultdict(lambda: defaultdict(Counter))
    places = [(path, dims, 1) for path, dims in tape.seen.items()]
    for name, value in tape.weights.items():
        path = name.rpartition(".")[0]
        while True:
            places.append((path, {*value.dims}, 3))
            if not path:
                break
            path = path.rpartition(".")[0]
    known: dict[Dim, list[tuple[int, Expression]]] = {}
    for path, dims, weight in places:
        for dim in {find(d) for d in dims}:
            if dim not in known:
                found = ((part.size, expression(part, spaces)) for part in inner(dim) if part.size > 1)  # fmt: skip
                known[dim] = [(n, e) for n, e in found if e is not None]
            for n, e in known[dim]:
                result[path][n][e] += weight
    return result
