"""Run every check that needs a GPU: ``make gpu-check``, or ``python tests/gpu_check.py [FOLDER]``.

The script needs no network and installs nothing: its Python has torch, triton, transformers, pytest, hypothesis and, for the bench,
pytest-benchmark. Logs, the picture and ``results/<device>.csv`` go to one folder; the exit status is 0 when every step passes.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).resolve().parent.parent
KERNEL_TESTS = [
    "tests/kernels/test_expand.py",
    "tests/kernels/test_squares.py",
    "tests/kernels/test_adamw_kernel.py",
    "tests/kernels/test_inherit_kernel.py",
]
MODEL_TESTS = [
    "tests/model/test_families.py",
    "tests/planning/test_build.py",
    "tests/optimizer",
    "tests/commit",
    "tests/execution/test_memory.py",
    "tests/analysis/test_verification.py",
]
NOT_HERE = [  # one builds packages, and the step "bench" covers the other
    "tests/house/test_packaging.py",
    "tests/benchmarks/test_bench.py",
]


def steps(out: Path) -> dict[str, list[str] | str]:
    """Return, by name of the step, a command or the reason why the step is left out."""
    python = [sys.executable, "-m"]
    ignored = [f"--ignore={path}" for path in NOT_HERE]
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    checked = [
        sanitizer,
        "--tool",
        "memcheck",
        "--error-exitcode",
        "9",
        *python,
        "pytest",
        "-q",
        "-x",
        *KERNEL_TESTS,
    ]
    return {
        "kernels": [*python, "pytest", "-q", *KERNEL_TESTS],
        "tests": [*python, "pytest", "-q", *ignored, "tests"],
        "device": [
            *python,
            "pytest",
            "-q",
            *MODEL_TESTS,
        ],  # the models are on the GPU and grow through the kernels
        "memcheck": checked if Path(sanitizer).exists() else "compute-sanitizer is not installed",
        "demo": [*python, "growkern", "demo", "--device", "cuda", "--out", str(out / "demo")],
        "bench": [*python, "bench", "--gpu", "--out", str(out / "results")],
    }


def main(folder: str = "gpu-check", *only: str) -> int:
    """Run every step, or the steps in ``only``; each step writes ``<step>.log``."""
    import torch

    if not torch.cuda.is_available():
        print("gpu-check: this machine has no CUDA device; nothing was checked.")
        return 2
    out = Path(folder).resolve()
    out.mkdir(parents=True, exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    failed = []
    for name, command in steps(out).items():
        if only and name not in only:
            continue
        if isinstance(command, str):
            print(f"{name:10} left out: {command}", flush=True)
            continue
        environment["GROWKERN_TEST_DEVICE"] = "cuda" if name == "device" else "cpu"
        start = perf_counter()
        with (out / f"{name}.log").open("w") as log:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            ).returncode
        last = (out / f"{name}.log").read_text().strip().splitlines()[-1:]
        print(
            f"{name:10} {'ok' if code == 0 else f'FAILED ({code})'} in {perf_counter() - start:.0f} s: {' '.join(last)}",
            flush=True,
        )
        failed += [name] if code else []
    print(f"logs and results: {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
