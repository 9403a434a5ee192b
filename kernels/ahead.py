"""Compile kernels in threads before they are launched: most of a compilation runs outside of Python, so that several take little longer
than one, and the first growth of a process need not wait for those that were started when a schedule was attached."""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from threading import Lock
from typing import Any

import torch

import growkern.kernels.expand as expand
import growkern.kernels.squares as squares

Key = tuple[Any, ...]
_started: dict[Key, Future[object]] = {}
_alone = Lock()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(8, "growkern")


def start(dtypes: Iterable[torch.dtype], device: torch.device) -> None:
    """Start to compile what a growth of tensors of these dtypes launches; random maps, whose rows are staged, come later.

    A kernel that does not compile here raises where it is launched.
    """
    for dtype in dtypes:
        if dtype not in expand.DTYPES:
            continue
        if dtype.is_floating_point:
            options = squares.launch_options(dtype)
            math = torch.float64 if dtype == torch.float64 else torch.float32
            _submit(squares.squares_kernel, (torch.int64, math, torch.int64, 2), options, device)
        means = torch.float32 if dtype.itemsize < 4 else dtype  # fills of a low-precision target
        for src in {dtype, means}:
            _submit(expand.expand_kernel, (torch.int64, 0, 2, 8), expand.launch_options(src, dtype, 0), device)  # fmt: skip


def finish() -> None:
    """Wait until what was started is compiled."""
    for future in [*_started.values()]:
        future.exception()


def _submit(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any], device: torch.device) -> None:  # fmt: skip
    key = kernel, device, *map(str, options.items())
    if key not in _started:
        _started[key] = _pool().submit(_compile, kernel, arguments, options, device)


def _compile(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any], device: torch.device) -> None:  # fmt: skip
    with torch.cuda.device(device):
        with (
            _alone
        ):  # threads that make triton's cache of a device at once each make one, and one is kept
            kernel.device_caches[device.index]
        kernel.warmup(*arguments, grid=(1,), **options)
