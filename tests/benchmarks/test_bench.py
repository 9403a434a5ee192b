"""The bench runs end to end at tiny sizes, appends its rows to a CSV, and does not time a case whose tests fail."""

import os
import re
from collections.abc import Iterator

import pytest
import torch
from benches import ROOT, importable, rows_of

from growkern.depth import IdentityBlocks
from growkern.model.describe import describe
from growkern.planning.build import build
from growkern.planning.sizes import resolve_sizes
from growkern.width import Lossless

pytest.importorskip("pytest_benchmark")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
transformers = pytest.importorskip("transformers")

with importable():
    from bench import __main__ as bench
    from bench import bars, baselines, bench_models, harness, predicted

BREAKER = '''"""Loaded by pytest: makes random maps wrong."""
from growkern.execution import execute

def broken(plan, *arguments, _sound=execute.execute, **options):
    staged = _sound(plan, *arguments, **options)
    if "Random" in plan.width:
        staged.values["layer.weight"][-1, -1] += 1
    return staged

execute.execute = broken
'''


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Replace conftest's fixture that fills new memory with NaN: the bench measures time."""
    yield


def fake(case: str, backend: str, phase: str, gb_s: float, **values: object) -> harness.Row:
    empty: harness.Row = dict.fromkeys(harness.COLUMNS, "")
    names = {"op": "model", "case": case, "backend": backend, "phase": phase, "dtype": "fp32"}
    return empty | names | {"gb_s": gb_s, "tensor_bytes": 1 << 30} | values


@pytest.mark.slow
def test_quick_run_measures_keeps_and_draws_and_a_red_case_is_not_timed(tmp_path, monkeypatch):
    results = tmp_path / "results"

    assert bench.main(["--quick", "--out", str(results)]) == 0

    first = rows_of(results)
    assert {row["op"] for row in first} == {"expand", "adamw", "inherit", "model"}
    for row in first:
        assert tuple(row) == harness.COLUMNS
        may_be_empty = {"driver", "triton", "promised_bytes"}
        without = row["backend"] == "host" or row["phase"] == "busy" or row["op"] == "inherit"
        may_be_empty |= {"roof_percent"} if without else set()
        assert all(row[name] for name in harness.COLUMNS if name not in may_be_empty), row
        assert float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
    assert {"torch, live", "cross_entropy + kl_div, live", "Liger, live"} < {
        row["backend"] for row in first if row["op"] == "inherit"
    }
    for key in {(row["op"], row["case"], row["tensor_bytes"], row["dtype"]) for row in first}:
        if key[0] == "inherit":
            continue
        members = [
            row
            for row in first
            if (row["op"], row["case"], row["tensor_bytes"], row["dtype"]) == key
        ]
        assert {row["backend"] for row in members} & {harness.ROOF, bench_models.HOST}
    assert any("random" in row["case"] for row in first)
    (picture,) = results.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")

    (tmp_path / "breaker.py").write_text(BREAKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTEST_PLUGINS", "breaker")
    monkeypatch.setattr(bench, "OPS", ("expand",))  # which the breaker breaks

    assert bench.main(["--quick", "--only", "kernels", "--out", str(results)]) == 1

    both = rows_of(results)
    assert both[: len(first)] == first and len(both) > len(first)
    assert not any("random" in row["case"] for row in both[len(first) :])
    (path,) = results.glob("*.csv")
    assert sum(line.startswith("op,case,") for line in path.read_text().splitlines()) == 1


@pytest.mark.slow
def test_a_model_that_does_not_compute_the_same_is_not_timed(monkeypatch, tmp_path):
    grow = bench_models.growkern.expand_inplace

    def broken(model, *arguments, **options):
        report = grow(model, *arguments, **options)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.01)
        return report

    monkeypatch.setattr(bench_models.growkern, "expand_inplace", broken)

    assert bench_models.main("tiny Llama 2x wide", str(tmp_path / "found.json")) == 1

    found = bench_models.json.loads((tmp_path / "found.json").read_text())
    assert found["rows"] == [] and "logits are off by" in found["red"]


