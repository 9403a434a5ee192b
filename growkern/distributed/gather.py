"""Move parts of sharded tensors between processes: the whole of a tensor to each, or the rows that each reads."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from growkern.distributed.shards import Range, gathered, is_sharded, mesh_dim_of_rows, shard
from growkern.support.interrupts import uninterrupted


class Gather:
    """Gathers whole tensors, one at a time; ``vote`` is called before, so that no process waits for one that has failed.

    Attributes:
        n_received: Bytes received from other processes so far.
    """

    def __init__(self, vote: Callable[[], object]) -> None:
        self._vote = vote
        self.n_received = 0

    def whole(self, t: Any) -> Tensor:
        """Return the whole of a tensor.

        No signal arrives, and memory does not run out, between the vote and the collective: the other processes would wait.
        """
        if not is_sharded(t):
            return t
        held: Tensor = t.to_local()
        room = held.new_empty(t.shape)
        with uninterrupted():
            self._vote()
            del room
            full: Any = gathered(t)
            full = full.wait() if hasattr(full, "wait") else full
        self.n_received += (full.numel() - held.numel()) * full.element_size()
        return full

    def numbers(self, own: Tensor, like: Any) -> Tensor:
        """Return numbers of all parts of a sharded tensor, (parts, n), from this process's (n,); a plain tensor is one part."""
        if not is_sharded(like):
            return own[None]
        from torch.distributed.tensor import DTensor, Replicate

        places = [Replicate() if place.is_replicate() else shard(0) for place in like.placements]
        return self.whole(DTensor.from_local(own[None], like.device_mesh, places, run_check=False))

    def rows(self, t: Any, transfers: "Callable[[int], Transfer]") -> Tensor:
        """Return a tensor with the rows that this process holds or reads in their places, and zeros in place of all others.

        Args:
            t: A tensor whose first axis alone is sharded, over ``mesh_dim_of_rows(t)``.
            transfers: Returns what a process sends and receives, from its number in the mesh dimension.
        """
        dim = mesh_dim_of_rows(t)
        transfer = transfers(t.device_mesh.get_local_rank(dim))
        held: Tensor = t.to_local()
        full = held.new_zeros(t.shape)
        full[transfer.first : transfer.first + len(held)] = held
        if not transfer.moves:
            return full
        import torch.distributed as dist

        sent, taken = (rows.to(held.device) for rows in (transfer.sent, transfer.taken))
        out, into = held.index_select(0, sent), held.new_empty((len(taken), *t.shape[1:]))
        group = t.device_mesh.get_group(dim)
        with uninterrupted():
            self._vote()
            dist.all_to_all_single(into, out, transfer.n_taken, transfer.n_sent, group=group)
        self.n_received += into.nbytes
        return full.index_copy_(0, taken, into)


class Transfer(NamedTuple):
    """Rows of a tensor that one process sends and receives, where all processes hold equal parts of the first axis.

    Attributes:
        first: First row that the process holds.
        sent: Rows that it sends, counted from ``first``, process by process.
        taken: Rows that it receives, process by process.
        n_sent: Number of rows that it sends to each process.
        n_taken: Number of rows that it receives from each process.
        moves: False when no process receives a row.
    """

    first: int
    sent: Tensor
    taken: Tensor
    n_sent: list[int]
    n_taken: list[int]
    moves: bool


def transfer_of(
    process: int, read: Sequence[Sequence[Range]], held: Sequence[Range], *, moves: bool
) -> Transfer:
    """Return what one process sends and receives.

    Args:
        process: Number of the process in its group.
        read: Ranges of rows that each process reads, in order.
        held: Range of rows that each process holds.
        moves: False when every process holds what it reads.
    """
    first = held[process][0]
    to = [shared(read[i], held[process]) if i != process else [] for i in range(len(held))]
    by = [shared(read[process], held[i]) if i != process else [] for i in range(len(held))]
    return Transfer(
        first,
        _rows([one for ranges in to for one in ranges]) - first,
        _rows([one for ranges in by for one in ranges]),
        [sum(n for _, n in ranges) for ranges in to],
        [sum(n for _, n in ranges) for ranges in by],
        moves,
    )


def shared(ranges: Sequence[Range], within: Range) -> list[Range]:
    """Return the parts of ranges that lie within another."""
    first, end = within[0], sum(within)
    bounds = ((max(begin, first), min(begin + n, end)) for begin, n in ranges)
    return [(begin, stop - begin) for begin, stop in bounds if begin < stop]


def _rows(ranges: Sequence[Range]) -> Tensor:
    return torch.cat([torch.arange(first, first + n) for first, n in ranges] or [torch.arange(0)])


def reduced(t: Any, vote: Callable[[], object]) -> Tensor:
    """Return a gradient as the sum of the processes' summands, where each process has one; ``vote``: see ``Gather``."""
    if not is_sharded(t) or not any(place.is_partial() for place in t.placements):
        return t
    from torch.distributed.tensor import Replicate

    places = [Replicate() if place.is_partial() else place for place in t.placements]
    with uninterrupted():
        vote()
        return t.redistribute(placements=places)
