"""Live objects that a growth would make stale: other optimizers, modules outside the model, averages, schedulers."""

import gc
import re
import sys
from collections.abc import Mapping, Sequence
from sys import getrefcount
from typing import Any

from torch import nn
from torch.fx import GraphModule
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from growkern.distributed.zero import NAME, is_zero
from growkern.errors import PlanError, UnsupportedModelError, UnsupportedOptimizerError
from growkern.optimizer.schedulers import driven_by
from growkern.support.live_registry import Live, in_pass, mid_step
from growkern.support.names import named_modules, named_parameters
from growkern.support.wrappers import unwrapped

ENGINE = "DeepSpeedEngine"  # recognized by class name, so that no framework is imported
AVERAGE = re.compile(
    r"(^|[a-z0-9_])E(ma|MA)(?![a-z])|MovingAverage"
)  # ModelEmaV2, EMAModel, EMA, ...


def refuse_mid_pass(model: nn.Module, *optims: object) -> None:
    """Raise PlanError inside a forward or a backward of the model, or inside the step of an optimizer before its update is done."""
    if running := in_pass(model):
        raise PlanError(
            f"a growth inside {running} would break the rest of it; grow between steps, or in a post-hook of optimizer.step() "
            "(GrowthSchedule.attach)."
        )
    if any(map(mid_step, optims)):
        raise PlanError(
            "a growth in a closure or a pre-hook of optimizer.step() would change half a step; grow between steps, or in a "
            "post-hook (GrowthSchedule.attach)."
        )


def refuse_stale_references(
    model: nn.Module,
    optims: Sequence[Optimizer],
    live: Live,
    averages: Sequence[nn.Module] | None,
    master_weights: Mapping[nn.Parameter, nn.Parameter] | None = None,
) -> Live:
    """Refuse a growth that would leave live objects with tensors of the source.

    Args:
        model: Source model, without wrappers.
        optims: Optimizers of the model.
        live: Live objects of the process.
        averages: Averages of the model that the user passed; None if ``ema`` was not passed.
        master_weights: Parameter -> the copy that an optimizer holds in its place.

    Returns:
        ``live``, or a new list made after garbage collection if ``live`` contained a stale object.

    Raises:
        UnsupportedOptimizerError: Another optimizer holds state of the parameters (its next step would fail, or corrupt
            memory under ``fused=True``); the optimizer holds parameters that no module holds, or is a part of a ZeroRedundancyOptimizer.
        UnsupportedModelError: A module outside the model holds one of the model's parameters (a head tied to this backbone);
            a ``DeepSpeedEngine`` around the model is alive; an average of a model of the same shapes was not passed.
    """
    params = {id(p): name for name, p in named_parameters(model)}
    inside = {id(m) for _, m in named_modules(model)}

    def optimizers(live: Live) -> list[str]:
        own = {id(thing) for optim in optims for thing in (optim, optim.state)}
        own |= {id(holder.optim) for holder in map(_holder, optims) if holder is not None}
        others = [o for o in live.optimizers if id(o) not in own and hasattr(o, "state")]
        others = [o for o in others if id(o.state) not in own]
        return [_kind(o) for o in others if any(id(p) in params for p in o.state)]

    def modules(live: Live) -> list[str]:
        others = [m for m in live.modules if id(m) not in inside and "_parameters" in vars(m)]
        # torch.compile makes new graphs
        others = [m for m in others if not isinstance(m, GraphModule)]
        shared = [(m, p) for m in others for p in m._parameters.values() if id(p) in params]  # pyright: ignore[reportPrivateUsage]
        return [f"{type(m).__name__} ({params[id(p)]})" for m, p in shared]

    def engines(live: Live) -> list[str]:
        return [ENGINE for m in _engines(live) if any(id(p) in params for p in m.parameters())]

    def averaged(live: Live) -> list[str]:
        return _averages_like(model, live) if averages is None else []

    _refuse_dead(model, optims, live, master_weights or {})
    _refuse_part(model, optims, live)
    if engines(live) or optimizers(live) or modules(live) or averaged(live):
        live, title = live.collected(), f"cannot grow this {type(model).__name__}:"
        if engines(live):
            raise UnsupportedModelError(
                f"{title} a {ENGINE} around the model is alive, which is not supported yet: grow before deepspeed.initialize, or save, "
                "grow the checkpoint (growkern grow), and initialize anew."
            )
        if others := optimizers(live):
            raise UnsupportedOptimizerError(
                f"{title} another live optimizer has state of its parameters ({', '.join(others)}), "
                "which would not grow. Pass that optimizer as optim, in a list with the others, or clear its .state and delete it."
            )
        if others := modules(live):
            raise UnsupportedModelError(
                f"{title} modules outside the model have its parameters ({', '.join(others[:3])}) and would not grow. "
                "Pass the whole model."
            )
        if others := averaged(live):
            raise UnsupportedModelError(
                f"{title} an {others[0]} of a {type(model).__name__} of the same shapes is alive and would not grow: pass the average as "
                "ema=, or pass ema=() if it averages another model."
            )
    return live


