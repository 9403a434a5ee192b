"""Hints: what the trace of a small model of a class does not show, such as the names of sizes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from growkern.support.argument_types import wrong_fields

Fixed = tuple[object, tuple[str, ...], str]
NEEDED = "hidden", "heads", "layers"
SIZES = "kv_heads", "head_dim", "ffn", "experts", "top_k", "positions", "vocab", "token_types"


@dataclass(frozen=True, eq=False)
class Hint:
    """What tracing does not see in a class of models that are built from a config.

    Attributes:
        fields: Field of the config -> size that it holds. Without a field of ``head_dim``, hidden = heads x head_dim.
        derived: Size without a value in the config -> the size that it is a multiple of, and the factor.
        follows: Field -> size that it holds where it equals that size; a field of another value keeps it.
        apart: Field of ``follows`` -> size of its own, where the value is another, and why this size is fixed.
        fixed_by: Field -> the value under which all sizes grow, the sizes that are fixed under other values, and why.
        only: Field -> the value for which the family is described.
        unused: Tensors that the forward of a model without ties does not use; their lengths say what their axes are.
        unread: Names of attributes that no module reads once the model is built.
        by_stack: True when the spaces of heads and ffn have the name of their stack (the encoder's beside the decoder's).
        lists: Fields that hold one entry per block.
        eps: Field that holds the epsilon of the norms.
        saves: Two sizes: transformers saves the model only if the first is a multiple of the second.
        divided: Field, cached by the model, that is divided by the factor of a size: field -> the size.
        config: Further fields, of configs of single modules, such as ``decoder.num_layers`` -> size.

    Example:
        >>> fields = {"hidden_size": "hidden", "num_attention_heads": "heads", "num_hidden_layers": "layers", "vocab_size": "vocab"}
        >>> fields |= {"num_key_value_heads": "kv_heads", "intermediate_size": "ffn"}
        >>> growkern.describe(phi, hints=growkern.Hint(fields)).sizes
        {'hidden': 48, 'heads': 4, 'layers': 2, 'vocab': 97, 'kv_heads': 2, 'ffn': 80, 'head_dim': 12}
    """

    fields: Mapping[str, str]
    derived: Mapping[str, tuple[str, int]] = field(default_factory=dict[str, tuple[str, int]])
    follows: Mapping[str, str] = field(default_factory=dict[str, str])
    apart: Mapping[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])
    fixed_by: Mapping[str, Fixed] = field(default_factory=dict[str, Fixed])
    only: Mapping[str, object] = field(default_factory=dict[str, object])
    unused: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    by_stack: bool = False
    lists: tuple[str, ...] = ()
    eps: str | None = None
    saves: tuple[str, str] | None = None
    divided: Mapping[str, str] = field(default_factory=dict[str, str])
    config: Mapping[str, str] = field(default_factory=dict[str, str])


def problems(hint: Hint, config: Any) -> Iterator[str]:
    """Yield a problem for every field of a hint that has a wrong type, names no size, or does not fit a config."""
    wrong = [*wrong_fields(hint, deep=True)]
    yield from wrong
    if wrong:
        return
    named = {**dict.fromkeys(hint.fields.values()), **dict.fromkeys(hint.derived)}
    yield from (f"fields: no field holds {size}; name the field that does." for size in NEEDED if size not in named)  # fmt: skip
    if "layers" not in hint.fields.values():
        return
    for size in named:
        if size not in (*NEEDED, *SIZES) and not size.endswith("layers"):
            yield f"fields: {size!r} is no size that a hint can name; name one of {', '.join((*NEEDED, *SIZES))}."
    for name, size in hint.fields.items():
        if getattr(config, name, None) is None and size not in ("head_dim", *hint.derived):
            yield f"fields: the config has no value of {name!r}; correct the name, or say what {size} is a multiple of in derived."
    depth = next(getattr(config, name, 0) for name, size in hint.fields.items() if size == "layers")
    lists: dict[str, Any] = {k: v for k, v in vars(config).items() if isinstance(v, list) and v}  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]  # fmt: skip
    for name, value in lists.items():
        if len(value) == depth and "layer" in name and name not in hint.lists:
            yield f"{name}: the config has a list with an entry per block; name it in lists."
    for name in (*hint.follows, *hint.only, *hint.divided):
        if not hasattr(config, name):
            yield f"{name}: the config has no such field; correct the name."