@pytest.mark.parametrize("case", ["tiny GPT-2 2x wide", "tiny Llama 2x wide"])
def test_baselines_double_what_they_claim_to(case):
    model, optim = bench_models.build(bench_models.CASES[case])
    before = bench_models.logits(model)
    grown, grown_optim = bench_models.build(bench_models.CASES[case])
    plan = bench_models.growkern.plan(model, optim)
    bench_models.growkern.expand_inplace(
        grown, grown_optim, width=bench_models.Lossless(noise=0.0), dynamics=None
    )
    shapes = {row.name: plan.shapes(row)[1] for row in plan.tensors}

    doubled, doubled_optim = baselines.state_dict_double(model, optim, grown.config)
    repeated = baselines.repeat_and_divide(model, grown.config, shapes)

    selected = baselines.index_selects([*bench_models.jobs(model, optim, plan)[0]])
    assert [tuple(t.shape) for t in selected] == [shapes[row.name] for row in plan.tensors if plan.changes(row)]  # fmt: skip
    for target in (doubled, repeated):
        torch.testing.assert_close(bench_models.logits(target), before, rtol=1e-4, atol=1e-5)
    for p, q in zip(model.parameters(), doubled.parameters(), strict=True):
        for power, key in enumerate(baselines.MOMENTS, 1):
            small, large = optim.state[p][key], doubled_optim.state[q][key]
            assert large.shape == q.shape
            if p.dim() == 2:  # two blocks on the diagonal, divided
                torch.testing.assert_close(large.sum(), small.sum() * 2 / 2**power)


