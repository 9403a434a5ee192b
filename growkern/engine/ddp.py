"""Growth of a model that several processes train: agree before, vote before every collective, compare after.

Under ``DistributedDataParallel``, the reducer is rebuilt inside the same wrapper. Under ``fully_shard``, the processes of a mesh vote.
"""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from growkern.distributed.shards import is_sharded
from growkern.errors import CommitError, PlanError, UnsupportedOptimizerError
from growkern.support.interrupts import uninterrupted
from growkern.support.names import named_parameters

BLOCK = (
    1 << 20
)  # elements per partial sum: an int64 copy of a whole float32 parameter would be twice as large
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by element size


class Ranks:
    """The processes that train a model, and collective checks between them.

    Every process must call the growth. Without other processes, the checks do nothing.

    Attributes:
        wrappers: The ``DistributedDataParallel`` around the model.
        meshes: The meshes of the model's sharded parameters.
    """

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module]) -> None:
        """Find the wrappers of a model among live modules; a wrapped module may contain the model as a submodule."""
        own = {id(p): p for _, p in named_parameters(model)}
        self.model = model
        self.agreed = self.began = self.voted = False
        wrappers = (m for m in modules if isinstance(m, nn.parallel.DistributedDataParallel))
        self.wrappers: list[Any] = [
            m for m in wrappers if any(id(p) in own for p in m.parameters())
        ]
        placed: list[Any] = [p for p in own.values() if is_sharded(p)]
        self.meshes: list[Any] = [*{id(p.device_mesh): p.device_mesh for p in placed}.values()]

    @contextmanager
    def together(self) -> Generator[None, None, None]:
        """Run the block in all processes or in none: an error in one process fails all, and reducers are rebuilt after the rollback."""
        try:
            yield
        except BaseException:
            if not self.agreed:  # other processes wait in agree()
                self.agreed = True
                self._gathered(torch.tensor([0]))
            elif self.began:
                self.vote(False)
                self.rebuild()
            raise

    def finish(self) -> bool:
        """Finish a growth that has succeeded in this process; return True when the model has a wrapper.

        Raises:
            CommitError: The growth failed in another process, or the parameters differ between processes.
        """
        self.vote(True)
        self.rebuild()
        self.check()
        return self.several

    @property
    def several(self) -> bool:
        """True when there are other processes."""
        return bool(self.wrappers or self.meshes)

    @uninterrupted()  # a process that is interrupted before its answer would keep the others waiting
    def go_on(self) -> None:
        """Vote before a collective, so that no process waits in it for one that has failed.

        Raises:
            CommitError: Another process has failed.
        """
        if not self.voted:
            self._count(True)

    @property
    def n(self) -> int:
        """Number of processes of the largest mesh; 1 without one."""
        return max((mesh.size() for mesh in self.meshes), default=1)

    @uninterrupted()  # a process that is interrupted before its answer would keep the others waiting
    def total(self, numbers: Tensor) -> Tensor:
        """Add float64 numbers of all processes of the largest mesh.

        Raises:
            CommitError: Another process has failed.
        """
        if not self.meshes:
            return numbers
        self.go_on()
        largest = max(self._gathered(numbers.view(torch.int64)), key=len)  # the bits of the numbers
        return torch.stack(largest).view(torch.float64).sum(0).cpu()

    @uninterrupted()  # a process that is interrupted before its answer would keep the others waiting
    def alike(self, text: str, what: str) -> None:
        """Compare ``text`` before the plan; see ``agree``."""
        try:
            self._compare(text, what)
        except BaseException:
            self.agreed = True  # the others have heard of it
            raise

    def before_forward(self) -> None:
        """Vote before a forward that gathers shards; a model without shards gathers nothing.

        Raises:
            CommitError: Another process has failed.
            PlanError: Another process runs no forward.
        """
        if self.meshes and self.began:
            self.go_on()
        elif self.meshes:
            self.alike("a forward", "check=")

    def before_gather(self, what: str) -> None:
        """Vote before ``what`` of the state of a ``ZeroRedundancyOptimizer`` is gathered.

        Raises:
            CommitError: Another process has failed.
            PlanError: The processes have different optimizers.
            UnsupportedOptimizerError: The model is in no ``DistributedDataParallel``, so the processes cannot vote.
        """
        if not self.several:
            raise UnsupportedOptimizerError(
                "a ZeroRedundancyOptimizer grows with a model in DistributedDataParallel, by whose process group the processes vote; wrap "
                "the model."
            )
        self.alike(what, "optim")

    @uninterrupted()  # a process that is interrupted before its answer would keep the others waiting
    def agree(self, text: str, what: str) -> None:
        """Compare ``text`` between all processes.

        Raises:
            CommitError: Another process failed before this call.
            PlanError: The processes have different texts.
        """
        self.agreed = True
        self._compare(text, what)
        self.began = True

    def _compare(self, text: str, what: str) -> None:
        digest = 1 + int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "little")
        for numbers in self._gathered(torch.tensor([digest])):
            said = {int(n) for n in numbers}
            if 0 in said:
                raise CommitError(
                    "another process refused the growth, or failed; see the error of that process."
                )
            if len(said) > 1:
                raise PlanError(
                    f"the processes do not agree on {what}: pass the same arguments in all processes."
                )

    @uninterrupted()  # a process that is interrupted before its answer would keep the others waiting
    def vote(self, ok: bool) -> None:
        """Tell the other processes whether this process has succeeded; later calls do nothing.

        Raises:
            CommitError: This process has succeeded, and another one has failed.
        """
        if self.voted:
            return
        self.voted = True
        self._count(ok)

    def _count(self, ok: bool) -> None:
        for numbers in self._gathered(torch.tensor([int(ok)])):
            if ok and not all(int(n) for n in numbers):
                self.voted = True
                raise CommitError(
                    "the growth failed in another process and was rolled back; see the error of that process."
                )

    def rebuild(self) -> None:
        """Give every wrapper a new reducer for the current parameters."""
        for wrapper in self.wrappers:
            _rebuild(wrapper)

    def check(self) -> None:
        """Raise CommitError when a checksum of the bits of any parameter differs between processes."""
        if not self.wrappers:
            return
        params = dict(self.model.named_parameters())
        sums = torch.stack([_checksum(p) for p in params.values()])
        for rows in self._gathered(sums):
            same = torch.stack(rows).eq(rows[0]).all(0)
            if apart := [name for name, equal in zip(params, same, strict=True) if not equal]:
                raise CommitError(
                    f"processes differ after the growth in {len(apart)} tensors ({', '.join(apart[:3])}); check that the "
                    "processes had equal weights before, and load a checkpoint in all of them."
                )

    def _gathered(self, numbers: Tensor) -> list[list[Tensor]]:
        """Gather ``numbers`` in each wrapper and each mesh: a list of int64 (N,), one per process."""
        gathered: list[list[Tensor]] = []
        several = [[wrapper.process_group] for wrapper in self.wrappers]
        several += [mesh.get_all_groups() for mesh in self.meshes]
        device = next(self.model.parameters()).device if several else None
        for groups in several:
            own = numbers.to(device, torch.int64)[None]
            for group in groups:  # of a mesh: one per dimension
                parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
                try:
                    dist.all_gather(parts, own, group=group)
                except RuntimeError as error:
                    self.voted = True  # nobody would answer
                    raise CommitError(
                        f"another process has ended, or has not answered in the time of the process group ({error}); the growth was "
                        "rolled back in this process. Start the processes again from a checkpoint."
                    ) from error
                own = torch.cat(parts)
            gathered.append([*own])
        return gathered


