"""Where a checkpoint of ``torch.distributed.checkpoint`` has the tensors of a model and of its optimizer, found from the keys alone.

    model        PREFIX NAME
    state        PREFIX state. NAME . KEY
    param groups PREFIX param_groups. NAME . KEY (flattened), or PREFIX param_groups. INDEX . KEY

Torch's tutorials have the prefixes ``model.`` and ``optim.``, torchtitan has none and ``optimizer.``.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from growkern.checkpoints.dcp_source import KeyPath, Source
from growkern.errors import CheckpointError, raise_all
from growkern.support.text import fold, short

STATE, GROUPS = "state.", "param_groups."


@dataclass(frozen=True)
class Layout:
    """Keys of a checkpoint.

    Attributes:
        model: Name in the model's state dict -> key.
        state: Name of a parameter -> state key -> key.
        groups: Name of a parameter, or index of a param group -> option of the group -> key; nested options are joined by dots.
        others: Keys of all other entries.
        flat: True when the options of the param groups are stored by parameter; False by group; None when they are not stored.
    """

    model: Mapping[str, str]
    state: Mapping[str, Mapping[str, str]]
    groups: Mapping[str, Mapping[str, str]]
    others: tuple[str, ...]
    flat: bool | None = field(default=None)


def layout_of(
    source: Source, shapes: Mapping[str, tuple[int, ...]], ties: Collection[str]
) -> Layout:
    """Find the tensors of a model in a checkpoint.

    Args:
        source: The checkpoint.
        shapes: Shape of every tensor of the model's state dict.
        ties: Names of tied parameters, each of which has another name too.

    Raises:
        CheckpointError: Tensors of the model are missing or have other shapes, or the checkpoint has several models or optimizers.
    """
    state, groups = dict[str, dict[str, str]](), dict[str, dict[str, str]]()
    prefixes, left = set[str](), list[str]()
    for key in source.paths:
        for token, found in ((STATE, state), (GROUPS, groups)):
            if (place := _owned(key, token, shapes, by_index=token is GROUPS)) is not None:
                prefix, owner, option = place
                prefixes.add(prefix)
                found.setdefault(owner, {})[option] = key
                break
        else:
            left.append(key)
    keys = _model(source, left, shapes, ties)
    own = {*keys.values()}
    others = tuple(key for key in left if key not in own)
    numbered = [key for key in others if _owned(key, STATE, (), by_index=True) is not None]
    problems = [*_problems(prefixes, numbered, groups)]
    raise_all(CheckpointError, f"cannot grow the optimizer of {source.folder}:", problems)
    flat = None if not groups else not next(iter(groups)).isdecimal()
    return Layout(keys, state, groups, others, flat)


def _owned(
    key: str, token: str, names: Collection[str], *, by_index: bool
) -> tuple[str, str, str] | None:
    """Split a key into the prefix, the parameter (or index) after a token, and the rest; None if the key has no such form."""
    at = key.find(token)
    while at >= 0:
        rest = key[at + len(token) :]
        if at == 0 or key[at - 1] == ".":
            parts = rest.split(".")
            for n in range(len(parts) - 1, 0, -1):
                if (name := ".".join(parts[:n])) in names:
                    return key[:at], name, ".".join(parts[n:])
            if by_index and len(parts) > 1 and parts[0].isdecimal():
                return key[:at], parts[0], ".".join(parts[1:])
        at = key.find(token, at + 1)
    return None


def _model(
    source: Source, keys: list[str], shapes: Mapping[str, tuple[int, ...]], ties: Collection[str]
) -> dict[str, str]:
    """Return the key of every tensor of the model."""
    needed = shapes.keys() - ties
    found: dict[str, dict[str, str]] = {}
    for key in (key for key in keys if key in source.tensors):
        parts = key.split(".")
        for n in range(len(parts)):
            if (name := ".".join(parts[n:])) in shapes:
                found.setdefault(key[: len(key) - len(name)], {})[name] = key
    whole = [prefix for prefix, own in found.items() if needed <= own.keys()]
    if len(whole) > 1:
        raise CheckpointError(
            f"{source.folder} has several copies of the model, under {', '.join(map(repr, sorted(whole)))}: growth grows one; save the "
            "others (averages of the weights) apart."
        )
    most = whole or sorted(found, key=lambda prefix: -len(found[prefix]))[:1]
    if not most or 2 * len(found[most[0]]) < len(needed):
        tops = sorted({key.partition(".")[0] for key in source.paths})
        raise CheckpointError(
            f"{source.folder} has no tensors by the names of this model ({min(needed)}, ...), under any prefix: it has {len(keys)} "
            f"entries under {', '.join(tops[:8])}{', ...' * (len(tops) > 8)}; save {{'model': get_model_state_dict(model)}}."
        )
    own, prefix = found[most[0]], most[0]
    missing = [
        f"{prefix}{name}: is missing; save the whole model." for name in sorted(needed - own.keys())
    ]
    apart = [
        f"{key}: has shape {stored}, and the model has {shapes[name]}; build the model, or the plan, of the source's sizes."
        for name, key in own.items()
        if (stored := tuple(source.tensors[key].size)) != shapes[name]
    ]
    alike = {fold(name) for name in shapes}
    names = {key: key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
    more = [
        f"{key}: is of a block that the model does not have; build the model, or the plan, of the source's sizes."
        for key, name in names.items()
        if key in source.tensors and name not in shapes and fold(name) in alike
    ]
    problems = missing + apart + more
    raise_all(CheckpointError, f"{source.folder} is no checkpoint of this model:", problems)
    return own


def _problems(
    prefixes: Collection[str],
    numbered: Collection[str],
    groups: Mapping[str, Mapping[str, str]],
) -> Iterator[str]:
    if len(prefixes) > 1:
        yield f"it has several optimizers, under {', '.join(map(repr, sorted(prefixes)))}; save one."
    if numbered:
        yield (
            f"{min(numbered)}: is state by number, and not by name of the parameter; save get_optimizer_state_dict(model, optim) in place "
            "of optim.state_dict()."
        )
    if len({name.isdecimal() for name in groups}) > 1:
        yield f"its param groups are stored by parameter and by number ({short([*groups][:3])}); save one form."
    if any(
        key.partition(".")[0] == "update_scale" for options in groups.values() for key in options
    ):
        yield (
            "param_groups: have the factors of an UpdateScale, which belong to elements and do not grow on disk; grow the live run by "
            "expand_inplace."
        )


def renamed(path: KeyPath, old: str, new: str) -> KeyPath:
    """Return the path of an entry of another parameter: the last element of the path that has the name is changed."""
    for i in reversed(range(len(path))):
        part = path[i]
        if isinstance(part, str) and old in part:
            head, _, tail = part.rpartition(old)
            return (*path[:i], head + new + tail, *path[i + 1 :])
    return path
