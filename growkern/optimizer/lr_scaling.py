"""Factors that keep the source's training dynamics after a growth, for param groups, step hooks or the optimizer itself.

    update of the source, in the target's units: s x update(gradient / a, weight / s)

``dynamics="mup"`` applies only the learning-rate factor of this formula, ``dynamics="exact"`` applies all of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from math import prod, sqrt
from typing import TypeVar

import torch
from torch import Tensor

from growkern.optimizer.factors import Factor, Scale
from growkern.optimizer.state_rules import SLICES, Law, OptimSpec, muon_adjustment
from growkern.optimizer.update_scale import UpdateScale
from growkern.planning.growth_plan import AxisMap, GrowthPlan, TensorRow
from growkern.planning.index_map import PAD, IndexMap
from growkern.planning.vector import Vector
from growkern.support.dtypes import arithmetic

REWARM = (1.3, 250.0)  # rho and tau of SPARKLING, arXiv:2602.02472
ROUNDING = 1e-6  # tolerance for a product of float32 factors that equals 1
T = TypeVar("T")


@dataclass(frozen=True)
class Multiplier:
    """Factors of one target parameter, one vector per axis; see ``Scale`` for the fields."""

    update: tuple[Vector, ...]
    grad: tuple[Vector, ...] = ()
    gain: float = 1.0
    units: tuple[Vector, ...] | None = None
    offset: float = 0.0

    @cached_property
    def trivial(self) -> bool:
        """True when nothing is scaled."""
        factors = [[vector.uniform for vector in vectors] for vectors in (self.update, self.grad)]
        return self.gain == 1 and all(
            None not in f and prod(x or 0.0 for x in f) == 1 for f in factors
        )


def lr_factors(
    plan: GrowthPlan, law: Law | None, described: OptimSpec | None
) -> dict[str, float | None]:
    """The law's learning-rate factor of every target parameter that the optimizer holds; None if unknown or not uniform."""
    factors: dict[str, float | None] = {}
    for row in held_rows(plan, described) if law else ():
        factor = law.lr_factor(*plan.scales(row)) if law else None
        gain = _gain(plan, law, described, row, matrix_norm=False)
        factors[row.name] = None if factor is None else factor * gain
    return factors


def held_rows(plan: GrowthPlan, described: OptimSpec | None) -> list[TensorRow]:
    """Rows of the target parameters whose source parameters are in the optimizer."""
    held = {name for group in described.groups for name in group} if described else set[str]()
    return [row for row in plan.tensors if row.source in held]


def multipliers(
    plan: GrowthPlan, law: Law, described: OptimSpec, dynamics: str
) -> dict[str, Multiplier]:
    """The ``Multiplier`` of every target parameter that the optimizer holds, without trivial ones."""
    made: dict[object, Multiplier] = {}  # by what it is made from: blocks are alike
    nontrivial: dict[str, Multiplier] = {}
    for row in held_rows(plan, described):
        axes = plan.axis_maps(row)
        gain = _gain(plan, law, described, row, matrix_norm=dynamics == "exact")
        coupled = row.source in described.coupled
        key = (*((axis.weight_scale, axis.grad_scale) for axis in axes), gain, coupled, row.offset)
        if (multiplier := made.get(key)) is None:
            multiplier = made[key] = _multiplier(axes, law, dynamics, gain, coupled, row.offset)
        if not multiplier.trivial:
            nontrivial[row.name] = multiplier
    return nontrivial


def _multiplier(
    axes: Sequence[AxisMap], law: Law, dynamics: str, gain: float, coupled: bool, offset: float
) -> Multiplier:
    if dynamics == "exact":
        update = tuple(_no_zero(axis.weight_scale) for axis in axes)
        grad = tuple(_no_zero(axis.grad_scale) for axis in axes)
        return Multiplier(update, grad, gain, offset=offset)
    weight, of_grad = law.lr or (0, 0)
    update = tuple(
        _no_zero(
            _power(axis.weight_scale, weight).zip(
                _power(axis.grad_scale, of_grad), lambda x, y: x * y
            )
        )
        for axis in axes
    )
    ones = tuple(Vector.full(1.0, len(vector)) for vector in update)
    # coupled weight decay is part of the gradient and keeps its strength: the optimizer sees the weight unscaled
    return Multiplier(update, gain=gain, units=ones if coupled else None)


