"""MSG's ramp: after a growth, the mask ``c`` of what is new rises from ``1 / ramp`` to 1, folded into the weights of a stock model.

    space that a norm reads (hidden): weights that write a new coordinate x c, gains x sqrt(r), epsilons x r; r = (n_old + c^2 n_new) / n
    any other space (ffn, heads): weights that read a new coordinate x c
    new block: weights and biases that write its outputs x c

At c = 0 the model computes the source's function, and at c = 1 all weights, gains and epsilons are those of the growth without a ramp. The
optimizer sees weights and gradients without the mask (``UpdateScale.masks``). The schedule's counts alone give ``c``, so a state dict needs
no entry for it. Where a tied head reads rows of the embedding, they carry ``c`` there too. A clipping threshold applies to gradients of the
masked weights. The config keeps the epsilon of c = 1, and modules have the masked one until the ramp ends. A schedule that is removed in a
ramp leaves the mask as it is.

Yao et al., "Masked Structural Growth for 2x Faster Language Model Pre-training", ICLR 2024, arXiv:2305.02869. There, the mask of a norm's
input weighs the mean square by ``c``; folded into the writers, it weighs it by ``c^2``. There, the mask of a head multiplies its queries,
keys and values; here, it multiplies what ``o`` reads. In float32, rounding moved weights by at most 1.6e-5 of their values over a ramp of
5,000 steps (measured).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from growkern.commit.optimizer_guard import optim_guard_of, settle
from growkern.depth import IdentityBlocks
from growkern.engine.report import GrowthReport
from growkern.errors import GrowthError, PlanError, raise_all
from growkern.model.describe import describe
from growkern.model.size_values import space_of
from growkern.model.spec import Blocks, ModelSpec
from growkern.optimizer.factors import Factor, Scale, multiply_, rescale_
from growkern.optimizer.update_scale import UpdateScale, offset_of, scale_of
from growkern.planning.axis_scales import axis_maps, norm_factors
from growkern.planning.build import build
from growkern.planning.decisions import WidthMethod
from growkern.planning.growth_record import read
from growkern.planning.index_map import IndexMap
from growkern.planning.method_spaces import Space, spaces
from growkern.planning.sizes import WIDTHS, resolve_sizes
from growkern.support.dtypes import arithmetic
from growkern.support.interrupts import uninterrupted
from growkern.support.names import named_parameters, submodule
from growkern.training.triggers import Event
from growkern.width.copy_and_pad import CopyAndPad
from growkern.width.drawn import Drawn

if TYPE_CHECKING:
    from growkern.training.attachment import Attachment
    from growkern.training.schedule import GrowthSchedule

EPS = "_growkern_eps"  # attribute of a norm during a ramp: name and value of its epsilon at c = 1
Vectors = dict[tuple[IndexMap, torch.dtype, torch.device], Tensor]
Coordinates = tuple[int, int]  # number of old coordinates, and of all, that a norm reads


@dataclass(frozen=True)
class Mask:
    """Which elements of a tensor carry ``c``.

    Attributes:
        axes: Index map of each axis whose new coordinates carry ``c``; None for an axis without a mask.
        whole: True when every element carries ``c``.
        norm: Coordinates that the norm of a gain reads, so that the gain carries ``sqrt(r)``; None for other tensors.
        offset: Constant that the model adds to the tensor.
    """

    axes: tuple[IndexMap | None, ...]
    whole: bool = False
    norm: Coordinates | None = None
    offset: float = 0.0

    def factors(self, c: float, like: Tensor, made: Vectors) -> tuple[Factor, ...]:
        """Return the factors of the elements under the mask ``c``, one per axis, on the device of a tensor.

        ``made`` holds the vectors of this ``c`` that other tensors had, and takes those of this tensor.
        """
        number = (c if self.whole else 1.0) * sqrt(mean_square(c, self.norm))
        vectors: list[Factor] = [
            1.0 if axis is None else _vector(axis, c, like, made) for axis in self.axes or (None,)
        ]
        return vectors[0] * number, *vectors[1:]


def _vector(index_map: IndexMap, c: float, like: Tensor, made: Vectors) -> Tensor:
    """Return ``c`` at new coordinates, and 1 at the others."""
    key = index_map, arithmetic(like.dtype), like.device
    if key not in made:
        values = index_map.per_copy(lambda _: 1.0, pad=c).expanded()
        made[key] = torch.tensor(values, dtype=key[1], device=key[2])
    return made[key]


def mean_square(c: float, norm: Coordinates | None) -> float:
    """Return ``r``, the factor on the mean square of a norm's input whose new coordinates are multiplied by ``c``."""
    n_old, n = norm or (1, 1)
    return (n_old + c * c * (n - n_old)) / n


