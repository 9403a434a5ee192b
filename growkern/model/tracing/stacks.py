"""Containers of like blocks -> the stacks that depth growth repeats, with the tensors that make a block the identity."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from growkern.model.spec import Blocks, post_norm_eps_reason
from growkern.model.tracing.naming import Spaces
from growkern.model.tracing.terms import Dim, atoms
from growkern.model.tracing.values import Norm, Stream, Use
from growkern.support.names import named_modules

UNLIKE = "its blocks differ"


@dataclass
class Stacks:
    """The stacks of a model, their sizes, and why other containers cannot gain blocks."""

    blocks: list[Blocks] = field(default_factory=list[Blocks])
    sizes: dict[str, int] = field(default_factory=dict[str, int])
    reasons: dict[str, str] = field(default_factory=dict[str, str])


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
        why = _unlike(path, blocks, spaces, weights)
        first = int(why == UNLIKE and len(blocks) > 1 and _unlike(path, blocks, spaces, weights, 1) is None)  # fmt: skip
        stack = _stack(path, len(blocks), first, spaces, weights, uses, norms)
        named = {*stack.identity, *stack.carries}
        if first and any(f"{path}.0.{name}" not in weights for name in named):
            first = 0
        if not stack.identity and (why is None or first):
            why, first = "no stream passes through all blocks", 0
        if why and not first:
            result.reasons[path] = why
            continue
        size = f"layers{len(result.blocks) + 1}" if result.blocks else "layers"
        result.blocks.append(replace(stack, size=size))
        result.sizes[size] = len(blocks)
    return result


def _containers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in named_modules(model):
        if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential) and len(module):
            names = [*module._modules]  # pyright: ignore[reportPrivateUsage]
            if names == [str(i) for i in range(len(names))]:
                yield path, module


def _unlike(
    path: str,
    blocks: Sequence[nn.Module | None],
    spaces: Spaces,
    weights: Mapping[str, Sequence[Dim]],
    first: int = 0,
) -> str | None:
    """Return why the blocks of a container, from ``first`` on, are no copies of each other."""
    if any(block is None for block in blocks):
        return "places of the container are empty"
    if len(blocks) < 2:
        return "it has one block, and two show what passes from block to block"
    if len({id(block) for block in blocks}) < len(blocks):
        return "blocks share a module"
    shapes = list[dict[str, tuple[str, ...]]]()
    for i in range(first, len(blocks)):
        base = f"{path}.{i}."
        own = {name.removeprefix(base): dims for name, dims in weights.items() if name.startswith(base)}  # fmt: skip
        shapes.append({name: tuple(_text(d, spaces) for d in dims) for name, dims in own.items()})
    if len({type(block) for block in blocks}) > 1 or any(shape != shapes[0] for shape in shapes):
        return UNLIKE
    return None


def _text(dim: Dim, spaces: Spaces) -> str:
    own = " ".join(f"{spaces.size_of(a)}{a.size}" for a in atoms(dim))
    return f"{dim.size}: {own}"


def _stack(
    path: str,
    n: int,
    first: int,
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
    base = f"{path}.{first}."
    on_stream = [
        u
        for u in uses
        if u.tensor.startswith(base) and u.tensor in weights
        if any(a in spaces.normed for a in atoms(weights[u.tensor][u.axis]))
    ]
    identity = {
        u.tensor.removeprefix(base): -u.offset if u.role == "gain" else 0.0
        for u in on_stream
        if u.role != "reader"
        if len(writes[u.stream.find()]) == n == len(reads[u.stream.find()])
    }
    if identity:
        return Blocks(path, identity=identity, first_copied=first)
    return _post_norm(path, base, first, on_stream)


def _index(name: str, path: str) -> str:
    return name.removeprefix(f"{path}.").partition(".")[0]


def _post_norm(path: str, base: str, first: int, uses: Sequence[Use]) -> Blocks:
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
        first_copied=first,
    )