def _gain(
    plan: GrowthPlan,
    law: Law | None,
    described: OptimSpec | None,
    row: TensorRow,
    *,
    matrix_norm: bool,
) -> float:
    """Factor on an orthogonalized step (Muon): undoes the shape in its learning rate and, if asked, ``sqrt(copies)`` in its norm."""
    if law is None or not law.matrix or described is None:
        return 1.0
    source, target = plan.shapes(row)
    how = described.adjusts.get(row.source)
    gain = muon_adjustment(source, how) / muon_adjustment(target, how)
    return gain * sqrt(prod(target) / prod(source)) if matrix_norm else gain


def _no_zero(vector: Vector) -> Vector:
    """Replace a factor 0 by 1: pads that nothing reads have factor 0 and no dynamics to keep."""
    return vector.map(lambda x: x or 1.0)


def _power(vector: Vector, power: float) -> Vector:
    return vector.map(lambda x: x**power if power and x else 1.0)  # 0: see _no_zero


def scales(
    plan: GrowthPlan,
    source: Mapping[str, Tensor],
    added_factors: Mapping[str, Multiplier],
    before: UpdateScale | None,
) -> dict[str, Scale]:
    """Scales of the target parameters for ``UpdateScale``: scales of the source, grown, times the factors that this growth adds.

    Args:
        plan: The growth.
        source: Source parameters by name.
        added_factors: Factors that this growth adds, by target name.
        before: ``UpdateScale`` of the optimizer before the growth.
    """
    grown: dict[str, Scale] = {}
    for row in plan.tensors:
        p = source.get(row.source)
        old = before.scales.get(p) if before and p is not None else None
        new = added_factors.get(row.name)
        if p is None or (old is None and new is None):
            continue
        old, new = old or Scale(()), new or Multiplier(())
        maps = [axis.index_map for axis in plan.axis_maps(row)]
        update = _along(old.update, maps, new.update, p)
        units = None
        if old.units is not None or new.units is not None:
            mine = new.update if new.units is None else new.units
            units = _along(old.seen, maps, mine, p)
        grad = _along(old.grad, maps, new.grad, p)
        offset = new.offset or old.offset
        scale = Scale(update, grad, old.gain * new.gain, units, offset)
        if not plan.shrinks or not _is_one(scale):  # a shrink that inverts a growth leaves no scale
            grown[row.name] = scale
    return grown


def _is_one(scale: Scale) -> bool:
    """True when all factors of a scale are 1 up to rounding."""
    factors = [scale.gain, *scale.update, *scale.grad, *scale.seen]
    return all(bool(torch.all(abs(torch.as_tensor(f) - 1) < ROUNDING)) for f in factors)


