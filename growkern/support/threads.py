"""Work on a CPU in two threads per core, each of which runs torch's operators alone.

An operator that runs on all cores waits for its slowest part. Where other processes use the cores, every operator then waits for a core
that is lost for milliseconds; threads with work of their own wait once, at the end.
"""

import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from queue import Queue
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
PER_CORE = 2  # threads; where other processes use the cores, a second one is faster, and where they do not, it costs nothing
AHEAD = 2  # items per thread that wait for it
CHUNK = 1 << 18  # elements per item on a CPU: temporaries fit in cache, and every thread has work
LARGE = 1 << 24  # bytes of work from which threads pay
FEW, PER_THREAD = (
    4,
    1 << 28,
)  # threads for any large work, and bytes of work for each thread more: a thread has up to 14 MB of temporaries
SMALL = 1 << 20  # bytes of an item that is read faster than handed to a thread


@contextmanager
def one_thread() -> Generator[None]:
    """Run torch's operators in the caller's thread alone, as suits small tensors: see above."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n)


def run_each(
    items: Iterable[T], worker: Callable[[], Callable[[T], object]], device: torch.device, n_bytes: int
) -> None:  # fmt: skip
    """Run a function on every item; large work on a CPU runs on up to twice as many threads as torch uses, other work on the caller's.

    Args:
        items: Independent pieces of work; the caller's thread iterates over them.
        worker: Called once per thread; returns the function of that thread.
        device: Device of the work.
        n_bytes: Bytes of the work.

    Raises:
        BaseException: The first that an item, or the iteration, has raised; no thread runs on.
    """
    n = torch.get_num_threads()
    if n == 1 or n_bytes < LARGE or device.type != "cpu":
        run = worker()
        for item in items:
            run(item)
        return
    n_threads = min(PER_CORE * n, max(FEW, n_bytes // PER_THREAD))
    waiting: Queue[list[T]] = Queue(AHEAD * n_threads)  # an empty list ends a thread
    errors: list[BaseException] = []
    alone = threading.Semaphore(0)

    def work() -> None:
        try:
            # of this thread, and of all that use torch for the first time from now on
            torch.set_num_threads(1)
            alone.release()
            run = worker()
            with torch.no_grad():
                while item := waiting.get():
                    if not errors:
                        run(item[0])
        except BaseException as error:
            errors.append(error)
            while waiting.get():  # so that the caller never waits for room
                pass

    threads: list[threading.Thread] = []
    try:
        for _ in range(n_threads):
            thread = threading.Thread(target=work, name="growkern", daemon=True)
            thread.start()
            threads.append(thread)
        for _ in threads:
            alone.acquire()
        torch.set_num_threads(n)  # of this thread, and of others as above
        for item in items:
            if errors:
                break
            waiting.put([item])
    finally:
        for _ in threads:
            waiting.put([])
        for thread in threads:
            thread.join()
        torch.set_num_threads(n)
    if errors:
        raise errors[0]


def read_each(
    items: Sequence[T], run: Callable[[T], object], tensor_of: Callable[[T], Tensor]
) -> None:
    """Run a function that reads the tensor of each item, on one device: large tensors by ``run_each``, small ones on the caller's thread.

    Args:
        items: Independent pieces of work.
        run: The function.
        tensor_of: Returns the tensor that the work of an item reads.
    """
    large, small = list[T](), list[T]()
    for item in items:
        (large if tensor_of(item).nbytes >= SMALL else small).append(item)
    for some in filter(None, (large, small)):
        n_bytes = sum(tensor_of(item).nbytes for item in some) if some is large else 0
        run_each(some, lambda: run, tensor_of(some[0]).device, n_bytes)
