"""What every test stands on: Triton's interpreter where there is no GPU, one thread per worker, fixed seeds, poisoned memory."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import wraps

import hypothesis
import pytest
import torch
from torch import Tensor

# families that `make check` tests: one with RMSNorm, RoPE and gates, one with none of them
QUICK = "llama", "gpt2"
HAS_CUDA = torch.cuda.is_available()

if not HAS_CUDA:
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # read by `import triton`, which nothing above does
for number, default in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if (
        signal.getsignal(number) == signal.SIG_IGN
    ):  # a background job, or nohup; subprocesses inherit it
        signal.signal(number, default)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # for subprocesses
    torch.set_num_threads(1)
with torch.device(
    "meta"
):  # torch looks up once which functions a device context redirects: those below, before they are wrapped
    assert torch.empty(0).is_meta

# no deadline: a busy machine is no failure; derandomized: a run is green or red for the code alone
hypothesis.settings.register_profile("growkern", deadline=None, derandomize=True)
hypothesis.settings.load_profile("growkern")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu`` where there is none, and mark the cases of most families as slow."""
    for item in items:
        if not HAS_CUDA and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if (
            getattr(item, "callspec", None)
            and item.callspec.params.get("family", QUICK[0]) not in QUICK
        ):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Keep what the imports made out of ``gc.get_objects``, which every growth goes through: half of the suite's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def without_accelerators() -> None:
    """No test meets an Accelerator of another, or a data loader that another left in its middle, at whose end every step synchronizes."""
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(True)
        state.GradientState._reset_state()


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fill uninitialized floating memory with NaN, so that an element nobody wrote is seen."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(allocate)
    def poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point():
            with torch.no_grad():  # a leaf that requires grad refuses writes
                tensor.fill_(float("nan"))
        return tensor

    return poisoned
