"""Free memory of a device, and backups of source tensors on the host or on disk until the growth has succeeded."""

import ctypes
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Backup = Callable[
    [Tensor], Callable[[], Tensor]
]  # takes a tensor that is about to be replaced; returns a function that restores it


CGROUPS = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that can be allocated on a device; None if unknown. On the host, the limits of the container count too."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu":
        known = [n for n in (_host_free(), container_free()) if n is not None]
        return min(known, default=None)
    return None


def _host_free() -> int | None:
    try:
        with open("/proc/meminfo") as lines:
            return next(
                int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")
            )
    except (OSError, StopIteration):
        return None


def container_free(root: Path = CGROUPS, process: Path = Path("/proc/self/cgroup")) -> int | None:
    """Return the bytes left under the memory limits of this process's control groups; None if no group has a limit.

    Args:
        root: Mount point of the control groups: of version 2, or of version 1 with its folder ``memory``.
        process: File that lists the groups of this process, in the format of ``/proc/self/cgroup``. Inside a container, the mount may
            begin at the container's own group, so the limit of the root counts too.
    """
    try:
        lines = [line.split(":", 2) for line in process.read_text().splitlines()]
    except OSError:
        return None
    free: list[int] = []
    for _, controllers, path in lines:
        if controllers == "":
            mount, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            mount = root / "memory"
        else:
            continue
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            free += _left(folder, *names)
            if folder == mount:
                break
    return min(free, default=None)


def _left(group: Path, limit: str, usage: str, cache: str) -> list[int]:
    """Return the bytes left under the limit of one control group, if it has a limit; inactive file pages do not count as used."""
    try:
        allowed, used = ((group / name).read_text().strip() for name in (limit, usage))
        stat = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        reclaimable = next((int(n) for name, n in stat if name == cache), 0)
        if allowed == "max" or int(allowed) >= 1 << 60:  # version 1: a huge number is no limit
            return []
        return [max(0, int(allowed) - int(used) + reclaimable)]
    except (OSError, ValueError):
        return []


def keep_on_device(tensor: Tensor) -> Callable[[], Tensor]:
    """Keep a tensor on its device."""
    return lambda: tensor


class Offload:
    """Backs up GPU tensors on the host and host tensors in a temporary file, in a thread; their memory is free when they are written.

    A tensor that could not be written is kept where it is, and ``wait`` raises.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "growkern")
        self._file: FileIO | None = None
        self._errors: list[BaseException] = []
        self._last: Future[Any] | None = None
        # by address, while the storage lives: tensors that share a storage share it again when restored
        self._kept: dict[int, tuple[StorageWeakRef, Callable[[], Tensor]]] = {}

    def __enter__(self) -> "Offload":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)  # the growth has succeeded, or all is restored
        if self._file is not None:
            self._file.close()

    def __call__(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Back up a tensor that nobody writes any more; return a function that restores it."""
        if not tensor.is_cuda and tensor.is_shared():  # other processes have it too
            return keep_on_device(tensor)
        place = tensor.untyped_storage().data_ptr()
        if place not in self._kept or self._kept[place][0].expired():
            back = cache(self._written(_raw(tensor)))
            self._kept[place] = StorageWeakRef(tensor.untyped_storage()), back
        back, dtype, device = self._kept[place][1], tensor.dtype, tensor.device
        layout = tensor.storage_offset(), tensor.shape, tensor.stride()
        return lambda: torch.empty(0, dtype=dtype, device=device).set_(
            back().untyped_storage(), *layout
        )

    def wait(self) -> None:
        """Wait until all tensors are written; raise what the first that could not be written has raised."""
        if self._last is not None:
            self._last.result()
        if self._errors:
            raise self._errors[0]
        trim()

    def _written(self, raw: Tensor) -> Callable[[], Tensor]:
        """Write a storage in the thread; return a function that reads it, in the thread too: the file has one position."""
        store = _to_host(raw.device) if raw.is_cuda else partial(_to_file, file=self._opened())

        def write(raw: Tensor) -> Callable[[], Tensor]:
            try:
                return store(raw)
            except BaseException as error:
                self._errors.append(error)
                return lambda: raw

        self._last = written = self._thread.submit(write, raw)
        return lambda: self._thread.submit(written.result()).result()

    def _opened(self) -> FileIO:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="growkern-", buffering=0)  # noqa: SIM115
        return self._file


