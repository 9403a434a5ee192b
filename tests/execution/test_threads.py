"""Large work on a CPU runs in threads of its own: the same bits, one error for the caller, and torch's number of threads as before."""

import threading

import pytest
import torch
from models import grow, make, train
from torch.utils._python_dispatch import TorchDispatchMode

from growkern.execution import measures, torch_backend
from growkern.model.tracing.small import plain_torch
from growkern.support import threads
from growkern.support.threads import FEW, LARGE, PER_CORE, PER_THREAD, run_each
from growkern.width import FPI, Lossless

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 3])
def n_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def seen_by_a_new_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start(), thread.join()
    return found[0]


@pytest.mark.parametrize(
    ("n_bytes", "most"), [(LARGE, FEW), (FEW * PER_THREAD, FEW), ((FEW + 1) * PER_THREAD, FEW + 1)]
)
def test_every_item_runs_once_and_alone(n_threads, n_bytes, most):
    ran, own = [], []

    def worker():
        own.append(torch.get_num_threads())
        return ran.append

    run_each(range(100), worker, CPU, n_bytes)

    n = min(most, n_threads * PER_CORE) if n_threads > 1 else 1
    assert sorted(ran) == [*range(100)] and own == [1] * n
    assert torch.get_num_threads() == seen_by_a_new_thread() == n_threads


@pytest.mark.parametrize(
    ("device", "n_bytes"), [("cpu", LARGE - 1), ("cuda", LARGE), ("meta", LARGE)]
)
def test_small_work_and_work_of_other_devices_stays_in_the_callers_thread(
    device, n_bytes, n_threads
):
    ran = []

    run_each(
        range(9),
        lambda: lambda i: ran.append((i, threading.get_ident(), torch.get_num_threads())),
        torch.device(device),
        n_bytes,
    )

    assert ran == [(i, threading.get_ident(), n_threads) for i in range(9)]
    assert torch.get_num_threads() == seen_by_a_new_thread() == n_threads


def test_a_thread_that_uses_torch_meanwhile_keeps_its_number(n_threads):
    seen = []

    run_each(range(20), lambda: lambda _: seen.append(seen_by_a_new_thread()), CPU, LARGE)

    assert seen == [n_threads] * 20


@pytest.mark.parametrize("at", [0, 50, 99])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["item", "iteration", "worker"])
def test_what_raises_reaches_the_caller_and_ends_the_threads(n_threads, where, error, at):
    def items():
        for i in range(100):
            if where == "iteration" and i == at:
                raise error("boom")
            yield i

    def run(i):
        if where == "item" and i == at:
            raise error("boom")

    def worker():
        if where == "worker":
            raise error("boom")
        return run

    with pytest.raises(error, match="boom"):
        run_each(items(), worker, CPU, LARGE)

    assert not [t for t in threading.enumerate() if t.name == "growkern"]
    assert torch.get_num_threads() == seen_by_a_new_thread() == n_threads


@pytest.mark.parametrize("method", [Lossless(noise=0.5), Lossless(), FPI(maps="random")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_growth_in_threads_writes_the_bits_of_one_without(n_threads, method, dtype, monkeypatch):
    def grown(large, n):
        torch.set_num_threads(1)
        monkeypatch.setattr(threads, "LARGE", large)
        monkeypatch.setattr(threads, "SMALL", 256)
        monkeypatch.setattr(measures, "CHUNK", 64)
        for name in ("PART", "NOISY_PART"):
            monkeypatch.setattr(torch_backend, name, 64)
        model = make("llama", tied=True).to(dtype)
        optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
        train(model, optim, 2)
        torch.set_num_threads(n)
        grow(model, optim, to="2x", width=method)
        return [t for p in model.parameters() for t in (p, *optim.state[p].values())]

    expected = grown(1 << 60, 1)

    assert all(torch.equal(a, b) for a, b in zip(grown(0, n_threads), expected, strict=True))


class ReadOnAllCores(TorchDispatchMode):
    """Names the operators of its thread that read a large tensor with several threads of torch."""

    def __init__(self, least):
        super().__init__()
        self.least, self.found = least, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = [t for arg in args for t in (arg if isinstance(arg, list | tuple) else [arg])]
        large = [t for t in given if isinstance(t, torch.Tensor) and t.numel() >= self.least]
        several = torch.get_num_threads() > 1 and "empty" not in function.name()
        if large and several and not aliases(result, large):
            self.found.add(function.name())
        return result


def aliases(result, tensors):
    """True for views of tensors, and for tensors that were written in place."""
    of = result if isinstance(result, torch.Tensor) else result[0]
    places = {t.untyped_storage().data_ptr() for t in tensors}
    return of.untyped_storage().data_ptr() in places


@pytest.mark.parametrize("method", [Lossless(noise=0.5), Lossless()], ids=str)
def test_no_operator_on_all_cores_reads_a_tensor(method, monkeypatch):
    monkeypatch.setattr(threads, "LARGE", 0)
    monkeypatch.setattr(threads, "SMALL", 0)
    model = make("gpt2", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optim, 2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ReadOnAllCores(24 * 24) as mode:
            grow(model, optim, to="2x", width=method)
    finally:
        torch.set_num_threads(before)

    assert not mode.found


def test_a_small_model_is_traced_on_one_core(n_threads):
    with plain_torch():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == seen_by_a_new_thread() == n_threads


def test_models_are_traced_one_after_the_other():
    entered, done = threading.Event(), threading.Event()

    def other():
        with plain_torch():
            entered.set()
        done.set()

    thread = threading.Thread(target=other)
    with plain_torch():
        thread.start()
        assert not entered.wait(0.2)
        assert torch.get_default_dtype() == torch.float64
    thread.join()
    assert entered.is_set() and done.is_set() and torch.get_default_dtype() == torch.float32
