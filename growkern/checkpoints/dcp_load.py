"""Growth of a checkpoint of ``torch.distributed.checkpoint`` while it is loaded: every process computes its own shards."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from growkern.checkpoints.dcp_layout import Layout, layout_of
from growkern.checkpoints.dcp_source import Source
from growkern.commit.checkpoint_guard import (
    Grown,
    growth_history,
    guard_model,
    history_of,
    records_growths,
)
from growkern.commit.optimizer_guard import OptimGuard, optim_guard_of
from growkern.commit.param_groups import LR_FACTOR
from growkern.distributed.processes import Processes
from growkern.distributed.shards import Box, box_of, is_sharded, joined, local, reshard
from growkern.engine.history import methods_of
from growkern.errors import GrowthError, PlanError, raise_all
from growkern.execution.boxwise import Boxwise
from growkern.model.spec import ModelSpec
from growkern.optimizer.describe import describe_optimizer
from growkern.optimizer.factors import Scale
from growkern.optimizer.lr_scaling import multipliers, scales
from growkern.optimizer.state_rules import SLICES, VALUE, OptimSpec, Rule
from growkern.optimizer.update_scale import UpdateScale, scale_of
from growkern.planning.growth_plan import GrowthPlan, TensorRow
from growkern.planning.growth_record import GrowthRecord, digest, digest_of, read
from growkern.support.memory import trim
from growkern.support.names import canonical, named_buffers, named_parameters

ON_DISK = "grow the checkpoint by growkern.dcp.grow, and load its target"
PACKED = "growth"  # option of a param group: what OptimGuard packs


@dataclass(frozen=True)
class Read:
    """What has been read for an optimizer.

    Attributes:
        states: Target parameter -> its state.
        options: Options of every param group.
    """

    states: Mapping[nn.Parameter, Mapping[str, object]]
    options: tuple[Mapping[str, Any], ...]


class Filling:
    """A model of the target's sizes that is ready to be filled from a checkpoint of the source: everything is checked.

    Attributes:
        source: The checkpoint.
        model: The model.
        optim: Its optimizer; None to fill the weights only.
        plan: The plan.
        live: Parameters and persistent buffers of the model by name.
        layout: Keys of the checkpoint.
    """

    def __init__(
        self, source: Source, model: nn.Module, optim: Optimizer | None, plan: GrowthPlan
    ) -> None:
        """Check plan, model, optimizer and checkpoint against each other.

        Raises:
            GrowthError: They do not fit; the message lists every reason.
        """
        self.source, self.model, self.optim, self.plan = source, model, optim, plan
        reshard(model)
        self.live = _live(model, plan.ties)
        raise_all(PlanError, "cannot grow this checkpoint while it is loaded:", [*self._unfit()])
        shapes = {row.source: plan.shapes(row)[0] for row in plan.tensors if row.name in self.live}
        self.layout: Layout = layout_of(source, shapes, ())
        self.described = None if optim is None else self._described(optim)
        law = self.described.law if self.described else None
        units = plan.dynamics == "exact" and law is not None and not law.slices
        self.rules: Mapping[str, Rule | None] = (
            law.grown(plan.state, source_units=units) if law else {}
        )
        self.boxwise = Boxwise(plan)
        problems = [*self._unreadable(), *self._unrecorded()]
        raise_all(PlanError, "cannot grow this checkpoint while it is loaded:", problems)
        for row in self.rows:
            self.boxwise.check(row, source.of(self.layout.model[row.source]), self.box(row.name))

    @cached_property
    def rows(self) -> list[TensorRow]:
        """Rows of the tensors that the model stores."""
        return [row for row in self.plan.tensors if row.name in self.live]

    def box(self, name: str) -> Box | None:
        """Return the box that this process holds of a tensor; None for the whole tensor."""
        t = self.live[name]
        return box_of(t, t.shape) if is_sharded(t) else None

    def _unfit(self) -> Iterator[str]:
        """Yield a problem for tensors of model and plan that do not match, and for what no process can compute alone."""
        plan, named = self.plan, {row.name for row in self.plan.tensors}
        params = dict(named_parameters(self.model, remove_duplicate=False))
        yield from _other_ties(plan.ties, params)
        yield from (
            f"{name}: is not in the plan; make the plan for the model that the checkpoint is of."
            for name in self.live
            if name not in named
        )
        for row in plan.tensors:
            wanted, t = plan.shapes(row)[1], self.live.get(row.name)
            if t is not None and tuple(t.shape) != wanted:
                yield f"{row.name}: has shape {tuple(t.shape)}, and the plan grows it to {wanted}; build the model of the target's sizes."
            if t is not None and t.is_meta:
                yield f"{row.name}: is on the meta device; call model.to_empty(device=...) first."
        known = {*self.live, *(name for name, _ in named_buffers(self.model))}
        missing = [row.name for row in plan.tensors if row.name not in known]
        if missing:
            yield f"{missing[0]}: is not in the model, nor are {len(missing) - 1} more of the plan; build the model of the target's sizes."
        if plan.shrinks:
            yield "the plan shrinks the model; load the checkpoint, then call shrink_inplace."
        if plan.drawn or any(
            axis.pad == "from_method" and axis.index_map.has_pads for axis in plan.axes.values()
        ):
            yield f"{plan.width}, {plan.depth} computes new weights from whole tensors; {ON_DISK}."

    def _described(self, optim: Optimizer) -> OptimSpec:
        """Describe the optimizer, with the names that its parameters' sources have."""
        blank = ModelSpec(self.plan.family, self.plan.target_sizes, {}, ties=self.plan.ties)
        of, origin = (
            describe_optimizer(self.model, optim, blank, drop=True),
            {row.name: row.source for row in self.plan.tensors},
        )
        strange = [
            f"{name}: is in the optimizer, and not in the plan."
            for name in of.names
            if name not in origin
        ]
        raise_all(PlanError, "cannot grow the state of this optimizer:", strange)

        def source_of(name: str) -> str:
            return origin[name]

        groups = tuple(tuple(dict.fromkeys(map(source_of, group))) for group in of.groups)
        adjusts = {source_of(name): how for name, how in of.adjusts.items()}
        return replace(
            of,
            groups=groups,
            adjusts=adjusts,
            states={},
            coupled=frozenset(map(source_of, of.coupled)),
        )

    def _unreadable(self) -> Iterator[str]:
        """Yield a problem for state that cannot be grown or has no place in the optimizer."""
        of = self.described
        if of is None:
            return
        if not self.layout.state:
            yield "the checkpoint has no state of an optimizer's parameters; pass optim=None to load the weights."
            return
        law = of.law
        if law is None or law.resets:
            yield f"{of.kind}: its state has no known law of growth; load with optim=None from a checkpoint of the model alone."
            return
        for name, keys in self.layout.state.items():
            if name not in of.names:
                yield f"{next(iter(keys.values()))}: is state of a parameter that the optimizer does not hold."
                continue
            for option, key in keys.items():
                rule, shape = law.rules.get(option), self._shape(name)
                stored = self.source.of(key) if key in self.source.tensors else None
                if option not in law.rules or option in SLICES:
                    yield f"{key}: is no state that growth knows of {of.kind}; {ON_DISK}."
                elif stored is None and rule is not None:
                    yield f"{key}: is not stored as a tensor; save the checkpoint again."
                elif stored is not None and rule is not None:
                    if stored.dtype == torch.uint8:
                        yield f"{key}: is stored in 8 bits; load it into the source's model, grow that by expand_inplace, and save it."
                    elif stored.shape != rule.shape(shape):
                        yield f"{key}: has shape {stored.shape}, and the plan is for {rule.shape(shape)}."
                    elif rule.reduced is not None and any(map(is_sharded, self.live.values())):
                        yield f"{key}: is a mean over an axis, of which shards cannot be computed alone; {ON_DISK}."
        yield from self._unmatched_groups()
        if self.optim is not None and scale_of(self.optim) is not None:
            yield "the optimizer already has an UpdateScale; build it anew."

    def _shape(self, source: str) -> tuple[int, ...]:
        return next(self.plan.shapes(row)[0] for row in self.plan.tensors if row.source == source)

    def _unmatched_groups(self) -> Iterator[str]:
        """Yield a problem where a param group of the optimizer has parameters with different stored options."""
        for group in self._options if self.layout.groups else ():
            first = group[0] if group else {}
            if any(
                options.keys() != first.keys()
                or not all(bool(options[k] == first[k]) for k in first)
                for options in group
            ):
                yield (
                    "a param group of the optimizer has parameters whose stored options differ: build the optimizer with the param groups "
                    "of the run that saved the checkpoint."
                )
                return

    @cached_property
    def _options(self) -> list[list[dict[str, Any]]]:
        """Stored options of every parameter of every param group."""
        layout, of = self.layout, self.described
        assert of is not None
        values = self.source.values(
            [key for keys in layout.groups.values() for key in keys.values()]
        )
        found = {
            at: {o: values[key] for o, key in keys.items() if o.partition(".")[0] != PACKED}
            for at, keys in layout.groups.items()
        }
        if layout.flat:
            return [[found[name] for name in group if name in found] for group in of.groups]
        by_name = {
            name: options for options in found.values() for name in options.pop("params", ())
        }
        return [[by_name[name] for name in group if name in by_name] for group in of.groups]

    @cached_property
    def factors(self) -> Mapping[str, Scale]:
        """Factors of the growth on the updates of the target's parameters."""
        of, plan = self.described, self.plan
        if of is None or of.law is None or plan.dynamics is None:
            return {}
        added = multipliers(plan, of.law, of, plan.dynamics)
        like = {row.source: self.live[row.name] for row in self.rows}
        return scales(plan, like, added, None)

    def _unrecorded(self) -> Iterator[str]:
        """Yield a problem where the model's epsilons, or its record of the growth, are not those of the growth."""
        record, factors = self.recorded, self.factors
        made = (
            "growkern.expand_inplace(small, small_optim, plan=plan, backend='nan'), with a small model on the meta device, makes "
            "small.config the grown one"
        )
        if record is None and self.plan.eps:
            name, factor = next(iter(self.plan.eps.items()))
            yield (
                f"{name}: the plan multiplies this epsilon by {factor:g}, and the model has no record of the growth: build it from the "
                f"grown config; {made}."
            )
        if record is not None and factors and getattr(read(record), "split", None) == []:
            yield f"the model's config records a growth without an optimizer, and the plan has learning-rate factors: {made}."
        if factors and self.described and self.described.law and self.described.law.slices:
            yield "growkern.optim.AdamW keeps factors in its state, which load does not make; pass dynamics=None to growkern.plan."

    @cached_property
    def recorded(self) -> str | None:
        """The model's record of this growth; None if it has none."""
        history = growth_history(self.model)
        own = history[-1] if history else None
        return own if own is not None and digest_of(read(own)) == digest(self.plan) else None

    def measure(self, processes: Processes) -> None:
        """Measure the strength of the noise of every weight, each in one process."""
        rows = {row.source: row for row in self.rows}
        noisy = [
            row for row in rows.values() if self.boxwise.is_measured(row, self.source.of(self.layout.model[row.source]))
        ]  # fmt: skip
        with processes.together("The model is as before."):
            for row in noisy[processes.rank :: processes.n]:
                self.boxwise.measure(row, self.source.of(self.layout.model[row.source]))
        for stds in processes.gathered(self.boxwise.tiler.stds):
            self.boxwise.tiler.stds |= stds

    def read(self) -> Read:
        """Compute the optimizer's state, and then the weights, which are written."""
        states: dict[nn.Parameter, Mapping[str, object]] = {}
        if self.optim is not None:
            for group in self.optim.param_groups:
                together = bool(group.get("fused") or group.get("capturable"))
                states |= {
                    p: self._state(p, together, group)
                    for p in group["params"]
                    if id(p) in self._names
                }
        for row in self.rows:
            local(self.live[row.name]).copy_(self._grown(row, self.layout.model, VALUE))
        options = (
            tuple(group[0] if group else {} for group in self._options) if self.described else ()
        )
        return Read(states, options)

    @cached_property
    def _names(self) -> dict[int, TensorRow]:
        return {id(self.live[row.name]): row for row in reversed(self.rows)}

    def _grown(self, row: TensorRow, keys: Mapping[str, str], rule: Rule | None) -> Tensor:
        above = None if row.next_layer_source is None else keys.get(row.next_layer_source)
        following = None if above is None else self.source.of(above)
        trim()  # what the tensor before took
        return self.boxwise.grown(
            row, self.source.of(keys[row.source]), rule, following, self.box(row.name)
        )

    def _state(self, p: Any, on_device: bool, group: Mapping[str, Any]) -> dict[str, object]:
        """Compute the state of a parameter; empty for one that starts without state."""
        row, law = self._names[id(p)], self.described.law if self.described else None
        stored = self.layout.state.get(row.source, {})
        if self.plan.state == "drop" or row.state == "fresh":
            zeros = law.together if law and group.get("fused") else ()
            return {option: torch.zeros_like(p) for option in zeros if option in stored}
        state: dict[str, object] = {}
        for option, key in stored.items():
            rule = self.rules.get(option)
            if key not in self.source.tensors:
                state[option] = self.source.values([key])[key]
            elif rule is None:
                value = self.source.tensor(key)
                state[option] = value.to(p.device) if on_device else value
            else:
                keys = {
                    name: own[option] for name, own in self.layout.state.items() if option in own
                }
                own = self._grown(row, keys, rule).to(local(p).device, p.dtype)
                state[option] = joined(own, p, p.shape) if is_sharded(p) else own
        return state

    def finish(self, found: Read) -> None:
        """Give the optimizer its state, its options and the factors of its updates; record the growth where the model does not."""
        record = self.recorded
        if record is None:
            record = self._record()
        if self.optim is None or self.described is None:
            return
        for p, state in found.states.items():
            self.optim.state.pop(p, None)
            if state:
                self.optim.state[p] = dict(state)
        for group, options in zip(self.optim.param_groups, found.options, strict=True):
            group |= options
            group.setdefault(LR_FACTOR, 1.0)
        if self.factors:
            orders = {
                k: (rule.weight, rule.grad)
                for k, rule in self.described.rules.items()
                if rule is not None
            }
            UpdateScale(
                self.optim, {self.live[n]: s for n, s in self.factors.items()}, orders=orders
            )
        if optim_guard_of(self.optim) is None:
            what = Grown.by(self.plan, len(growth_history(self.model)), record).what
            OptimGuard(self.described.rules, what, [record], self.model).register(self.optim)

    def _record(self) -> str:
        """Record the growth in the model's config, and in its guard."""
        split = None if self.optim is None else [False]
        record = GrowthRecord.of(self.plan, split)
        try:
            methods_of(record)
        except GrowthError:  # a custom method
            record = replace(record, plan=self.plan.to_json())
        text, guard, config = (
            record.to_json(),
            guard_model(self.model),
            getattr(self.model, "config", None),
        )
        guard.growths = [*guard.growths, Grown.by(self.plan, len(guard.growths) + 1, text)]
        if records_growths(config):
            config.growkern_history = [*history_of(config), text]  # pyright: ignore
        return text


def _other_ties(ties: Mapping[str, str], params: Mapping[str, nn.Parameter]) -> Iterator[str]:
    """Yield a problem for parameters that are one in the plan and two in the model, or two in the plan and one in the model."""
    for name, owner in ties.items():
        if params.get(name) is not params.get(owner):
            yield f"{name}: is tied to {owner} in the plan, and not in the model; build the model with tied weights."
    named: dict[int, str] = {}
    for name, p in params.items():
        if name not in ties and (first := named.setdefault(id(p), name)) != name:
            yield f"{name}: is tied to {first} in the model, and not in the plan; build the model without tied weights."


def _live(model: nn.Module, ties: Collection[str]) -> dict[str, Any]:
    """Return the parameters and persistent buffers of a model by name, without the further names of tied parameters."""
    stored = {*map(canonical, model.state_dict())}
    params = named_parameters(model, remove_duplicate=False)
    live = {name: p for name, p in params if name not in ties}
    return live | {name: b for name, b in named_buffers(model) if name in stored}