def _engines(live: Live) -> list[Any]:
    """Return the live engines of DeepSpeed."""
    things: list[Any] = [*live.modules]
    if (
        "deepspeed" in sys.modules
    ):  # an engine holds its model in a way that no registration hook sees
        things += gc.get_objects()
    return [thing for thing in things if ENGINE in (kind.__name__ for kind in type(thing).__mro__)]


def _refuse_part(model: nn.Module, optims: Sequence[Optimizer], live: Live) -> None:
    """Raise UnsupportedOptimizerError for the optimizer inside a ``ZeroRedundancyOptimizer``, which has a part of the parameters."""
    for holder in filter(None, map(_holder, live.optimizers)):
        if any(holder.optim is optim for optim in optims):
            raise UnsupportedOptimizerError(
                f"cannot grow this {type(model).__name__}: the optimizer is the part of a {NAME} in this process; pass the "
                f"{NAME}."
            )


def _holder(optim: Any) -> Any:
    """Return a ``ZeroRedundancyOptimizer``, and None for another optimizer."""
    return optim if is_zero(optim) else None


def _averages_like(model: nn.Module, live: Live) -> list[str]:
    """Return the class names of live averages of a model of the same shapes."""
    shapes = [(name, p.shape) for name, p in named_parameters(model)]
    inside = {id(m) for _, m in named_modules(model)}
    return [
        type(holder).__name__
        for holder in live.modules
        if is_average(type(holder))
        for m in holder.modules()
        if id(m) not in inside and [(n, p.shape) for n, p in named_parameters(m)] == shapes
    ]


def refuse_neighbors(model: nn.Module, optims: Sequence[Optimizer], live: Live) -> None:
    """Raise UnsupportedModelError where the optimizers also train other parts of a module around the model, which read its hidden size."""
    own = {id(p) for _, p in named_parameters(model)}
    held = {id(p) for optim in optims for group in optim.param_groups for p in group["params"]}
    if not held - own:
        return
    parents: dict[int, list[nn.Module]] = {}
    for module in live.modules:
        for child in vars(module).get("_modules", {}).values():
            parents.setdefault(id(child), []).append(module)
    around, queue = dict[int, nn.Module](), [model]
    while queue:
        for parent in parents.get(id(queue.pop()), ()):
            if id(parent) not in around:
                around[id(parent)] = parent
                queue.append(parent)
    for outer in around.values():
        if names := [n for n, p in outer.named_parameters() if id(p) in held - own]:
            raise UnsupportedModelError(
                f"cannot grow this {type(model).__name__} alone: it is part of a {type(outer).__name__}, whose other parameters are in "
                f"the same optimizer and would stay narrow ({', '.join(names[:3])}). Pass the {type(outer).__name__} (with spec=, if "
                "its family is not known); or keep parameters that do not read this model in an optimizer of their own."
            )


