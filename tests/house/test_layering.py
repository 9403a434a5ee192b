"""A room imports lower rooms only, and only the command line prints; the rules read syntax trees, and broken modules fail the rules."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = (  # top to bottom: a room imports from lower rows, and from itself
    ("cli",),
    ("growkern",),  # growkern/__init__.py
    ("checkpoints", "integrations"),
    ("advice",),
    ("training", "recipes", "learning"),
    ("analysis",),
    ("api",),
    ("engine",),
    ("commit", "execution"),
    ("optimizer",),
    ("width", "depth", "shrink", "vocab"),
    ("planning",),
    ("model",),
    ("distributed",),
    ("pictures",),
    ("errors", "support"),
)
MODULES = {
    "__main__": "cli",
    "inherit": "training",
    "optim": "optimizer",
    "procedures": "training",
}  # single files that belong to a room of another name
RANKS = {name: rank for rank, names in enumerate(ROWS) for name in names}
IMPORTERS = {  # room -> the only modules that may import the room
    "kernels": {
        "growkern.execution.execute",
        "growkern.inherit.linear_loss",
        "growkern.optimizer.adamw",
    },
}
DEVICE_FREE = {
    "planning",
    "width",
    "depth",
    "shrink",
    "pictures",
    "errors",
}  # rooms that do not import torch
DEVICE_FREE_MODULES = {
    "growkern.model.spec",
    "growkern.model.layers",
    "growkern.optimizer.state_rules",
}
TORCHLESS = {
    "growkern.support.argument_types",
    "growkern.support.html",
    "growkern.support.text",
    "growkern.support.renamed",
    "growkern.support.wrappers",
}  # modules of support that device-free rooms may import
DEVICE = {"torch", "triton", "transformers"}
STRANGERS = {  # room -> lower rooms that the room must not import
    "commit": {"width", "depth", "shrink", "vocab"},
    "execution": {"width", "depth", "shrink", "vocab"},
}
LAZY = {"triton", "transformers"}  # packages that only functions import, where they are used
ON_USE = {
    "kernels",
    "pictures",
}  # rooms that only functions import: they need triton and matplotlib
PRINTERS = {"cli"}


def room_of(module: str) -> str:
    """Return the room of a module: ``width`` for ``growkern.width.lossless``, ``growkern`` for ``growkern``."""
    name = module.split(".")[1] if "." in module else module
    return MODULES.get(name, name)


def imports_of(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Yield each imported module, and True where the import is inside a function or under ``if TYPE_CHECKING``."""
    inside = {
        id(node)
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(f, ast.If) and ast.unparse(f.test) == "TYPE_CHECKING")
        for node in ast.walk(f)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in inside
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                names_module = base == "growkern" and alias.name in {*RANKS, *MODULES, *IMPORTERS}
                yield (f"growkern.{alias.name}" if names_module else base), id(node) in inside


def violations(module: str, source: str) -> list[str]:
    """List the rules that one file breaks; ``module`` is its import name, e.g. ``growkern.width.lossless``."""
    tree, room = ast.parse(source), room_of(module)
    if room == "kernels":
        return [*_kernel_violations(tree)]
    if room not in RANKS:
        return [f"{module} is in no room: add it to ROWS"]
    found = list[str]()
    device_free = (
        room in DEVICE_FREE
        or module in DEVICE_FREE_MODULES
        or module.startswith("growkern.model.families")
    )
    for name, in_function in imports_of(tree):
        top = name.partition(".")[0]
        if name.startswith("."):
            found.append(f"{module}: relative import of {name!r}")
        if device_free and (
            top in DEVICE
            or (room_of(name) == "support" and top == "growkern" and name not in TORCHLESS)
        ):
            found.append(
                f"{module} imports {name}, and with it torch, but plans are made without a device"
            )
        if top in LAZY and not in_function and room not in PRINTERS:
            found.append(f"{module} imports {top} outside a function")
        if top == "growkern":
            found += _growkern_violations(module, room, name, in_function)
    if room not in PRINTERS:
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        found += [f"{module} prints" for f in calls if isinstance(f, ast.Name) and f.id == "print"]
    return found


