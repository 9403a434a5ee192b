"""Bounds on what a command line call may do: an error is a message with an exit code, and a call takes little time and memory."""

import os
import sys
import time
from pathlib import Path

from saved import invoke
from typer.testing import Result

from growkern.support import memory

EXAMPLES = int(os.environ.get("GROWKERN_EXAMPLES", "100"))  # per test; the suite has little time
SECONDS, N_BYTES = 2.0, 500e6  # of the process: a busy machine is no failure


def bounded(*arguments: object) -> Result:
    """Call the command line, and assert that it ends in time, in little memory, and without a traceback."""
    memory.trim()
    start = resident("VmRSS", reset=True)
    began = time.process_time()
    result = invoke(*arguments)
    seconds, n_bytes = time.process_time() - began, resident("VmHWM") - start
    error = result.exception
    assert error is None or isinstance(error, SystemExit), (arguments, repr(error)[:2000])
    assert seconds < SECONDS and n_bytes < N_BYTES, (arguments, seconds, n_bytes)
    if result.exit_code:
        assert result.exit_code in (1, 2) and result.stderr.strip(), (arguments, result.output)
        assert "Traceback" not in result.output and len(result.stderr) < 5000, result.output[:9000]
    return result


def resident(key: str, reset: bool = False) -> int:
    """Return a figure of this process in bytes, ``VmRSS`` or the peak ``VmHWM``, which ``reset`` begins anew; 0 where it is unknown."""
    if sys.platform != "linux":
        return 0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
