"""The processes that call a function together, and votes between them."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from growkern.errors import CheckpointError
from growkern.support.text import one_line

T = TypeVar("T")


@contextmanager
def answered() -> Generator[None]:
    """Run collectives of a checkpoint; raise CheckpointError where another process has ended."""
    try:
        yield
    except RuntimeError as error:
        raise CheckpointError(
            f"another process has ended, or has not answered in the time of the process group ({one_line(error, 300)}). Start all "
            "processes again, from the source."
        ) from error


class Processes:
    """The processes of the default process group; this process alone where ``torch.distributed`` is not initialized.

    Attributes:
        rank: Rank of this process.
        n: Number of processes.
    """

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized()
        self.rank, self.n = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)

    def gathered(self, value: T) -> list[T]:
        """Return the values of all processes, by rank.

        Raises:
            CheckpointError: Another process has ended.
        """
        if self.n == 1:
            return [value]
        values: list[Any] = [None] * self.n
        with answered():
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self, after: str) -> Generator[None]:
        """Run a block without collectives in all processes; an error in one is raised in all, when every process has ended the block.

        Args:
            after: What the state is after an error, as a sentence.

        Raises:
            CheckpointError: Another process failed.
        """
        failed: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failed = error
        said = self.gathered("" if failed is None else f"{type(failed).__name__}: {failed}")
        if failed is not None:
            raise failed
        if errors := {rank: text for rank, text in enumerate(said) if text}:
            rank, text = next(iter(errors.items()))
            raise CheckpointError(f"process {rank} failed ({one_line(text, 500)}). {after}")
