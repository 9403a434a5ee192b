"""A growth's peak memory is the promised number of bytes; a lean growth that fails restores the source tensors that it let go."""

import copy
import io
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from models import batch, grow, make, train
from states import fail_at

import growkern
from growkern.commit import commit
from growkern.commit import optimizer as optim_target
from growkern.commit import param_groups as groups
from growkern.engine.sources import tensors_of
from growkern.errors import CommitError, GrowthError, InsufficientMemoryError, PlanError
from growkern.execution import execute, sets
from growkern.execution.grouping import grouped
from growkern.execution.tiles import Tiler
from growkern.kernels import table
from growkern.kernels.table import Table
from growkern.optimizer.describe import describe_optimizer
from growkern.optimizer.state_rules import GRADIENT, SQUARE, VALUE
from growkern.support import memory

TENSORS = {
    "plain": torch.randn(5, 7),
    "transposed": torch.randn(5, 7).T,
    "part": torch.randn(9, 9)[2:7, 1:5],
    "bfloat16": torch.randn(3, 3).bfloat16(),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
}


@pytest.mark.parametrize("name", TENSORS)
def test_what_is_kept_elsewhere_comes_back_as_it_was(name):
    tensor = (
        TENSORS[name].clone(memory_format=torch.preserve_format)
        if name != "part"
        else TENSORS[name]
    )
    before, layout = tensor.clone(), (tensor.stride(), tensor.storage_offset())

    with memory.Offload() as keep:
        keep(torch.ones(1000))  # the file holds other tensors too
        back = keep(tensor)
        again = keep(torch.zeros(3))
        keep.wait()
        tensor.zero_()

        assert torch.equal(back(), before) and (back().stride(), back().storage_offset()) == layout
        assert torch.equal(again(), torch.zeros(3))


class Halting(io.FileIO):
    """A file that takes and gives at most 7 bytes at a time."""

    def write(self, data):
        return super().write(data[:7])

    def readinto(self, buffer):
        return super().readinto(buffer[:7])


@pytest.mark.parametrize("name", TENSORS)
def test_bytes_of_a_tensor_are_its_elements_in_order(name, tmp_path):
    tensor = TENSORS[name]

    with Halting(tmp_path / "file", "w+b") as file:
        n_bytes = memory.write_bytes(tensor, file)
        file.seek(0)
        data = bytes(memory.read_bytes(n_bytes, file).tolist())
        file.seek(0)
        with pytest.raises(OSError, match="shorter than what was written"):
            memory.read_bytes(n_bytes + 1, file)

    assert data == (tmp_path / "file").read_bytes()
    assert len(data) == tensor.numel() * tensor.element_size()
    if len(data):
        read = torch.frombuffer(bytearray(data), dtype=tensor.dtype).view(tensor.shape)
        assert torch.equal(read, tensor)


def fixture(family="llama"):
    model = make(family, tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optim, 100)
    train(model, optim, 2)
    model(batch()).logits.square().mean().backward()
    return model, optim, scheduler


