"""``ZeroRedundancyOptimizer``: whole in every process while it grows, partitioned anew after.

Outside a growth each process has the state of its own parameters, in the optimizer that the wrapper holds. Within, the wrapper has the
state of all parameters, so that it grows as an ordinary optimizer does. What is private in torch is named here alone.
"""

from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from growkern.errors import UnsupportedOptimizerError
from growkern.support.interrupts import uninterrupted

NAME = "ZeroRedundancyOptimizer"
PART = "_growkern_part"
PRIVATE = (
    "_all_params",
    "_all_state_dicts",
    "_build_param_buckets",
    "_clear_cache",
    "_get_is_trainable_mask",
    "_is_trainable_mask",
    "_overlap_with_ddp",
    "_param_to_rank",
    "_partition_parameters",
)
WAY_OUT = (
    "Load its consolidated state into an optimizer of the class that it wraps, grow with this one and its scheduler, and build the "
    f"{NAME} anew from its param groups and state."
)


def is_zero(optim: object) -> bool:
    """True for a ``ZeroRedundancyOptimizer``."""
    return any(kind.__name__ == NAME for kind in type(optim).__mro__)


def wrapped_kind(optim: Any) -> type:
    """Return the class whose state an optimizer has: of a ``ZeroRedundancyOptimizer``, the class that it wraps."""
    held: object = optim.optim if is_zero(optim) else optim
    return type(held)


def is_part(optim: object) -> bool:
    """True for the optimizer that a ``ZeroRedundancyOptimizer`` holds, after a growth: hooks are the wrapper's."""
    return PART in vars(optim)


def refuse_zero(zero: Any) -> None:
    """Raise UnsupportedOptimizerError for a ``ZeroRedundancyOptimizer`` that cannot be partitioned anew."""
    if missing := [name for name in PRIVATE if not hasattr(zero, name)]:
        why = f"this torch's is not one that growkern knows (attribute {missing[0]} is missing)"
    elif zero._overlap_with_ddp or zero.parameters_as_bucket_view:
        why = "overlap_with_ddp= and parameters_as_bucket_view= are not supported"
    elif not wrapped_kind(zero).__module__.startswith("torch.optim"):
        why = f"it wraps a {wrapped_kind(zero).__qualname__}, and growkern partitions torch's optimizers only"
    else:
        return
    raise UnsupportedOptimizerError(f"cannot grow this {NAME}: {why}. {WAY_OUT}")


@contextmanager
def whole(
    optims: Sequence[Optimizer], vote: Callable[[str], object], rollbacks: list[Callable[[], object]] | None = None
) -> Generator[Callable[[], None]]:  # fmt: skip
    """Give every ``ZeroRedundancyOptimizer`` the state of all parameters, until the function that is yielded partitions it anew.

    Args:
        optims: Optimizers of one model.
        vote: Called before the processes exchange state, with what they exchange; raises an error where another process has failed.
        rollbacks: Steps that undo this growth with earlier ones, where a later growth may fail; a partition is added as the last step.

    Raises:
        GrowthError: What the block raises; the partition and the state are then those from before.
    """
    zeros: list[Any] = [optim for optim in optims if is_zero(optim)]
    before = [(zero, zero.state, zero.optim.state) for zero in zeros]
    parted = list[Any]()

    def part() -> None:
        for zero in zeros:
            parted.append(zero)
            _partition(zero)

    try:
        for zero in zeros:
            zero.state = defaultdict(dict, _gathered(zero, vote))
            zero.optim.state = defaultdict(dict)
        yield part
    except BaseException:
        for zero, state, own in before:
            zero.state, zero.optim.state = state, own
        for zero in parted:  # its param groups are those from before
            _assign(zero)
        raise
    if rollbacks is not None:  # they run from the end
        rollbacks[:0] = [partial(_partition, zero) for zero in zeros]


def _gathered(zero: Any, vote: Callable[[str], object]) -> dict[Tensor, dict[str, Any]]:
    """Return the state of all parameters, broadcast by their owners; of own parameters, the dicts in use.

    All memory is allocated before the last vote, and no signal arrives between a vote and a broadcast: the other processes would wait.
    """
    gathered: dict[Tensor, dict[str, Any]] = {}
    sent: list[tuple[Tensor, int]] = []  # tensor, and the process that has it
    by_owner: dict[int, list[Tensor]] = {rank: [] for rank in range(zero.world_size)}
    for p, owner in zero._param_to_rank.items():
        by_owner[owner].append(p)
    own: list[dict[str, Any]] = [zero.optim.state.get(p, {}) for p in by_owner[zero.rank]]
    about = [{k: _blank(v) for k, v in state.items()} for state in own]
    with uninterrupted():
        vote("names of state")
        said: list[Any] = [None] * zero.world_size
        dist.all_gather_object(said, about, zero.process_group)
    for rank, params in by_owner.items():
        source = dist.get_global_rank(zero.process_group, rank)
        for i, (p, entries) in enumerate(zip(params, said[rank], strict=True)):
            if entries:
                gathered[p] = own[i] if rank == zero.rank else entries
            for key, value in entries.items():
                if not isinstance(value, Tensor) or not value.is_meta:
                    continue
                if rank == zero.rank:
                    sent.append((own[i][key].contiguous(), source))
                else:
                    gathered[p][key] = torch.empty_like(value, device=p.device)
                    sent.append((gathered[p][key], source))
    with uninterrupted():
        vote("state")
        for t, source in sent:
            dist.broadcast(t, source, zero.process_group)
    return gathered


def _blank(value: object) -> object:
    """Return what is sent of an entry ahead: a tensor with dimensions without its elements, anything else as it is."""
    if isinstance(value, Tensor) and value.dim():
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return value


def _partition(zero: Any) -> None:
    """Partition the parameters anew, and keep the state of the own ones."""
    own = _assign(zero)
    # one dict for both: UpdateScale is a hook of the wrapper
    zero.state = zero.optim.state = defaultdict(
        dict, {p: zero.state[p] for p in own if p in zero.state}
    )


def _assign(zero: Any) -> list[Tensor]:
    """Assign the parameters in the param groups to processes; return those of this process."""
    zero._all_params = [p for group in zero.param_groups for p in group["params"]]
    zero._is_trainable_mask = zero._get_is_trainable_mask()
    zero._all_state_dicts = []  # consolidated before
    zero._clear_cache()
    setattr(zero.optim, PART, True)
    zero.optim.param_groups = zero._partition_parameters()[zero.rank]
    return [p for group in zero.optim.param_groups for p in group["params"]]
