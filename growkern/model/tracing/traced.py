"""A model that no family knows -> its spec, by one forward, a trial of its attributes and the permutation test."""

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from growkern.distributed.shards import is_sharded
from growkern.errors import UnsupportedModelError, raise_all
from growkern.model.spec import AxisUse, Blocks, ModelSpec
from growkern.model.tracing import hollow
from growkern.model.tracing.attributes import (
    Attributes,
    Search,
    find_attributes,
    trial_sizes,
)
from growkern.model.tracing.candidates import Numbers
from growkern.model.tracing.config import Fields, find_fields, has_config
from growkern.model.tracing.expressions import Expression, expressions
from growkern.model.tracing.forward import Inputs, TracingError, not_nan, persistent_buffers
from growkern.model.tracing.inputs import example_inputs
from growkern.model.tracing.known import fingerprint
from growkern.model.tracing.modes import BothModes, trains_by_other_code
from growkern.model.tracing.naming import Spaces, name_spaces
from growkern.model.tracing.permutation import limit_of, permutation_error, rounds_as_far
from growkern.model.tracing.reload import ReloadTrial, merged, numbers_of_grown
from growkern.model.tracing.roles import Roles, eps_names, find_roles
from growkern.model.tracing.rules import trace
from growkern.model.tracing.scalings import powers, settled
from growkern.model.tracing.stacks import UNLIKE, Stacks, copied_at_the_end, counted, find_stacks
from growkern.model.tracing.table import table_of
from growkern.model.tracing.tape import Tape
from growkern.model.tracing.terms import Dim, atoms, find, keep_size
from growkern.model.tracing.trial import Tensors, deepened
from growkern.support.names import named_modules, named_parameters
from growkern.support.progress import stage


@dataclass(frozen=True, eq=False)
class TracedSpec(ModelSpec):
    """A spec that was found by tracing; ``print`` shows it as a table.

    Attributes:
        example: The inputs of the traced forward, on which a growth is checked.
        text: The table.
        reload_problem: Why a saved checkpoint of a grown model may not load, or load as another function; empty if a trial did.
        reload_sizes: Sizes after whose growth it may not.
    """

    example: object = field(default=None, repr=False)
    text: str = field(default="", repr=False)
    reload_problem: str = ""
    reload_sizes: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return self.text


@dataclass
class Trace:
    """One traced forward, and what was found by it; ``proved`` when a model built from a grown config has the spec's tensors."""

    model: nn.Module
    inputs: Inputs
    tape: Tape
    spaces: Spaces
    roles: Roles
    stacks: Stacks
    proved: bool = False
    search: Search | None = None  # for attributes

    @property
    def weights(self) -> dict[str, list[Dim]]:
        """First name of every tensor -> its dimensions."""
        return {name: value.dims for name, value in self.tape.weights.items()}


_LOG = logging.getLogger("growkern")
UNUSED = "the forward does not use it"
# attributes that hold the number of a block, also where one block has it
NUMBER = re.compile(r"(layer|block)_?(idx|index|id|num)")
_KNOWN: WeakKeyDictionary[nn.Module, tuple[object, TracedSpec]] = WeakKeyDictionary()
_ALIKE: dict[object, TracedSpec] = {}  # by fingerprint
REMEMBERED = 16  # fingerprints


def describe_by_tracing(model: nn.Module, inputs: Inputs | None = None) -> TracedSpec | None:
    """Describe a model that no family knows by one forward.

    Args:
        model: Any model, with its weights.
        inputs: Inputs that reach every parameter; None for those of the model's last description, or for inputs made from the config of a
            model of transformers.

    Returns:
        The spec; None without inputs. A second description of an unchanged model by the same inputs, or without, is the first. So is that
        of another model with equal classes, attributes and shapes, where the inputs are made from the config.

    Raises:
        UnsupportedModelError: The forward failed or did not reach a parameter, or the model does not pass the
            permutation test.
    """
    own, alike = fingerprint(model)
    known = _KNOWN.get(model)
    if known and known[0] == own and (inputs is None or inputs is known_inputs(model)):
        return known[1]
    title = f"cannot describe {type(model).__name__} by tracing:"
    if sharded := next((n for n, p in named_parameters(model) if is_sharded(p)), None):
        raise UnsupportedModelError(
            f"{title} {sharded} is sharded; describe the model before it is sharded, and pass spec=."
        )
    given = known_inputs(model) if inputs is None else inputs
    if given is None:
        return None
    if meta := next((n for n, p in named_parameters(model) if p.is_meta), None):
        raise UnsupportedModelError(
            f"{title} {meta} is on the meta device, and a forward needs values; load the weights first."
        )
    alike = alike and inputs is None and known is None
    if alike and own in _ALIKE:
        both = isinstance(_ALIKE[own].example, BothModes)
        spec = replace(_ALIKE[own], example=BothModes(given) if both else given)
    else:
        with not_nan(model), torch.inference_mode(False):  # inference tensors record nothing
            spec = _described(model, given, title)
    _KNOWN[model] = fingerprint(model)[0], spec  # the forward may have computed attributes
    if alike:
        _ALIKE[own] = spec
        for oldest in [*_ALIKE][:-REMEMBERED]:
            del _ALIKE[oldest]
    return spec


