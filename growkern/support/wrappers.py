"""Wrappers of models, optimizers and schedulers, identified by class name, so that no framework is imported."""

from typing import Any

WRAPPERS = {  # class name in the MRO -> attribute that holds the wrapped object
    "AcceleratedOptimizer": "optimizer",
    "AcceleratedScheduler": "scheduler",
    "ActivationWrapper": "_checkpoint_wrapped_module",
    "DistributedDataParallel": "module",
    "LightningOptimizer": "optimizer",
    "OptimizedModule": "_orig_mod",
    "_FabricModule": "module",
    "_FabricOptimizer": "optimizer",
}

CONTAINERS = {  # class name in the MRO -> attribute that holds the list
    "LRSchedulersContainer": "schedulers",
    "OptimizersContainer": "optimizers",
}


def listed(things: Any) -> list[Any]:
    """Return the entries of a list, a tuple or a container of torchtitan; a list of the argument itself if it is none of these."""
    for kind in type(things).__mro__:
        if kind.__name__ in CONTAINERS:
            return list(getattr(things, CONTAINERS[kind.__name__]))
    return list(things) if isinstance(things, list | tuple) else [things]  # pyright: ignore[reportUnknownArgumentType]


def unwrapped(thing: Any) -> Any:
    """Return the model, optimizer or scheduler inside all wrappers, or the argument itself if it has no wrapper."""
    for kind in type(thing).__mro__:
        if kind.__name__ in WRAPPERS:
            return unwrapped(getattr(thing, WRAPPERS[kind.__name__]))
    return thing
