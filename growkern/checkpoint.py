"""Growth of a checkpoint that transformers saved, from shards to shards: neither source nor target is ever in memory whole."""

import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from growkern.api import plan as plan_growth
from growkern.commit import check_blocks, grown_config
from growkern.describe import describe, refuse_unknown, tensors_of
from growkern.errors import CheckpointError, GrowthError, PlanError, UnsupportedModelError
from growkern.execute import Execution
from growkern.law import check
from growkern.memory import page_out
from growkern.methods import DepthMethod, WidthMethod
from growkern.plan import GrowthPlan, TensorRow
from growkern.shards import Shards, aside, n_bytes_of, parsed, stored
from growkern.sizes import Target
from growkern.tables import table

CONFIG = "config.json"
WEIGHTS = (  # what becomes of a folder's weights and training state is not a matter of copying
    ".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".index.json", "trainer_state.json",
)  # fmt: skip
SPARE = 1 << 20  # bytes of the disk for config, index and headers
Progress = Callable[[int, int], object]  # bytes written so far, bytes in all


@dataclass(frozen=True)
class Checkpoint:
    """A saved model, loaded.

    Attributes:
        folder: Where it lies.
        model: On the CPU, in evaluation mode, in the widest dtype that is stored; its weights are mapped from the shards.
        dtypes: Name on disk -> dtype.
        unused: Names on disk that the model has no place for.
    """

    folder: Path
    model: Any
    dtypes: Mapping[str, torch.dtype]
    unused: tuple[str, ...]


@dataclass(frozen=True)
class GrownCheckpoint:
    """What became of a checkpoint.

    Attributes:
        out: Where it lies.
        plan: What was done.
        n_params: Parameters of source and target.
        n_bytes: Of the weights of source and target, as stored.
        n_files: Shards of the target.
        seconds: Wall time.
        notes: What the user should know.
    """

    out: Path
    plan: GrowthPlan
    n_params: tuple[int, int]
    n_bytes: tuple[int, int]
    n_files: int
    seconds: float
    notes: tuple[str, ...]

    def __str__(self) -> str:
        sizes = self.plan.target_sizes
        rows = [[k, n, sizes[k]] for k, n in self.plan.source_sizes.items() if sizes[k] != n]
        rows += [["parameters", *self.n_params], ["MB", *(round(n / 1e6) for n in self.n_bytes)]]
        why = "; ".join(self.plan.reasons)
        return "\n\n".join(
            [
                f"Grew {self.plan.family} by {self.plan.width}, {self.plan.depth}, seed {self.plan.seed}",
                table(["size", "source", "target"], rows),
                "function preserving" if not why else f"not function preserving: {why}",
                *(f"note: {note}" for note in self.notes),
                f"{self.out}: {self.n_files} file{'s' * (self.n_files > 1)} of weights in {self.seconds:.3g} s",
            ]
        )


def load(folder: Path) -> Checkpoint:
    """Load a checkpoint that ``save_pretrained`` wrote, after its files have been checked.

    Args:
        folder: With ``config.json`` and safetensors.

    Returns:
        The model of the class that its config names, and how it is stored.

    Raises:
        CheckpointError: It is incomplete, damaged, or not in safetensors; every reason at once.
        UnsupportedModelError: No family describes its class, or it is quantised.
    """
    kind = _kind(folder)
    dtypes = stored(folder)
    floating = [dtype for dtype in dtypes.values() if dtype.is_floating_point]
    widest = floating[0] if floating else torch.float32
    for dtype in floating:
        widest = torch.promote_types(widest, dtype)
    with _quiet():
        try:
            model, info = kind.from_pretrained(
                str(folder.resolve()),
                dtype=widest,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{folder}: transformers cannot load it as {kind.__name__}: {error}"
            ) from error
    problems = [*sorted(info["missing_keys"]), *map(str, info["error_msgs"])]
    if problems:
        raise CheckpointError(
            f"{folder} is incomplete: {len(problems)} tensors of {kind.__name__} are not stored: {', '.join(problems[:5])}."
        )
    return Checkpoint(folder, model, dtypes, tuple(sorted(info["unexpected_keys"])))


