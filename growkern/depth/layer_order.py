"""Helpers of the depth methods: orders of source layers, and the target blocks that follow from an order."""

from collections.abc import Sequence

from growkern.errors import PlanError
from growkern.planning.argument_checks import wrong_layer
from growkern.planning.decisions import BlockRow
from growkern.support.text import short


def blocks(
    order: Sequence[int], n_source: int, who: str, branch: Sequence[float] = ()
) -> tuple[BlockRow, ...]:
    """Return the blocks of a target whose layer ``l`` copies source layer ``order[l]``; the first copy is the source's own block.

    Raises:
        PlanError: A source layer is missing or does not exist, or its first copy comes before the first copy of the layer below it.
    """
    first = {source: at for at, source in reversed([*enumerate(order)])}
    if sorted(first) != list(range(n_source)):
        odd = sorted(set(range(n_source)) ^ set(first))
        raise PlanError(
            f"{who}: layers {', '.join(map(str, odd[:5]))} are left out, or not in a model of {n_source} layers; name "
            f"every layer from 0 to {n_source - 1}."
        )
    if sorted(first, key=lambda source: first[source]) != list(range(n_source)):
        raise PlanError(
            f"{who}: the first copies of the source's layers are not in ascending order; sort them."
        )
    scale = branch or [1.0] * len(order)
    return tuple(
        BlockRow(source, first[source] != at, scale[at]) for at, source in enumerate(order)
    )


def spread(n_source: int, n_target: int) -> tuple[BlockRow, ...]:
    """Return the blocks of a target with new blocks spread evenly; each new block follows the source block that it copies."""
    n_new, rows = n_target - n_source, list[BlockRow]()
    for i in range(n_source):
        rows.append(BlockRow(i))
        rows += [BlockRow(i, new=True)] * ((i + 1) * n_new // n_source - i * n_new // n_source)
    return tuple(rows)


def between(
    n_source: int, n_target: int, ignore_first: int, ignore_last: int, who: str
) -> tuple[int, int]:
    """Return the source and target depth without the ignored layers.

    Raises:
        PlanError: The ignored layers leave none to repeat.
    """
    if any(map(wrong_layer, (ignore_first, ignore_last))):
        raise PlanError(
            f"{who}: ignore_first={short(ignore_first)} and ignore_last={short(ignore_last)} are not numbers of layers; pass ints."
        )
    ignored = ignore_first + ignore_last
    if min(ignore_first, ignore_last) < 0 or ignored >= n_source:
        raise PlanError(
            f"{who}: ignore_first={short(ignore_first)} and ignore_last={short(ignore_last)} leave none of the {n_source} layers to "
            "repeat; lower them to leave at least one."
        )
    return n_source - ignored, n_target - ignored


def around(order: Sequence[int], n_source: int, ignore_first: int, ignore_last: int) -> list[int]:
    """Put the ignored layers below and above ``order``, an order of the repeated layers."""
    return [
        *range(ignore_first),
        *(source + ignore_first for source in order),
        *range(n_source - ignore_last, n_source),
    ]
