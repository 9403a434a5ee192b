"""What the command line says, read: target sizes, and methods as one writes them in Python. Nothing is evaluated."""

import ast
from collections.abc import Sequence
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from growkern import depth, width
from growkern.errors import PlanError
from growkern.planning.decisions import DepthMethod, WidthMethod
from growkern.planning.sizes import Target

WIDTHS: dict[str, type] = {name: getattr(width, name) for name in width.__all__}
DEPTHS: dict[str, type] = {name: getattr(depth, name) for name in depth.__all__}


def sizes_of(texts: Sequence[str]) -> Target:
    """Read target sizes: ``["2x"]``, or ``["hidden=1024,layers=24", "ffn=2x"]``.

    Raises:
        PlanError: Neither, or a size that is named twice.
    """
    if len(texts) == 1 and "=" not in texts[0]:
        return texts[0]
    found: dict[str, int | str] = {}
    for part in [part.strip() for text in texts for part in text.split(",")]:
        name, equals, value = (word.strip() for word in part.partition("="))
        if not (name and equals and value):
            raise PlanError(f"cannot read {part!r}: 2x, or hidden=1024,layers=24.")
        if name in found:
            raise PlanError(f"{name} is named twice.")
        found[name] = int(value) if value.isdecimal() else value
    return found


def width_of(text: str) -> WidthMethod:
    """Read a width method, ``"HyperClone(noise_db=10)"``; raise PlanError for anything else."""
    return cast(WidthMethod, _method(_parsed(text), text, WIDTHS))


def depth_of(text: str) -> DepthMethod:
    """Read a depth method, ``"Stack"``; raise PlanError for anything else."""
    return cast(DepthMethod, _method(_parsed(text), text, DEPTHS))


def methods_of(text: str) -> WidthMethod | DepthMethod | tuple[WidthMethod, DepthMethod]:
    """Read a method of either kind, or a pair, ``"FPI() + Stack()"``; raise PlanError for anything else."""
    tree = _parsed(text)
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        pair = _method(tree.left, text, WIDTHS), _method(tree.right, text, DEPTHS)
        return cast(tuple[WidthMethod, DepthMethod], pair)
    return cast(WidthMethod, _method(tree, text, WIDTHS | DEPTHS))


def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _unreadable(text) from None


def _method(tree: ast.expr, text: str, known: dict[str, type]) -> object:
    """A name, or a call of a name with literals."""
    call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
    if not isinstance(call.func, ast.Name):
        raise _unreadable(text)
    if call.func.id not in known:
        raise PlanError(f"there is no method {call.func.id!r}: {', '.join(known)}.")
    try:
        values: list[Any] = [ast.literal_eval(value) for value in call.args]
        named: dict[str, Any] = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise _unreadable(text) from None
    try:
        made = known[call.func.id](*values, **named)
    except TypeError as error:
        raise PlanError(f"cannot make {text!r}: {error}.") from None
    for name, hint in get_type_hints(known[call.func.id]).items():
        if not _fits(value := getattr(made, name), hint):
            said = hint.__name__ if type(hint) is type else str(hint).replace("typing.", "")
            raise PlanError(f"cannot make {text!r}: {name}={value!r} is no {said}.")
    return made


def _fits(value: object, hint: Any) -> bool:
    """True where a literal is of the type that a method's field has."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, tuple) and all(
            _fits(v, inner[0]) for v in cast(Sequence[object], value)
        )
    if hint in (int, float):
        kinds = int if hint is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool)
    return isinstance(value, hint)


def _unreadable(text: str) -> PlanError:
    return PlanError(
        f"cannot read {text!r}: the name of a method, with arguments that are plain values, such as HyperClone(noise_db=10)."
    )
