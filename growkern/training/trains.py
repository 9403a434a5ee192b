"""Who trains: every parameter, the blocks on top, or the new blocks. The rest keeps its values, and the backward does not go below.

The forward stays as it is: its values, its dropout masks and its loss are those of training everything.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import ClassVar

from torch import nn

from growkern.commit.checkpoint_guard import growth_history
from growkern.commit.frozen import Frozen
from growkern.commit.optimizer import Masters
from growkern.engine.freezing import choose
from growkern.engine.report import GrowthReport
from growkern.errors import PlanError, UnsupportedModelError, raise_all
from growkern.model.describe import describe
from growkern.model.spec import Blocks, ModelSpec
from growkern.support.argument_types import typed_arguments, wrong_fields
from growkern.support.names import named_parameters
from growkern.support.wrappers import unwrapped

__all__ = ["All", "New", "SubModels", "Top", "Trains"]


def __dir__() -> list[str]:
    return __all__


@dataclass(frozen=True)
class Trains(ABC):
    """Choice of who trains; a subclass chooses. It is a field of events and schedules, and ``apply`` applies it by hand.

    Raises:
        PlanError: A field has another type.

    Example:
        >>> growkern.trains.Top(1).apply(model)
        >>> [block.mlp.up_proj.weight.requires_grad for block in model.model.layers]
        [False, True]
    """

    everything: ClassVar[bool] = False
    varies: ClassVar[bool] = False  # True for a choice that changes in every step

    def __post_init__(self) -> None:
        raise_all(PlanError, f"{type(self).__name__}:", [*wrong_fields(self)])

    @abstractmethod
    def frozen(self, spec: ModelSpec, new_blocks: Sequence[str], n_steps: int = 0) -> Frozen:
        """Return the names at which parameters do not train; a tied parameter has several names.

        Args:
            spec: Description of the model.
            new_blocks: Names of the blocks that the last growth added (``GrowthReport.new_blocks``).
            n_steps: Steps of the run so far, for a choice that changes in every step.

        Raises:
            PlanError: The choice is not possible in this model.
        """

    def choices(self, spec: ModelSpec, new_blocks: Sequence[str]) -> list[Frozen]:
        """Return what is frozen in each kind of step, all of them equally often; see ``frozen``.

        Args:
            spec: Description of the model.
            new_blocks: Names of the blocks that the last growth added.
        """
        return [self.frozen(spec, new_blocks)]

    @typed_arguments(PlanError, model=UnsupportedModelError)
    def apply(
        self,
        model: nn.Module,
        report: GrowthReport | None = None,
        *,
        spec: ModelSpec | None = None,
        master_weights: Masters | None = None,
    ) -> None:
        """Let these parameters train from now on, and no others; ``trains.All().apply(model)`` lets all train again.

        Parameters that do not train get ``requires_grad=False`` and lose their gradient; the optimizer keeps their state, and skips them.
        Reducers of ``DistributedDataParallel`` are rebuilt: every process has to call. A later growth keeps the choice, and its new blocks
        train; an event of a schedule chooses anew. Parameters that had ``requires_grad=False`` before keep that, and so
        do copies of them in new blocks, unless new blocks are what is chosen.

        Args:
            model: The model; wrappers are removed.
            report: Report of the growth whose blocks are new; needed by ``New()``, and by ``Top()`` without ``n``.
            spec: Description of a custom model.
            master_weights: Mapping from parameter to the float32 copy that the optimizer updates in place of the parameter.

        Raises:
            PlanError: The choice is not possible in this model, no parameter would train, the report is not that of the model's last
                growth, or an ``LBFGS`` would move what does not train. Nothing has changed.
            UnsupportedModelError: The model cannot be described, or its blocks are under reentrant gradient checkpointing.

        Example:
            >>> report = growkern.expand_inplace(model, optim, to={"layers": 4})
            >>> growkern.trains.New().apply(model, report)
        """
        model = unwrapped(model)
        described = describe(model, spec)
        if self.varies:
            raise PlanError(
                f"{self} changes in every step: pass it to a GrowthSchedule, as trains= of the schedule or of an event."
            )
        new_blocks = report.new_blocks if report is not None else ()
        if report is not None and [*report.history][-1:] != growth_history(model)[-1:]:
            raise PlanError(
                f"{self}: the report is not that of this model's last growth, which may have moved its blocks: pass the last report."
            )
        choose(model, self.frozen(described, new_blocks), master_weights)


@dataclass(frozen=True)
class All(Trains):
    """Everything trains that trained before another choice.

    Example:
        >>> event = growkern.At(step=3000, to=None, trains=growkern.trains.All())
        >>> print(growkern.GrowthSchedule([event], trains=growkern.trains.Top(1)))
        event  to            trigger     state
        -----  ------------  ----------  ------------------------
            0  trains All()  step 3,000  waiting: step 0 of 3,000
    """

    everything: ClassVar[bool] = True

    def frozen(self, spec: ModelSpec, new_blocks: Sequence[str], n_steps: int = 0) -> Frozen:
        """Return no name."""
        return Frozen()


ALL = All()


@dataclass(frozen=True)
class Top(Trains):
    """The top blocks train, and what comes after the blocks; the blocks below, and the embedding, run forward only.

    A head that is tied to the embedding trains by the gradient of the head alone.

    Attributes:
        n: Number of blocks; None for the number that the last growth added.
        head: False to leave out what comes after the blocks.

    Raises:
        PlanError: ``n`` is below 1.

    Example:
        >>> report = growkern.expand_inplace(model, optim, to={"layers": 3}, depth=depth.TopCopies())
        >>> growkern.trains.Top().apply(model, report)
        >>> [block.mlp.up_proj.weight.requires_grad for block in model.model.layers]
        [False, False, True]

    Reference:
        Yang et al., "Progressively Stacking 2.0: A Multi-stage Layerwise Training Method for BERT Training Speedup", arXiv:2011.13635.
    """

    n: int | None = None
    head: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n is not None and self.n < 1:
            raise PlanError(f"Top: n={self.n} blocks cannot train; pass 1 or more.")

    def frozen(self, spec: ModelSpec, new_blocks: Sequence[str], n_steps: int = 0) -> Frozen:
        """Return the names below the top blocks."""
        stack = _only_stack(spec, self)
        if self.n is None and not new_blocks:
            raise PlanError(
                "Top: no block is new; pass the number of blocks that train, as Top(n)."
            )
        n, n_layers = self.n or len(new_blocks), spec.sizes[stack.size]
        if n > n_layers:
            raise PlanError(
                f"Top: {n} blocks cannot train in a model of {n_layers}; pass {n_layers} or less."
            )
        trained = {f"{stack.path}.{i}" for i in range(n_layers - n, n_layers)}
        return _all_but(spec, trained, head=self.head, new_blocks=new_blocks)


@dataclass(frozen=True)
class New(Trains):
    """The blocks that the last growth added train, wherever they are, and nothing else: how LLaMA Pro trains.

    Attributes:
        head: True to train what comes after the blocks, too.

    Example:
        >>> report = growkern.expand_inplace(model, optim, to={"layers": 4})
        >>> growkern.trains.New().apply(model, report)
        >>> [block.mlp.up_proj.weight.requires_grad for block in model.model.layers]
        [False, True, False, True]

    Reference:
        Wu et al., "LLaMA Pro: Progressive LLaMA with Block Expansion", ACL 2024, arXiv:2401.02415.
    """

    head: bool = False

    def frozen(self, spec: ModelSpec, new_blocks: Sequence[str], n_steps: int = 0) -> Frozen:
        """Return the names outside of the new blocks."""
        if not new_blocks:
            raise PlanError(
                "New: no block is new: pass the report of a growth that adds blocks, or name more layers in the event's to=."
            )
        known = {
            f"{stack.path}.{i}" for stack in spec.stacks for i in range(spec.sizes[stack.size])
        }
        if strange := sorted({*new_blocks} - known):
            raise PlanError(
                f"New: this {spec.family} has no block {strange[0]}: pass the report of its own last growth."
            )
        return _all_but(spec, {*new_blocks}, head=self.head, new_blocks=new_blocks)


@dataclass(frozen=True)
class SubModels(Trains):
    """One sub-model trains in each step, in its top blocks and in the head: stage 1 of bert2BERT.

    Sub-model ``i`` of ``L / size`` is the model of the lowest ``i * size`` blocks, under the head. Each step draws one; its blocks up to
    ``(i - 1) * size`` run forward only, its other blocks train, and the blocks above it do not run. In evaluation mode the whole model
    runs. The draw depends on ``seed`` and on the number of the step, so all processes, and a run that was resumed, draw the same. Under
    ``DistributedDataParallel`` every step builds a reducer for what trains in it. ``torch.compile`` makes a graph per sub-model, and its
    ``recompile_limit`` allows 8.

    Attributes:
        size: Number of blocks that train in a step.
        seed: Seed of the draws.

    Raises:
        PlanError: ``size`` is below 1.

    Example:
        >>> schedule = growkern.GrowthSchedule([growkern.At(step=5000, to=None)], trains=growkern.trains.SubModels(1))
        >>> choices = schedule.who_trains.choices(growkern.describe(model), ())
        >>> [choice.n_blocks for choice in choices]  # blocks that run in a step
        [1, 2]

    Reference:
        Chen et al., "bert2BERT: Towards Reusable Pretrained Language Models", ACL 2022, arXiv:2110.07143.
    """

    size: int = 3
    seed: int = 0
    varies: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1:
            raise PlanError(f"SubModels: size={self.size} blocks cannot train; pass 1 or more.")

    def choices(self, spec: ModelSpec, new_blocks: Sequence[str]) -> list[Frozen]:
        """Return, for each sub-model, the names outside of the blocks that train in it, and how many blocks run."""
        stack = _only_stack(spec, self)
        n, rest = divmod(spec.sizes[stack.size], self.size)
        if rest:
            raise PlanError(
                f"SubModels: {spec.sizes[stack.size]} blocks do not divide into sub-models of {self.size}; choose a size that divides them."
            )
        found: list[Frozen] = []
        for end in range(self.size, n * self.size + 1, self.size):
            trained = {f"{stack.path}.{i}" for i in range(end - self.size, end)}
            chosen = _all_but(spec, trained, head=True)
            found.append(Frozen(chosen.names, chosen.stacks, end, chosen.below))
        return found

    def frozen(self, spec: ModelSpec, new_blocks: Sequence[str], n_steps: int = 0) -> Frozen:
        """Return what is frozen in the next step."""
        choices = self.choices(spec, new_blocks)
        digest = blake2b(f"{self.seed},{n_steps}".encode(), digest_size=8).digest()
        return choices[int.from_bytes(digest, "little") % len(choices)]


def flops_per_token(model: nn.Module, spec: ModelSpec, frozen: Frozen) -> float:
    """Return the FLOPs of a step per token: 2 per parameter that runs forward, 2 per parameter that the backward passes, 2 per gradient.

    Where everything trains, they are 6 per parameter. Embeddings count, and attention scores do not, as in Kaplan et al., arXiv:2001.08361.
    """
    stacks, n_run = {stack.path for stack in spec.stacks}, frozen.n_blocks
    names, lowest = [*spec.tensors], None
    if len(stacks) == 1:
        trained = [place[1] for n in names if n not in frozen.names and (place := spec.block_of(n))]
        lowest = min(trained, default=None)
    order = {name: i for i, name in enumerate(names)}
    last = max((order[name] for name in names if spec.block_of(name)), default=0)
    runs, passed, learned = set[nn.Parameter](), set[nn.Parameter](), set[nn.Parameter]()
    for name, p in named_parameters(model, remove_duplicate=False):
        place = spec.block_of(name)
        if place is not None and n_run is not None and place[1] >= n_run:
            continue
        runs.add(p)
        if name not in frozen.names:
            learned.add(p)
        if not frozen.names or (
            order[name] > last if place is None else lowest is None or place[1] >= lowest
        ):
            passed.add(p)
    return 2.0 * sum(p.numel() for group in (runs, passed, learned) for p in group)


def _only_stack(spec: ModelSpec, trains: Trains) -> Blocks:
    """Return the only stack of a model; raise PlanError if there are two, or none, or if it has no blocks."""
    if spec.blocks is None or spec.extra_stacks:
        paths = " and ".join(stack.path for stack in spec.stacks)
        why = (
            f"it has two stacks ({paths}), and the upper one reads the lower"
            if paths
            else "its spec names no blocks"
        )
        raise PlanError(
            f"{type(trains).__name__}: cannot tell which blocks of this {spec.family} are on top: {why}. Choose New(), or All()."
        )
    if not spec.sizes[spec.blocks.size]:
        raise PlanError(
            f"{type(trains).__name__}: this {spec.family} has no blocks, so none can train; grow it by depth=Fresh() first."
        )
    return spec.blocks


def _all_but(
    spec: ModelSpec, blocks: set[str], *, head: bool, new_blocks: Sequence[str] = ()
) -> Frozen:
    """Freeze all but some blocks, and the head: what a spec lists after the tensors of all blocks."""
    frozen, after, below = list[str](), list[str](), list[str]()
    for name in spec.tensors:
        if (place := spec.block_of(name)) is None:
            after.append(name)
            continue
        stack, index, _ = place
        below = below or after
        frozen += after
        after = []
        if f"{stack.path}.{index}" not in blocks:
            frozen.append(name)
    names, paths = frozen if head else [*frozen, *after], [stack.path for stack in spec.stacks]
    new = tuple(f"{block}." for block in new_blocks if block in blocks)
    opened = [name for name in spec.tensors if new and name.startswith(new)]
    return Frozen(names, paths, below=below if len(paths) == 1 else (), opened=opened)
