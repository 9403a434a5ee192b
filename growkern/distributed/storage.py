"""Exchange the storage of a parameter in place, plain or sharded: the object, its hooks and its references stay."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from growkern.distributed.shards import is_sharded
from growkern.support.memory import Backup

Swap = tuple[Callable[[Any], object], Callable[[], object]]  # write, put back


def swapped(p: Tensor, keep: Backup) -> Swap:
    """Return a function that gives a parameter the storage of another tensor, and one that puts the old storage back."""
    if is_sharded(p):
        return _swapped_shard(p, keep)
    before = keep(p.detach())

    def back() -> None:
        with torch.no_grad():
            p.set_(torch.empty(0, dtype=p.dtype, device=p.device))  # pyright: ignore[reportArgumentType]  # frees memory for the source
            p.set_(before())  # pyright: ignore[reportArgumentType]

    def write(value: Tensor) -> None:
        with torch.no_grad():
            p.set_(value)  # pyright: ignore[reportArgumentType]

    return write, back


def _swapped_shard(p: Any, keep: Backup) -> Swap:
    before = kept_shard(p, keep)
    return lambda value: set_shard(p, value.to_local(), value._spec), lambda: before()


def kept(t: Any, keep: Backup) -> Callable[[], Tensor]:
    """Back up a tensor; return a function that restores it."""
    if not is_sharded(t):
        return keep(t)
    from torch.distributed.tensor import DTensor

    before, spec = keep(t.to_local()), t._spec
    return lambda: DTensor(before(), spec, requires_grad=False)  # pyright: ignore


def kept_shard(p: Any, keep: Backup) -> Callable[[], Tensor]:
    """Back up the shard of a parameter; return a function that puts it back, and returns all elements in its storage."""
    held, spec = p._local_tensor, p._spec
    layout = held.shape, held.stride(), held.storage_offset()
    before = keep(whole_storage(held))

    def back() -> Tensor:
        whole = before()
        set_shard(p, whole.as_strided(*layout), spec)
        return whole

    return back


def whole_storage(t: Any) -> Tensor:
    """Return all elements in the storage of a tensor, in one dimension."""
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())


def set_shard(p: Any, local: Tensor, spec: Any) -> None:
    """Give a ``DTensor`` parameter another shard and the size of another specification."""
    from torch.distributed.tensor import DTensor

    new: Any = DTensor(local, spec, requires_grad=False)  # pyright: ignore
    with torch.no_grad(), _IgnoresSet():
        torch.ops.aten.set_.source_Tensor(p, new)  # pyright: ignore
    p.data = new
    p._local_tensor, p._spec = local, spec


class _IgnoresSet(TorchDispatchMode):
    """Ignores ``set_`` of the data: the autograd kernel above it drops the node that accumulates gradients of the old size."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.set_.source_Tensor:  # pyright: ignore
            return args[0]
        return func(*args, **(kwargs or {}))
