"""Plans and source tensors -> staged target tensors. Knows no model and writes nothing that lives.

Targets are cut into pieces; a backend writes all pieces of a device.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from math import prod

import torch
from torch import Tensor

from growkern import reference
from growkern.errors import GrowthError, InsufficientMemoryError
from growkern.pieces import Cutter
from growkern.plan import GrowthPlan
from growkern.reference import Piece
from growkern.state import Law
from growkern.tensors import Tensors


def execute(
    plan: GrowthPlan, sources: Tensors, law: Law | None, *, backend: str | None = None
) -> Tensors:
    """Compute every target tensor that differs from its source.

    Args:
        plan: What to do.
        sources: Live tensors by source name; they are only read.
        law: Of the optimizer, for ``sources.states``.
        backend: ``"triton"``, ``"torch"``, or None for triton on a GPU and torch elsewhere.

    Returns:
        Staged tensors by target name, in fresh storage. Scalars of the state are copied for new blocks only.

    Raises:
        InsufficientMemoryError: They do not fit beside the sources, with both figures.
        GrowthError: The backend cannot run.
    """
    orders: Mapping[str, int | None] = law.orders if law else {}
    check_memory(plan, sources, orders)
    staged, pieces, cutter = Tensors(), list[Piece](), Cutter(plan)
    for row in plan.rows:
        if not plan.changes(row):
            continue
        source = sources.values[row.source]
        target = staged.values[row.name] = torch.empty(
            plan.shapes(row)[1], dtype=source.dtype, device=source.device
        )
        if row.source in plan.counters:
            target.copy_(torch.arange(target.shape[-1], device=target.device).expand_as(target))
            continue
        jobs = [(source, target, 0)]
        if row.constant is None and row.source in sources.grads and not row.new:
            grad = sources.grads[row.source]
            staged.grads[row.name] = torch.empty(target.shape, dtype=grad.dtype, device=grad.device)
            jobs.append((grad, staged.grads[row.name], 1))
        if row.state == "law" and plan.state == "exact" and row.source in sources.states:
            state = staged.states[row.name] = dict[str, object]()
            for key, value in sources.states[row.source].items():
                order = orders[key]
                if order is not None and isinstance(value, Tensor):
                    grown = state[key] = torch.empty(
                        target.shape, dtype=value.dtype, device=value.device
                    )
                    jobs.append((value, grown, order))
                elif row.new:
                    state[key] = value.clone() if isinstance(value, Tensor) else value
        for src, dst, order in jobs:
            pieces += cutter.pieces(row, src, dst, order)
    _run(pieces, backend)
    return staged


def needed_bytes(
    plan: GrowthPlan, sources: Tensors, orders: Mapping[str, int | None]
) -> dict[torch.device, int]:
    """Bytes that the staged tensors take, per device."""
    needed: dict[torch.device, int] = {}
    for row in plan.rows:
        if plan.changes(row):
            n = prod(plan.shapes(row)[1])
            state = (
                sources.states.get(row.source, {})
                if row.state == "law" and plan.state == "exact"
                else {}
            )
            grown: list[object] = [
                value for key, value in state.items() if orders.get(key) is not None
            ]
            grown += [
                sources.values[row.source],
                None if row.new or row.constant is not None else sources.grads.get(row.source),
            ]
            for t in grown:
                if isinstance(t, Tensor):
                    needed[t.device] = needed.get(t.device, 0) + n * t.element_size()
    return needed


def check_memory(plan: GrowthPlan, sources: Tensors, orders: Mapping[str, int | None]) -> None:
    """Raise InsufficientMemoryError when the staged tensors do not fit beside the sources."""
    for device, n_bytes in needed_bytes(plan, sources, orders).items():
        free = free_bytes(device)
        if free is not None and n_bytes > free:
            raise InsufficientMemoryError(
                f"the grown tensors need {n_bytes / 2**30:.2f} GiB on {device} beside the source, {free / 2**30:.2f} GiB are free; "
                "free memory, choose a smaller target, or grow with state='drop'."
            )


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be allocated on a device; None when that is not known."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu":
        try:
            with open("/proc/meminfo") as lines:
                return next(
                    int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")
                )
        except (OSError, StopIteration):
            return None
    return None


def unavailable(backend: str, device: torch.device) -> list[str]:
    """Why a backend cannot run on a device; empty when it can."""
    if backend == "torch":
        return []
    if backend != "triton":
        return [f"there is no backend {backend!r}: 'triton', 'torch' or None"]
    if find_spec("triton") is None:
        return ["triton is not installed"]
    from triton import knobs  # pyright: ignore  (untyped, and imported only where it is used)

    interpreted = bool(knobs.runtime.interpret)  # pyright: ignore
    if device.type != ("cpu" if interpreted else "cuda"):
        return [
            f"triton{' (interpreted)' if interpreted else ''} does not run on {device.type}; use backend='torch'"
        ]
    return []


def _run(pieces: list[Piece], backend: str | None) -> None:
    by_device: dict[torch.device, list[Piece]] = {}
    for piece in pieces:
        by_device.setdefault(piece.dst.device, []).append(piece)
    for device, group in by_device.items():
        chosen = backend or (
            "triton" if device.type == "cuda" and not unavailable("triton", device) else "torch"
        )
        if reasons := unavailable(chosen, device):
            raise GrowthError(f"cannot run backend={backend!r}: {'; '.join(reasons)}.")
        if chosen == "triton":
            from growkern.kernels.expand import expand
        else:
            expand = reference.expand
        expand(group)
