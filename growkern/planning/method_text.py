"""Make method objects from text such as ``"HyperClone(noise_db=10)"``, without evaluating the text as code."""

import ast
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from growkern.errors import PlanError
from growkern.planning.plan_fields import MAX_FACTOR, MAX_SEED, MAX_TEXT
from growkern.support.text import one_line, short


def parsed(text: str) -> ast.expr:
    """Parse an expression; raise PlanError for text that is not an expression."""
    if len(text) > MAX_TEXT:
        raise unreadable(text)
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise unreadable(text) from None


def method_of(tree: ast.expr, text: str, known: Mapping[str, type]) -> object:
    """Make the method that an expression names, or calls with literal arguments.

    Args:
        tree: Syntax tree of the name or the call.
        text: Text that the user wrote, for error messages.
        known: Name of a method -> class.

    Raises:
        PlanError: An unknown name, an argument that is not a literal, or an argument that the class does not accept.
    """
    call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
    if not isinstance(call.func, ast.Name):
        raise unreadable(text)
    if call.func.id not in known:
        raise PlanError(
            f"there is no method {short(call.func.id)}; the methods are {', '.join(known)}."
        )
    try:
        values: list[Any] = [ast.literal_eval(value) for value in call.args]
        named: dict[str, Any] = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise unreadable(text) from None
    try:
        made = known[call.func.id](*values, **named)
    except TypeError as error:
        raise PlanError(f"cannot make {short(text)}: {one_line(error, 300)}.") from None
    if any(not _within(value) for value in (*values, *named.values())):
        raise PlanError(f"cannot make {short(text)}: a number is out of range.")
    for name, hint in get_type_hints(known[call.func.id]).items():
        if not _fits(value := getattr(made, name), hint):
            said = hint.__name__ if type(hint) is type else str(hint).replace("typing.", "")
            raise PlanError(
                f"cannot make {short(text)}: {name}={short(value)} is not of type {said}."
            )
    return made


def names_method(text: str, known: Mapping[str, type]) -> bool:
    """True when a method can be made from its text."""
    try:
        method_of(parsed(text), text, known)
    except PlanError:
        return False
    return True


def unreadable(text: str) -> PlanError:
    """Return the error for a text that names no method."""
    return PlanError(
        f"cannot read {short(text)}; write the name of a method, with arguments that are plain values, such as HyperClone(noise_db=10)."
    )


def _within(value: Any) -> bool:
    """True for everything but numbers that are larger than any seed, or than any factor."""
    if type(value) is int:
        return -MAX_SEED <= value <= MAX_SEED
    return not isinstance(value, float) or -MAX_FACTOR <= value <= MAX_FACTOR


def _fits(value: object, hint: Any) -> bool:
    """True when a value matches the type hint of a method's field."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, alternative) for alternative in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, tuple) and all(
            _fits(v, inner[0]) for v in cast(Sequence[object], value)
        )
    if hint in (int, float):
        if isinstance(value, bool) or not isinstance(value, int if hint is int else (int, float)):
            return False
        return isinstance(value, float) or value.bit_length() < 1000  # a longer one is no float
    return isinstance(value, origin or hint)