def _refuse_dead(
    model: nn.Module,
    optims: Sequence[Optimizer],
    live: Live,
    master_weights: Mapping[nn.Parameter, nn.Parameter],
) -> None:
    """Raise UnsupportedOptimizerError when an optimizer holds parameters that no module holds."""
    if dead := _dead(model, optims, live, master_weights):
        raise UnsupportedOptimizerError(
            f"cannot grow this {type(model).__name__}: its optimizer has {len(dead)} parameters that no module has any more "
            f"({', '.join(dead[:3])}), so it does not train their replacements. Build a new optimizer, or take these parameters "
            "out of the param groups."
        )


def _dead(
    model: nn.Module,
    optims: Sequence[Optimizer],
    live: Live,
    master_weights: Mapping[nn.Parameter, nn.Parameter],
) -> list[str]:
    """Return the names of optimizer parameters that no module holds.

    Such a parameter has no reference outside its optimizer, or has the shape of a trainable parameter that is in no param group.
    """
    groups: list[tuple[Optimizer, Any]] = [
        (optim, group) for optim in optims for group in optim.param_groups
    ]
    held = {id(p) for m in live.modules if "_parameters" in vars(m) for p in m._parameters.values()}  # pyright: ignore
    held |= {id(master) for master in master_weights.values()}
    places = {id(p) for _, group in groups for p in group["params"]}
    missing = {
        p.shape
        for _, p in named_parameters(model)
        if p.requires_grad and id(master_weights.get(p, p)) not in places
    }
    dead: list[str] = []
    probe = [object()]
    p: Any = probe[0]
    own = getrefcount(p)  # the count for a list and a local name, in this version of Python
    for optim, group in groups:
        names = group.get("param_names", [None] * len(group["params"]))
        for i in range(len(group["params"])):
            p = group["params"][i]
            keeps = own + (p in optim.state)
            if id(p) not in held and (getrefcount(p) <= keeps or p.shape in missing):
                dead.append(names[i] or f"of shape {tuple(p.shape)}")
    return dead


def _averaged_in(average: nn.Module) -> nn.Module:
    """Return the module that an average holds: ``module`` of torch's and timm's, ``ema_model`` of lucidrains'."""
    held: list[Any] = [getattr(average, name, None) for name in ("module", "ema_model")]
    inner = [m for m in held if isinstance(m, nn.Module)] if is_average(type(average)) else []
    return inner[0] if inner else average


def is_average(kind: type) -> bool:
    """True for classes of weight averages, of torch and of other libraries, which are recognized by name."""
    return issubclass(kind, AveragedModel) or bool(AVERAGE.search(kind.__name__))


def averages_of(model: nn.Module, ema: nn.Module | Sequence[nn.Module] | None) -> list[nn.Module]:
    """Return the modules inside the averages of the model; raise PlanError for an object that is no average of the model."""
    single: list[Any] = [] if ema is None else [ema]
    several: Sequence[Any] = ema if isinstance(ema, list | tuple) else single
    if strangers := [average for average in several if not isinstance(average, nn.Module)]:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PlanError(
            f"ema: expected an AveragedModel or another module, got {type(strangers[0]).__name__}."
        )
    averages = [unwrapped(_averaged_in(average)) for average in several]
    shapes = {name: p.shape for name, p in named_parameters(model)}
    params = [id(p) for module in (model, *averages) for _, p in named_parameters(module)]
    if len(set(params)) < len(params):
        raise PlanError(
            "ema: an average shares parameters with the model, or with another average; pass every average once."
        )
    for average in averages:
        own = {name: p.shape for name, p in named_parameters(average)}
        if apart := [name for name in own | shapes if own.get(name) != shapes.get(name)]:
            raise PlanError(
                f"ema: this {type(average).__name__} is no average of the model: the shapes differ in {', '.join(apart[:3])}. Leave it out."
            )
    return averages


def unmanaged_schedulers(optim: Optimizer, handed: Sequence[object], live: Live) -> list[str]:
    """Return the class names of live schedulers that drive the optimizer and are not in ``handed``."""

    def found_in(live: Live) -> list[str]:
        drivers = [s for s in live.schedulers if driven_by(s) is optim]
        return [type(s).__name__ for s in drivers if not any(s is passed for passed in handed)]

    return found_in(live) and found_in(live.collected())


def _kind(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