def _described(model: nn.Module, given: Inputs, title: str) -> TracedSpec:
    """Trace a model, by evaluation mode or by both modes, and test the description."""
    stage("tracing the forward", 0.0)
    found = trace_model(model, given)
    probe = hollow.hollow_copy(model) if found.tape.hollow and model.training else model
    if model.training and trains_by_other_code(probe, given, found.tape.steps):
        given = BothModes(given)
        found = trace_model(model, given)
    spec = spec_of(found)
    raise_all(UnsupportedModelError, title, [*_unreached(found)])
    own = Tensors(found.weights, spec.tensors, spec.ties)
    before = found.search and found.search.moved
    error = permutation_error(model, given, own, found.tape.output_dims, before=before)
    if not (error < limit_of(model) or rounds_as_far(model, given, own, before, error)):
        raise UnsupportedModelError(
            f"{title} its output moves by {error:.1e} when the coordinates of its spaces are permuted, so the trace does not see all that "
            "the forward does; pass spec=ModelSpec(...) to describe it yourself."
        )
    return spec


def known_inputs(model: nn.Module) -> Any:
    """Return the inputs of a model's last description, or inputs made from its config; None if there are none."""
    known = _KNOWN.get(model)
    example = known[1].example if known else example_inputs(model)
    return example.inputs if isinstance(example, BothModes) else example


def trace_model(model: nn.Module, inputs: Inputs) -> Trace:
    """Run a model once and find its spaces, roles and stacks."""
    try:
        tape = _tape(model, inputs)
    except TracingError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"cannot describe {type(model).__name__} by tracing: its forward failed on inputs ({type(error).__name__}: {error}); pass "
            "describe(model, inputs=batch)."
        ) from error
    tape.scalings = settled(tape)
    weights = {name: value.dims for name, value in tape.weights.items()}
    for name in weights.keys() - tape.touched:
        for dim in weights[name]:
            keep_size(dim, UNUSED, name)
    spaces = name_spaces(weights, tape.norms, tape.products, _written(tape))
    found = Trace(model, inputs, tape, spaces, Roles(spaces), Stacks())
    _roles(found)
    return found


def _tape(model: nn.Module, inputs: Inputs) -> Tape:
    """Trace a large model by shapes, where its forward does not ask for values."""
    if hollow.is_large(model):
        try:
            return trace(hollow.hollow_copy(model), inputs)
        except Exception as error:  # what asks for values may raise anything
            _LOG.debug("%s is traced with values: %s", type(model).__name__, error)
    return trace(model, inputs)


def _roles(found: Trace) -> None:
    """Find the roles and stacks of a trace whose spaces have names."""
    tape = found.tape
    names = {own[0]: own for own in tape.names.values()}
    eps = eps_names(found.model, tape.norms)
    found.roles = find_roles(found.spaces, found.weights, names, tape.uses, tape.norms, tape.statistics, eps, tape.scalings)  # fmt: skip
    found.stacks = find_stacks(found.model, found.spaces, found.weights, tape.uses, tape.norms)


def _written(tape: Tape) -> set[Dim]:
    """Return the atoms of axes that write: of all axes but those that are read only."""
    first = {name: own[0] for own in tape.names.values() for name in own}
    reads = {(first[u.tensor], u.axis) for u in tape.uses if u.role == "reader"}
    reads -= {(first[u.tensor], u.axis) for u in tape.uses if u.role != "reader"}
    axes = [(name, i, d) for name, v in tape.weights.items() for i, d in enumerate(v.dims)]
    return {a for name, i, dim in axes if (name, i) not in reads for a in atoms(dim)}


def _unreached(found: Trace) -> Iterator[str]:
    """Yield the tensors that the forward did not use, unless a model built from a larger config has them in the same shape."""
    for name in found.weights:
        if name not in found.tape.touched and not found.proved:
            yield f"{name}: {UNUSED} on the example; pass inputs that reach it to growkern.describe(model, inputs=...)."


