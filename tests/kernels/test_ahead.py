"""Kernels that are compiled ahead of a growth are those that it launches; a driver without a GPU stands in for sm_90.

Triton's interpreter and compiler cannot share a process: the test runs this file as a script.
"""

import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.xdist_group("compile"), pytest.mark.slow]


def test_what_is_compiled_ahead_is_what_a_growth_launches(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    out = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300
    )

    assert out.returncode == 0, out.stderr
    ahead, launched, *names = out.stdout.split()
    assert (
        int(ahead) == 5 and launched == "0"
    )  # float32, bfloat16, means in bfloat16; two of squares
    assert {*names} == {"growkern"}


def main() -> None:
    import threading
    from contextlib import nullcontext

    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from growkern.execution.pieces import Group, Piece
    from growkern.kernels import ahead, expand, squares

    class Driver:
        """Compiles for sm_90 and launches nothing."""

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    driver.set_active(Driver())
    torch.cuda.device = torch.cuda.device_of = lambda _: nullcontext()
    compiled = []

    def count(**_):
        compiled.append(threading.current_thread().name.partition("_")[0])

    triton.knobs.runtime.jit_post_compile_hook = count
    ahead.start([torch.float32, torch.bfloat16], torch.device("cuda", 0))
    ahead.start([torch.bfloat16, torch.uint8], torch.device("cuda", 0))
    ahead.finish()
    n_ahead = len(compiled)

    class Unlaunched:
        """A kernel whose launches compile and do not run."""

        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **options: self.kernel.run(
                *args, grid=grid, warmup=True, **options
            )

    expand.expand_kernel = Unlaunched(expand.expand_kernel)
    squares.squares_kernel = Unlaunched(squares.squares_kernel)
    for src, dst in ((torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)):
        piece = Piece(torch.ones(70, 1, dtype=src).expand(70, 9), torch.empty(70, 9, dtype=dst))
        expand.expand([Group.of(piece)] * 3)
        squares.sums_of_squares([piece.dst] * 3, torch.ones(3))
    print(n_ahead, len(compiled) - n_ahead, *compiled)


if __name__ == "__main__":
    main()