def masks_of(
    spec: ModelSpec, source_sizes: Mapping[str, int], new_blocks: Sequence[str]
) -> tuple[dict[str, Mask], dict[str, Coordinates]]:
    """Derive what carries ``c`` from the roles of the axes.

    Args:
        spec: Description of the grown model.
        source_sizes: Named sizes before the growth.
        new_blocks: Names of the blocks that the growth added.

    Returns:
        The masks by tensor name; and ``"module.attribute"`` of each masked epsilon -> the coordinates that the norm reads.
    """
    before = replace(spec, sizes=dict(source_sizes))
    wide = Drawn().widen(before, spec.sizes)
    maps = axis_maps(spec.axes, wide, norm_factors(before, wide), {})
    growing = {space.name: space for space in spaces(before, spec.sizes) if not space.same}
    masks, eps = dict[str, Mask](), dict[str, Coordinates]()
    for name, axes in spec.tensors.items():
        if name in spec.ties:
            continue
        norm = axes[0].norm if axes else None
        read = growing.get(space_of(norm.reads)) if norm is not None else None
        coordinates = None if read is None else (read.n_source, read.n_target)
        if norm is not None and norm.eps is not None and coordinates is not None:
            eps[f"{name.rpartition('.')[0]}.{norm.eps}"] = coordinates
        masked: list[IndexMap | None] = []
        for axis in axes:
            own = [growing[space] for space in map(space_of, axis.streams) if space in growing]
            role = "writer" if any(space.norms for space in own) else "reader"
            masked.append(maps[spec.axes[axis]].index_map if own and axis.role == role else None)
        place = spec.block_of(name)
        stack, index, inner = place or (Blocks(""), 0, "")
        whole = f"{stack.path}.{index}" in new_blocks and inner in stack.branches
        if whole or coordinates is not None or any(axis is not None for axis in masked):
            masks[name] = Mask(tuple(masked), whole, coordinates, norm.offset if norm else 0.0)
    return masks, eps


