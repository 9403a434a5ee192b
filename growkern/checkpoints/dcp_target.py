"""The entries of a grown checkpoint of ``torch.distributed.checkpoint``; each is computed when it is written."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from growkern.checkpoints.dcp_layout import GROUPS, Layout, renamed
from growkern.checkpoints.dcp_replay import Replayed
from growkern.checkpoints.dcp_source import KeyPath, Source
from growkern.distributed.shards import Box
from growkern.errors import UnsupportedOptimizerError
from growkern.execution.boxwise import Boxwise
from growkern.optimizer.state_rules import VALUE, Rule
from growkern.planning.growth_plan import TensorRow
from growkern.support.memory import trim
from growkern.support.progress import Progress

# optimizers for which state of zeros is what their first step would make
ZEROED = {
    *(f"torch.optim.{name}" for name in ("adam.Adam", "adamw.AdamW", "adamax.Adamax", "radam.RAdam", "rmsprop.RMSprop", "Muon")),
    *("torch.optim.sgd.SGD", "torch.optim.adadelta.Adadelta", "lion_pytorch.lion_pytorch.Lion"),
}  # fmt: skip


PART = 16 << 20  # bytes of a tensor that are computed at once


@dataclass(frozen=True)
class Entry:
    """An entry of the target.

    Attributes:
        path: Path in the state dict.
        tensor: A tensor of its shape and dtype on the meta device; None for an entry that is no tensor.
        made: Computes a box of the tensor (None: all of it), or returns the bytes.
        splits: True for a tensor of which a box can be computed alone.
    """

    path: KeyPath
    tensor: Tensor | None
    made: Callable[[Box | None], Tensor | BytesIO]
    splits: bool = False

    @property
    def key(self) -> str:
        """Key of the entry: its path, joined by dots."""
        return ".".join(map(str, self.path))


class Target:
    """The entries of a grown checkpoint.

    Attributes:
        entries: Entries by key.
    """

    def __init__(self, source: Source, grown: Replayed, boxwise: Boxwise) -> None:
        """List the entries; nothing is computed.

        Raises:
            UnsupportedOptimizerError: Parameters start without state, which a checkpoint of this optimizer cannot express.
        """
        self.source, self.grown, self.boxwise = source, grown, boxwise
        self.rows = {row.name: row for row in grown.plan.tensors}
        made = [
            *self._model(),
            *self._state(),
            *self._groups(),
            *map(self._copied, grown.layout.others),
        ]
        self.entries = {entry.key: entry for entry in made}

    @property
    def n_bytes(self) -> tuple[int, int]:
        """Bytes of all tensors of source and target."""
        stored = map(self.source.of, self.source.tensors)
        before = sum(torch.Size(t.shape).numel() * t.dtype.itemsize for t in stored)
        return before, sum(
            entry.tensor.nbytes for entry in self.entries.values() if entry.tensor is not None
        )

    def _model(self) -> Iterator[Entry]:
        """Yield the parameters and buffers; a tied parameter is stored under each of its names."""
        model, layout = self.grown.model, self.grown.layout
        first = {
            id(p): n for n, p in model.named_parameters(remove_duplicate=False) if n in self.rows
        }
        params = dict(model.named_parameters(remove_duplicate=False))
        for name in model.state_dict():
            row = self.rows.get(name) or self.rows[first[id(params[name])]]
            if name in self.rows or name in layout.model:
                yield self._grown(
                    row, name, layout.model[row.source], VALUE, self._above(row, layout.model)
                )

    def _above(self, row: TensorRow, keys: Mapping[str, str]) -> str | None:
        return None if row.next_layer_source is None else keys.get(row.next_layer_source)

    def _grown(
        self, row: TensorRow, name: str, key: str, rule: Rule | None, above: str | None
    ) -> Entry:
        stored = self.source.of(key)
        shape = stored.shape if rule is None else rule.shape(self.grown.plan.shapes(row)[1])
        blank = torch.empty(shape, dtype=stored.dtype, device="meta")
        following = None if above is None else self.source.of(above)
        path = renamed(self.source.paths[key], row.source, name)
        grown = partial(self.boxwise.grown, row, stored, rule, following)
        return Entry(path, blank, grown, splits=True)

    def _state(self) -> Iterator[Entry]:
        """Yield the optimizer state; a parameter that starts without state gets what the optimizer's first step would make."""
        grown, layout = self.grown, self.grown.layout
        if grown.optim is None:
            return
        for name, p in grown.model.named_parameters():
            row, kept = self.rows[name], grown.optim.state.get(p, {})
            fresh = row.state == "fresh" or grown.plan.state == "drop"
            for option, key in layout.state.get(row.source, {}).items():
                rule = grown.rules.get(option)
                if fresh or option not in kept:
                    yield self._zeros(row, key, rule)
                elif key not in self.source.tensors:
                    yield self._copied(key, renamed(self.source.paths[key], row.source, name))
                else:
                    keys = {n: own[option] for n, own in layout.state.items() if option in own}
                    yield self._grown(row, name, key, rule, self._above(row, keys))

    def _zeros(self, row: TensorRow, key: str, rule: Rule | None) -> Entry:
        groups = self.grown.optim.param_groups if self.grown.optim else []
        damped = any(
            group.get("dampening") for group in groups
        )  # the first step of SGD damps no gradient
        if self.grown.kind not in ZEROED or damped or key not in self.source.tensors:
            raise UnsupportedOptimizerError(
                f"{row.name} starts without state of {self.grown.kind}, which the checkpoint cannot express: choose depth.Stack() for new "
                "blocks, or state='exact'; or grow the live run by expand_inplace."
            )
        stored = self.source.of(key)
        shape = stored.shape if rule is None else rule.shape(self.grown.plan.shapes(row)[1])
        blank = torch.empty(shape, dtype=stored.dtype, device="meta")
        path = renamed(self.source.paths[key], row.source, row.name)
        return Entry(path, blank, lambda _: torch.zeros(shape, dtype=stored.dtype))

    def _groups(self) -> Iterator[Entry]:
        """Yield the options of the grown param groups."""
        optim, layout = self.grown.optim, self.grown.layout
        if optim is None or layout.flat is None:
            return
        names = {id(p): name for name, p in self.grown.model.named_parameters()}
        base = _base(self.source, layout)
        for index, group in enumerate(optim.state_dict()["param_groups"]):
            own = [names[id(p)] for p in optim.param_groups[index]["params"]]
            options = {key: value for key, value in group.items() if key != "params"}
            if layout.flat:
                for name in own:
                    yield from _leaves((*base[:-1], f"{base[-1]}{name}"), options, flat=True)
            else:
                yield from _leaves((*base, index), options | {"params": own}, flat=False)

    def _copied(self, key: str, path: KeyPath | None = None) -> Entry:
        """Return an entry of the source, as it is."""
        path = path or self.source.paths[key]
        if key in self.source.tensors:
            stored = self.source.of(key)
            blank = torch.empty(stored.shape, dtype=stored.dtype, device="meta")
            return Entry(path, blank, lambda _: self.source.tensor(key))
        return Entry(path, None, lambda _: self.source.contents([key])[key])


