"""Wrappers, engines and captured graphs under which a model cannot be described."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

WRAPPERS = {
    "DataParallel": "pass model.module",
    "FullyShardedDataParallel": (
        fsdp1
        := "FSDP1 keeps flat parameters: use fully_shard, or save the gathered model, grow it (growkern grow), and wrap it anew"
    ),
    "DeepSpeedEngine": (
        deepspeed
        := "grow before deepspeed.initialize, or save, grow the checkpoint (growkern grow), and initialize anew"
    ),
    "PeftModel": (
        adapters := "merge the adapters first, or grow the base model before adding them"
    ),
    "BaseTuner": adapters,
    "BaseTunerLayer": adapters,
}
MANAGED = {  # attribute that an engine gives a parameter, also seen on the model inside its wrapper -> the engine, and the way out
    "_fsdp_flattened": ("FullyShardedDataParallel", fsdp1),
    "ds_id": ("DeepSpeedEngine (ZeRO stage 3)", deepspeed),
    "_hp_mapping": ("DeepSpeedEngine (ZeRO stage 1 or 2)", deepspeed),
}
PARAMETRIZED = {
    "weight_orig",
    "weight_g",
    "weight_v",
    "weight_mask",
}  # of torch.nn.utils: prune, weight_norm, spectral_norm


def wrappers(modules: Sequence[tuple[str, nn.Module]]) -> Iterator[str]:
    """Yield the wrappers and engines that own parameters of a model, and what hides parameters or captures the forward."""
    by_remedy: dict[str, str] = {}  # keyed by remedy: the outermost wrapper is enough
    first_of = {type(module): name or "the model" for name, module in reversed(modules)}
    for own, name in reversed(first_of.items()):
        for kind in own.__mro__:
            if kind.__name__ in WRAPPERS:
                by_remedy.setdefault(WRAPPERS[kind.__name__], f"{name} is a {kind.__name__}")
    params = {
        f"{path}.{name}".lstrip("."): p
        for path, m in modules
        for name, p in m._parameters.items()  # pyright: ignore[reportPrivateUsage]
        if p is not None
    }
    for name, p in params.items():
        for engine, way_out in (MANAGED[a] for a in MANAGED.keys() & vars(p).keys()):
            by_remedy.setdefault(way_out, f"{name}: a {engine} owns the parameter")
    for way_out, what in by_remedy.items():
        yield f"{what}, which is not supported yet: {way_out}."
    for name, module in modules:
        own = vars(module)
        if parametrize.is_parametrized(module) or any(
            PARAMETRIZED & own[kept].keys() for kept in ("_parameters", "_buffers")
        ):
            yield f"{name}: is parametrized or pruned; remove the parametrization first."
        if getattr(own.get("forward"), "__module__", None) == "torch.cuda.graphs":
            yield (
                f"{name or 'the model'}: make_graphed_callables has captured its forward, whose graphs would go on with the memory of the "
                "source's weights: delete the module's attribute forward, grow, and make the graphs again."
            )
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        yield "a CUDA graph is being captured; grow before, and capture the graph again."
