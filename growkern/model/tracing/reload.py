"""What a checkpoint of a grown model of transformers loads into: a model built from the grown config computes the same function."""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from growkern.model.size_values import size_value
from growkern.model.tracing.attributes import Attributes, Search, trial_sizes
from growkern.model.tracing.candidates import Numbers
from growkern.model.tracing.config import Fields
from growkern.model.tracing.forward import (
    Inputs,
    call_model,
    distance,
    evaluated,
    main_output,
    persistent_buffers,
    tried,
)
from growkern.model.tracing.hollow import Hollow, hollow
from growkern.model.tracing.mapped_weights import mapped_distance, run_mapped
from growkern.model.tracing.naming import HIDDEN, Spaces
from growkern.model.tracing.program import Unfilled, first_difference, program_of
from growkern.model.tracing.terms import Dim
from growkern.model.tracing.trial import (
    Steps,
    Tensors,
    grown_copy,
    set_config,
    set_values,
)
from growkern.support.names import named_buffers, named_modules, named_parameters, submodule

logger = logging.getLogger("growkern")


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


def numbers_of_grown(
    model: nn.Module, own: Tensors, fields: Fields, sizes: Mapping[str, int]
) -> Numbers:
    """Return the numbers that modules of a model hold that is built from the config at other sizes."""
    copied: Any = grown_copy(model, own, {}, hollow)
    set_config(copied, {k: size_value(e, sizes) for k, e in fields.sizes.items()})
    try:
        built = _built(model, copied.config, by_shapes=True)
    except Exception as error:  # a config may raise anything
        logger.debug("the grown config builds no model: %s", error)
        return Numbers({}, sizes)
    held = {(path, name): v for path, m in named_modules(built) for name, v in vars(m).items() if type(v) is float}  # fmt: skip
    for full, b in named_buffers(built):
        path, _, name = full.rpartition(".")
        held |= {(path, name): float(b)} if b.dim() == 0 and not isinstance(b, Hollow) else {}
    return Numbers(held, sizes)


@dataclass(frozen=True)
class ReloadTrial:
    """Grows copies of a model, and builds models from their configs with their tensors.

    A model whose weights have values has to return the source's output, and its logits where it generates. One whose weights have none has
    to run the operations of the grown model.

    Args:
        search: The source, a model of transformers, its inputs, its tensors and its trace.
        fields: What its config says.
        attributes: Its attributes.
    """

    search: Search
    fields: Fields
    attributes: Attributes

    def not_reloaded(self) -> dict[str, str]:
        """Return the sizes after whose growth a model built from the config is another function than the grown model, and why."""
        fixed = {**self.search.spec.fixed, **self.attributes.fixed}
        free = [s for s in self.search.spaces.sizes if s not in fixed]
        if not free or self.problem(free) is None:
            return {}
        coupled = {"heads", "kv_heads"}
        if self.attributes.coupled or self.fields.coupled:
            coupled.add("hidden")
        units = [[s for s in free if s in coupled], *([s] for s in free if s not in coupled)]
        return {
            size: f"a model built from the grown config computes another function{why}"
            for unit in filter(None, units)
            if (why := self.problem(unit)) is not None
            for size in unit
        }

    @cached_property
    def _said(self) -> list[Tensor]:
        """The logits of generation of a source whose numbers do not grow."""
        if self.attributes.scaled:
            return []
        with evaluated(self.search.model):
            return _generated(self.search.model, self.search.inputs)

    def problem(self, grow: Sequence[str]) -> str | None:
        """Return where a model built from the config of a copy in which sizes grow computes something else; None if it does not."""
        search, by_shapes = self.search, self.search.tape.hollow
        sizes = search.spaces.sizes | trial_sizes(search.spaces, grow)
        every, atoms_at = {**search.spec.sizes, **sizes}, search.spaces.at(sizes)
        maps = {a: [j % a.size for j in range(n)] for a, n in atoms_at.items()}
        fields = {k: size_value(e, every) for k, e in self.fields.sizes.items()}
        steps = Steps([*self.attributes.scaled], atoms_at)

        def build(grown: nn.Module) -> nn.Module | None:
            set_config(grown, fields)
            return _loaded(search.model, grown, by_shapes)

        grown = grown_copy(search.model, search.own, maps, hollow if by_shapes else None)
        try:
            built = build(grown)
        except Exception as error:  # a config that builds no such model may raise anything
            logger.debug("the grown config builds no model: %s", error)
            return ""
        if built is None:
            return ""
        if not by_shapes:
            error = self._difference(built, maps, steps)
            return None if error < search.limit else ""
        for key, e in self.attributes.sizes.items():
            path, _, name = key.rpartition(".")
            set_values(grown, {(path, name): size_value(e, every)})
        why = _other_operation(grown, built, partial(call_model, inputs=search.inputs))
        if why is None:
            cached = partial(_generation, inputs=search.inputs, caches=(True,))
            return _other_operation(grown, built, cached)
        after = run_mapped(search.model, search.inputs, search.own, maps, prepare=build, mode=steps)
        error = mapped_distance(search.moved, after, search.tape.output_dims, maps)
        return None if error < search.limit else why

    def _difference(
        self, built: nn.Module, maps: Mapping[Dim, Sequence[int]], steps: Steps
    ) -> float:
        """Return by how much a built model differs from the output of the source.

        The larger of the differences of the main output and of the logits of generation counts, of the rows whose first tokens are equal.
        """
        with evaluated(built), steps:
            outputs = tried(built, self.search.inputs)
        after = None if isinstance(outputs, Exception) else main_output(outputs)
        moved = mapped_distance(self.search.tape.output, after, self.search.tape.output_dims, maps)
        if moved == float("inf"):
            return moved
        pairs, said = list[tuple[Tensor, Tensor]](), self._said
        with evaluated(built):
            now = _generated(built, self.search.inputs) if said else []
        if said and len(now) != len(said):
            return float("inf")
        for i, old in enumerate(said):
            first = i - i % 2  # the second step follows the first token
            same = now[first].argmax(-1) == said[first].argmax(-1)
            pairs.append((now[i], old) if i == first else (now[i][same], old[same]))
        return max([moved, *(distance(a, b) for a, b in pairs if b.numel())])


