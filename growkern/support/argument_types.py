"""Check values against type annotations, so that a wrong argument is refused by name before anything reads it."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache, wraps
from inspect import Parameter, Signature, signature
from itertools import repeat
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from growkern.support.text import short
from growkern.support.wrappers import unwrapped

P = ParamSpec("P")
R = TypeVar("R")
PLAIN = str, int, float, bool, NoneType
WORDS = {float: "number", bool: "bool", NoneType: "None", object: "anything"}


def typed_arguments(
    error: type[Exception], *own: str, **errors: type[Exception]
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function check its arguments against its annotations.

    Args:
        error: What a wrong argument raises.
        own: Names of arguments that the function checks itself.
        errors: Name of an argument -> what this argument raises instead.

    Raises:
        error: (from a call of the decorated function) An argument is not of its type; the message names the first one.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @cache
        def quick() -> tuple[list[str], dict[str, Callable[[Any], bool]]]:
            hints, names = _hints(function), [*_signature(function).parameters]
            kinds = [parameter.kind for parameter in _signature(function).parameters.values()]
            if Parameter.VAR_POSITIONAL in kinds:
                return [], {}
            return names, {name: _sure(hints[name]) for name in names if name in hints}

        @wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            names, sure = quick()
            given: Mapping[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
            plain = len(names) >= len(args) and all(
                name in own or (name in sure and sure[name](value)) for name, value in given.items()
            )
            if plain:
                return function(*args, **kwargs)
            try:
                given = _signature(function).bind(*args, **kwargs).arguments
            except TypeError:
                given = {}  # Python's own message says what is missing
            for name, value, kind in _pairs(function, given):
                for problem in () if name in own else misfits(name, value, kind):
                    raise errors.get(name, error)(problem)
            return function(*args, **kwargs)

        return wrapper

    return decorate


def wrong_fields(thing: Any, *, deep: bool = False) -> Iterator[str]:
    """Yield a problem for every field of a dataclass that is not of its type; ``deep``: of dataclasses in its fields too."""
    for name, kind in _fields(thing.__class__).items():
        yield from misfits(name, getattr(thing, name), kind, deep=deep)


def misfits(name: str, value: Any, kind: Any, *, deep: bool = False) -> Iterator[str]:
    """Yield a problem for every part of the value ``name`` that is not of the annotated type ``kind``."""
    if not _always(value.__class__, kind):
        yield from (f"{name}{problem}" for problem in _misfits(value, kind, deep))


def _misfits(value: Any, kind: Any, deep: bool) -> Iterator[str]:
    """Yield what ``misfits`` does without the name; names are added on the way up, where there is a problem at all."""
    origin, parts = _parts(kind)
    if origin in (Union, UnionType):
        tries = [[*_misfits(value, part, deep)] for part in parts if _is(value, part)]
        if all(tries):
            yield from tries[0] if tries else [_wrong(value, kind)]
    elif not _is(value, kind):
        yield _wrong(value, kind)
    elif origin in (tuple, Sequence):
        kinds = parts if parts[-1] is not Ellipsis and origin is tuple else repeat(parts[0])
        for i, (entry, part) in enumerate(zip(value, kinds, strict=False)):
            yield from (f"[{i}]{problem}" for problem in _misfits(entry, part, deep))
    elif origin in (Mapping, MutableMapping):
        for key, entry in value.items():
            yield from (f", key {short(key, 60)}{problem}" for problem in _misfits(key, parts[0], deep))  # fmt: skip
            yield from (f"[{short(key, 60)}]{problem}" for problem in _misfits(entry, parts[1], deep))  # fmt: skip
    elif deep and is_dataclass(kind):
        yield from (f".{problem}" for problem in wrong_fields(value, deep=True))


def _is(value: Any, kind: Any) -> bool:
    """Return True if a value is of a type, apart from the types of what it contains."""
    origin, parts = _parts(kind)
    if kind is Any or kind is object or getattr(kind, "_is_protocol", False):
        return True
    if origin is Literal:
        return any(value is part or (type(value) is str and value == part) for part in parts)
    if origin is tuple:
        entries: list[Any] = [*value] if isinstance(value, tuple | list) else []
        fits = parts[-1] is Ellipsis or len(entries) == len(parts)
        return fits and isinstance(value, tuple | list)
    if kind in (int, float):
        return type(value) is not bool and isinstance(value, Integral if kind is int else Real)
    if origin is Sequence and isinstance(value, str):
        return False
    wanted = origin or kind
    return isinstance(value, wanted) or isinstance(unwrapped(value), wanted)


def _wrong(value: Any, kind: Any) -> str:
    plain = type(value) in (str, int, float, bool, tuple, list, dict, NoneType)
    got = short(value) if plain else f"a {type(value).__name__}"
    return f": expected {_words(kind)}, got {got}."


def _words(kind: Any) -> str:
    """Return a type as words."""
    origin, parts = _parts(kind)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_words, parts)))
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin in (tuple, Sequence):
        entries = (
            " and ".join(map(_words, parts)) if parts[-1] is not Ellipsis else _words(parts[0])
        )
        return f"{origin.__name__.lower()} of {entries}"
    if origin in (Mapping, MutableMapping):
        return f"mapping from {_words(parts[0])} to {_words(parts[1])}"
    return WORDS.get(kind) or ("function" if origin is Callable else kind.__name__)


def _pairs(function: Callable[..., Any], given: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:  # fmt: skip
    """Yield name, value and annotation of each argument; of ``**options`` annotated by a TypedDict, those of each known option."""
    for name, value in given.items():
        kind = _hints(function).get(name, Any)
        if _signature(function).parameters[name].kind is Parameter.VAR_KEYWORD:
            known = _hints(get_args(kind)[0]) if get_args(kind) else {}
            yield from ((key, v, known.get(key, Any if known else kind)) for key, v in value.items())  # fmt: skip
        elif name != "self":
            yield name, value, kind


@cache
def _always(plain: type, kind: Any) -> bool:
    """Return True if every value of a plain class is of a type, so that no value need be looked at."""
    origin, parts = _parts(kind)
    if origin in (Union, UnionType):
        return any(_always(plain, part) for part in parts)
    if kind in (int, float):
        return plain is int or plain is kind
    return plain in PLAIN and kind is plain


def _sure(kind: Any) -> Callable[[Any], bool]:
    """Return a quick test that is True only for values of a type: for plain values, and tuples and lists of such."""
    origin, parts = _parts(kind)
    tests = [_sure(part) for part in parts if origin in (Union, UnionType, tuple, Sequence)]
    if origin is Literal:
        return lambda value: value.__class__ is str and value in parts
    if not tests:
        return lambda value: _always(value.__class__, kind)
    if origin in (Union, UnionType):
        return lambda value: any(test(value) for test in tests)
    if origin is Sequence or (origin is tuple and parts[-1] is Ellipsis):
        return lambda value: value.__class__ in (tuple, list) and all(map(tests[0], value))
    return lambda value: (
        value.__class__ in (tuple, list)
        and len(value) == len(tests)
        and all(test(entry) for test, entry in zip(tests, value, strict=True))
    )


@cache
def _parts(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    return get_origin(kind), get_args(kind)


@cache
def _signature(function: Callable[..., Any]) -> Signature:
    return signature(function)


@cache
def _hints(owner: Any) -> dict[str, Any]:
    return get_type_hints(owner)


@cache
def _fields(kind: Any) -> dict[str, Any]:
    return {f.name: _hints(kind)[f.name] for f in fields(kind)}
