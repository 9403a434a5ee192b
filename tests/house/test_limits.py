"""A module has at most 400 lines, and a function outside families and ``LONG`` has at most 60 lines and 15 branches."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(  # growkern/kernels is a link in a checkout, and holds files in an unpacked sdist
    p
    for room in ("growkern", "kernels")
    for p in (ROOT / room).rglob("*.py")
    if p.parent != ROOT / "growkern" / "kernels"
)
LINES, FUNCTION, BRANCHES = 400, 60, 15  # lines of a module; lines and branches of a function
BRANCH = ast.If, ast.For, ast.While, ast.IfExp, ast.ExceptHandler, ast.Match
LONG = {  # functions that may be longer, and the reason
    "kernels/adamw_tile.py: _tile": "one kernel: what it computes for a tile is one text, and each call would be inlined",
    "growkern/integrations/hf.py: attach": "a class that the trainer restores by calling it, so it is made here, with its methods",
    "growkern/cli/main.py: app": "the demo's options are its signature",
    "growkern/cli/commands.py: grow": "the options are its signature",
}


def functions(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield name, lines (without the docstring) and branches of every function of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            said = len((ast.get_docstring(node, clean=False) or "").splitlines())
            lines = node.end_lineno - node.lineno + 1 - said
            yield node.name, lines, sum(isinstance(n, BRANCH) for n in ast.walk(node))


def test_no_module_has_more_than_400_lines():
    long = {p.name: n for p in FILES if (n := len(p.read_text().splitlines())) > LINES}

    assert not long and len(FILES) > 100


def test_no_function_has_more_than_60_lines_or_15_branches():
    families = ROOT / "growkern" / "model" / "families"  # a family has a line per tensor
    found = {
        f"{path.relative_to(ROOT).as_posix()}: {name}": f"{lines} lines, {branches} branches"
        for path in FILES
        if path.parent != families
        for name, lines, branches in functions(path)
        if lines > FUNCTION or branches > BRANCHES
    }

    assert found.keys() == LONG.keys(), found


@pytest.mark.parametrize(
    ("body", "lines", "branches"),
    [("    pass\n" * 61, 62, 0), ('    """Said.\n\n    More."""\n    pass\n', 2, 0), ("    if x: pass\n" * 16, 17, 16)],
    ids=["long", "docstring", "branches"],
)  # fmt: skip
def test_lines_and_branches_are_counted(body, lines, branches, tmp_path):
    (path := tmp_path / "one.py").write_text(f"def one():\n{body}")

    assert [*functions(path)] == [("one", lines, branches)]


@pytest.mark.xdist_group("one")
def test_a_group_of_tests_stays_on_one_worker(request):
    """pytest-xdist groups tests by a suffix of their ids, which pytest 9.2.0 ignores: each worker then runs every fixture."""
    grouped = getattr(request.config.option, "loadgroup", False)

    assert request.node.nodeid.endswith("@one") or not grouped
