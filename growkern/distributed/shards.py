"""Tensors of which every process holds a part (``DTensor``). A part is a box: a range of coordinates along every axis."""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from growkern.errors import UnsupportedModelError
from growkern.support.memory import is_pinned
from growkern.support.names import named_modules, named_parameters

if TYPE_CHECKING:
    from growkern.distributed.fsdp import FullySharded

PLAIN = Tensor, nn.Parameter
Range = tuple[int, int]  # first coordinate, number of coordinates


class Box(NamedTuple):
    """The part of a tensor that a process holds.

    Attributes:
        ranges: Range of coordinates along every axis.
        shape: Shape of the whole tensor.
    """

    ranges: tuple[Range, ...]
    shape: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """The ranges as slices of the whole tensor."""
        return tuple(slice(first, first + n) for first, n in self.ranges)

    @property
    def sizes(self) -> list[int]:
        """Shape of the part."""
        return [n for _, n in self.ranges]

    def rectangle(self, n_row_axes: int) -> tuple[Range, Range]:
        """Return the ranges of rows and columns in the matrix whose rows are the first axes of the whole tensor, flattened.

        Raises:
            UnsupportedModelError: The box is no rectangle of this matrix.
        """

        def flat(axes: range) -> Range:
            cut = [i for i in axes if self.ranges[i] != (0, self.shape[i])]
            if cut and cut != [axes.start]:
                raise UnsupportedModelError(
                    f"a tensor of shape {self.shape} is sharded along axis {cut[-1]}, which growth cannot cut; shard it along axis "
                    f"{axes.start}."
                )
            inner = prod(self.shape[i] for i in axes[1:])
            first, n = self.ranges[axes.start] if len(axes) else (0, 1)
            return first * inner, n * inner

        return flat(range(n_row_axes)), flat(range(n_row_axes, len(self.shape)))


def is_sharded(t: object) -> bool:
    """True for a ``DTensor``; its module is imported with the first of them."""
    if type(t) in PLAIN:  # most tensors
        return False
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def has_shards(model: nn.Module) -> bool:
    """True for a model with a parameter that is a ``DTensor``."""
    return any(is_sharded(p) for _, p in named_parameters(model))


def refuse_shards(model: nn.Module, what: str) -> None:
    """Raise UnsupportedModelError for a sharded model, on which a function does not work.

    Raises:
        UnsupportedModelError: Parameters are sharded.
    """
    if has_shards(model):
        raise UnsupportedModelError(
            f"{what} does not support sharded models: call it before the model is sharded."
        )


def _managed(model: nn.Module) -> list[Any]:
    """Return the modules to which ``fully_shard`` was applied."""
    module: Any = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(module, "FSDPModule", None)
    return [] if kind is None else [m for _, m in named_modules(model) if isinstance(m, kind)]


def reshard(model: nn.Module) -> None:
    """Free the parameters that ``fully_shard`` has gathered, as after an evaluation, so that modules hold the sharded ones."""
    for module in _managed(model):
        module.reshard()


def fully_sharded(model: nn.Module, *averages: nn.Module) -> "FullySharded | None":
    """Return the parameters of a model and its averages that ``fully_shard`` manages; None if it manages none of the model's.

    Raises:
        PlanError: Gradients wait to be reduced.
        UnsupportedModelError: This version of torch has other private attributes.
    """
    if not _managed(model):
        return None
    from growkern.distributed.fsdp import FullySharded

    return FullySharded(model, *averages)


def first_of_zeros(
    make: Callable[[torch.device], nn.Module], model: nn.Module, path: str
) -> nn.Module:
    """Make the first block of a stack, of zeros, where the model's tensors are; sharded where ``fully_shard`` manages the model.

    Args:
        make: Function from a device to the block, with tensors of zeros on this device.
        model: The model.
        path: Path of the stack in the model.
    """
    device = next(model.parameters()).device
    if not _managed(model):
        return make(device)
    from growkern.distributed import fsdp

    block = make(torch.device("meta"))  # no process needs the whole block
    fsdp.shard_first(block, model, path)
    block.to_empty(device=device)
    for t in (*block.parameters(), *block.buffers()):
        local(t.detach()).zero_()
    return block


