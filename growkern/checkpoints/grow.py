"""Growth of a transformers checkpoint from shards to shards. Neither source nor target is ever in memory as a whole."""

import copy
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from growkern.api import plan as plan_growth
from growkern.checkpoints.card import CardContents, carried
from growkern.checkpoints.load import Checkpoint, Layout, load
from growkern.checkpoints.output import aside, modes, others, refuse_out, restrict, sweep
from growkern.checkpoints.recipe import RECIPE, Recipe, recipe_of
from growkern.checkpoints.shards import Shards, n_bytes_of
from growkern.commit.checkpoint_guard import growth_history
from growkern.commit.commit import check_blocks, grown_config
from growkern.engine.history import recorded
from growkern.engine.sources import tensors_of
from growkern.errors import CheckpointError, PlanError, raise_all
from growkern.execution.execute import Execution
from growkern.model.describe import describe
from growkern.model.spec import ModelSpec
from growkern.planning.check import check
from growkern.planning.decisions import DepthMethod, WidthMethod
from growkern.planning.growth_plan import GrowthPlan, TensorRow
from growkern.planning.sizes import Target, resolve_sizes
from growkern.support.progress import Progress
from growkern.support.text import table
from growkern.width import ShrinkPerturb

Methods = tuple[WidthMethod | None, DepthMethod | None]
SPARE = 1 << 20  # bytes of disk space for config, index and headers


@dataclass(frozen=True)
class GrownCheckpoint:
    """Report of a checkpoint's growth.

    Attributes:
        out: Folder of the grown checkpoint.
        plan: Plan of the growth.
        n_params: Number of parameters of source and target.
        n_bytes: Bytes of the stored weights of source and target.
        n_files: Number of shards of the target.
        seconds: Wall time.
        notes: Notes of the plan, and the tensors and files of the source that are not in the target.
    """

    out: Path
    plan: GrowthPlan
    n_params: tuple[int, int]
    n_bytes: tuple[int, int]
    n_files: int
    seconds: float
    notes: tuple[str, ...]

    @property
    def summary(self) -> dict[str, object]:
        """The report as a mapping, without the tensors of the plan."""
        kept = "family", "width", "depth", "seed", "source_sizes", "target_sizes", "preserves", "reasons"  # fmt: skip
        own = "out", "n_params", "n_bytes", "n_files", "seconds", "notes"
        return {key: getattr(self.plan, key) for key in kept} | {key: getattr(self, key) for key in own}  # fmt: skip

    def __str__(self) -> str:
        sizes = self.plan.target_sizes
        rows = [[k, n, sizes[k]] for k, n in self.plan.source_sizes.items() if sizes[k] != n]
        rows += [["parameters", *self.n_params], ["bytes", *self.n_bytes]]
        return "\n\n".join(
            [
                f"Grew {self.plan.family} by {self.plan.width}, {self.plan.depth}, seed {self.plan.seed}",
                table(["size", "source", "target"], rows),
                self.plan.preserves_text,
                *(f"note: {note}" for note in self.notes),
                f"{self.out}: {self.n_files} file{'s' * (self.n_files > 1)} of weights in {self.seconds:.3g} s",
            ]
        )


def plan_for(
    source: Checkpoint,
    *,
    to: Target = "2x",
    width: WidthMethod | None = None,
    depth: DepthMethod | None = None,
    seed: int | None = None,
) -> GrowthPlan:
    """Plan a growth of a checkpoint; see ``growkern.plan``. Also raise PlanError if transformers could not load the target."""
    # a checkpoint has no optimizer state to carry
    state = "drop" if isinstance(width, ShrinkPerturb) else "exact"
    plan = plan_growth(source.model, to=to, width=width, depth=depth, seed=seed, state=state)
    target_config(plan, source.model)
    return plan


def _plan_by(recipe: Recipe, source: Checkpoint) -> GrowthPlan:
    """Plan a growth by a recipe; raise PlanError if the recipe is of another source."""
    if recipe.plan is not None:
        plan = GrowthPlan.from_json(recipe.plan)
    else:
        width, depth = recipe.methods()
        plan = plan_for(source, to=recipe.to, width=width, depth=depth, seed=recipe.seed)
    recipe.check(plan, source.model.dtype)
    return plan


