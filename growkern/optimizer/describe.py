"""Describe live optimizers: class, names of parameters and state keys, law. Values are never read."""

from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.optim import Optimizer

from growkern.distributed.shards import is_sharded
from growkern.distributed.zero import is_zero, refuse_zero, wrapped_kind
from growkern.errors import UnsupportedOptimizerError, raise_all
from growkern.model.spec import ModelSpec
from growkern.optimizer.state_rules import LAWS, Law, OptimSpec, by_order
from growkern.support.names import named_parameters
from growkern.support.wrappers import listed, unwrapped

Optimizers = Optimizer | Sequence[Optimizer] | None
RELOAD = "load a checkpoint that fits, or grow with state='drop'."


def optimizers(optim: object) -> tuple[Optimizer, ...]:
    """Return an optimizer, or a list of optimizers, as a tuple without the wrappers of frameworks; None: an empty tuple.

    Raises:
        UnsupportedOptimizerError: An entry is no optimizer, is a ZeroRedundancyOptimizer that cannot grow, or occurs twice.
    """
    several = listed(optim)
    bare = [unwrapped(entry) for entry in several if entry is not None or len(several) > 1]
    for i, entry in enumerate(bare):
        _check_class(entry, f"optim[{i}]" if len(several) > 1 else "optim")
    if len({id(entry) for entry in bare}) < len(bare):
        raise UnsupportedOptimizerError(
            "optim: an optimizer occurs twice; pass every optimizer once."
        )
    return tuple(bare)


def describe_optimizers(
    model: nn.Module,
    optims: Sequence[Optimizer],
    spec: ModelSpec,
    *,
    drop: bool = False,
    state_rules: Mapping[str, int | None] | None = None,
    master_weights: Mapping[nn.Parameter, nn.Parameter] | None = None,
) -> tuple[OptimSpec, ...]:
    """Describe the optimizers of a model, each of other parameters; see ``describe_optimizer``.

    Args:
        model: The model that the optimizers train.
        optims: The optimizers.
        spec: Spec of the model.
        drop: True when the state is going to be dropped, so that no law is needed.
        state_rules: See ``describe_optimizer``. Of several optimizers, the rules apply to state keys without a known rule.
        master_weights: Parameter of the model -> its master weights, which an optimizer holds in its place.

    Raises:
        UnsupportedOptimizerError: Two optimizers hold one parameter, or see ``describe_optimizer``.
    """
    if optims and master_weights is not None:
        _check_masters(model, optims, master_weights)
    described = tuple(
        describe_optimizer(
            model, optim, spec, drop=drop, state_rules=_own_rules(optim, optims, state_rules), master_weights=master_weights,
        )
        for optim in optims
    )  # fmt: skip
    keys = {key for one in described for state in one.states.values() for key in state}
    if keys and (strange := sorted((state_rules or {}).keys() - keys)):
        raise UnsupportedOptimizerError(
            f"state_rules: no parameter has the state {', '.join(strange)}; the parameters have {', '.join(sorted(keys))}."
        )
    held = Counter(name for one in described for group in one.groups for name in group)
    if twice := [name for name, n in held.items() if n > 1]:
        raise UnsupportedOptimizerError(
            f"{twice[0]} and {len(twice) - 1} more parameters are in two optimizers; take each out of all but one."
        )
    return described


