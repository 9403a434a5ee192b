"""Which tensors and modules of the target copy those of the source: blocks are copied by their numbers."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from growkern.model.spec import Blocks, ModelSpec
from growkern.planning.decisions import BlockRow

# path of the stack -> source block -> target blocks that copy the source block
Homes = Mapping[str, Mapping[int, list[int]]]


def by_pattern(blocks: Sequence[BlockRow], stack: Blocks) -> tuple[BlockRow, ...]:
    """Return the blocks of a stack of several kinds in an order in which every place has its kind.

    New blocks stand behind all others where they would move these to places of other kinds, and copy the nearest block of their kind.
    """
    kinds, places = stack.kinds, stack.kinds_at(len(blocks))
    if any(not b.new and kinds[b.source] != kind for b, kind in zip(blocks, places, strict=True)):
        blocks = sorted(blocks, key=lambda b: b.new)
    own = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in {*kinds}}
    return tuple(
        replace(b, source=min(own[kind], key=lambda i: (abs(i - b.source), -i))) if b.new else b
        for b, kind in zip(blocks, places, strict=True)
    )


def homes_of(blocks: Sequence[BlockRow]) -> Mapping[int, list[int]]:
    """Map every source block to the target blocks that copy it."""
    homes: dict[int, list[int]] = defaultdict(list)
    for index, block in enumerate(blocks):
        homes[block.source].append(index)
    return homes


def targets(spec: ModelSpec, homes: Homes, name: str) -> Iterator[tuple[str, int]]:
    """Yield every target name of a source tensor or module, with the index of its target block (0 outside of blocks)."""
    place = spec.block_of(name)
    if place is None or not homes:
        yield name, 0
        return
    stack, source, inner = place
    for index in homes[stack.path][source]:
        yield f"{stack.path}.{index}.{inner}", index
