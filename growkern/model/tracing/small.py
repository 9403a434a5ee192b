"""A small model of the class of a live one: the sizes that a hint names are small and differ from each other."""

import copy
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import RLock
from typing import Any

import torch
from torch import nn

from growkern.model.hints import Hint
from growkern.support.names import named_modules, named_parameters
from growkern.support.threads import one_thread

# two sets of sizes: what has a size in both sets has it because of the size
# hidden is a multiple of heads, and a quarter of head_dim, which RoPE may rotate, has two halves
SMALL = (
    {"group": 2, "kv_heads": 3, "top_k": 4, "token_types": 5, "heads": 6, "experts": 7, "head_dim": 16, "ffn": 26, "embedding": 28,
     "positions": 37, "vocab": 97, "hidden": 66},
    {"group": 3, "kv_heads": 5, "top_k": 6, "token_types": 7, "heads": 15, "experts": 11, "head_dim": 32, "ffn": 34, "embedding": 36,
     "positions": 41, "vocab": 101, "hidden": 165},
)  # fmt: skip
PATTERN = 2  # blocks behind the first block of the last kind
_ALONE = RLock()
IDS = ("pad", "bos", "eos", "cls", "sep", "mask", "unk", "decoder_start")  # of tokens


def coupled(hint: Hint) -> bool:
    """True when the config has no field for head_dim: hidden = heads x head_dim."""
    return "head_dim" not in hint.fields.values()


def with_group(sizes: Mapping[str, int]) -> dict[str, int]:
    """Return sizes with the number of query heads per kv head, where a model has kv heads."""
    group = {"group": sizes["heads"] // sizes["kv_heads"]} if "kv_heads" in sizes else {}
    return {**sizes, **group}


def depths(hint: Hint) -> list[str]:
    """Return the names of the sizes that count blocks."""
    return [size for size in hint.fields.values() if size.endswith("layers")]


def live_sizes(config: Any, hint: Hint) -> dict[str, int]:
    """Return the sizes of a live model, from its config."""
    sizes: dict[str, Any] = {size: getattr(config, name, None) for name, size in hint.fields.items()}  # fmt: skip
    for size, (base, factor) in hint.derived.items():
        sizes[size] = sizes.get(size) or sizes[base] * factor
    if sizes.get("head_dim") is None:
        sizes["head_dim"] = sizes["hidden"] // sizes["heads"]
    for name, (size, _) in hint.apart.items():
        if getattr(config, name) != sizes[hint.follows[name]]:
            sizes[size] = getattr(config, name)
    return sizes


def small_sizes(config: Any, hint: Hint, which: int, n_blocks: int) -> dict[str, int]:
    """Return the small sizes in place of the live ones, with a number of blocks."""
    own = {size: SMALL[which][size] for size in live_sizes(config, hint) if size in SMALL[which]}
    if coupled(hint):
        own["hidden"] = own["heads"] * own["head_dim"]
    for size, (base, factor) in hint.derived.items():
        if size not in hint.fields.values():
            own[size] = own[base] * factor
    return own | dict.fromkeys(depths(hint), n_blocks)


def pattern(model: nn.Module, paths: Sequence[str]) -> dict[str, list[frozenset[str]]]:
    """Return the path of each stack -> for every block, the names of its parameters."""
    found: dict[str, list[frozenset[str]]] = {}
    names = [name for name, _ in named_parameters(model, remove_duplicate=False)]
    for path in paths:
        own: dict[str, set[str]] = {}
        for name in names:
            if name.startswith(f"{path}."):
                index, _, rest = name.removeprefix(f"{path}.").partition(".")
                own.setdefault(index, set()).add(rest)
        found[path] = [frozenset(own[k]) for k in sorted(own, key=lambda k: int(k) if k.isdigit() else -1)]  # fmt: skip
    return found


def containers(model: nn.Module, counts: Sequence[int]) -> list[str]:
    """Return the paths of the outermost ModuleLists with as many modules as the stacks have blocks."""
    found = [path for path, m in named_modules(model) if isinstance(m, nn.ModuleList) and len(m) in counts]  # fmt: skip
    return [path for path in found if not any(path.startswith(f"{p}.") for p in found)]


def n_blocks(kinds: Sequence[Sequence[frozenset[str]]]) -> int:
    """Return how many blocks show every kind of block, and which of them repeat."""
    last = [max((blocks.index(kind) for kind in {*blocks}), default=0) for blocks in kinds]
    longest = max((len(blocks) for blocks in kinds), default=0)
    return max(PATTERN, min(longest, max(last, default=0) + PATTERN))


def small_config(config: Any, hint: Hint, sizes: Mapping[str, int]) -> Any:
    """Return a copy of a config in which the sizes of a hint are small."""
    own: Any = copy.deepcopy(config)
    large = live_sizes(config, hint)
    for name, size in hint.follows.items():
        if getattr(config, name) == large[size]:
            setattr(own, name, sizes[size])
        elif name in hint.apart:
            setattr(own, name, sizes[hint.apart[name][0]])
    for name, size in hint.fields.items():
        setattr(own, name, sizes[size])
    n = sizes[depths(hint)[0]]
    for name in hint.lists:
        entries = getattr(own, name, None)
        if isinstance(entries, list):
            kept: list[Any] = entries[:n] or ["full_attention"]  # pyright: ignore[reportUnknownVariableType]
            setattr(own, name, kept + kept[-1:] * (n - len(kept)))
    for name in (f"{kind}_token_id" for kind in IDS):
        if isinstance(getattr(own, name, None), int) and getattr(own, name) >= sizes.get("vocab", 0):  # fmt: skip
            setattr(own, name, 1)
    if getattr(own, "rope_parameters", None):
        own.rope_parameters = _plain_rope(own.rope_parameters)
    if hasattr(own, "to_dict"):  # of transformers
        own._experts_implementation = "eager"  # others refuse float64
        own._attn_implementation = own.dtype = None
    return own


@contextmanager
def plain_torch() -> Generator[None]:
    """Make small tensors on the CPU and in float64 whatever the caller's defaults are, and leave the caller's random state as it is.

    The defaults are the process's, so threads that describe models wait for each other.
    """
    with _ALONE:
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with one_thread(), torch.random.fork_rng(devices=[]), _on_cpu():
                torch.manual_seed(0)
                yield
        finally:
            torch.set_default_dtype(dtype)


def _on_cpu() -> AbstractContextManager[object]:
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def rotary(config: Any) -> float:
    """Return the fraction of head_dim that RoPE rotates, by the config."""
    rope: Any = getattr(config, "rope_parameters", None)
    return float(rope.get("partial_rotary_factor", 1.0)) if rope else 0.0


def _plain_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters of RoPE of the default type, which no other size of the model follows from."""
    if "rope_type" not in rope and all(isinstance(own, Mapping) for own in rope.values()):
        return {kind: _plain_rope(own) for kind, own in rope.items()}
    kept = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    return {"rope_type": "default", **kept}
