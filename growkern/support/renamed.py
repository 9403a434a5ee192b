"""Renamed arguments, attributes and fields of dataclasses: the old names work for one release, with a DeprecationWarning."""

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def renamed_arguments(**new_names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function accept keyword arguments by their old names. ``new_names`` maps old name -> new name.

    Raises:
        TypeError: (from a call of the decorated function) An argument was passed by both names.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        called = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]

        @wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            given: dict[str, Any] = kwargs
            for old in new_names.keys() & given.keys():
                new = new_names[old]
                if new in given:
                    raise TypeError(f"{called}() got both {new}= and {old}=, its old name")
                _warn(f"{old}= is called {new}= now", 3)
                given[new] = given.pop(old)
            return function(*args, **kwargs)

        return wrapper

    return decorate


def renamed_attribute(new: str) -> property:
    """Return a property for the old name of an attribute; the property reads the attribute ``new``."""

    def read(self: object) -> Any:
        _warn(f"this attribute of {type(self).__name__} is called {new} now", 3)
        return getattr(self, new)

    return property(read, doc=f"The old name of ``{new}``.")


def renamed_fields(**new_names: str) -> Callable[[type[T]], type[T]]:
    """Let a dataclass be constructed and read by the old names of its fields. ``new_names`` maps old name -> new name."""

    def decorate(cls: type[T]) -> type[T]:
        cls.__init__ = renamed_arguments(**new_names)(cls.__init__)
        for old, new in new_names.items():
            setattr(cls, old, renamed_attribute(new))
        return cls

    return decorate


def _warn(text: str, level: int) -> None:
    warnings.warn(f"growkern: {text}; the old name goes with 0.3.", DeprecationWarning, level)
