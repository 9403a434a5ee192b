"""``torch.compile`` of modules and of their copies: ``deepcopy`` leaves out what ``module.compile()`` has set."""

import copy
from collections.abc import Callable
from inspect import getclosurevars
from typing import Any

from torch import nn

CALL = "_compiled_call_impl"  # set by module.compile()
CONTEXT = "dynamo_ctx"  # of the module that torch.compile(module) returns


def is_compiled(module: nn.Module) -> bool:
    """True for a module after ``module.compile()``, and for the module that ``torch.compile(module)`` returns."""
    return vars(module).get(CALL) is not None or CONTEXT in vars(module)


def decorator_of(module: nn.Module) -> Callable[[Any], Any] | None:
    """Return what compiles a function with the arguments with which a compiled module was compiled; None if it is unknown.

    No module is in the decorator. The compiled call has the decorator in the closure of its public method ``get_compiler_config``.
    """
    call: Any = vars(module).get(CALL)
    if call is None:
        return vars(module).get(CONTEXT)
    if getattr(call, "__func__", None) is nn.Module._call_impl:  # pyright: ignore[reportPrivateUsage]
        return lambda function: function  # compile(disable=True)
    config: Any = getattr(call, "get_compiler_config", None)
    made: Any = getclosurevars(config).nonlocals.get("self") if callable(config) else None
    return made if callable(made) else None


def contexts(module: nn.Module) -> dict[int, object]:
    """Return, by ``id``, the decorators in the compiled modules of a module, which its copies share."""
    return {id(c): c for m in module.modules() if (c := vars(m).get(CONTEXT)) is not None}


def compile_alike(made: nn.Module, like: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Compile a copy of a module where the module is compiled, with the same arguments; return the copy.

    Args:
        made: What ``deepcopy`` has made of ``like``.
        like: The module.
        memo: The memo of this ``deepcopy``.
    """
    for new, old in zip(made.modules(), like.modules(), strict=True):
        own: dict[str, Any] = vars(new)
        if vars(old).get(CALL) is not None and (decorator := decorator_of(old)) is not None:
            own[CALL] = decorator(new._call_impl)  # pyright: ignore[reportPrivateUsage]
        if (
            CONTEXT in own
        ):  # deepcopy calls the constructor, which makes the compiled forward and nothing else
            kept = {k: t for k, t in vars(old).items() if k.endswith("_hooks") or k == "get_compiler_config"}  # fmt: skip
            own |= copy.deepcopy(kept, memo)
            own |= {"_torchdynamo_orig_callable": new._orig_mod.forward, "_torchdynamo_wrapper_id": id(new)}  # pyright: ignore  # fmt: skip
    return made
