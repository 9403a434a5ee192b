"""Memory: what is free, and where a source waits for the growth to succeed when it cannot wait on its device."""

import ctypes
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from mmap import PAGESIZE
from typing import Any

import torch
from torch import Tensor

Keep = Callable[
    [Tensor], Callable[[], Tensor]
]  # takes a tensor that is about to be replaced; gives the way to have it back


HUGE_PAGE = 1 << 21
# of <linux/mman.h>; the second since 5.4, and refused without harm before
MADV_HUGEPAGE, MADV_PAGEOUT = 14, 21


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


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor of the dtype and device of another.

    A large one of the host lies in huge pages where the system leaves that to the program: its first touch brings 2 MiB at a time
    rather than 4 KiB, which is what takes longest on a CPU. (What torch does for all under ``THP_MEM_ALLOC_ENABLE=1``.)
    """
    tensor = torch.empty(shape, dtype=like.dtype, device=like.device)
    if tensor.device.type == "cpu":
        _advise(tensor, HUGE_PAGE, MADV_HUGEPAGE)
    return tensor


def in_place(tensor: Tensor) -> Callable[[], Tensor]:
    """Keep a tensor where it is."""
    return lambda: tensor


@contextmanager
def elsewhere() -> Generator[Keep, None, None]:
    """Keep tensors of a GPU on the host, and those of the host in a temporary file, so that their memory is free at once."""
    files = ExitStack()
    file: list[Any] = []
    kept: dict[
        int, Callable[[], Tensor]
    ] = {}  # by storage: tensors that share one still do when they are back

    def keep(tensor: Tensor) -> Callable[[], Tensor]:
        raw, place = _raw(tensor), tensor.untyped_storage().data_ptr()
        if not tensor.is_cuda and not file:
            opened = tempfile.TemporaryFile(prefix="growkern-", buffering=0)  # noqa: SIM115
            file.append(files.enter_context(opened))
        if place not in kept:
            kept[place] = cache(_to_host(raw) if tensor.is_cuda else _to_file(raw, file[0]))
        back, dtype, device = kept[place], tensor.dtype, tensor.device
        layout = tensor.storage_offset(), tensor.shape, tensor.stride()
        return lambda: torch.empty(0, dtype=dtype, device=device).set_(
            back().untyped_storage(), *layout
        )

    with files:
        yield keep


def _raw(tensor: Tensor) -> Tensor:
    """The bytes that lie under a tensor."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _to_host(raw: Tensor) -> Callable[[], Tensor]:
    host, device = raw.cpu(), raw.device
    return lambda: host.to(device)


def _to_file(raw: Tensor, file: Any) -> Callable[[], Tensor]:
    n_bytes = raw.numel()
    start = file.seek(0, 2)
    done, buffer = 0, memoryview(_buffer(raw))
    while done < n_bytes:
        done += file.write(buffer[done : done + (1 << 28)])

    def back() -> Tensor:
        tensor = torch.empty(n_bytes, dtype=torch.uint8)
        into, read = memoryview(_buffer(tensor)), 0
        file.seek(start)
        while read < n_bytes:
            got = int(file.readinto(into[read:]))
            if not got:
                raise OSError(f"the temporary file of a source ended {n_bytes - read} bytes early")
            read += got
        return tensor

    return back


def _buffer(raw: Tensor) -> ctypes.Array[ctypes.c_ubyte]:
    return (ctypes.c_ubyte * raw.numel()).from_address(raw.data_ptr())


def trim() -> None:
    """Give freed memory of the host back to the system."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):  # glibc
        ctypes.CDLL(None).malloc_trim(0)


def bytes_of(tensor: Tensor) -> memoryview:
    """The elements of a tensor of the host as bytes, in order; they live as long as the view does."""
    dense = tensor.detach().contiguous()
    n_bytes = dense.numel() * dense.element_size()
    array = (ctypes.c_ubyte * n_bytes).from_address(dense.data_ptr() if n_bytes else 0)
    array.tensor = dense  # pyright: ignore[reportAttributeAccessIssue]
    return memoryview(array).cast("B")


def page_out(tensor: Tensor) -> None:
    """Let the memory of a tensor that is mapped from a file go, as a hint: what is read again is read from the file again."""
    _advise(tensor, PAGESIZE, MADV_PAGEOUT)


def _advise(tensor: Tensor, page: int, advice: int) -> None:
    """Tell the system how the whole pages that a tensor of the host lies in are used; a hint, so a refusal is no failure."""
    storage = tensor.untyped_storage()
    start = -(-storage.data_ptr() // page) * page
    end = (storage.data_ptr() + storage.nbytes()) // page * page
    if sys.platform == "linux" and end > start:
        place, n_bytes = ctypes.c_void_p(start), ctypes.c_size_t(end - start)
        ctypes.CDLL(None).madvise(place, n_bytes, advice)
