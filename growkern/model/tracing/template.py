"""Spec of a model from a small one of its class, which is traced once for a class and its config, and stretched to the live sizes.

The live model is neither run nor copied, so that it may be on the meta device, sharded, huge, or without blocks.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from growkern.errors import UnsupportedModelError, raise_all
from growkern.model.hints import Hint
from growkern.model.size_values import ROOT
from growkern.model.spec import QUERY, AxisUse, Blocks, ModelSpec, TensorSpec, on_residual
from growkern.model.tracing.alterations import alterations
from growkern.model.tracing.cached import cached_values, counters, rebuilt
from growkern.model.tracing.forward import Inputs, persistent_buffers
from growkern.model.tracing.inputs import example_inputs
from growkern.model.tracing.naming import Spaces
from growkern.model.tracing.permutation import limit_of, permutation_error
from growkern.model.tracing.roles import eps_names
from growkern.model.tracing.scores import trace_scores
from growkern.model.tracing.small import (
    containers,
    depths,
    live_sizes,
    n_blocks,
    pattern,
    plain_torch,
    rotary,
    small_config,
    small_sizes,
    with_group,
)
from growkern.model.tracing.stacks import UNLIKE, find_stacks
from growkern.model.tracing.stretch import Template, stretched
from growkern.model.tracing.template_axes import Axes
from growkern.model.tracing.trial import Tensors
from growkern.support.names import named_buffers, named_modules, named_parameters

# fields that no description follows from; a growth changes the last
NAMES = "_name_or_path", "architectures", "transformers_version", "growkern_history"
_KNOWN: dict[tuple[object, ...], Template] = {}


def describe_by_hint(model: nn.Module, kind: type[nn.Module], hint: Hint, inputs: Inputs | None = None) -> ModelSpec:  # fmt: skip
    """Describe a model by the trace of a small model of its class.

    Args:
        model: The live model, of which names, shapes and the config are read.
        kind: Its class.
        hint: What the trace does not show.
        inputs: Inputs of the class; ids are taken modulo the small vocabulary. None to make them from the config.

    Returns:
        The spec, which nobody has compared with the tensors of the live model yet.

    Raises:
        UnsupportedModelError: The hint excludes the config, or a small model of the config cannot be built or traced.
    """
    return stretched(*_template(model, kind, hint, inputs))


def altered(model: nn.Module, kind: type[nn.Module], hint: Hint, spec: ModelSpec) -> str | None:
    """Return where a live model differs from what its class builds of its config; None if it does not. ``spec``: its spec."""
    return next(alterations(_template(model, kind, hint, None)[0], model, spec), None)


Found = tuple[Template, nn.Module, Hint, dict[str, int]]


def _template(model: nn.Module, kind: type[nn.Module], hint: Hint, inputs: Inputs | None) -> Found:
    """Return the spec of the small model, traced once for a class and its config, and what it is stretched to."""
    config: Any = model.config
    raise_all(
        UnsupportedModelError, f"cannot describe this {kind.__name__}:", [*_excluded(config, hint)]
    )
    sizes = live_sizes(config, hint)
    live = pattern(model, containers(model, [sizes[size] for size in depths(hint)]))
    n = n_blocks([*live.values()])
    own = small_config(config, hint, small_sizes(config, hint, 0, n))
    values: dict[str, object] = own.to_dict() if hasattr(own, "to_dict") else {**vars(own)}
    fields = {k: v for k, v in values.items() if k not in {*hint.divided, *NAMES}}
    key = kind, hint, n, json.dumps(fields, default=str, sort_keys=True)
    known = None if inputs is not None else _KNOWN.get(key)
    if known is None:
        with plain_torch():
            known = _KNOWN[key] = _Traced(kind, config, hint, n, inputs).template()
    return known, model, hint, sizes


def _excluded(config: Any, hint: Hint) -> Iterator[str]:
    for name, value in hint.only.items():
        if getattr(config, name) != value:
            yield (
                f"{name}={getattr(config, name)} is not described; growkern describes {name}={value} only. "
                "Pass spec=ModelSpec(...) to describe it yourself."
            )


class _Traced:
    """A small model that was traced, and another of other sizes, which tells sizes from equal numbers."""

    def __init__(self, kind: type[nn.Module], config: Any, hint: Hint, n: int, inputs: Inputs | None) -> None:  # fmt: skip
        self.hint, self.name = hint, kind.__name__
        self.family: str = getattr(config, "model_type", self.name)
        self.sizes, self.other_sizes = (small_sizes(config, hint, i, n) for i in (0, 1))
        try:
            configs = (small_config(config, hint, own) for own in (self.sizes, self.other_sizes))
            self.model, self.other = (kind(own).eval() for own in configs)
            made = example_inputs(self.model) if inputs is None else _small(inputs, self.sizes)
            self.inputs: Inputs = {} if made is None else made
            self.tape = trace_scores(self.model, self.inputs)
        except Exception as error:
            raise self._refused(f"cannot be built and run ({type(error).__name__}: {error})") from error  # fmt: skip
        self.paths = containers(self.model, [n])
        one, two = ({*_live(m, own)} for m, own in ((self.model, self.sizes), (self.other, self.other_sizes)))  # fmt: skip
        if one != two:
            raise self._refused(f"has {min(one ^ two)} at some sizes only; name the field that decides it in follows")  # fmt: skip
        if len(self.paths) != len(depths(hint)):
            raise self._refused(f"has blocks in {self.paths}, and its hint names {depths(hint)}")
        self.weights = {name: value.dims for name, value in self.tape.weights.items()}
        self.axes = Axes(self.tape, with_group(self.sizes), self.paths, eps_names(self.model, self.tape.norms), hint.by_stack)  # fmt: skip

    def _refused(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"cannot describe {self.name}: a small model of its config {why}; pass spec=ModelSpec(...) to describe it yourself."
        )

    def template(self) -> Template:
        """Return the spec of the small model, after the permutation test."""
        tensors, ties = self._tensors()
        own = Tensors(self.weights, tensors, ties)
        error = permutation_error(self.model, self.inputs, own, self.tape.output_dims)
        if not error < limit_of(self.model):
            raise self._refused(f"moves its output by {error:.1e} when the coordinates of its spaces are permuted")  # fmt: skip
        cached = cached_values(self.model, self.other, self.sizes, self.other_sizes, self.paths)
        if cached.unexplained and not self.hint.fixed_by:
            raise self._refused(f"has {cached.unexplained[0]}, which follows from its sizes in an unknown way")  # fmt: skip
        scaled = ROOT in cached.sizes.values() or self.axes.scaled_scores()
        blocks = self._blocks()
        spec = ModelSpec(
            family=self.family,
            sizes=self.sizes,
            tensors=tensors,
            ties=ties,
            blocks=blocks[0],
            extra_stacks=tuple(blocks[1:]),
            attributes={
                k: v
                for k, v in cached.sizes.items()
                if k.rpartition(".")[2] not in self.hint.unread
            },
            counters=tuple(counters(self.model)),
            activation_scales=({QUERY: ROOT} if scaled else {}) | self.axes.powers(),
            rebuilt_from_config=tuple(rebuilt(self.model, self.other)),
            fixed={stack.size: UNLIKE for stack in blocks if not stack.identity}
            | self.axes.fixed(rotary(self.model.config)),
            post_norm=self.axes.post_norm(),
        )
        classes = {path: type(module) for path, module in named_modules(self.model)}
        return Template(spec, pattern(self.model, self.paths), classes)

    def _tensors(self) -> tuple[dict[str, TensorSpec], dict[str, str]]:
        """Return the axes of the tensors that the forward uses, and of those that the hint says it does not use; and the ties."""
        tensors, ties, shapes = dict[str, TensorSpec](), dict[str, str](), _live(self.other, self.other_sizes)  # fmt: skip
        live = _live(self.model, self.sizes)
        for name in self.tape.in_order(live):
            t = live[name]
            first = self.axes.first.get(name)
            if not first or (first not in self.tape.touched and name in self.hint.unused):
                axes = self.axes.plain(t)
            elif first in self.tape.touched:
                axes = self.axes.tensor(name, first, self.weights[first])
            else:
                continue  # the check against the live model names the tensor as not described
            tensors[name] = tuple(self._checked(name, *pair) for pair in zip(axes, t.shape, shapes[name].shape, strict=True))  # fmt: skip
            if first and first != name:
                ties[name] = first
        return tensors, ties

    def _checked(self, name: str, axis: AxisUse, n: int, other: int) -> AxisUse:
        """Return an axis; one that has the length of a size by accident is fixed."""
        if axis.size(self.other_sizes) == other:
            return axis
        if n != other:
            why = f"has {name} with an axis of {n}, and of {other} with other sizes, and no product of sizes of its hint has this length"
            raise self._refused(why)
        return AxisUse("reader" if axis.role == "reader" else "writer", ((n,),))

    def _blocks(self) -> list[Blocks]:
        """Return the stacks in the model's order; one whose blocks differ has nothing that makes a block the identity."""
        names = self.axes.names()
        spaces = Spaces(sizes=self.sizes, names=names, normed={a for a, s in names.items() if on_residual(s)})  # fmt: skip
        found = find_stacks(self.model, spaces, self.weights, self.tape.uses, self.tape.norms)
        own, result = {stack.path: stack for stack in found.blocks}, list[Blocks]()
        for path, size in zip(self.paths, depths(self.hint), strict=True):
            stack = own.get(path, Blocks(path))
            if stack.kinds:  # blocks behind a first unlike one are copied
                known = all(f"{path}.0.{name}" in self.weights for name in stack.identity)
                first = {*stack.kinds[1:]} == {1} and known
                stack = (
                    replace(stack, kinds=(), next_kinds=(), first_copied=1)
                    if first
                    else Blocks(path)
                )
            gains = not stack.carries and 0.0 not in stack.identity.values()
            result.append(replace(stack, size=size, outputs=tuple(stack.identity) if gains else ()))
        return result


def _live(model: nn.Module, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Return parameters, persistent buffers, and buffers with an entry per position."""
    live: dict[str, Tensor] = dict(named_parameters(model, remove_duplicate=False))
    own, n = persistent_buffers(model), sizes.get("positions")
    return live | {name: b for name, b in named_buffers(model, remove_duplicate=False) if name in own or n in b.shape}  # fmt: skip


def _small(inputs: Inputs, sizes: Mapping[str, int]) -> Inputs:
    """Return inputs of a live model as inputs of a small one: in float64, ids modulo its vocabulary, no longer than its positions."""

    def small(t: Tensor) -> Tensor:
        if t.is_floating_point():
            return t.to("cpu", torch.float64)
        t = t.cpu()[..., : sizes.get("positions")] if t.dim() else t.cpu()
        return t % sizes["vocab"] if t.dtype != torch.bool and "vocab" in sizes else t

    return inputs if callable(inputs) else tree_map_only(Tensor, small, inputs)