def spec_of(found: Trace) -> TracedSpec:
    """Return the spec of a traced model, with the attributes and config fields that trials have proved."""
    model, spaces = found.model, found.spaces
    plain, own = _plain(found), Fields()
    if has_config(model):
        stage("reading the config", 0.1)
        own = _fields(found, plain)
        for _ in merged(spaces) if own.problem or own.together else ():
            _roles(found)
            plain = _plain(found)
            own = _fields(found, plain)
            if not (own.problem or own.together):
                break
        found.proved = own.problem is None
    plain = _deepened(found, plain, own)
    stage("trying attributes", 0.2)
    tensors = Tensors(found.weights, plain.tensors, plain.ties)
    to = {**plain.sizes, **trial_sizes(spaces, [s for s in spaces.sizes if s not in plain.fixed])}
    numbers = numbers_of_grown(model, tensors, own, to) if found.proved else Numbers({}, to)
    found.search = search = Search(model, found.inputs, found.tape, spaces, replace(plain, config=own.sizes), numbers)  # fmt: skip
    attributes = find_attributes(search)
    if own.problem and attributes.fixed:  # a grown config has only what grows
        own = _fields(found, replace(plain, fixed={**plain.fixed, **attributes.fixed}))
        found.proved = own.problem is None
    if found.proved and hollow.is_large(model) and not found.tape.hollow:
        own.problem = f"not tried, as the forward of a model of more than {hollow.LARGE:,} parameters depends on their values"  # fmt: skip
    elif found.proved:
        stage("building a grown model from its config", 0.5)
        attributes.fixed |= ReloadTrial(search, own, attributes).not_reloaded()
    return _complete(found, plain, attributes, own)


def _plain(found: Trace) -> ModelSpec:
    """Return the spec without what attributes and the config say."""
    spaces, roles, stacks = found.spaces, found.roles, found.stacks.blocks
    return ModelSpec(
        family=type(found.model).__name__,
        sizes={**spaces.sizes, **found.stacks.sizes},
        tensors=_in_order(found, roles.tensors),
        ties=roles.ties,
        blocks=stacks[0] if stacks else None,
        extra_stacks=tuple(stacks[1:]),
        post_norm=roles.post_norm,
        fixed=dict(_fixed(spaces)),
        non_affine_norms=dict(roles.bare),  # pyright: ignore[reportArgumentType]
        whole_multiples=dict(roles.whole),
        summed=tuple(roles.summed),
    )


def _fields(found: Trace, plain: ModelSpec) -> Fields:
    free = [s for s in found.spaces.sizes if s not in plain.fixed]
    # one field may hold the epsilon of norms that do not grow too: growkern then leaves the field, and makes copies
    others = [n for n in found.tape.norms if not {a for d in n.over for a in atoms(d)} <= found.spaces.names.keys()]  # fmt: skip
    eps = next((n.eps for n in found.tape.norms if n.eps and not others), None)
    sizes = trial_sizes(found.spaces, free)
    return find_fields(found.model, plain, _by_length(found), sizes, eps)


def _deepened(found: Trace, plain: ModelSpec, own: Fields) -> ModelSpec:
    """Return a spec without the stacks to which a block was added on a copy that did not pass on what it got."""
    kept, stacks, sizes = list[Blocks](), found.stacks, dict(plain.sizes)
    tensors, numbers = Tensors(found.weights, plain.tensors, plain.ties), _block_numbers(found)
    for stack in [
        replace(s, next_kinds=own.next_kinds.get(s.path, s.next_kinds)) for s in stacks.blocks
    ]:
        fields: dict[str, object] = {name: sizes[stack.size] + 1 for name, size in own.sizes.items() if size == stack.size}  # fmt: skip
        why = None
        if not fields and has_config(found.model):
            why = "no field of the config counts its blocks alone, or the config gives a longer model other blocks or tensors"
        elif stack.kinds and not stack.next_kinds:
            why = f"{UNLIKE}, and their kinds do not repeat"
        source = copied_at_the_end(stack, sizes[stack.size])
        base = f"{stack.path}.{source}."
        own_numbers = [name.removeprefix(base) for name in numbers if name.startswith(base)]
        given = (found.model, found.inputs, tensors, stack, source, fields, own.lists, own_numbers, found.tape)  # fmt: skip
        if why is None and (why := deepened(*given)):
            counts = counted(found.model, stack, sizes[stack.size])
            if counts and deepened(*given, counts) is None:
                why = None
                stacks.counted |= dict.fromkeys(counts, stack.size)
        if why is None:
            kept.append(stack)
            continue
        stacks.reasons[stack.path] = why
        stacks.lost[stack.size] = f"{stack.path} gains no blocks: {why}"
        del sizes[stack.size], stacks.sizes[stack.size]
        own.sizes = {name: size for name, size in own.sizes.items() if size != stack.size}
    stacks.blocks = kept
    return replace(
        plain, sizes=sizes, blocks=kept[0] if kept else None, extra_stacks=tuple(kept[1:])
    )