def describe_optimizer(
    model: nn.Module,
    optim: Optimizer,
    spec: ModelSpec,
    *,
    drop: bool = False,
    state_rules: Mapping[str, int | None] | None = None,
    master_weights: Mapping[nn.Parameter, nn.Parameter] | None = None,
) -> OptimSpec:
    """Describe an optimizer: its class, its param groups and state keys by parameter name.

    Args:
        model: The model that the optimizer trains.
        optim: The optimizer.
        spec: Spec of the model.
        drop: True when the state is going to be dropped, so that no law is needed.
        state_rules: State key -> order in the gradient (0: gathered unscaled; None: kept), for classes or keys without a known law.
        master_weights: Parameter of the model -> its master weights, which the optimizer holds in its place.

    Returns:
        Names and a law, no values.

    Raises:
        UnsupportedOptimizerError: ``optim`` is no optimizer, or holds no parameter of the model; its
            state has a class or key without a known law, or does not fit its parameter; ``state_rules`` or ``master_weights`` does
            not match the optimizer.
    """
    _check_class(optim)
    live = named_parameters(model, remove_duplicate=False)
    names = {
        id((master_weights or {}).get(p, p)): name for name, p in live if name not in spec.ties
    }
    held = [
        tuple(names[id(p)] for p in group["params"] if id(p) in names)
        for group in optim.param_groups
    ]
    kind = _kind(optim)
    title = f"cannot grow the state of this {type(optim).__name__}:"
    if not any(held):
        raise UnsupportedOptimizerError(
            f"{title} the optimizer has no parameter of this {type(model).__name__}; pass the optimizer that trains the "
            "model, and pass master_weights= if the optimizer has copies of higher precision."
        )
    law = _law_of(kind, optim, state_rules)
    states = {names[id(p)]: (p, s) for p, s in optim.state.items() if id(p) in names and s}
    problems = [] if drop or (law and law.resets) else [*_unknown(kind, law, states)]
    if not drop:
        problems += _kept_whole(states, state_rules or {})
    raise_all(UnsupportedOptimizerError, title, problems)
    keys = {name: tuple(map(str, s)) for name, (_, s) in states.items()}
    adjusts = {
        names[id(p)]: group["adjust_lr_fn"]
        for group in optim.param_groups
        for p in group["params"]
        if law and law.matrix and id(p) in names
    }
    coupled = {
        name
        for group, members in zip(optim.param_groups, held, strict=True)
        for name in members
        if law and not law.decays and not group.get("decoupled_weight_decay")
    }
    return OptimSpec(kind, tuple(held), keys, law, adjusts, frozenset(coupled))


def _check_class(optim: object, name: str = "optim") -> None:
    """Raise UnsupportedOptimizerError for an object that is no optimizer, and for a ZeroRedundancyOptimizer that cannot grow."""
    if type(optim).__module__.startswith("deepspeed."):
        raise UnsupportedOptimizerError(
            f"{name}: a {type(optim).__name__} of DeepSpeed partitions the state, which is not supported yet: grow before "
            "deepspeed.initialize, or save, grow the checkpoint (growkern grow), and initialize anew."
        )
    if not isinstance(optim, Optimizer):
        raise UnsupportedOptimizerError(
            f"{name}: expected a torch.optim.Optimizer, got {type(optim).__name__}."
        )
    if is_zero(optim):
        refuse_zero(optim)


def _law_of(
    kind: str, optim: Optimizer, state_rules: Mapping[str, int | None] | None
) -> Law | None:
    """The law of a class under the options of its param groups, with the user's rules added; None without law and rules."""
    law = LAWS.get(kind)
    if law is not None and law.lr_without is not None:
        option, lr = law.lr_without
        law = law if all(group.get(option) for group in optim.param_groups) else replace(law, lr=lr)
    if state_rules is None:
        return law
    law = law or Law({}, lr=None)
    return replace(law, rules={**law.rules, **{k: by_order(k, n) for k, n in state_rules.items()}})


def _own_rules(
    optim: Optimizer, optims: Sequence[Optimizer], state_rules: Mapping[str, int | None] | None
) -> Mapping[str, int | None] | None:
    """Return the user's rules for an optimizer: all of them, or of several optimizers those for keys without a known rule."""
    if state_rules is None or len(optims) == 1:
        return state_rules
    law = _law_of(_kind(optim), optim, None)
    keys = {key for state in optim.state.values() for key in state}
    own = {k: n for k, n in state_rules.items() if k in keys and not (law and k in law.rules)}
    return own or None


def _kind(optim: Optimizer) -> str:
    kind = wrapped_kind(optim)
    return f"{kind.__module__}.{kind.__qualname__}"


