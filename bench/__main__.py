"""Run every bench of this machine: ``python -m bench`` on a CPU, ``python -m bench --gpu`` for everything on a GPU.

The run times kernel microbenchmarks, then whole models, and prints a table and the bars. Rows are appended to
``bench/results/<device>.csv``; a picture of this run is saved to the same folder. A case is red if its result is wrong or its
process fails; a red case is not timed. The exit status is 1 if a case is red.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import bench_models, harness, predicted
from bench.bars import bars
from bench.report import picture, table

OPS = ("expand", "adamw", "inherit")  # bench/bench_<op>.py contains test_<op>
VERDICTS = (" PASSED", " FAILED", " ERROR")
Found = tuple[list[harness.Row], list[str]]  # rows, and descriptions of red cases


def kernels(scope: str, progress: Progress, folder: Path) -> Found:
    """Run the microbenchmarks under pytest-benchmark."""
    task = progress.add_task("kernels", total=None)
    red: list[str] = []

    def on_line(line: str) -> None:
        name, _, rest = line.partition("[")
        if counted := re.search(r"collected (\d+) item", line):
            progress.update(task, total=int(counted[1]))
        for verdict in VERDICTS:
            if verdict in rest and name.endswith(tuple(f"::test_{op}" for op in OPS)):
                case = rest.rpartition(verdict)[0].removesuffix("]")
                progress.update(task, advance=1, description=f"kernels: {escape(case)}")
                if verdict != VERDICTS[0] and case not in red:  # one case may have FAILED and ERROR
                    red.append(case)

    path = folder / "expand.json"
    status, tail = harness.follow(
        [
            "pytest",
            *(f"bench/bench_{op}.py" for op in OPS),
            *("-v", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "pytest_benchmark.plugin"),
            *(f"--bench-scope={scope}", f"--benchmark-json={path}"),
            *("--benchmark-columns=median", "--tb=line", "-W", "ignore:Benchmark fixture"),
        ],
        on_line,
        TRITON_CACHE_DIR=str(folder / "triton"),
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
    )
    progress.update(task, description="kernels")
    if status and not red:
        red.append(f"pytest ended with status {status}:\n{tail}")
    text = path.read_text() if path.exists() else ""
    benchmarks = json.loads(text)["benchmarks"] if text else []
    return [
        harness.row(**benchmark["extra_info"], seconds=benchmark["stats"]["data"])
        for benchmark in benchmarks
    ], red


def models(scope: str, progress: Progress, folder: Path) -> Found:
    """Run every whole model in a process of its own, with an empty compilation cache."""
    rows: list[harness.Row] = []
    red: list[str] = []
    names = bench_models.chosen(scope)
    task = progress.add_task("models", total=len(names))
    for index, name in enumerate(names):
        path = folder / f"{index}.json"
        status, tail = harness.follow(
            ["bench.bench_models", name, str(path)],
            lambda line, at=name: progress.update(task, description=f"{at}: {escape(line)[:60]}"),
            TRITON_CACHE_DIR=str(folder / f"triton-{index}"),
        )
        result = json.loads(path.read_text()) if path.exists() else {"rows": [], "red": tail}
        rows += result["rows"]
        red += [f"{name}: {result['red'] or tail}"] if status else []
        progress.update(task, advance=1)
    progress.update(task, description="models")
    return rows, red


BENCHES = {"kernels": kernels, "models": models}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benches, append rows and draw the picture; return 1 if a case is red."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=(__doc__ or "").split("\n")[0]
    )
    scopes = parser.add_mutually_exclusive_group()
    scopes.add_argument("--gpu", action="store_true", help="everything; needs a GPU")
    scopes.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--only", choices=sorted(BENCHES), help="one half of it")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    console = Console()
    console.width = max(console.width, 100)  # the whole table fits, in a log too
    has_gpu = torch.cuda.is_available()
    if options.gpu and not has_gpu:
        console.print("[red]--gpu: torch sees no CUDA device here[/red]")
        return 2
    scope = "gpu" if options.gpu else "quick" if options.quick else "cpu"
    start = perf_counter()
    rows: list[harness.Row] = []
    red: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        TemporaryDirectory() as folder,
        Progress(*columns, TimeElapsedColumn(), console=console) as progress,
    ):
        for name, bench in BENCHES.items():
            if options.only in (None, name):
                new_rows, wrong = bench(scope, progress, Path(folder))
                rows += new_rows
                red += wrong
    rows = harness.with_roof(rows)
    if rows:
        path = harness.append(rows, options.out)
        console.print(table(rows))
        console.print(bars(rows, gpu=has_gpu))
        if (compared := predicted.beside(rows, harness.machine()["device"])) is not None:
            console.print(compared)
        console.print(f"rows     {path}")
    if any(row["op"] == "expand" for row in rows):
        console.print(f"picture  {picture(rows, options.out)}")
    for failure in red:
        console.print(f"[red]red, not timed:[/red] {escape(failure)}")
    console.print(f"{len(rows)} rows, {len(red)} red, {perf_counter() - start:.0f} s")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
