"""Which tensors and modules of the target copy those of the source: blocks are copied by their numbers."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from growkern.model.spec import ModelSpec
from growkern.planning.decisions import BlockRow

# path of the stack -> source block -> target blocks that copy the source block
Homes = Mapping[str, Mapping[int, list[int]]]


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