def _base(source: Source, layout: Layout) -> KeyPath:
    """Return the path of the param groups; the last part of a flat one is a prefix of a key."""
    owner, options = next(iter(layout.groups.items()))
    key = next(iter(options.values()))
    path, cut = source.paths[key], f"{GROUPS}{owner}"
    if not layout.flat:
        return path[: len(path) - 1 - path[::-1].index(int(owner))]
    at = next(i for i, part in enumerate(path) if isinstance(part, str) and cut in part)
    part = str(path[at])
    return (*path[:at], part[: part.rindex(cut) + len(GROUPS)])


def _leaves(path: KeyPath, value: Any, *, flat: bool) -> Iterator[Entry]:
    """Yield the entries of an option; ``torch.distributed.checkpoint`` stores the leaves of nested dicts."""
    if isinstance(value, Mapping):
        for key, inner in value.items():  # pyright: ignore[reportUnknownVariableType]
            own = (*path[:-1], f"{path[-1]}.{key}") if flat else (*path, str(key))  # pyright: ignore
            yield from _leaves(own, inner, flat=False)
    elif isinstance(value, Tensor):
        yield Entry(path, torch.empty_like(value, device="meta"), lambda _: value.clone())
    else:
        content = BytesIO()
        torch.save(value, content)
        yield Entry(path, None, lambda _: content)


class GrowthPlanner(DefaultSavePlanner):
    """Save planner that computes an entry when the writer asks for it, and frees it when the writer asks for the next one."""

    def __init__(self, entries: Mapping[str, Entry], on_progress: Progress) -> None:
        super().__init__()
        self._entries, self._on_progress = entries, on_progress
        self._last: Tensor | None = None
        self._done = self._total = 0

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        """Set the state dict, and the paths that a loader rebuilds it by."""
        super().set_up_planner(state_dict, storage_meta, is_coordinator)
        self.mappings = {key: entry.path for key, entry in self._entries.items()}

    def create_local_plan(self) -> SavePlan:
        """Plan to write large tensors in parts, ranges of rows: two copies of a part are in memory when torch writes it."""
        plan = super().create_local_plan()
        self.plan = replace(plan, items=[part for item in plan.items for part in self._parts(item)])
        return self.plan

    def _parts(self, item: WriteItem) -> Iterator[WriteItem]:
        t, data = self._entries[item.index.fqn].tensor, item.tensor_data
        if (
            data is None
            or t is None
            or t.nbytes <= PART
            or not self._entries[item.index.fqn].splits
        ):
            yield item
            return
        step = max(1, PART * len(t) // t.nbytes)
        for first in range(0, len(t), step):
            offsets = torch.Size([first, *[0] * (t.dim() - 1)])
            sizes = torch.Size([min(step, len(t) - first), *t.shape[1:]])
            chunk = ChunkStorageMetadata(offsets=offsets, sizes=sizes)
            yield replace(
                item,
                index=MetadataIndex(item.index.fqn, offsets),
                type=WriteItemType.SHARD,
                tensor_data=replace(data, chunk=chunk),
            )

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Count the bytes that this process writes."""
        self._total = sum(item.tensor_storage_size() or 0 for item in new_plan.items)
        return super().finish_plan(new_plan)

    def resolve_data(self, write_item: WriteItem) -> Tensor | BytesIO:
        """Compute an entry, or a part of it."""
        self.written()
        entry, box = self._entries[write_item.index.fqn], None
        if write_item.type == WriteItemType.SHARD and (data := write_item.tensor_data) is not None:
            box = Box(tuple(zip(data.chunk.offsets, data.chunk.sizes, strict=True)), (*data.size,))
        made = entry.made(box)
        if isinstance(made, Tensor):
            self._last = made
        return made

    def written(self) -> None:
        """Free the last entry, to which the writer keeps a reference until the end of its file."""
        if self._last is not None:
            self._done += self._last.nbytes
            self._last.untyped_storage().resize_(0)
            self._last = None
            trim()
            self._on_progress(self._done, self._total)


def blank_state_dict(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Return a state dict whose tensors have no elements, and whose other entries are empty."""
    return {key: "" if entry.tensor is None else entry.tensor for key, entry in entries.items()}