def _complete(found: Trace, plain: ModelSpec, attributes: Attributes, own: Fields) -> TracedSpec:
    spaces = found.spaces
    sizes, coupled = dict(plain.sizes), attributes.coupled or own.coupled
    fixed = {**spaces.lost, **found.stacks.lost, **plain.fixed, **attributes.fixed}
    if coupled:
        sizes["head_dim"] = sizes["hidden"] // sizes["heads"]
        fixed["head_dim"] = "attention multiplies activations over it"
    given: dict[str, Any] = {f.name: getattr(plain, f.name) for f in fields(plain)}
    given |= {
        "sizes": sizes,
        "fixed": fixed,
        "attributes": {**attributes.sizes, **_block_numbers(found), **found.stacks.counts(False)},
        "config": {**own.sizes, **attributes.config, **found.stacks.counts(True)},
        "config_lists": own.lists,
        "config_eps": own.eps,
        "hidden_is_heads": coupled,
        "activation_scales": {
            found.roles.stream(find(scaling.dim), scaling.before): power
            for scaling, power in powers(attributes.scaled, spaces)
        },
    }
    why = own.problem or next(iter(own.together.values()), "")
    widths = plain.sizes.keys() - {s.size for s in plain.stacks} if own.problem else own.together
    spec = TracedSpec(**given, example=found.inputs, reload_problem=why, reload_sizes=frozenset(widths))  # fmt: skip
    return replace(spec, text=table_of(spec, found.inputs, found.weights, spaces, found.stacks.reasons, why))  # fmt: skip


def _by_length(found: Trace) -> dict[int, list[Expression]]:
    """Return length -> the sizes and products of sizes of that length anywhere in the model, the most frequent first."""
    counts: dict[int, Counter[Expression]] = defaultdict(Counter)
    for own in expressions(found.tape, found.spaces).values():
        for n, count in own.items():
            counts[n] += count
    return {
        n: [e for e, _ in count.most_common() if any(isinstance(x, str) for x in e)]
        for n, count in counts.items()
    }


def _block_numbers(found: Trace) -> dict[str, str]:
    """Return the attributes of modules inside blocks that hold the number of the block."""
    result: dict[str, str] = {}
    modules = dict(named_modules(found.model))
    for stack in found.stacks.blocks:
        # blocks of some kinds may lack it
        held = defaultdict[tuple[str, str], dict[int, int]](dict)
        for path, module in modules.items():
            index, _, rest = path.removeprefix(f"{stack.path}.").partition(".")
            if path.startswith(f"{stack.path}.") and index.isdigit():
                for name, value in vars(module).items():
                    if type(value) is int:
                        held[rest, name][int(index)] = value
        for (rest, name), values in held.items():
            if (len(values) > 1 or NUMBER.search(name)) and all(
                i == value for i, value in values.items()
            ):
                result |= {
                    ".".join(filter(None, (stack.path, str(i), rest, name))): "block"
                    for i in values
                }
    return result


def _fixed(spaces: Spaces) -> Iterator[tuple[str, str]]:
    """Yield the sizes whose spaces cannot grow, although they have names, and why."""
    for atom, why in spaces.fixed.items():
        size = spaces.size_of(atom)
        if size:
            yield ("heads" if size == "group" else size), next(iter(why))


def _in_order(found: Trace, tensors: Mapping[str, tuple[AxisUse, ...]]) -> dict[str, tuple[AxisUse, ...]]:  # fmt: skip
    """Return the axes of every parameter and persistent buffer in the order of the forward; a buffer of numbers keeps its shape."""
    live: dict[str, Any] = dict(named_parameters(found.model, remove_duplicate=False))
    live |= persistent_buffers(found.model)
    return {
        name: tensors.get(name) or tuple(AxisUse("writer", ((n,),)) for n in live[name].shape)
        for name in found.tape.in_order(live)
    }