def grow(
    folder: Path,
    out: Path,
    *,
    to: Target = "2x",
    width: WidthMethod | None = None,
    depth: DepthMethod | None = None,
    seed: int | None = None,
    plan: GrowthPlan | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    on_progress: Progress = lambda done, total: None,
) -> GrownCheckpoint:
    """Grow a checkpoint into another folder, which ``from_pretrained`` loads.

    Sources are read from their shards and targets written to theirs one set of tensors after the other. All is written to a folder
    beside ``out``, which is renamed when it is whole; a failure, or Ctrl-C, leaves nothing behind.

    Args:
        folder: Source: what ``load`` takes. It is only read.
        out: Target; its parent exists.
        to: As in ``expand_inplace``.
        width: Width method; default ``width.Lossless()``.
        depth: Depth method; default ``depth.IdentityBlocks()``.
        seed: Of all noise; None for the number of growths in the config's history.
        plan: A plan made before, in place of ``to``, ``width``, ``depth`` and ``seed``.
        overwrite: Replace a checkpoint that is at ``out``.
        max_shard_size: Of a file; a tensor that is larger has one of its own.
        on_progress: Called after every tensor.

    Returns:
        What was done; ``print`` it.

    Raises:
        CheckpointError: See ``load``; ``out`` exists, is not beside the source, or cannot be written.
        UnsupportedModelError: See ``load``.
        PlanError: The growth cannot be planned, or the plan is for another model.
        InsufficientMemoryError: The largest set of tensors does not fit.
    """
    start = perf_counter()
    limit = n_bytes_of(max_shard_size)
    _refuse_out(folder, out, overwrite)
    source = load(folder)
    model = source.model
    with torch.no_grad():
        found = describe(model)
        if plan is None:
            plan = plan_growth(model, to=to, width=width, depth=depth, seed=seed)
        check(plan, found)
        check_blocks(plan, model)
        config = grown_config(plan, model.config)
        names = _parameters(plan, model)
        n_params = sum(p.numel() for p in model.parameters())
        tensors = tensors_of(model, None, found)
        run = Execution(plan, tensors, {}, memory="lean")
        layout = _Layout(source, plan, tensors.values)
        model.to("meta")  # the sources are let go one by one
        _refuse_full(out, layout.n_bytes)
        with aside(out, overwrite) as part:
            shards = Shards(part, layout.targets, limit)
            done = 0
            for name, tensor in _grown(run, layout):
                done += sum(shards.write(*one) for one in layout.on_disk(name, tensor).items())
                on_progress(done, shards.n_bytes)
                del tensor
            shards.close()
            config.save_pretrained(part)
            left = _copy_others(folder, part)
    notes = [*plan.notes]
    if source.unused:
        some = ", ".join(source.unused[:3])
        notes.append(
            f"{len(source.unused)} stored tensors are not of a {type(model).__name__} and were left out: {some}."
        )
    if left:
        notes.append(f"not copied: {', '.join(left)}.")
    sizes = sum(t.numel() * t.element_size() for t in layout.sources.values()), layout.n_bytes
    target = sum(_n(plan.shapes(row)[1]) for row in plan.rows if row.source in names)
    return GrownCheckpoint(
        out, plan, (n_params, target), sizes, len(shards.files), perf_counter() - start, tuple(notes)
    )


def _kind(folder: Path) -> Any:
    """The class of transformers that a checkpoint's config names."""
    import transformers

    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; give that of a saved checkpoint.")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} holds no {CONFIG}; give what save_pretrained wrote.")
    config = parsed(folder / CONFIG)
    if "quantization_config" in config:
        raise UnsupportedModelError(
            f"{folder} is quantised; grow the checkpoint it was made from, and quantise the target."
        )
    named = config.get("architectures")
    if not isinstance(named, list) or len(named) != 1:  # pyright: ignore[reportUnknownArgumentType]
        raise UnsupportedModelError(
            f'{folder / CONFIG} does not say which class it is of; add "architectures": ["LlamaForCausalLM"], or what it is.'
        )
    name = str(named[0])  # pyright: ignore[reportUnknownArgumentType]
    kind = getattr(transformers, name, None)
    if not isinstance(kind, type) or not hasattr(kind, "from_pretrained"):
        raise UnsupportedModelError(f"{folder / CONFIG}: transformers has no class {name!r}.")
    refuse_unknown(kind)
    return kind