def _growkern_violations(module: str, room: str, name: str, in_function: bool) -> Iterator[str]:
    target = room_of(name)
    who = "growkern.model.describe", "growkern.model.families"
    if "families" in name and module not in who:
        yield f"{module} imports {name}; only growkern.model.describe may"
    if target in STRANGERS.get(room, ()):
        yield f"{module} imports {name}, of which it must not know"
    if target == room:
        return
    if target in IMPORTERS and module not in IMPORTERS[target]:
        yield f"{module} imports {name}; only {', '.join(sorted(IMPORTERS[target]))} may"
    if target in ON_USE and not in_function:
        yield f"{module} imports {name} outside a function"
    if target == "kernels":
        return
    if target not in RANKS:
        yield f"{module} imports {name}, which is in no room"
    elif RANKS[target] <= RANKS[room]:
        yield f"{module} imports {name}, which is not below it"


def _kernel_violations(tree: ast.AST) -> Iterator[str]:
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for name, _ in imports_of(tree):
        if name.partition(".")[0] not in allowed and not name.startswith("growkern.kernels."):
            yield f"a kernel imports {name}"


def modules() -> list[tuple[str, Path]]:
    """Return module name and path of every file of the library."""
    library = [
        p for p in (ROOT / "growkern").rglob("*.py") if "kernels" not in p.parts
    ]  # some Pythons follow the symlink kernels
    names = [
        (".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), p)
        for p in library
    ]
    return sorted(
        names + [(f"growkern.kernels.{p.stem}", p) for p in (ROOT / "kernels").glob("*.py")]
    )


@pytest.mark.parametrize(
    ("module", "path"), modules(), ids=lambda v: v if isinstance(v, str) else ""
)
def test_module_keeps_the_rules(module, path):
    assert violations(module, path.read_text()) == []


def test_every_room_has_a_file():
    rooms = {room_of(module) for module, _ in modules()}

    assert rooms == {*RANKS, "kernels"}


def test_contributing_draws_the_rooms_that_the_rules_know():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    drawn = text.partition("```text\n")[2].partition("```")[0]
    rows = [line[:48].replace(",", " ").split() for line in drawn.splitlines()]

    assert rows == [[*row] for row in ROWS if row != ("growkern",)]


BROKEN = {
    "plan-imports-commit": (
        "growkern.planning.growth_plan",
        "from growkern.commit.commit import commit",
        "not below it",
    ),
    "errors-imports-tables": (
        "growkern.errors",
        "from growkern.support.text import table",
        "not below it",
    ),
    "commit-imports-report": (
        "growkern.commit.commit",
        "import growkern.engine.report",
        "not below it",
    ),
    "width-imports-depth": (
        "growkern.width.lossless",
        "from growkern.depth.stack import Stack",
        "not below it",
    ),
    "report-imports-package": (
        "growkern.engine.report",
        "from growkern import expand_inplace",
        "not below it",
    ),
    "in-a-function-too": (
        "growkern.model.spec",
        "def f():\n    from growkern.planning.growth_plan import build",
        "not below it",
    ),
    "unknown-target": ("growkern.api", "from growkern.nowhere import x", "in no room"),
    "unknown-module": ("growkern.nowhere", "", "in no room"),
    "relative": (
        "growkern.planning.growth_plan",
        "from .errors import PlanError",
        "relative import",
    ),
    "api-imports-verify": (
        "growkern.api",
        "from growkern.analysis.verification import verify",
        "not below it",
    ),
    "commit-imports-execution": (
        "growkern.commit.commit",
        "from growkern.execution.execute import Execution",
        "not below it",
    ),
    "api-imports-family": (
        "growkern.api",
        "from growkern.model.families.gpt2 import describe",
        "only growkern.model.describe may",
    ),
    "family-imports-family": (
        "growkern.model.families.gpt2",
        "from growkern.model.families import llama",
        "only growkern.model.describe may",
    ),
    "commit-imports-width": (
        "growkern.commit.commit",
        "from growkern.width import Lossless",
        "must not know",
    ),
    "commit-imports-depth": (
        "growkern.commit.commit",
        "from growkern import depth",
        "must not know",
    ),
    "tensors-imports-errors": (
        "growkern.support.named_tensors",
        "from growkern.errors import GrowthError",
        "not below it",
    ),
    "plan-imports-torch": ("growkern.planning.growth_plan", "import torch.nn", "without a device"),
    "family-imports-transformers": (
        "growkern.model.families.bert",
        "def f():\n    import transformers",
        "without a device",
    ),
    "state-imports-triton": (
        "growkern.optimizer.state_rules",
        "from triton import cdiv",
        "without a device",
    ),
    "plan-imports-tensors": (
        "growkern.planning.growth_plan",
        "from growkern.support.named_tensors import Tensors",
        "with it torch",
    ),
    "eager-triton": ("growkern.execution.execute", "import triton", "outside a function"),
    "eager-transformers": ("growkern.model.describe", "import transformers", "outside a function"),
    "eager-kernels": (
        "growkern.execution.execute",
        "from growkern.kernels.expand import expand",
        "outside a function",
    ),
    "eager-pictures": (
        "growkern.planning.growth_plan",
        "from growkern.pictures.plan import draw",
        "outside a function",
    ),
    "pictures-import-plan": (
        "growkern.pictures.plan",
        "from growkern.planning.growth_plan import GrowthPlan",
        "not below it",
    ),
    "pictures-import-torch": ("growkern.pictures.plan", "import torch", "without a device"),
    "api-imports-kernels": (
        "growkern.api",
        "def f():\n    from growkern.kernels import expand",
        "only growkern.execution.execute, growkern.inherit.linear_loss, growkern.optimizer.adamw may",
    ),
    "package-of-kernels": (
        "growkern.commit.commit",
        "def f():\n    from growkern import kernels",
        "only growkern.execution.execute, growkern.inherit.linear_loss, growkern.optimizer.adamw may",
    ),
    "kernel-imports-growkern": (
        "growkern.kernels.expand",
        "from growkern.execution.pieces import Piece",
        "a kernel imports",
    ),
    "kernel-imports-numpy": ("growkern.kernels.expand", "import numpy as np", "a kernel imports"),
    "kernel-imports-relative": (
        "growkern.kernels.expand",
        "from . import other",
        "a kernel imports",
    ),
    "print": ("growkern.api", "def f():\n    print('hello')", "prints"),
}
SOUND = {
    "down": ("growkern.planning.growth_plan", "from growkern.errors import PlanError\nimport json"),
    "leaf": (
        "growkern.commit.commit",
        "import torch\nfrom growkern.support.named_tensors import Tensors",
    ),
    "folder": ("growkern.width", "from growkern.width.lossless import Lossless"),
    "families": ("growkern.model.families", "from growkern.model.families import bert"),
    "describe": ("growkern.model.describe", "from growkern.model.families import FAMILIES"),
    "lazy": (
        "growkern.execution.execute",
        "def f():\n    import triton\n    from growkern.kernels.expand import expand",
    ),
    "types": (
        "growkern.cli.demo_run",
        "if TYPE_CHECKING:\n    from transformers import LlamaForCausalLM",
    ),
    "public": (
        "growkern.cli.main",
        "import growkern\nfrom growkern import expand_inplace, plan\nprint(growkern.__version__)",
    ),
    "sibling": (
        "growkern.kernels.expand",
        "import triton.language as tl\nfrom growkern.kernels.noise import normal\nimport math",
    ),
    "no-call": ("growkern.engine.report", "printer = 'print(x)'\nlogger.print(1)"),
}


@pytest.mark.parametrize(("module", "source", "match"), BROKEN.values(), ids=BROKEN)
def test_rule_can_fail(module, source, match):
    found = violations(module, source)

    assert any(match in line for line in found), found


@pytest.mark.parametrize(("module", "source"), SOUND.values(), ids=SOUND)
def test_rule_lets_sound_code_pass(module, source):
    assert violations(module, source) == []
