"""How pytest runs the kernel microbenchmarks."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--bench-scope``: which sizes and cases."""
    parser.addoption("--bench-scope", default="cpu", help="quick, cpu or gpu")


def pytest_benchmark_generate_machine_info() -> dict[str, str]:
    """Every row says what machine it is from; pytest-benchmark would take seconds to find out."""
    return {}