class Ramp:
    """The ramp of an attached schedule's last growth.

    Attributes:
        c: Mask that the live weights carry; 1 when no ramp is in progress.
        ends: Step at which the mask reaches 1.
    """

    def __init__(self) -> None:
        self.c, self.ends = 1.0, 0
        self._masks: dict[Tensor, Mask] = {}
        self._eps: list[tuple[nn.Module, str, Coordinates]] = []

    def begin(self, of: "Attachment") -> None:
        """Mask what a growth has just added.

        Raises:
            PlanError: The spec of a custom model does not describe the grown model.
        """
        try:
            c = self._found(of)
        except GrowthError as error:
            raise PlanError(
                f"the model has grown, and its ramp has not begun: {error} Correct spec=, and go on from a checkpoint before the growth."
            ) from error
        if c < 1:
            self._move(of, c)

    def resume(self, of: "Attachment") -> None:
        """Go on with the ramp that the schedule's counts tell of, in a model whose weights carry its mask.

        Raises:
            PlanError: The model has not the sizes of the last growth, or is in a ramp of another schedule.
        """
        c, scales = self._found(of), map(scale_of, of.optims)
        masked = next((scale for scale in scales if scale is not None and scale.masks), None)
        if masked is not None and not of.schedule.history:
            raise PlanError(
                f"this model is in a ramp of a schedule that was removed: {masked.ramp}. Load the state of that schedule before this one "
                "is attached."
            )
        if c < 1 or masked is not None or any(EPS in vars(m) for m in of.model.modules()):
            for optim in of.optims:
                settle(optim)  # factors that were loaded
            self.c = c
            self._move(of, c)

    def count(self, of: "Attachment") -> None:
        """Count a step, and raise the mask."""
        if self.c == 1:
            of.schedule.counts.n_steps += 1
            return
        with uninterrupted():
            of.schedule.counts.n_steps += 1
            self._move(of, progress(of.schedule)[0])

    def noted(self, report: GrowthReport) -> GrowthReport:
        """Return the report of a growth with a note on the ramp that has begun."""
        if self.c == 1:
            return report
        note = f"a ramp masks what is new until step {self.ends:,}: the function goes on from the source's."
        return replace(report, notes=(*report.notes, note))

    def _found(self, of: "Attachment") -> float:
        """Find what the ramp of the last growth masks; return the mask that it has now."""
        c, self.ends = progress(of.schedule)
        if c < 1:
            model, growth = of.model, read(of.schedule.history[-1])
            spec = describe(model, of.spec_of(model))
            if dict(spec.sizes) != dict(growth.target_sizes):
                raise PlanError(
                    f"the schedule is in a ramp of a model of {dict(growth.target_sizes)}, and this model has {dict(spec.sizes)}: call "
                    "growkern.resume and load the weights before the schedule is loaded and attached."
                )
            masks, eps = masks_of(spec, growth.source_sizes, of.schedule.new_blocks)
            params = dict(named_parameters(model, remove_duplicate=False))
            self._masks = {params[name]: mask for name, mask in masks.items() if name in params}
            places = [(*path.rpartition("."), of_norm) for path, of_norm in eps.items()]
            self._eps = [(submodule(model, at), name, norm) for at, _, name, norm in places]
        return c

    def _move(self, of: "Attachment", c: float) -> None:
        """Change the mask of weights from ``self.c`` to ``c``, and set that of epsilons and optimizers."""
        with torch.no_grad(), uninterrupted():
            before, after = Vectors(), Vectors()
            factors = {p: mask.factors(c, p, after) for p, mask in self._masks.items()}
            held = dict[Tensor, dict[str, Tensor]]()
            for optim in of.optims:
                held |= self._in(optim, factors if c < 1 else {})
            for p, mask in self._masks.items() if c != self.c else ():
                pairs = zip(mask.factors(self.c, p, before), factors[p], strict=True)
                ratios = tuple(new / old for old, new in pairs)
                for key, t in held.get(p, {"": p}).items():
                    rescale_(t, ratios, offset_of(key, mask.offset), multiply_)
            for module, name, norm in self._eps:
                _, value = vars(module).setdefault(EPS, (name, getattr(module, name)))
                setattr(module, name, value * mean_square(c, norm))
            self.c = c
            if c == 1:
                self._masks, self._eps = {}, []
                for module in of.model.modules():
                    if EPS in vars(module):
                        setattr(module, *vars(module).pop(EPS))

    def _in(
        self, optim: Optimizer, factors: Mapping[Tensor, tuple[Factor, ...]]
    ) -> dict[Tensor, dict[str, Tensor]]:
        """Let an optimizer see its parameters without their mask; return them, with their state in the same units."""
        if (scale := scale_of(optim)) is None:
            guard = optim_guard_of(optim)
            rules = guard.rules.items() if guard is not None else ()
            orders = {key: (rule.weight, rule.grad) for key, rule in rules if rule is not None}
            scale = UpdateScale(optim, dict[Tensor, Scale](), orders=orders)
        scale.restore()  # this hook may run before that of the UpdateScale
        params: list[Tensor] = [p for group in optim.param_groups for p in group["params"]]
        masked = [p for p in params if p in self._masks]
        scale.masks = {
            p: Scale(own, tuple(1.0 / f for f in own), offset=self._masks[p].offset)
            for p in masked
            if (own := factors.get(p)) is not None
        }
        scale.ramp = f"the ramp ends at step {self.ends:,}"
        return {p: scale.tensors(p) for p in masked}


def progress(schedule: "GrowthSchedule") -> tuple[float, int]:
    """Return the mask of the next step, 1 without a ramp, and the step after which it is 1."""
    fired = zip(schedule.events, schedule.fired, strict=False)
    last = next(((e, step) for e, step in reversed([*fired]) if e.to is not None), None)
    if last is None or not last[0].ramp:
        return 1.0, 0
    n, ramp = schedule.counts.n_steps - last[1] + 1, last[0].ramp
    return min(1.0, n / ramp), last[1] + ramp - 1


