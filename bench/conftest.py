"""pytest hooks of the kernel microbenchmarks."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--bench-scope``, which selects sizes and cases."""
    parser.addoption("--bench-scope", default="cpu", help="quick, cpu or gpu")


def pytest_benchmark_generate_machine_info() -> dict[str, str]:
    """Return no machine info: every row names the machine, and pytest-benchmark's detection takes seconds."""
    return {}