@contextmanager
def _quiet() -> Generator[None]:
    """Transformers without its progress bars and its table of what was loaded."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _refuse_out(folder: Path, out: Path, overwrite: bool) -> None:
    source, target = folder.resolve(), out.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise CheckpointError(
            f"cannot write {out}: it is, is in, or holds the source {folder}; name another folder."
        )
    if not out.parent.is_dir():
        raise CheckpointError(f"cannot write {out}: there is no folder {out.parent}.")
    if not (out.exists() or out.is_symlink()):
        return
    if not overwrite:
        raise CheckpointError(f"{out} exists; name another folder, or pass --overwrite.")
    if out.is_symlink() or not out.is_dir():
        raise CheckpointError(f"cannot overwrite {out}: it is no folder.")
    if any(out.iterdir()) and not (out / CONFIG).is_file():
        raise CheckpointError(
            f"cannot overwrite {out}: it holds no {CONFIG}, so it is no checkpoint; remove it yourself."
        )


def _refuse_full(out: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < n_bytes + SPARE:
        raise CheckpointError(
            f"cannot write {out}: the target takes {n_bytes / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free there."
        )


def _parameters(plan: GrowthPlan, model: Any) -> set[str]:
    held = dict(model.named_parameters(remove_duplicate=False))
    return {row.source for row in plan.rows if row.source in held}


class _Layout:
    """How tensors of the model lie on disk: under which names, in which pieces, in which dtype.

    Attributes:
        rows: Target name -> row, of what is stored.
        sources: What is stored of the source, on the meta device.
        targets: The same of the target.
        mapped: Sources that are what is on disk, as it is.
        n_bytes: Of the targets.
    """

    def __init__(
        self, source: Checkpoint, plan: GrowthPlan, values: Mapping[str, Tensor]
    ) -> None:
        self.model = source.model
        kept = set(self.model.state_dict()) - set(self.model._keys_to_ignore_on_save or ())  # pyright: ignore[reportPrivateUsage]
        self.rows: dict[str, TensorRow] = {r.name: r for r in plan.rows if r.source in kept}
        self.sources: dict[str, Tensor] = {}
        self.targets: dict[str, Tensor] = {}
        self.mapped: set[str] = set()
        whole: dict[str, Tensor] = {}
        for row in self.rows.values():
            value = values[row.source]
            shape = plan.shapes(row)[1]
            before, after = (
                self._reverted({name: torch.empty(dims, dtype=value.dtype, device="meta")})
                for name, dims in ((row.source, value.shape), (row.name, shape))
            )
            whole[row.name] = torch.empty(shape, dtype=value.dtype, device="meta")
            for old, new in zip(before, after, strict=True):
                dtype = source.dtypes.get(old, value.dtype)
                self.sources[old] = before[old].to(dtype)
                self.targets[new] = after[new].to(dtype)
            if source.dtypes.get(next(iter(before))) == value.dtype and len(before) == 1:
                self.mapped.add(row.source)
        shapes = {name: tensor.shape for name, tensor in self._reverted(whole).items()}
        if shapes != {name: tensor.shape for name, tensor in self.targets.items()}:
            raise UnsupportedModelError(
                f"a checkpoint of {type(self.model).__name__} keeps several of the model's tensors in one, which is not grown on "
                "disk: load it, grow it with expand_inplace, and save it."
            )
        self.n_bytes = sum(t.numel() * t.element_size() for t in self.targets.values())

    def on_disk(self, name: str, tensor: Tensor) -> Mapping[str, Tensor]:
        """A target as it is stored; nothing where the model does not store it."""
        return self._reverted({name: tensor}) if name in self.rows else {}

    def _reverted(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self.model, tensors)


def _grown(run: Execution, layout: _Layout) -> Iterator[tuple[str, Tensor]]:
    """Every target by name; sources are let go when they have been used."""
    values = dict(run.sources.values)
    same: dict[str, list[TensorRow]] = {}
    for row in run.plan.rows:
        if not run.plan.changes(row):
            same.setdefault(row.source, []).append(row)
    for one, staged in zip(run.sets, run.parts(), strict=True):
        source = one.rows[0].source
        yield from staged.values.items()
        staged.values.clear()
        yield from ((row.name, values[source]) for row in same.pop(source, []))
        _let_go(values, source, layout)
    for source, rows in same.items():
        yield from ((row.name, values[source]) for row in rows)
        run.sources.forget(source)
        _let_go(values, source, layout)


def _let_go(values: dict[str, Tensor], name: str, layout: _Layout) -> None:
    tensor = values.pop(name)
    if name in layout.mapped:
        page_out(tensor)


def _copy_others(folder: Path, part: Path) -> list[str]:
    """Copy what goes with a model (tokenizer, generation config, ...); give the names of what does not."""
    left: list[str] = []
    for path in sorted(folder.iterdir()):
        if not path.is_file():
            left.append(f"{path.name}/")
        elif path.name.endswith(WEIGHTS):
            if not path.name.endswith((".safetensors", ".index.json")):
                left.append(path.name)
        elif path.name != CONFIG:
            shutil.copyfile(path, part / path.name)
    return left


def _n(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


__all__ = ["Checkpoint", "GrownCheckpoint", "GrowthError", "PlanError", "grow", "load"]
