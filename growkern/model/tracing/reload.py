"""What a checkpoint of a grown model of transformers loads into: a model built from the grown config computes the same function."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from growkern.model.size_values import size_value
from growkern.model.spec import ModelSpec
from growkern.model.tracing.attributes import Attributes, trial_sizes
from growkern.model.tracing.config import Fields
from growkern.model.tracing.forward import (
    Inputs,
    distance,
    evaluated,
    main_output,
    persistent_buffers,
    tried,
)
from growkern.model.tracing.naming import HIDDEN, Spaces
from growkern.model.tracing.terms import Dim
from growkern.model.tracing.trial import (
    Steps,
    Tensors,
    grown_copy,
    mapped,
    set_config,
    tolerance,
)
from growkern.support.names import named_modules, named_parameters, submodule


def merged(spaces: Spaces) -> Iterator[str]:
    """Give spaces as long as hidden, then those as long as heads, that size, because configs have one field for both; yield the size.

    The caller stops once the config builds the model.
    """
    for size, space in (("hidden", HIDDEN), ("heads", "heads")):
        n = spaces.sizes.get(size)
        same = [other for other, m in spaces.sizes.items() if m == n and other.startswith("ffn")]
        for other in same:
            del spaces.sizes[other]
            for atom in [a for a in spaces.names if spaces.size_of(a) == other]:
                spaces.names[atom] = f"{space}.{spaces.names[atom].replace('.', '_')}"
        if same:
            yield size


def not_reloaded(
    model: nn.Module,
    inputs: Inputs,
    own: Tensors,
    spaces: Spaces,
    spec: ModelSpec,
    fields: Fields,
    attributes: Attributes,
    output: tuple[Tensor | None, Sequence[Dim]],
) -> dict[str, str]:
    """Return the sizes after whose growth a model built from the config is another function than the grown model, and why.

    Args:
        model: The source, a model of transformers.
        inputs: Its inputs.
        own: Its tensors.
        spaces: Its spaces.
        spec: Its spec.
        fields: What its config says.
        attributes: Its attributes.
        output: Its main output, and the dimensions.
    """
    free = [s for s in spaces.sizes if s not in {**spec.fixed, **attributes.fixed}]

    def error(grow: Sequence[str]) -> float:
        sizes = spaces.sizes | trial_sizes(spaces, grow)
        maps = {a: [j % a.size for j in range(n)] for a, n in spaces.at(sizes).items()}
        grown = grown_copy(model, own, maps)
        set_config(
            grown, {k: size_value(e, {**spec.sizes, **sizes}) for k, e in fields.sizes.items()}
        )
        before, dims = output
        steps = Steps([*attributes.scaled], spaces.at(sizes))
        expected = None if before is None else mapped(before, dims, maps)
        return _difference(model, grown, inputs, expected, steps, said)

    with evaluated(model):
        said = _generated(model, inputs) if free and not attributes.scaled else []
    if not free or error(free) < tolerance(model):
        return {}
    coupled = {"hidden", "heads", "kv_heads"} if attributes.coupled or fields.coupled else {"heads", "kv_heads"}  # fmt: skip
    units = [[s for s in free if s in coupled], *([s] for s in free if s not in coupled)]
    return {
        size: "a model built from the grown config computes another function"
        for unit in units
        if unit and not error(unit) < tolerance(model)
        for size in unit
    }


def _generated(model: Any, inputs: Inputs) -> list[Tensor]:
    """Return the logits of two steps of greedy generation, with a cache and without; none for a model that does not generate so."""
    kind = getattr(model, "can_generate", None)
    if kind is None or not isinstance(inputs, Mapping) or "input_ids" not in inputs or not kind():
        return []
    given: dict[str, Any] = {**inputs}  # pyright: ignore
    given.pop("use_cache", None)
    options = dict(max_new_tokens=2, min_new_tokens=2, do_sample=False, num_beams=1)
    more = dict(output_logits=True, return_dict_in_generate=True)
    try:
        runs = [model.generate(**given, use_cache=cache, **options, **more) for cache in (True, False)]  # fmt: skip
    except Exception:  # a model may generate from other inputs only
        return []
    return [logits for run in runs for logits in run.logits]


def _difference(
    model: nn.Module, grown: Any, inputs: Inputs, expected: Tensor | None, steps: Steps, said: Sequence[Tensor]
) -> float:  # fmt: skip
    """Return by how much a model that is built from the config of a grown copy, with its tensors, differs from the expected output.

    The larger of the differences of the main output and of the logits of generation counts, of the rows whose first tokens are equal.
    """
    try:
        built: nn.Module = type(model)(copy.deepcopy(grown.config))
    except Exception:  # a config that builds no such model may raise anything
        return float("inf")
    live: Mapping[str, Tensor] = dict(named_parameters(grown, remove_duplicate=False))
    live = {**live, **persistent_buffers(grown)}
    built.to(next(iter(live.values())).dtype)
    places = {name for name, _ in named_modules(built)}
    unsaved: Any = getattr(
        model, "_keys_to_ignore_on_save", None
    )  # a loaded model computes them anew
    for name, t in live.items():
        if name in (unsaved or ()):
            continue
        path, _, leaf = name.rpartition(".")
        if path not in places:
            return float("inf")
        held: Any = submodule(built, path)
        (held._parameters if isinstance(t, nn.Parameter) else held._buffers)[leaf] = t  # pyright: ignore[reportPrivateUsage]
    with evaluated(built), steps:
        outputs = tried(built, inputs)
    after = None if isinstance(outputs, Exception) else main_output(outputs)
    if after is None or expected is None or after.shape != expected.shape:
        return float("inf")
    pairs = [(after, expected)]
    with evaluated(built):
        now = _generated(built, inputs) if said else []
    if said and len(now) != len(said):
        return float("inf")
    for i, old in enumerate(said):
        first = i - i % 2  # the second step follows the first token
        same = now[first].argmax(-1) == said[first].argmax(-1)
        pairs.append((now[i], old) if i == first else (now[i][same], old[same]))
    return max(distance(a, b) for a, b in pairs if b.numel())
