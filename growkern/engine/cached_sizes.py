"""Sizes and epsilons that modules keep as attributes: those that a plan needs and a module lacks, and those that no spec names."""

from torch import nn

from growkern.errors import PlanError, raise_all
from growkern.planning.growth_plan import GrowthPlan
from growkern.support.names import named_modules


def refuse_missing_eps(plan: GrowthPlan, model: nn.Module) -> None:
    """Raise PlanError where a norm's epsilon has to change and the norm has no such attribute."""
    modules = dict(named_modules(model))
    paths = [path.rpartition(".") for path in plan.eps]
    missing = [
        f"{at}: the {type(modules[at]).__name__} has no attribute {name!r}, and its epsilon has to change by "
        f"{plan.eps[f'{at}.{name}']:.3g}: give it one that forward uses, name another by norm(eps=...), or grow by whole multiples."
        for at, _, name in paths
        if at in modules and not hasattr(modules[at], name)
    ]
    raise_all(PlanError, "cannot plan this growth:", missing)


def refuse_fractions(plan: GrowthPlan, model: nn.Module) -> None:
    """Raise PlanError where an int, such as the heads of one of several processes or a config's mlp_ratio, would become a fraction."""
    modules = dict(named_modules(model))
    fractions, config = list[str](), getattr(model, "config", None)
    held = [(path, *path.rpartition(".")[::2], after) for path, after in plan.attributes.items()]
    held += [(f"config.{name}", "config", name, after) for name, after in plan.config.items()]
    for path, owner, name, after in held:
        before = getattr(config if owner == "config" else modules.get(owner), name, None)
        if type(before) is int and after % 1:
            fractions.append(f"{path}: is the int {before}, and would be {after:g}: choose sizes that give an int.")  # fmt: skip
    raise_all(PlanError, "cannot change these attributes:", fractions)


def unlisted_sizes(plan: GrowthPlan, model: nn.Module) -> list[str]:
    """Return a note on the plain int attributes of modules that hold a size of the source and that the plan does not change."""
    grown = [name for name, n in plan.source_sizes.items() if plan.target_sizes[name] != n]
    heads = [name for name in ("heads", "kv_heads") if {name, "head_dim"} & {*grown}]
    sizes = {
        plan.source_sizes[name] * plan.source_sizes.get("head_dim", 0): f"{name} x head_dim"
        for name in heads
        if name in plan.source_sizes
    }
    sizes |= {plan.source_sizes[name]: name for name in grown}
    modules = dict(named_modules(model))
    found = [
        f"{path}.{name}".lstrip(".") + f" = {value} ({sizes[value]})"
        for path, module in modules.items()
        for name, value in vars(module).items()
        if type(value) is int and value > 1 and value in sizes and not name.startswith("_")
        if f"{path}.{name}".lstrip(".") not in plan.attributes
    ]
    if not found:
        return []
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return [
        f"attributes that equal an old size and are in no spec stay: {', '.join(found[:5])}{more}; name those that forward uses in "
        "attributes=."
    ]