def _recipe(
    plan: GrowthPlan, source: Checkpoint, spec: ModelSpec, shard: str, methods: Methods | None
) -> Recipe:
    """Return the recipe of a growth, with the plan itself where a recipe without the plan would make another one.

    Args:
        plan: Plan of the growth.
        source: The source.
        spec: Description of the source.
        shard: Maximum size of a shard.
        methods: The methods that made the plan at the sizes of ``to``, None for a default; None for a plan from elsewhere.
    """
    made = partial(recipe_of, plan, source=source.folder, dtype=source.model.dtype, shard=shard)
    bare = replace(made(again=plan), digest=None)
    try:
        if methods is None:
            return made(again=_plan_by(bare, source))
        # equal sizes, methods and seeds make equal plans
        told = [own in (None, one) for own, one in zip(methods, bare.methods(), strict=True)]
        same = all(told) and resolve_sizes(spec, bare.to) == plan.target_sizes
    except PlanError:  # a method that text does not represent, or sizes that follow each other
        same = False
    return made(again=plan if same else None)


def grow(
    folder: Path,
    out: Path,
    *,
    to: Target = "2x",
    width: WidthMethod | None = None,
    depth: DepthMethod | None = None,
    seed: int | None = None,
    plan: GrowthPlan | None = None,
    recipe: Recipe | None = None,
    overwrite: bool = False,
    max_shard_size: str | None = None,
    on_progress: Progress = lambda done, total: None,
) -> GrownCheckpoint:
    """Grow a checkpoint and write the target to another folder; ``from_pretrained`` loads the target.

    Source tensors are read from their shards, and target tensors written to new shards, one set of tensors at a time. The target is
    written to a temporary folder beside ``out``, which is renamed when the target is complete. A failure or Ctrl-C leaves no files. The
    target has a model card of its own (README.md), with the license and the languages of the source's card, and a recipe
    (growkern_recipe.yaml), which makes the same target of the same source, bit for bit.

    Args:
        folder: Folder of the source, see ``load``; only read.
        out: Folder of the target; the parent folder exists.
        to: See ``expand_inplace``.
        width: Width method; default ``width.Lossless()``.
        depth: Depth method; default ``depth.IdentityBlocks()``.
        seed: Seed of the symmetry-breaking noise; None for the number of growths in the config's history.
        plan: An existing plan, in place of ``to``, ``width``, ``depth`` and ``seed``.
        recipe: A recipe, in place of ``to``, ``width``, ``depth``, ``seed`` and ``plan``.
        overwrite: Replace an existing checkpoint at ``out``.
        max_shard_size: Maximum size of a shard; a larger tensor gets a shard of its own. None for the recipe's, else 5GB.
        on_progress: Called after every tensor with the bytes written and the total bytes.

    Returns:
        Report of the growth; ``print`` it.

    Raises:
        CheckpointError: See ``load``; or ``out`` exists, contains the source or is inside it, or cannot be written.
        UnsupportedModelError: See ``load``.
        PlanError: The growth cannot be planned, the plan is for another model, or no config describes the target.
        InsufficientMemoryError: The largest set of tensors does not fit in memory.
    """
    start = perf_counter()
    shard = max_shard_size or (recipe and recipe.max_shard_size) or "5GB"
    limit = n_bytes_of(shard)
    refuse_out(folder, out, overwrite)
    source = load(folder, mapped=True)
    copied, left = others(folder, (*source.files, RECIPE))
    refuse_out(folder, out, overwrite, copied)
    model = source.model
    with torch.no_grad():
        spec = describe(model)
        methods = (width, depth) if plan is None else None
        if recipe is not None:
            plan, methods = _plan_by(recipe, source), None if recipe.plan else recipe.methods()
        elif plan is None:
            plan = plan_for(source, to=to, width=width, depth=depth, seed=seed)
        check(plan, spec)
        check_blocks(plan, model)
        config = target_config(plan, model)
        raise_all(PlanError, f"no config describes the grown {spec.family}:", [*_unlike(plan, model, config)])  # fmt: skip
        made = _recipe(plan, source, spec, shard, methods)
        names = _parameters(plan, model)
        n_params = sum(_n(plan.shapes(row)[1]) for row in plan.tensors if row.source in names)
        counts = sum(p.numel() for p in model.parameters()), n_params
        fields, unread = carried(folder, copied)
        notes = (*plan.notes, *_left_out(source, left), *unread)
        tensors = tensors_of(model, (), spec)
        run = Execution(plan, tensors, lambda _: {}, streams=True)
        layout = Layout(source, plan, tensors.values)
        model.to("meta")  # the model drops its references; sources are freed one by one
        swept = sweep(out)
        refuse_full(out, layout.n_bytes)
        with aside(out, overwrite, folder.stat().st_mode) as part:
            config.save_pretrained(part)
            shards = Shards(part, layout.targets, limit)
            _write(shards, run, layout, on_progress)
            for name in copied:
                shutil.copyfile(folder / name, part / name)
            card = CardContents(plan, folder, config.architectures, counts, notes, fields, RECIPE)
            card.write(part)
            made.write(part, folder)
            source.snapshot.refuse_changes((*source.files, *copied))
            restrict(part, modes(folder, source.stored.files, copied))
            refuse_out(folder, out, overwrite, copied)
    sizes = sum(t.numel() * t.element_size() for t in layout.sources.values()), layout.n_bytes
    seconds, n_files = perf_counter() - start, len(shards.files)
    return GrownCheckpoint(out, plan, counts, sizes, n_files, seconds, (*notes, *swept))


