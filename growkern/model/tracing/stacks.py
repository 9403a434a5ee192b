"""Containers of like blocks -> the stacks that depth growth repeats, with the tensors that make a block the identity."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from growkern.model.layers import post_norm_eps_reason
from growkern.model.spec import Blocks
from growkern.model.tracing.naming import Spaces
from growkern.model.tracing.terms import Dim, atoms
from growkern.model.tracing.trial import CONFIG, configs_of
from growkern.model.tracing.values import Norm, Stream, Use
from growkern.support.names import named_modules

UNLIKE = "its blocks differ"
COUNTS = re.compile("layer|depth|block")  # in names of attributes


@dataclass
class Stacks:
    """The stacks of a model.

    Attributes:
        blocks: The stacks.
        sizes: Size of each stack -> its number of blocks.
        reasons: Path of a container that cannot gain blocks -> why.
        lost: Size of a stack that cannot gain blocks -> why.
        counted: Module, and its attribute that counts the blocks of a stack -> size of the stack.
    """

    blocks: list[Blocks] = field(default_factory=list[Blocks])
    sizes: dict[str, int] = field(default_factory=dict[str, int])
    reasons: dict[str, str] = field(default_factory=dict[str, str])
    lost: dict[str, str] = field(default_factory=dict[str, str])
    counted: dict[tuple[str, str], str] = field(default_factory=dict[tuple[str, str], str])

    def counts(self, in_config: bool) -> dict[str, str]:
        """Return the attributes of modules that count blocks, or such fields of configs -> size."""
        return {
            name if in_config else f"{path}.{name}".lstrip("."): size
            for (path, name), size in self.counted.items()
            if (path == CONFIG) == in_config
        }


def find_stacks(
    model: nn.Module,
    spaces: Spaces,
    weights: Mapping[str, Sequence[Dim]],
    uses: Sequence[Use],
    norms: Sequence[Norm],
) -> Stacks:
    """Find the containers (``ModuleList``, ``Sequential``, numbered ``ModuleDict``) whose blocks are alike and pass a stream on."""
    result = Stacks()
    inside = {path: sum(name.startswith(f"{path}.") for name in weights) for path, _ in _containers(model)}  # fmt: skip
    for path, container in sorted(_containers(model), key=lambda item: -inside[item[0]]):
        if not inside[path] or any(path.startswith(f"{stack.path}.") for stack in result.blocks):
            continue
        blocks = [*container._modules.values()]  # pyright: ignore[reportPrivateUsage]
        why = _no_stack(blocks)
        kinds = () if why else _kinds(path, blocks, spaces, weights)
        stack = (
            Blocks(path) if why else _stack(path, len(blocks), kinds, spaces, weights, uses, norms)
        )
        if not why and (not stack.identity or (kinds and stack.carries)):
            why = "no stream passes through all blocks" if not kinds else UNLIKE
        if why:
            result.reasons[path] = why
            continue
        size = f"layers{len(result.blocks) + 1}" if result.blocks else "layers"
        result.blocks.append(replace(stack, size=size))
        result.sizes[size] = len(blocks)
    if not result.blocks:
        why = [f"{path} gains no blocks: {why}" for path, why in result.reasons.items()]
        result.lost["layers"] = next(
            iter(why), "no ModuleList, Sequential or numbered ModuleDict holds its blocks"
        )
    return result


def _containers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in named_modules(model):
        if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential) and len(module):
            names = [*module._modules]  # pyright: ignore[reportPrivateUsage]
            if names == [str(i) for i in range(len(names))]:
                yield path, module


def _no_stack(blocks: Sequence[nn.Module | None]) -> str | None:
    """Return why a container is no stack of blocks."""
    if any(block is None for block in blocks):
        return "places of the container are empty"
    if len(blocks) < 2:
        return "it has one block, and two show what passes from block to block"
    if len({id(block) for block in blocks}) < len(blocks):
        return "blocks share a module"
    return None


def _kinds(
    path: str,
    blocks: Sequence[nn.Module | None],
    spaces: Spaces,
    weights: Mapping[str, Sequence[Dim]],
) -> tuple[int, ...]:
    """Return the index of the first block of the same kind, of every block; nothing if all are of one kind."""
    shapes = list[object]()
    for i, block in enumerate(blocks):
        base = f"{path}.{i}."
        own = {name.removeprefix(base): dims for name, dims in weights.items() if name.startswith(base)}  # fmt: skip
        shapes.append((type(block), {name: [_text(d, spaces) for d in dims] for name, dims in own.items()}))  # fmt: skip
    kinds = tuple(map(shapes.index, shapes))
    return kinds if any(kinds) else ()


def copied_at_the_end(stack: Blocks, n: int) -> int:
    """Return the block that a block more, behind all ``n``, copies: the last one of its kind."""
    if not stack.next_kinds:
        return n - 1
    return max(i for i, kind in enumerate(stack.kinds) if kind == stack.kinds_at(n + 1)[-1])


def counted(model: nn.Module, stack: Blocks, n: int) -> list[tuple[str, str]]:
    """Return the attributes of the modules around a stack, and the fields of their plain configs, that may count its blocks."""
    around = [(path, vars(m)) for path, m in named_modules(model) if not path or stack.path.startswith(f"{path}.")]  # fmt: skip
    around += [(CONFIG, vars(c)) for c in configs_of(model) if not hasattr(c, "to_dict")]
    held = [(path, name, value) for path, own in around for name, value in own.items()]
    return [(path, name) for path, name, value in held if type(value) is int and value == n and COUNTS.search(name)]  # fmt: skip


def turn_of(kinds: Sequence[int]) -> tuple[int, ...]:
    """Return the fewest kinds that repeat, in turn, from the start of a sequence."""
    lengths = range(1, len(kinds) + 1)
    n = next(p for p in lengths if all(a == b for a, b in zip(kinds[p:], kinds, strict=False)))
    return tuple(kinds[:n])


def _text(dim: Dim, spaces: Spaces) -> str:
    own = " ".join(f"{spaces.size_of(a)}{a.size}" for a in atoms(dim))
    return f"{dim.size}: {own}"


def _next_kinds(kinds: Sequence[int]) -> tuple[int, ...]:
    """Return how kinds go on whose second half repeats in turn; of two unlike blocks, the second repeats."""
    n = len(kinds)
    for p in range(1, n // 2 + 1):
        if all(kinds[i] == kinds[i - p] for i in range(n - max(p, n // 2), n)):
            return tuple(kinds[n - p :])
    return tuple(kinds[1:]) if n == 2 else ()


def _stack(
    path: str,
    n: int,
    kinds: Sequence[int],
    spaces: Spaces,
    weights: Mapping[str, Sequence[Dim]],
    uses: Sequence[Use],
    norms: Sequence[Norm],
) -> Blocks:
    """Return a stack with the tensors of a block that write a stream that all blocks read and write, and the constants."""
    reads: dict[Stream, set[str]] = defaultdict(set)
    writes: dict[Stream, set[str]] = defaultdict(set)
    for use in uses:
        if use.tensor.startswith(f"{path}."):
            own = reads if use.role == "reader" else writes
            own[use.stream.find()].add(_index(use.tensor, path))
    for norm in norms:
        if norm.module.startswith(f"{path}."):
            reads[norm.reads.find()].add(_index(norm.module, path))
    bases = [f"{path}.{i}." for i in sorted({*kinds, 0})]
    on_stream = [
        (base, u)
        for base in bases
        for u in uses
        if u.tensor.startswith(base) and u.tensor in weights
        if any(a in spaces.normed for a in atoms(weights[u.tensor][u.axis]))
    ]
    identity = {
        u.tensor.removeprefix(base): -u.offset if u.role == "gain" else 0.0
        for base, u in on_stream
        if u.role != "reader"
        if len(writes[u.stream.find()]) == n == len(reads[u.stream.find()])
    }
    if identity:
        return Blocks(path, identity=identity, kinds=tuple(kinds), next_kinds=_next_kinds(kinds))
    stack = _post_norm(path, bases[0], [u for base, u in on_stream if base == bases[0]])
    return replace(stack, kinds=tuple(kinds))


def _index(name: str, path: str) -> str:
    return name.removeprefix(f"{path}.").partition(".")[0]


def _post_norm(path: str, base: str, uses: Sequence[Use]) -> Blocks:
    """Return a stack of post-norm blocks: a new block only normalizes, and its last norm takes the constants of the block before."""
    gains = [u for u in uses if u.norm is not None]
    read = {u.norm.reads.find() for u in gains if u.norm}
    affine = {u.tensor: (u, g) for g in gains for u in uses if u.module == g.module and u.role != "reader"}  # fmt: skip
    plain = {t: 1.0 - g.offset if u.role == "gain" else 0.0 for t, (u, g) in affine.items()}
    last = gains[-1].module if gains else ""
    outputs = [u.tensor for u in uses if u.role == "writer" and u.stream.find() in read and u.tensor not in affine]  # fmt: skip
    identity = dict.fromkeys(outputs, 0.0) | {t: c for t, c in plain.items() if affine[t][1].module != last}  # fmt: skip
    eps = [g.norm.eps for g in gains if g.norm and isinstance(g.norm.eps, float)]
    return Blocks(
        path,
        identity={t.removeprefix(base): c for t, c in identity.items()} if gains else {},
        carries={t.removeprefix(base): c for t, c in plain.items() if t not in identity},
        reasons=post_norm_eps_reason(max(eps, default=1.0)),
    )