def agree(model: nn.Module, text: str, what: str) -> None:
    """Compare ``text`` between the processes of a model; see ``Ranks.agree``."""
    ranks = Ranks(model, ())
    with ranks.together():
        ranks.agree(text, what)


def _checksum(p: Tensor) -> Tensor:
    bits = p.detach().contiguous().view(BITS[p.element_size()]).flatten()
    parts: tuple[Tensor, ...] = torch.split(bits, BLOCK)
    return torch.stack([part.sum(dtype=torch.int64) for part in parts]).sum()


def _rebuild(ddp: Any) -> None:
    """Rebuild the reducer as ``DistributedDataParallel.__setstate__`` does; keep hooks, bucket and static-graph settings.

    Raises:
        CommitError: This version of torch has other private attributes.
    """
    try:
        hooks = list(ddp._comm_hooks)
        ddp._module_parameters = [
            p for n, p in ddp.module.named_parameters() if n not in ddp.parameters_to_ignore
        ]
        for name in ("reducer", "logger"):
            setattr(ddp, name, None)  # the old reducer removes its own hooks
        params, sparse = ddp._build_params_for_reducer()
        names = ddp._build_debug_param_to_name_mapping(params)
        ddp._has_rebuilt_buckets = False
        ddp._ddp_init_helper(params, sparse, names, ddp.static_graph)
        if ddp.static_graph:
            ddp.reducer._set_static_graph()
            ddp.logger._set_static_graph()
            ddp._static_graph_delay_allreduce_enqueued = False
        ddp._comm_hooks = []
        for hook, state in hooks:
            ddp.register_comm_hook(state, hook)
    except AttributeError as error:
        raise CommitError(
            f"this torch's DistributedDataParallel cannot be rebuilt ({error}); grow the model without the wrapper, and wrap it again."
        ) from error