def refuse_full(out: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < n_bytes + SPARE:
        raise CheckpointError(
            f"cannot write {out}: the target takes {n_bytes / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free; "
            "free space, or name a folder on another disk."
        )


def _left_out(source: Checkpoint, files: list[str]) -> Iterator[str]:
    """Yield notes on the tensors and files of the source that are not in the target."""
    if source.unused:
        kind, some = type(source.model).__name__, ", ".join(source.unused[:3])
        yield f"{len(source.unused)} stored tensors are not of a {kind} and were left out: {some}."
    if files:
        yield f"not copied: {', '.join(files)}."


def target_config(plan: GrowthPlan, model: Any, split: Sequence[bool] = ()) -> Any:
    """Return the target's config; raise PlanError if new blocks need a live model or transformers rejects the config."""
    config = model.config
    if plan.drawn:
        raise PlanError(
            f"{plan.depth} initializes new blocks with the code of a live model: load the checkpoint by from_pretrained, grow the model by "
            "expand_inplace, and save it; or choose another depth method."
        )
    growth_history(model)  # refuses a history that no growth can be added to
    grown = grown_config(plan, model, config, recorded(plan, describe(model, values=False), split))
    grown._attn_implementation = None  # of this process; save_pretrained checks other fields against it, and does not store it
    try:
        type(config).from_dict(grown.to_dict())
        with TemporaryDirectory() as folder:
            grown.save_pretrained(folder)
    except Exception as error:
        sizes = ", ".join(f"{k}={n}" for k, n in plan.target_sizes.items())
        raise PlanError(
            f"transformers accepts no {plan.family} of {sizes}; name other sizes: {' '.join(str(error).split())}"
        ) from error
    return grown


def _unlike(plan: GrowthPlan, model: Any, config: Any) -> Iterator[str]:
    """Yield the tensors whose shape is another in a model that is built from the target's config: a checkpoint would not load."""
    with torch.device("meta"):
        built = type(model)(copy.deepcopy(config))
    live = dict(built.named_parameters(remove_duplicate=False)) | dict(built.named_buffers())
    for row in plan.tensors:
        shape, found = tuple(plan.shapes(row)[1]), live.get(row.name)
        if found is None or tuple(found.shape) != shape:
            other = "no such tensor" if found is None else f"{tuple(found.shape)}"
            yield f"{row.name}: would be {shape}, and a model of the grown config has {other}; name other sizes."


def _parameters(plan: GrowthPlan, model: Any) -> set[str]:
    held = dict(model.named_parameters(remove_duplicate=False))
    return {row.source for row in plan.tensors if row.source in held}


def _write(shards: Shards, run: Execution, layout: Layout, on_progress: Progress) -> None:
    """Compute all target tensors and write them to the shards."""
    done = 0
    for name, tensor in _grown(run, layout):
        done += sum(shards.write(*entry) for entry in layout.on_disk(name, tensor).items())
        on_progress(done, shards.n_bytes)
        del tensor
    shards.close()


def _grown(run: Execution, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Yield every target tensor with its name; read each source before it is used, and free it after its last use."""
    sources, values = run.sources.values, dict(run.sources.values)
    same: dict[str, list[TensorRow]] = {}
    for row in run.plan.tensors:
        if not run.plan.changes(row):
            same.setdefault(row.source, []).append(row)
    used = [
        {name for row in s.tensors for name in (row.source, row.next_layer_source or row.source)}
        for s in run.sets
    ]
    last = {name: i for i, names in enumerate(used) for name in names}
    parts = run.parts()
    for i, tensor_set in enumerate(run.sets):
        read = {name: layout.read(name, values[name]) for name in used[i]}
        sources.update(read)
        staged = next(parts)
        rows = same.pop(source := tensor_set.tensors[0].source, [])
        kept = [(row.name, read[source]) for row in rows]
        read.clear()
        for name in used[i]:
            sources[name] = values[name]
            if last[name] == i and name not in same:
                sources.pop(name)
                values.pop(name)
        yield from staged.values.items()
        staged.values.clear()
        yield from kept
        kept.clear()
    for source, rows in same.items():
        sources.pop(source, None)
        tensor = layout.read(source, values.pop(source))
        yield from ((row.name, tensor) for row in rows)
        del tensor


def _n(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