def slices(
    plan: GrowthPlan,
    source: Mapping[str, Tensor],
    states: Mapping[str, Mapping[str, object]],
    added_factors: Mapping[str, Multiplier],
) -> dict[str, dict[str, Tensor]]:
    """Slices of the target parameters for ``growkern.optim.AdamW``: target name -> state entries with factors per row and column.

    Rows and columns that start without moments (``state="asymmetric"``, ``"zero_pad"``) get a step count of their own.

    Args:
        plan: The growth.
        source: Source parameters by name.
        states: Optimizer state by source name.
        added_factors: Factors that this growth adds, by target name.
    """
    grown: dict[str, dict[str, Tensor]] = {}
    for row in plan.tensors:
        p, new = source.get(row.source), added_factors.get(row.name, Multiplier(()))
        if p is None:
            continue
        state, axes = states.get(row.source, {}), plan.axis_maps(row)
        maps = _matrix([axis.index_map for axis in axes], IndexMap.product, IndexMap.identity(1))
        entries: dict[str, Tensor] = {}
        for kind, added in (("lr", new.update), ("eps", new.grad), ("decay", ())):
            vectors = _matrix(added, Vector.outer, Vector.full(1.0, 1)) if added else ()
            olds = tuple(state.get(f"{kind}_{side}", 1.0) for side in ("rows", "cols"))
            factors = _along(tuple(f if isinstance(f, Tensor) else 1.0 for f in olds), maps, vectors, p)  # fmt: skip
            for side, m, factor in zip(("rows", "cols"), maps, factors, strict=True):
                trivial = plan.shrinks and _is_one(Scale((factor,)))
                if not trivial and (isinstance(factor, Tensor) or factor != 1):
                    full = torch.full(
                        (m.n_target,), 1.0, dtype=arithmetic(p.dtype), device=p.device
                    )
                    entries[f"{kind}_{side}"] = full * factor
        if row.state == "law" and plan.state != "drop" and (step := state.get("step")) is not None:
            entries |= _born(plan, state, maps, float(step), p)  # pyright: ignore[reportArgumentType]
        if entries or (plan.shrinks and state.keys() & {*SLICES}):
            grown[row.name] = entries
    return grown


def _born(
    plan: GrowthPlan,
    state: Mapping[str, object],
    maps: Sequence[IndexMap],
    step: float,
    like: Tensor,
) -> dict[str, Tensor]:
    """State entries ``born_rows`` and ``born_cols``, the step counts at which rows and columns were created, and ``rewarm``."""
    entries: dict[str, Tensor] = {}
    fresh = plan.state in ("asymmetric", "zero_pad")
    for side, m in zip(("rows", "cols"), maps, strict=True):
        old = state.get(f"born_{side}")
        index = (m.first_copies() if fresh else m).indices
        if isinstance(old, Tensor) or (fresh and PAD in index):
            at = torch.tensor(index, device=like.device)
            known = old if isinstance(old, Tensor) else torch.zeros(
                m.n_source, dtype=arithmetic(like.dtype), device=like.device
            )  # fmt: skip
            lost = torch.full((), step if fresh else 0.0, dtype=known.dtype, device=like.device)
            entries[f"born_{side}"] = torch.where(at == PAD, lost, known[at.clamp(min=0)])
    rewarm = state.get("rewarm")
    if isinstance(rewarm, Tensor):
        entries["rewarm"] = rewarm.clone()
    elif entries and plan.state == "asymmetric":
        entries["rewarm"] = torch.tensor(REWARM, dtype=arithmetic(like.dtype), device=like.device)
    return entries


def _matrix(parts: Sequence[T], product: Callable[[T, T], T], unit: T) -> tuple[T, T]:
    """Fold the axes into rows and columns: the product of all axes but the last, and the last axis."""
    return (reduce(product, parts[:-1], unit), parts[-1]) if parts else (unit, unit)


def _along(
    olds: Sequence[Factor], maps: Sequence[IndexMap], news: Sequence[Vector], like: Tensor
) -> tuple[Factor, ...]:
    """Gather the old factors along each axis, pads taking their mean, and multiply them by the new factors."""
    factors: list[Factor] = []
    for i, index_map in enumerate(maps):
        old = olds[i] if i < len(olds) else 1.0
        if isinstance(old, Tensor):
            index = torch.tensor(index_map.indices, device=like.device)
            old = torch.where(index == PAD, old.mean(), old[index.clamp(min=0)])
        new = news[i] if news else Vector.full(1.0, index_map.n_target)
        added: Factor | None = new.uniform
        if added is None:
            added = torch.tensor(new.expanded(), dtype=arithmetic(like.dtype), device=like.device)
        factors.append(old * added)
    return tuple(factors)