@pytest.mark.parametrize("backend", [harness.ROOF, baselines.DOUBLE, baselines.REPEAT])
def test_the_first_call_of_a_baseline_is_timed(backend, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # first() writes this variable

    (seconds, _), promised = bench_models.first("tiny Llama 2x wide", backend)

    assert seconds > 0 and promised is None


def test_percent_of_the_roof_is_that_of_the_same_case_and_phase():
    rows = [
        fake("a", "copy_", "cold", 4.0),
        fake("a", "copy_", "warm", 10.0),
        fake("a", "torch", "cold", 3.0),
        fake("a", "torch", "warm", 5.0),
        fake("a", "torch", "first", 1.0),
        fake("c", "copy_", "cold", 4.0),
        fake("c", "copy_", "first", 2.0),
        fake("c", "torch", "first", 1.0),
        fake("a", "torch", "cold", 3.0, dtype="bf16"),
        fake("b", "torch", "cold", 3.0),
    ]

    percents = [row["roof_percent"] for row in harness.with_roof(rows)]

    assert percents == [100, 100, 75, 50, 25, 100, 100, 50, "", ""]


def test_row_says_quantiles_and_speed():
    row = harness.row(
        "expand", "a", "fp32", "torch", "cold", [0.1, 0.2, 0.3, 0.4, 0.6], moved=6 * 10**8, peak=5, tensor_bytes=7
    )  # fmt: skip

    assert [row[name] for name in harness.QUANTILES] == pytest.approx([180, 300, 440])
    assert row["gb_s"] == pytest.approx(2.0) and row["n_runs"] == 5


def test_bars_take_the_worst_case_and_both_sides_of_a_limit():
    at = bench_models.GPT2_WIDE
    figures = {"p50_ms": 100.0, "n_bytes": 900, "promised_bytes": 1000, "peak_bytes": 1015}
    rows = [
        fake(at, "torch noise=0", "cold", 3.0, roof_percent=75, **figures),
        fake(at, baselines.REPEAT, "cold", 0.3, p50_ms=300.0, n_bytes=300),
        fake(at, "torch default", "first", 3.0, p50_ms=200.0, roof_percent=55),
        fake(at, "torch default", "busy", 3.0, p50_ms=500.0),
        fake(at, baselines.DOUBLE, "first", 0.3, p50_ms=700.0),
        fake(at, baselines.SELECT, "first", 0.3, p50_ms=800.0),
        fake(at, baselines.SELECT, "busy", 0.3, p50_ms=900.0),
        fake(bench_models.HOST_XL, "host", "warm", 0.0, p50_ms=95.0),
        fake(bench_models.HOST_XL, "host", "again", 0.0, p50_ms=190.0),
        fake(bench_models.HOST_200, "host", "warm", 0.0, p50_ms=427.5),
    ]

    here = [bar for bar in bars.BARS if not bar.gpu]

    found = [bar.worst(rows, "torch", "noise=0") for bar in here]

    expected = [55, 4, 3.5, 1.8, 2.5, 75, 9, 1.5, None, 95, 1.08, 2]
    assert found[:12] == pytest.approx(expected) and set(found[12:]) == {None}
    held = [bar.held(figure) for bar, figure in zip(here, found, strict=True) if figure]
    assert held == [False, True, True, False, True, True, True, True, False, True, False]


def test_the_guide_has_the_predictions_of_the_model():
    guide = (ROOT / "growkern" / "guides" / "speed.md").read_text()
    rows = re.findall(r"^\| (?:fp32|bf16), noise.*$", guide, re.MULTILINE)

    for row in rows:
        name, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        kind = predicted.NOISY if name.endswith("1") else predicted.SCALED
        shares = [
            predicted.of_adam(name[:4], kind, device) for device in predicted.DEVICES.values()
        ]
        assert cells == [f"{100 * share:.0f} %" for share in shares]
    assert len(rows) == 4


def test_a_measurement_on_a_gpu_stands_beside_its_prediction():
    def row(case, dtype, percent, size=harness.LARGE, backend="triton"):
        own = dict(case=case, dtype=dtype, backend=backend, tensor_bytes=size, roof_percent=percent)
        return own | dict(op="expand", phase="warm")

    h200 = predicted.DEVICES["H200"]
    near = 100 * predicted.of_adam("bf16", predicted.NOISY, h200) * 0.81
    rows = [
        row("x2 adam noise=1", "bf16", near),
        row("x2 adam noise=0", "fp32", 60),
        row("x2 adam noise=0", "fp32", 60, size=1 << 20),
        row("x3 adam noise=0", "fp32", 60),
        row("x2 adam noise=0", "fp32", 60, backend="copy_"),
    ]
    drawn = predicted.beside(rows, "NVIDIA H200 NVL")
    cells = [[*column.cells] for column in drawn.columns]

    assert cells[3] == [f"{near:.0f} %", "60 %"]
    assert cells[4] == [
        f"{near / 0.81:.0f} %",
        f"{100 * predicted.of_adam('fp32', predicted.SCALED, h200):.0f} %  [red]find out why[/red]",
    ]
    assert predicted.beside(rows, "NVIDIA T4") is predicted.beside(rows[2:], "NVIDIA H200") is None


def test_the_model_slows_with_copies_noise_and_faster_memory():
    counts, h100, h200 = predicted.COUNTS["fp32"], *(predicted.DEVICES[n] for n in ("H100", "H200"))  # fmt: skip
    noisy, scaled = (predicted.share(counts, kind, 2, 2, h100) for kind in (predicted.NOISY, predicted.SCALED))  # fmt: skip

    assert 0.5 < predicted.share(counts, predicted.NOISY, 2, 2, h200) < noisy < scaled < 1


def test_busy_cores_are_spun_by_processes_that_end():
    with harness.spinning():
        busy = harness.subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True).stdout  # fmt: skip
    after = harness.subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True).stdout  # fmt: skip

    assert busy.count("while True: pass") == len(os.sched_getaffinity(0))
    assert "while True: pass" not in after


def test_peak_is_what_a_call_held_at_most():
    def hold() -> None:
        torch.ones(64 << 18)  # 64 MiB

    _, peak = harness.measured(hold)

    assert peak == pytest.approx(64 << 20, rel=0.05)


@pytest.mark.parametrize("case", bench_models.CASES)
def test_every_model_of_the_bench_can_be_planned(case):
    chosen = bench_models.CASES[case]
    config = getattr(transformers, f"{chosen.family}Config")(**chosen.config)
    kind = {"GPT2": transformers.GPT2LMHeadModel, "Llama": transformers.LlamaForCausalLM}
    with torch.device("meta"):
        spec = describe(kind[chosen.family](config), values=False)
    sizes = resolve_sizes(spec, chosen.to)

    plan = build(spec, sizes, width=Lossless(), depth=IdentityBlocks())

    assert plan.function_preserving and plan.target_sizes != plan.source_sizes