def _raw(tensor: Tensor) -> Tensor:
    """Return the storage of a tensor as a uint8 tensor."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _to_host(device: torch.device) -> Callable[[Tensor], Callable[[], Tensor]]:
    """Return a function that copies a storage to the host beside the kernels that are launched later."""
    ready = torch.cuda.current_stream(device).record_event()

    def store(raw: Tensor) -> Callable[[], Tensor]:
        with torch.cuda.stream(torch.cuda.Stream(device)):
            ready.wait()  # pyright: ignore[reportUnknownMemberType]
            host = raw.cpu()
        return lambda: host.to(device)

    return store


def _to_file(raw: Tensor, file: FileIO) -> Callable[[], Tensor]:
    start, pinned = file.seek(0, 2), is_pinned(raw)
    n_bytes = write_bytes(raw, file)

    def back() -> Tensor:
        file.seek(start)
        whole = read_bytes(n_bytes, file)
        return whole.pin_memory() if pinned else whole

    return back


def write_bytes(tensor: Tensor, file: FileIO) -> int:
    """Write the elements of a host tensor to an unbuffered file, in order; return the number of bytes."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    view = _view(flat)
    while view:
        view = view[file.write(view) :]
    return len(flat)


def read_bytes(n_bytes: int, file: FileIO) -> Tensor:
    """Read uint8 (n_bytes,) from an unbuffered file; raise OSError if the file ends early."""
    buffer = torch.empty(n_bytes, dtype=torch.uint8)
    view = _view(buffer)
    while view:
        if not (n := file.readinto(view)):
            raise OSError("the temporary file of a source is shorter than what was written")
        view = view[n:]
    return buffer


def _view(flat: Tensor) -> memoryview:
    """Return the memory of a host tensor, uint8 (n,), which the caller keeps alive."""
    return memoryview((ctypes.c_ubyte * len(flat)).from_address(flat.data_ptr())).cast("B")


def is_shared(tensor: Tensor) -> bool:
    """True for a host tensor in memory that processes share, and not in a file."""
    if tensor.device.type != "cpu":
        return False
    storage = tensor.untyped_storage()
    return storage.is_shared() and storage.filename is None


def stored_like(source: Tensor, target: Tensor) -> Tensor:
    """Return a contiguous target in the memory format of its source (``channels_last``, transposed), and in shared or pinned memory if
    the source is."""
    on_cpu = source.device.type == "cpu"
    if not on_cpu and source.is_contiguous():  # most targets
        return target
    if not source.is_contiguous() and target.dim() == source.dim():
        by_stride = sorted(range(source.dim()), key=lambda axis: -source.stride(axis))
        if by_stride != [*range(source.dim())]:
            target = torch.empty_permuted(
                target.shape, by_stride, dtype=target.dtype, device=target.device
            ).copy_(target)
    if not on_cpu or not source.numel():
        return target
    if is_shared(source):
        return target.share_memory_()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return target.pin_memory() if is_pinned(source) else target


def is_pinned(tensor: Tensor) -> bool:
    """True for a host tensor in page-locked memory."""
    can_pin = torch.cuda.is_initialized()  # else ``is_pinned`` would initialize the device
    return can_pin and tensor.device.type == "cpu" and tensor.is_pinned()


def trim() -> None:
    """Return freed host memory to the operating system."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):  # glibc
        ctypes.CDLL(None).malloc_trim(0)