def snapshot(model, optim, scheduler):
    values = {f"value {n}": t.clone() for n, t in model.state_dict().items()}
    values |= {
        f"grad {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }
    names = {id(p): n for n, p in model.named_parameters()}
    states = {
        f"{key} {names[id(p)]}": torch.as_tensor(value).clone()
        for p, state in optim.state.items()
        for key, value in state.items()
    }
    groups = [[names[id(p)] for p in g["params"]] for g in optim.param_groups]
    rates = [g["lr"] for g in optim.param_groups], scheduler.get_last_lr()
    return values, states, groups, rates, model.config.to_dict(), str(model)


def equal(one, other) -> bool:
    def tensors(a, b):
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    return tensors(one[0], other[0]) and tensors(one[1], other[1]) and one[2:] == other[2:]


@pytest.mark.parametrize("to", ["2x", {"hidden": 36, "layers": 4}], ids=["2x", "wider and deeper"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_lean_and_staged_growths_are_bitwise_equal(family, to):
    one, other = fixture(family), fixture(family)

    reports = [
        grow(model, optim, to=to, scheduler=scheduler, memory=mode)
        for (model, optim, scheduler), mode in [(one, "stage"), (other, "lean")]
    ]

    assert equal(snapshot(*one), snapshot(*other))
    assert [report.memory for report in reports] == ["stage", "lean"]
    assert reports[1].peak_bytes < reports[0].peak_bytes
    assert reports[0].n_bytes_written == reports[1].n_bytes_written
    train(other[0], other[1], 2)


STAGES = {
    "a set": (execute, "_run"),
    "values": (commit.Undo, "storage"),
    "dicts": (commit.Undo, "set_dict"),
    "copy blocks": (commit, "_new_blocks"),
    "guards": (commit, "_guard"),
    "hooks": (optim_target, "_scales"),
    "optimizer": (optim_target, "_optimizer"),
    "groups": (optim_target, "split_groups"),
    "scheduler": (groups, "_follow"),
    "last check": (optim_target, "check_state"),
}
OFTEN = "a set", "values", "dicts"  # a lean growth calls these stages once per set of tensors
ERRORS = RuntimeError("boom"), MemoryError(), KeyboardInterrupt()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "call", "error"),  # a later call fails by one error per stage
    [*((s, 1, e) for s in STAGES for e in ERRORS), *zip(OFTEN, (4, 4, 4), ERRORS, strict=True)],
    ids=lambda value: value if isinstance(value, str) else repr(value),
)
def test_a_lean_growth_that_fails_brings_every_source_back(stage, call, error, monkeypatch):
    model, optim, scheduler = fixture("llama")
    before, ids = snapshot(model, optim, scheduler), [id(p) for p in model.parameters()]
    failures = fail_at(monkeypatch, *STAGES[stage], error, call)
    to = {"hidden": 48, "layers": 3}
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CommitError
    with pytest.raises(expected):
        grow(model, optim, to=to, scheduler=scheduler, memory="lean")
    monkeypatch.undo()

    assert failures and equal(snapshot(model, optim, scheduler), before)
    assert [id(p) for p in model.parameters()] == ids
    grow(model, optim, to=to, scheduler=scheduler)  # the restored model can still grow
    train(model, optim, 1)


def test_sources_are_let_go_one_by_one():
    model, optim, _ = fixture("llama")
    spec = growkern.describe(model)
    plan, law = growkern.plan(model, optim), describe_optimizer(model, optim, spec).rules
    run = execute.Execution(plan, tensors_of(model, (optim,), spec), lambda _: law, memory="lean")
    changed = {row.source for row in plan.tensors if plan.changes(row)}
    sources = {name: weakref.ref(run.sources.values[name]) for name in changed}

    n_alive = []
    for _ in run.parts():
        alive = {name for name, source in sources.items() if source() is not None}
        assert alive == changed & set(run.sources.values)
        n_alive.append(len(alive))

    assert n_alive == [*reversed(range(len(changed)))]


def test_what_does_not_fit_staged_is_grown_lean(monkeypatch):
    staged, lean = (
        grow(*fixture()[:2], to="2x", dynamics=None, memory=mode).peak_bytes
        for mode in ("stage", "lean")
    )
    model, optim, _ = fixture()
    monkeypatch.setattr(sets, "free_bytes", lambda device: (staged + lean) // 2)

    report = grow(model, optim, to="2x", dynamics=None)

    assert (report.memory, report.peak_bytes) == ("lean", lean)
    assert "(lean)" in str(report)


def test_what_does_not_fit_at_all_is_refused_with_the_figures(monkeypatch):
    model, optim, scheduler = fixture()
    before = snapshot(model, optim, scheduler)
    monkeypatch.setattr(sets, "free_bytes", lambda device: 1000)

    for mode in (None, "stage", "lean"):
        with pytest.raises(
            InsufficientMemoryError, match="memory='stage'.*memory='lean'; free: 0.00"
        ):
            grow(model, optim, to="2x", scheduler=scheduler, memory=mode)

    assert equal(snapshot(model, optim, scheduler), before)


def test_an_unknown_memory_is_refused():
    with pytest.raises(PlanError, match="unknown memory='small'; pass 'stage', 'lean', or None"):
        grow(make("llama", tied=True), memory="small")


@pytest.mark.parametrize("seed", [3, 12, 15])
def test_master_weights_get_the_noise_of_the_weight_in_every_memory_mode(seed):
    """The root mean squares of these weights and of their masters are other numbers when they are rounded to bfloat16."""

    def grown(memory):
        torch.manual_seed(seed)
        model, masters, held = make("gpt2", tied=True, seed=seed), {}, []
        for i, (name, p) in enumerate(model.named_parameters()):
            if i % 2 or "wte" in name:
                p.data = p.data.to(torch.bfloat16)
                around = 1 + 1e-3 * torch.randn(p.shape)
                masters[p] = torch.nn.Parameter(p.detach().float() * around)
            held.append(masters.get(p, p))
        optim = torch.optim.AdamW(held)
        grow(model, optim, to="2x", memory=memory, master_weights=masters, seed=1)
        return [t for p in model.parameters() for t in (p, *([masters[p]] if p in masters else []))]

    for a, b in zip(grown("stage"), grown("lean"), strict=True):
        assert torch.equal(a, b)


def test_a_full_disk_takes_the_growth_back(monkeypatch):
    model, optim, scheduler = fixture()
    before = snapshot(model, optim, scheduler)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(memory, "_to_file", full)
    with pytest.raises(GrowthError, match="rolled back: .*No space left"):
        grow(model, optim, to="2x", scheduler=scheduler, memory="lean")

    assert equal(snapshot(model, optim, scheduler), before)


def test_sources_are_written_beside_the_computation_of_the_next_targets_and_no_later(monkeypatch):
    events, written, computing = [], threading.Event(), execute._run

    def computed(*args):
        events.append("compute")
        computing(*args)
        if len(events) > 1:  # a write of the set before goes on until here
            written.set()

    def to_file(raw, file):
        assert written.wait(60)
        back = store(raw, file=file)
        events.append("write")
        return back

    store = memory._to_file
    monkeypatch.setattr(memory, "_to_file", to_file)
    monkeypatch.setattr(execute, "_run", computed)
    model, optim, scheduler = fixture()
    n_each = 3  # a weight and its moments

    grow(model, optim, to="2x", scheduler=scheduler, memory="lean")

    assert events[:2] == ["compute", "compute"]
    for k in range(3, len(events)):  # at the third set, the first one's sources are written
        n_computed, n_written = (events[:k].count(name) for name in ("compute", "write"))
        assert n_written >= n_each * (n_computed - 2) if events[k] == "compute" else True


def test_tensors_that_share_memory_are_kept_once_and_still_share_it():
    flat = torch.arange(12.0)
    with memory.Offload() as keep:
        one, other = (keep(part) for part in flat.view(2, 6))

        assert torch.equal(one(), flat[:6]) and torch.equal(other(), flat[6:])
        assert one().untyped_storage().data_ptr() == other().untyped_storage().data_ptr()


def test_memory_that_is_used_again_is_kept_again():
    with memory.Offload() as keep:
        for value in range(20):
            tensor = torch.full((1000,), float(value))
            back = keep(tensor)
            del tensor
            assert torch.equal(back(), torch.full((1000,), float(value)))


def test_an_undo_that_fails_once_is_tried_again(monkeypatch):
    model, optim, scheduler = fixture()
    before, calls, buffer = snapshot(model, optim, scheduler), [], memory.read_bytes

    def fails(n_bytes, file):
        if failing:
            calls.append(1)
            if len(calls) == 2:
                raise MemoryError
        return buffer(n_bytes, file)

    failing = []
    monkeypatch.setattr(memory, "read_bytes", fails)
    monkeypatch.setattr(optim_target, "check_state", lambda *_: (failing.append(1), 1 / 0))

    with pytest.raises(CommitError, match="rolled back: division by zero"):
        grow(model, optim, to="2x", scheduler=scheduler, memory="lean")

    assert len(calls) > 2 and equal(snapshot(model, optim, scheduler), before)


def test_what_cannot_be_brought_back_is_said(monkeypatch):
    model, optim, scheduler = fixture()
    monkeypatch.setattr(optim_target, "check_state", lambda *_: 1 / 0)
    monkeypatch.setattr(memory, "read_bytes", lambda *_: 1 / 0)

    with pytest.raises(CommitError, match="could not be rolled back .*load them from a checkpoint"):
        grow(model, optim, to="2x", scheduler=scheduler, memory="lean")


@pytest.mark.parametrize("to", ["2x", "1.5x", {"layers": 4}], ids=str)
def test_the_bytes_reported_are_those_of_the_table(to):
    model, optim, _ = fixture("gpt2")
    spec = growkern.describe(model)
    plan, law = growkern.plan(model, optim, to=to), describe_optimizer(model, optim, spec).rules
    sources = tensors_of(model, (optim,), spec)
    run = execute.Execution(plan, sources, lambda _: law, memory="stage")
    tiler, staged = Tiler(plan), next(run.parts())
    tensors = {
        (row.name, order): job
        for row in plan.tensors
        if plan.changes(row)
        for order, job in enumerate(
            [
                (sources.values[row.source], staged.values[row.name]),
                (sources.grads.get(row.source), staged.grads.get(row.name)),
            ]
        )
        if job[1] is not None
    }
    for row in plan.tensors:
        for order, key in ((1, "exp_avg"), (2, "exp_avg_sq")):
            if row.name in staged.states:
                pair = sources.states[row.source][key], staged.states[row.name][key]
                tensors[row.name, key] = (*pair, order)
    rows = {row.name: row for row in plan.tensors}
    jobs = [
        tiler.job(
            rows[name], source, target, (VALUE, GRADIENT, SQUARE)[order[0] if order else kind]
        )
        for (name, kind), (source, target, *order) in tensors.items()
    ]
    n_measured = tiler.measure(jobs, lambda device: None)
    made = grouped(tiler, jobs)
    groups = made.groups
    built = Table()
    built.add([(group, range(len(group.pieces))) for group in groups], 16, 128)
    read = written = 0
    for record in built.content()[len(built.numbers) :].view(-1, table.N_FIELDS.value).tolist():
        size = record[table.N_ROWS.value] * record[table.N_COLS.value] * 4
        written += (
            size * (record[table.ROW_COPIES.value] >> 32) * (record[table.COL_COPIES.value] >> 32)
        )
        read += size if record[table.SRC_ROW.value] and record[table.SRC_COL.value] else 0

    assert run.n_written == written == sum(target.numel() * 4 for _, target, *_ in tensors.values())
    assert (
        run.n_read == read + n_measured + made.n_read
    )  # the last two: bytes read for statistics, such as the weight's size that scales noise
    if to == "2x":
        assert read == sum(source.numel() * 4 for source, *_ in tensors.values())


PEAK = """
import os, torch, transformers, growkern
torch.set_num_threads(1)

def model(width, layers, vocab, dtype):
    config = transformers.LlamaConfig(hidden_size=width, num_attention_heads=8, num_key_value_heads=4, vocab_size=vocab,
                                      intermediate_size=2 * width, num_hidden_layers=layers,
                                      tie_word_embeddings=dtype == "float32")
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    optim = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        optim.state[p] = dict(step=torch.tensor(9.0), exp_avg=torch.ones_like(p), exp_avg_sq=torch.ones_like(p))
    return model, optim

def memory(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

def measure(mode, dtype):
    growkern.expand_inplace(*model(64, 1, 100, dtype), memory=mode)  # pages of libraries count too
    source = model(512, 8, 16000, dtype)
    growkern.support.memory.trim()
    start = memory("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    report = growkern.expand_inplace(*source, memory=mode)
    print(mode, dtype, memory("VmHWM") - start, report.peak_bytes, report.n_bytes_written, flush=True)

growkern.expand_inplace(*model(64, 1, 100, "float32"))
for mode in ("stage", "lean"):
    for dtype in ("float32", "bfloat16"):
        if not (child := os.fork()):  # a process per case, after the imports
            measure(mode, dtype)
            os._exit(0)
        os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def peaks() -> dict[tuple[str, str], list[int]]:
    """Grow a model per memory mode and dtype; return the peak of resident memory, the promised peak and the bytes written."""
    fixed = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "131072"
    }  # by default glibc keeps a varying amount of freed memory
    out = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=900, env=fixed
    )
    lines = [line.split() for line in out.stdout.splitlines()]
    assert len(lines) == 4, out.stderr
    return {(mode, dtype): [*map(int, numbers)] for mode, dtype, *numbers in lines}


@pytest.mark.slow
@pytest.mark.xdist_group("peaks")  # one worker measures, once
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["stage", "lean"])
def test_resident_memory_peaks_at_what_was_promised(mode, dtype, peaks):
    peak, promised, written = peaks[mode, dtype]

    assert abs(peak - promised) < 0.02 * written, (peak, promised, written)


def control_groups(root, version: int, **limits: tuple[str, int, int]) -> Path:
    """Write control groups below ``root``: (limit, usage, file pages) per folder. Return the file that names the innermost group."""
    names = ("memory.max", "memory.current", "inactive_file") if version == 2 else (
        "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file",
    )  # fmt: skip
    mount, path = root / ("memory" if version == 1 else ""), ""
    for name, (limit, usage, cached) in limits.items():
        path += f"/{name}" if name != "top" else ""
        (mount / path.lstrip("/")).mkdir(parents=True, exist_ok=True)
        values = dict(zip(names, (limit, usage), strict=False))
        for file, value in values.items():
            (mount / path.lstrip("/") / file).write_text(f"{value}\n")
        stat = f"anon 1\n{names[2]} {cached}\n"
        (mount / path.lstrip("/") / "memory.stat").write_text(stat)
    process = root / "cgroup"
    line = f"0::{path or '/'}" if version == 2 else f"5:cpu,memory:{path or '/'}\n3:cpu:/"
    process.write_text(line + "\n")
    return process


@pytest.mark.parametrize("version", [1, 2])
def test_the_host_is_as_free_as_the_tightest_of_its_control_groups(tmp_path, version):
    process = control_groups(tmp_path, version, outer=("1000", 700, 100), inner=("5000", 700, 0))

    assert memory.container_free(tmp_path, process) == 1000 - 700 + 100


@pytest.mark.parametrize(("version", "limit"), [(1, str(1 << 62)), (2, "max")])
def test_a_control_group_without_a_limit_limits_nothing(tmp_path, version, limit):
    process = control_groups(tmp_path, version, top=(limit, 700, 0))

    assert memory.container_free(tmp_path, process) is None


def test_a_container_sees_its_own_group_at_the_root(tmp_path):
    control_groups(tmp_path, 2, top=("1000", 900, 0))
    (tmp_path / "cgroup").write_text("0::/docker/of/the/host\n")

    assert memory.container_free(tmp_path, tmp_path / "cgroup") == 100


def test_a_growth_that_a_container_has_no_room_for_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "container_free", lambda: 1000)
    model = make("llama", tied=True)
    before = copy.deepcopy(model.state_dict())

    with pytest.raises(InsufficientMemoryError):
        growkern.expand_inplace(model, to="2x")

    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
