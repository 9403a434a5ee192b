"""Growth of checkpoints of ``torch.distributed.checkpoint`` (DCP), with the optimizer state: on disk, or while they are loaded."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save  # pyright: ignore[reportUnknownVariableType]
from torch.optim import Optimizer

from growkern.api import check_arguments
from growkern.checkpoints.card import CARD, CardContents, carried
from growkern.checkpoints.dcp_load import Filling
from growkern.checkpoints.dcp_replay import Replayed, replay
from growkern.checkpoints.dcp_source import Source
from growkern.checkpoints.dcp_target import GrowthPlanner, Target, blank_state_dict
from growkern.checkpoints.grow import GrownCheckpoint, refuse_full, target_config
from growkern.checkpoints.output import aside, modes, others, refuse_out, restrict, sweep
from growkern.checkpoints.recipe import RECIPE
from growkern.checkpoints.shards import CONFIG
from growkern.checkpoints.source import Snapshot
from growkern.commit.checkpoint_guard import records_growths
from growkern.commit.param_groups import ORIGIN, SCHEDULER_LISTS
from growkern.distributed.processes import Processes, answered
from growkern.distributed.shards import has_shards
from growkern.errors import (
    CheckpointError,
    GrowthError,
    PlanError,
    UnsupportedModelError,
    UnsupportedOptimizerError,
)
from growkern.execution.boxwise import Boxwise
from growkern.model.spec import ModelSpec
from growkern.optimizer.describe import optimizers
from growkern.planning.decisions import DepthMethod, WidthMethod
from growkern.planning.growth_plan import GrowthPlan
from growkern.planning.growth_record import digest
from growkern.planning.sizes import Target as Sizes
from growkern.support.argument_types import typed_arguments
from growkern.support.progress import Progress
from growkern.support.text import one_line
from growkern.support.wrappers import unwrapped

__all__ = ["grow", "load"]


def __dir__() -> list[str]:
    return __all__


UNCHANGED = "Nothing was changed."


@typed_arguments(
    PlanError, "model", "optim", "to", "width", "depth", "state", "dynamics", "seed", "spec", "plan"
)
def grow(
    source: str | Path,
    target: str | Path,
    model: nn.Module,
    optim: Optimizer | None = None,
    *,
    to: Sizes = "2x",
    width: WidthMethod | None = None,
    depth: DepthMethod | None = None,
    state: str = "exact",
    dynamics: str | None = "mup",
    spec: ModelSpec | None = None,
    seed: int | None = None,
    plan: GrowthPlan | None = None,
    overwrite: bool = False,
    on_progress: Progress = lambda done, total: None,
) -> GrownCheckpoint:
    """Grow a checkpoint of ``torch.distributed.checkpoint`` into another one, with the optimizer state and the param groups.

    The numbers are those of ``expand_inplace``. Every process of the default process group calls ``grow`` and writes a share of the
    tensors; a process holds one source tensor and one target tensor at a time. Entries of other things (data loader, step count) are
    copied. The target is written to a temporary folder beside ``target``, which is renamed when the target is complete.

    Args:
        source: Folder of the source, which ``torch.distributed.checkpoint.save`` has written; only read. The prefixes of model and
            optimizer are found from the keys.
        target: Folder of the target, the same for all processes; the parent folder exists.
        model: A model of the source's sizes, usually on the meta device: names and shapes are read, not elements. It stays as it is.
        optim: An optimizer of the model's parameters, of the class and the param groups of the run that saved the checkpoint; None for a
            checkpoint without optimizer state.
        to: See ``expand_inplace``.
        width: See ``expand_inplace``.
        depth: See ``expand_inplace``.
        state: See ``expand_inplace``. Parameters without state (of identity blocks, or all under ``"drop"``) get zeros.
        dynamics: ``"mup"`` multiplies the stored learning rates by the law's factors: the target's param groups are those of a run that
            grew with its scheduler, and ``growkern.resume`` makes them. None leaves learning rates as they are.
        spec: Description of a custom model.
        seed: See ``expand_inplace``.
        plan: A plan from ``growkern.plan``, in place of ``to``, ``width``, ``depth``, ``state``, ``dynamics`` and ``seed``.
        overwrite: Replace an existing checkpoint at ``target``.
        on_progress: Called after every tensor with the bytes that this process has written, and the bytes of its share.

    Returns:
        Report of the growth; ``print`` it. Where the model has a config of transformers, the target has the grown ``config.json``, with the
        history of growths.

    Raises:
        CheckpointError: The checkpoint is not of this model and optimizer, is damaged, or cannot be written; or another process failed.
        PlanError: The growth cannot be planned, or stored param groups cannot express its learning-rate factors.
        UnsupportedModelError: See ``describe``.
        UnsupportedOptimizerError: The optimizer's state cannot be grown on disk.

    Example:
        >>> with torch.device("meta"):
        ...     small = transformers.LlamaForCausalLM(config)
        >>> optim = torch.optim.AdamW(small.parameters())
        >>> report = growkern.dcp.grow("run/step-1000", "run/grown", small, optim, to="2x")
        >>> report.n_params
        (10920, 40272)

    Reference:
        ``torch.distributed.checkpoint``: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
    """
    start, processes = perf_counter(), Processes()
    source, target, model = Path(source), Path(target), unwrapped(model)
    options: dict[str, Any] = dict(to=to, width=width, depth=depth, state=state, dynamics=dynamics, seed=seed)  # fmt: skip
    with processes.together(UNCHANGED), torch.no_grad():
        check_arguments(model, plan, to, width, depth, state, dynamics, seed)
        optim = _single(optim)
        _refuse(model, source, target, overwrite)
        snapshot, stored = Snapshot.of(source), Source(source)
        copied, left = others(source, (CONFIG, RECIPE, *stored.files))
        refuse_out(source, target, overwrite, copied)
        grown = replay(stored, model, optim, plan, spec, options)
        config = _config(grown, model, spec)
        left += (
            [CONFIG] if config is None and (source / CONFIG).exists() else []
        )  # of the source's sizes
        fields, unread = carried(source, copied)
        written = Target(stored, grown, Boxwise(grown.plan, getattr(width, "rows", None)))
    _refuse_apart(processes, grown.plan, target)
    n_params = grown.n_params, sum(p.numel() for p in grown.model.parameters())
    card = CardContents(grown.plan, source, (), n_params, (*_notes(grown, left), *unread), fields)
    planner = GrowthPlanner(written.entries, on_progress)
    with ExitStack() as stack:
        swept, part = list[str](), Path()
        with processes.together(UNCHANGED):
            if processes.rank == 0:
                swept = sweep(target)
                refuse_full(target, written.n_bytes[1])
                part = stack.enter_context(aside(target, overwrite, source.stat().st_mode))
        part = processes.gathered(part)[0]
        _save(written, planner, part, processes)
        with processes.together(UNCHANGED):
            snapshot.refuse_changes((*stored.files, *copied))
            if processes.rank == 0:
                _write_beside(part, source, copied, config, card)
                restrict(part, modes(source, [*stored.files], copied))
        rename = stack.pop_all()
    with processes.together(UNCHANGED):
        rename.close()
    notes = (*card.notes, *written.boxwise.notes, *swept)
    n_files, seconds = len([*target.glob("*.distcp")]), perf_counter() - start
    return GrownCheckpoint(target, grown.plan, n_params, written.n_bytes, n_files, seconds, notes)


@typed_arguments(PlanError, "optim", model=UnsupportedModelError)
def load(
    model: nn.Module, optim: Optimizer | None, path: str | Path, *, plan: GrowthPlan | str
) -> None:
    """Fill a model of the target's sizes, and its optimizer, from the checkpoint of the small model.

    The numbers are those of ``expand_inplace``. Every process of the default process group calls ``load`` and computes what it holds: the
    model may be sharded (``fully_shard``, or DTensors of any mesh whose shards are rows or columns), on any number of processes. A process
    reads the stored parts that have the rows it needs, and one source tensor is in memory at a time. Weights and state take the dtypes of
    the model. The optimizer gets state, the stored options of its param groups, and an ``UpdateScale`` where ``dynamics`` ask for one.

    All processes check plan, model, optimizer and checkpoint before anything is written. A failure while the checkpoint is read is an
    error in all processes; the optimizer is then as before, and some of the weights are already those of the target: a second copy of
    the weights does not exist. Load again.

    Args:
        model: A model of the target's sizes with memory (not on the meta device). Where the growth changes the epsilons of norms (a width
            that is no multiple), it is built from the grown config, see the example.
        optim: Its optimizer, newly built, with the param groups of the source's; None to fill the weights only.
        path: Folder of the source's checkpoint, the same for all processes; only read.
        plan: Plan of the growth, or its ``to_json()``, the same in all processes.

    Raises:
        PlanError: Plan, model and optimizer do not fit; every reason at once.
        CheckpointError: The checkpoint does not have the source's tensors or is damaged; or another process failed.
        UnsupportedModelError: A tensor is sharded in a way that growth cannot cut.
        UnsupportedOptimizerError: The optimizer's state cannot be grown.

    Example:
        >>> with torch.device("meta"):
        ...     small = transformers.LlamaForCausalLM(config)
        >>> plan = growkern.plan(small, to="2x")
        >>> small_optim = torch.optim.AdamW(small.parameters())
        >>> report = growkern.expand_inplace(small, small_optim, plan=plan, backend="nan")  # small.config is the target's then
        >>> large = transformers.LlamaForCausalLM(small.config)  # and fully_shard(large), where it is sharded
        >>> optim = torch.optim.AdamW(large.parameters())
        >>> growkern.dcp.load(large, optim, "run/step-1000", plan=plan)
        >>> torch.allclose(large(**batch).logits, model(**batch).logits, atol=1e-5)
        True

    Reference:
        ``torch.distributed.checkpoint``: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
    """
    processes, model = Processes(), unwrapped(model)
    with processes.together(UNCHANGED), torch.no_grad():
        made = GrowthPlan.from_json(plan) if isinstance(plan, str) else plan
        filling = Filling(Source(Path(path)), model, _single(optim), made)
    _refuse_apart(processes, made, Path(path))
    with torch.no_grad():
        filling.measure(processes)
        with processes.together(
            "The optimizer is as before; weights are written in part: load again."
        ):
            found = filling.read()
        filling.finish(found)


def _single(optim: object) -> Optimizer | None:
    """Return the only optimizer; raise UnsupportedOptimizerError for several."""
    several = optimizers(optim)  # pyright: ignore[reportArgumentType]
    if len(several) > 1:
        raise UnsupportedOptimizerError(
            f"optim: {len(several)} optimizers; a checkpoint grows with one. Load the checkpoint, grow by expand_inplace, and save it."
        )
    return several[0] if several else None


def _refuse(model: nn.Module, source: Path, target: Path, overwrite: bool) -> None:
    """Raise for a sharded model, and for folders that cannot be source and target."""
    if has_shards(model):
        raise UnsupportedModelError(
            "model: is sharded; pass a model of the source's sizes on the meta device, built from the config."
        )
    if not source.is_dir():
        raise CheckpointError(f"{source} is no folder; pass the folder of a saved checkpoint.")
    refuse_out(source, target, overwrite)


def _refuse_apart(processes: Processes, plan: GrowthPlan, folder: Path) -> None:
    """Raise PlanError where the processes have several plans, or several folders."""
    said = processes.gathered((digest(plan), str(folder.resolve())))
    if len({*said}) > 1:
        raise PlanError(
            f"the processes do not agree on the plan and the folder; pass the same arguments in all of them. {UNCHANGED}"
        )


def _notes(grown: Replayed, left: Sequence[str]) -> Iterator[str]:
    """Yield notes on the plan, on what was not copied, and on schedulers with a learning rate per param group, if groups were split."""
    yield from grown.plan.notes
    if left:
        yield f"not copied: {', '.join(left)}."
    if grown.optim is not None and any(ORIGIN in group for group in grown.optim.param_groups):
        for key in grown.layout.others:
            if key.rpartition(".")[2] in SCHEDULER_LISTS:
                yield (
                    f"{key}: has one learning rate per param group of the source, and the growth split the groups: make it anew, "
                    "on the optimizer that growkern.resume has replayed."
                )


def _config(grown: Replayed, model: Any, spec: ModelSpec | None) -> Any:
    """Return the grown config of transformers with its history; None for a model without such a config."""
    if not records_growths(getattr(model, "config", None)):
        return None
    if spec is None:
        target_config(grown.plan, model)  # raises PlanError if transformers rejects the config
    config: Any = grown.model.config
    config.architectures = config.architectures or [type(model).__name__]
    config._attn_implementation = None  # of this process; save_pretrained checks other fields against it, and does not store it
    return config


def _write_beside(
    folder: Path, source: Path, copied: Sequence[str], config: Any, card: CardContents
) -> None:
    """Write the config, copies of the source's files, and a model card in place of the source's."""
    if config is not None:
        config.save_pretrained(folder)
    for name in copied:
        (folder / name).write_bytes((source / name).read_bytes())
    if CARD in copied:
        card.write(folder)


def _save(target: Target, planner: GrowthPlanner, folder: Path, processes: Processes) -> None:
    """Compute and write the target; every process writes its share."""
    writer = FileSystemWriter(
        folder, per_thread_copy_ahead=0
    )  # no tensor ahead of the one that is written
    try:
        with answered(), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # that a process saves alone
            save(blank_state_dict(target.entries), storage_writer=writer, planner=planner, no_dist=processes.n == 1)  # fmt: skip
        planner.written()
    except CheckpointException as error:  # a BaseException
        failed: Mapping[int, Any] = error.failures
        own = failed.get(processes.rank, (None,))[0]
        if isinstance(own, GrowthError) or (own is not None and not isinstance(own, Exception)):
            raise own from None
        rank, (first, _) = next(iter(failed.items()))
        raise CheckpointError(f"process {rank} failed: {type(first).__name__}: {one_line(first, 500)}. {UNCHANGED}") from error  # fmt: skip