def without_fsdp(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which a model can be copied without its ``fully_shard``."""
    if not _managed(model):
        return nullcontext()
    from growkern.distributed.fsdp import bare

    return bare(model)


def local(t: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, in the tensor's own memory; a plain tensor is its own part."""
    if not is_sharded(t):
        return t
    with torch.no_grad():
        return t.to_local()  # pyright: ignore


def box_of(like: Any, shape: Sequence[int]) -> Box:
    """Return the box that this process holds of a tensor of ``shape`` that is placed as another; a plain tensor is held whole."""
    given: object = like
    if isinstance(given, Tensor) and not is_sharded(given):
        return Box(tuple((0, n) for n in shape), tuple(shape))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, first = compute_local_shape_and_global_offset(torch.Size(shape), like.device_mesh, like.placements)  # fmt: skip
    return Box(tuple(zip(first, sizes, strict=True)), tuple(shape))


def own_part(whole: Tensor, like: Any) -> Tensor:
    """Return the part of a whole tensor that this process holds of another of its shape."""
    return whole[box_of(like, whole.shape).slices] if is_sharded(like) else whole


def n_parts(t: Any) -> int:
    """Return the number of parts of a tensor; more processes than that have replicas."""
    if not is_sharded(t):
        return 1
    places = enumerate(t.placements)
    return prod(t.device_mesh.size(i) for i, place in places if not place.is_replicate())


def n_local(like: Tensor, shape: Sequence[int]) -> int:
    """Return the number of elements that this process holds of a tensor of ``shape`` that is placed as another."""
    return prod(box_of(like, shape).sizes) if is_sharded(like) else prod(shape)


def placement(t: Any) -> tuple[object, ...] | None:
    """Return the mesh and the placements of a sharded tensor; None for a plain tensor."""
    return (t.device_mesh, t.placements) if is_sharded(t) else None


def parts_of(n: int, n_parts: int) -> list[Range]:
    """Return the ranges of ``n`` rows in which ``Shard(0)`` cuts them: equal parts, the last of which are smaller or empty."""
    size = -(-n // n_parts)
    firsts = (min(n, i * size) for i in range(n_parts))
    return [(first, min(size, n - first)) for first in firsts]


def mesh_dim_of_rows(t: Any) -> int | None:
    """Return the only mesh dimension that shards a tensor, if it shards the first axis in equal parts; None for all other placements."""
    if not is_sharded(t) or not t.dim():
        return None
    dims = [i for i, place in enumerate(t.placements) if not place.is_replicate()]
    if len(dims) != 1 or t.placements[dims[0]] != shard(0):
        return None
    return dims[0] if _in_order(t.device_mesh, dims[0]) else None


@lru_cache(maxsize=16)
def _in_order(mesh: Any, dim: int) -> bool:
    """True when the processes along a mesh dimension are numbered as in their process group, which sorts them."""
    return bool((mesh.mesh.diff(dim=dim) > 0).all())


def shard(axis: int) -> Any:
    """Return the placement that shards an axis."""
    from torch.distributed.tensor import Shard

    return Shard(axis)


def part(like: Any, shape: Sequence[int]) -> Tensor:
    """Return uninitialized memory for this process's box; along the first axis, with the padding that ``fully_shard`` has."""
    held: Tensor = like.to_local()
    pinned = is_pinned(held)  # by CPUOffloadPolicy
    n_rows, *sizes = box_of(like, shape).sizes
    mesh, places = like.device_mesh, enumerate(like.placements)
    n_parts = prod(mesh.size(i) for i, place in places if getattr(place, "dim", None) == 0)
    padded = max(n_rows, -(-shape[0] // n_parts))
    if padded == n_rows:
        return held.new_empty((n_rows, *sizes), pin_memory=pinned)
    return held.new_zeros((padded, *sizes), pin_memory=pinned).narrow(0, 0, n_rows)


def joined(own: Tensor, like: Any, shape: Sequence[int]) -> Tensor:
    """Return the parts of all processes as one tensor of ``shape``, placed as another. No data move."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )  # fmt: skip


def gathered(t: Any) -> Tensor:
    """Return the whole of a tensor; every process of its mesh must call this."""
    return t.full_tensor() if is_sharded(t) else t


def plain_class(kind: type) -> type:
    """Return the class of a model itself: ``fully_shard`` makes a class of its own of it."""
    return next(k for k in kind.__mro__ if not k.__module__.startswith("torch.distributed"))