def _other_operation(grown: nn.Module, built: nn.Module, call: Callable[[nn.Module], object]) -> str | None:  # fmt: skip
    """Return the first operation that differs between two models without values; None where the first cannot run."""
    try:
        expected = program_of(grown, call)
    except Exception as error:  # a model may generate from other inputs only
        logger.debug("no operations of the grown copy: %s", error)
        return None
    try:
        why = first_difference(expected, program_of(built, call))
    except Exception as error:
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
    return why and f" ({why})"


def _generated(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return the logits of two steps of greedy generation, with a cache and without; none for a model that does not generate so."""
    try:
        return _generation(model, inputs)
    except Exception:  # a model may generate from other inputs only
        return []


def _generation(model: Any, inputs: Inputs, caches: Sequence[bool] = (True, False)) -> list[Tensor]:
    kind = getattr(model, "can_generate", None)
    if kind is None or not isinstance(inputs, Mapping) or "input_ids" not in inputs or not kind():
        return []
    given: dict[str, Any] = {**inputs}  # pyright: ignore
    given.pop("use_cache", None)
    options = dict(max_new_tokens=2, min_new_tokens=2, do_sample=False, num_beams=1)
    more = dict(output_logits=True, return_dict_in_generate=True)
    runs = [model.generate(**given, use_cache=cache, **options, **more) for cache in caches]
    return [logits for run in runs for logits in run.logits]


def _built(model: nn.Module, config: object, by_shapes: bool) -> nn.Module:
    """Build a model of the class of a model from a config."""
    with torch.random.fork_rng(devices=[]), Unfilled() if by_shapes else nullcontext():
        return type(model)(copy.deepcopy(config))


def _loaded(model: nn.Module, grown: Any, by_shapes: bool) -> nn.Module | None:
    """Build a model from the config of a grown copy, with the tensors that a checkpoint of the copy holds; None if one has no place."""
    built = _built(model, grown.config, by_shapes)
    buffers, places = dict(named_buffers(built)), {name for name, _ in named_modules(built)}
    live: dict[str, Tensor] = dict(named_parameters(grown, remove_duplicate=False))
    like, first = dict(named_buffers(grown)), next(iter(live.values()))
    if not by_shapes:
        built.to(first.device, first.dtype)
    for name, b in buffers.items():
        _place(built, name, b.to(first.device, like.get(name, first).dtype if b.is_floating_point() else b.dtype))  # fmt: skip
    source = dict(named_parameters(model, remove_duplicate=False)) | persistent_buffers(model)
    unsaved: Any = getattr(model, "_keys_to_ignore_on_save", None) or ()
    saved = persistent_buffers(built)
    for name, t in {**live, **persistent_buffers(grown)}.items():
        if name.rpartition(".")[0] not in places or (
            name in saved and saved[name].shape != t.shape
        ):
            return None
        if name in unsaved and by_shapes and t.shape != source[name].shape:
            return None  # a loaded model computes it anew, and its values are not known
        if name not in unsaved or by_shapes:
            _place(built, name, t)
    return built


def _place(model: nn.Module, name: str, t: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = submodule(model, path)
    (module._parameters if isinstance(t, nn.Parameter) else module._buffers)[leaf] = t  # pyright: ignore