def width_of(event: Event, model: nn.Module, spec: ModelSpec | None) -> WidthMethod | None:
    """Return the width method that an event grows by: under a ramp, the one that draws all new weights.

    Raises:
        PlanError: The mask of the event's growth is no function of weights, or its methods make no sense with a ramp; every reason at
            once.
    """
    if not event.ramp or event.to is None:
        return event.width
    described = describe(model, spec, values=False)
    sizes = resolve_sizes(described, event.to)
    title = f"cannot ramp this {described.family}:"
    raise_all(PlanError, title, [*_problems(event, described, sizes)])
    wide = [name for name in WIDTHS if sizes.get(name) != described.sizes.get(name)]
    if not wide or not isinstance(event.width, CopyAndPad):
        return event.width
    same_depth = {stack.size: described.sizes[stack.size] for stack in described.stacks}
    source = build(described, {**sizes, **same_depth}, width=event.width, depth=IdentityBlocks())
    raise_all(PlanError, title, [f"at c = 0, {reason}." for reason in source.reasons])
    return Drawn(event.width.std)


def _problems(event: Event, spec: ModelSpec, sizes: Mapping[str, int]) -> Iterator[str]:
    """Yield why the growth of an event cannot be ramped."""
    grown = [name for name, n in sizes.items() if n != spec.sizes[name]]
    stacks = [stack for stack in spec.stacks if stack.size in grown]
    for name in {*grown} - {*WIDTHS, *(stack.size for stack in stacks)}:
        yield f"ramp= masks {', '.join(WIDTHS)} and layers, and not {name}: grow {name} by an event of its own, without ramp=."
    own = event.width
    if {*grown} & {*WIDTHS} and not (isinstance(own, CopyAndPad) and own.norm == "corrected"):
        yield (
            "ramp= goes on from the function of CopyAndPad(norm='corrected'): pass width=width.CopyAndPad(norm='corrected'), not "
            f"{own or 'the default'}."
        )
    wholes = " at whole multiples" if spec.post_norm else ""
    for space in spaces(spec, sizes):
        if space.norms and not space.same and (why := _not_folded(spec, space)):
            yield (
                f"{space.size}: {why}, so the mask is no function of weights. Grow {space.size} by an event without ramp= "
                f"(width.Lossless() keeps the function{wholes}), and ramp the other sizes."
            )
    for stack in stacks:
        yield from _of_depth(event, stack, spec.sizes[stack.size], sizes[stack.size])


def _not_folded(spec: ModelSpec, space: Space) -> str | None:
    """Return why the mask of a space that norms read cannot be folded into weights."""
    if "layer" in space.norms:
        where = "post-norm LayerNorms" if spec.post_norm else "LayerNorms"
        return f"{where} subtract a mean over the masked coordinates"
    if spec.post_norm:
        return "norms write the residual stream (post-norm)"
    if space.name in spec.squares_kept:
        return "a norm has no gain to correct, or an epsilon that cannot change"
    return "a norm reads it behind an activation function" if space.activated else None


def _of_depth(event: Event, stack: Blocks, n_source: int, n_target: int) -> Iterator[str]:
    """Yield why new blocks of a stack cannot be ramped."""
    ways = "pass depth=depth.Stack(), depth.TopCopies() or depth.Fresh()"
    order = event.depth.deepen(n_source, n_target) if event.depth is not None else None
    if stack.carries:
        yield (
            f"{stack.size}: a new post-norm block normalizes its input also where its outputs are masked: grow {stack.size} by an event "
            "without ramp= (depth.IdentityBlocks() keeps the function)."
        )
    elif not stack.branches:
        yield f"{stack.size}: the spec does not name the outputs of a block; set Blocks(outputs=(...))."
    if order is None or order.identity:
        yield f"{stack.size}: IdentityBlocks starts at 0 and stays there under a mask; leave ramp= out, or {ways}."
    elif any(block.branch != 1 for block in order.blocks):
        yield f"{stack.size}: {event.depth} scales the branches of the source's blocks, which no mask can undo; {ways}."


def of_run(attachment: "Attachment") -> Iterator[str]:
    """Yield why no growth of an attached run can be ramped."""
    if not any(event.ramp for event in attachment.schedule.events):
        return
    for name in ("ema", "master_weights"):
        if attachment.options.get(name):
            yield f"ramp= with {name}=: the copies of the weights would not carry the mask; leave one of the two out."
    low = {p.dtype for p in attachment.model.parameters() if p.dtype != arithmetic(p.dtype)}
    if low:
        yield (
            f"ramp= rescales weights by a small factor in every step, which {', '.join(map(str, low))} rounds away: keep the weights in "
            "float32, and compute in low precision by autocast."
        )