def _check_masters(
    model: nn.Module,
    optims: Sequence[Optimizer],
    master_weights: Mapping[nn.Parameter, nn.Parameter],
) -> None:
    """Raise UnsupportedOptimizerError unless ``master_weights`` maps parameters to distinct masters that an optimizer holds instead."""
    names = {id(p): name for name, p in named_parameters(model)}
    places = [id(p) for optim in optims for group in optim.param_groups for p in group["params"]]
    pairs = [*master_weights.items()] if isinstance(master_weights, MutableMapping) else []
    problems = [] if isinstance(master_weights, MutableMapping) else ["expected a dict from parameters to float32 copies."]  # fmt: skip
    for p, master in pairs:
        name = names.get(id(p))
        if name is None or not isinstance(master, nn.Parameter):  # pyright: ignore[reportUnnecessaryIsInstance]
            problems.append(
                f"{name or 'a key'}: is no parameter of the model, or its copy is no nn.Parameter; map parameters to nn.Parameters."
            )
        elif master.shape != p.shape:
            problems.append(
                f"{name}: has shape {tuple(p.shape)}, and its copy {tuple(master.shape)}; pass the copy that optim updates."
            )
        elif places.count(id(master)) != 1 or id(p) in places:
            problems.append(
                f"{name}: the optimizer must have the copy, once, and not the parameter; build optim from the copies."
            )
    masters = {id(master) for _, master in pairs}
    if len(masters) < len(pairs):
        problems.append("two parameters share a copy; give each parameter a copy of its own.")
    known = {id(p) for p, _ in pairs} | set(places)
    left = [name for i, name in names.items() if i not in known]
    stray = [i for i in places if i not in masters and i not in names]
    if left and stray:
        problems.append(
            f"{left[0]} and {len(left) - 1} more have no copy, and the optimizer has {len(stray)} tensors that are no copies; add them."
        )
    raise_all(UnsupportedOptimizerError, "master_weights:", problems)


def _kept_whole(
    states: Mapping[str, tuple[Tensor, Mapping[str, object]]], state_rules: Mapping[str, int | None]
) -> Iterator[str]:
    """Yield a problem for each state that a user's rule keeps as it is although it has the shape of its parameter, which may grow."""
    for name, (p, state) in states.items():
        for key, order in state_rules.items():
            value = state.get(key)
            if order is None and isinstance(value, Tensor) and value.shape == p.shape and p.dim():
                yield (
                    f"{name}: state {key!r} has the shape of the parameter, so it cannot be kept as it is when the parameter grows; pass "
                    "its order in the gradient: 0 (copied unscaled), 1 or 2."
                )


def _unknown(
    kind: str, law: Law | None, states: Mapping[str, tuple[Tensor, Mapping[str, object]]]
) -> Iterator[str]:
    """Yield an error message for each state entry that cannot be grown."""
    if law is None:
        if states:
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in LAWS))
            keys = sorted({str(key) for _, state in states.values() for key in state})
            yield (
                f"the law of {kind} (state {', '.join(keys)}) is not known. Known: {known}. Say how each key grows by "
                "state_rules={\"key\": order in the gradient}, or grow with state='drop'."
            )
        return
    for name, (p, state) in states.items():
        for key, value in state.items():
            rule = law.rules.get(key)
            if key not in law.rules:
                yield (
                    f"{name}: unknown state {key!r}; known: {', '.join(law.rules)}. Say how the key grows by "
                    f"state_rules={{\"{key}\": order in the gradient}}, or grow with state='drop'."
                )
            elif rule is not None and not isinstance(value, Tensor):
                yield f"{name}: state {key!r} is a {type(value).__name__}, not a tensor; {RELOAD}"
            elif key == "step" and isinstance(value, Tensor) and value.dim():
                yield f"{name}: state 'step' has shape {tuple(value.shape)}, not one number; {RELOAD}"
            elif isinstance(value, Tensor) and type(value) is not Tensor and not is_sharded(value):
                yield f"{name}: state {key!r} is a {type(value).__name__}; growkern grows plain tensors only; grow with state='drop'."
            elif isinstance(value, Tensor) and rule is not None:
                shape = rule.shape(tuple(p.shape))
                if tuple(value.shape) != shape:
                    of = f"the parameter {tuple(p.shape)}" + (
                        f", so {shape} is its shape" if rule.reduced else ""
                    )
                    yield f"{name}: state {key!r} has shape {tuple(value.shape)}, {of}; {RELOAD}"
