"""Imports point down only, and nothing but the command line prints: read off the syntax trees, every rule seen to fail."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = (  # top to bottom: a module imports from lower rows only
    ("cli",),
    ("demo", "commands"),
    ("demo_picture",),
    ("demo_run",),
    ("growkern",),  # growkern/__init__.py
    ("integrations", "adviser"),
    (
        "schedule",
        "recipes",
        "history",
        "compare",
        "upcycle",
        "checkpoint",
        "arguments",
        "batches",
    ),
    ("shrinking",),
    ("events",),
    ("api",),
    ("advice",),
    ("notes", "ddp", "compiled"),
    ("report", "commit", "execute", "verify", "saved"),
    ("optim_target",),
    ("dynamics",),
    ("scale", "guard"),
    ("optim",),
    ("reference_adamw",),
    ("pieces",),
    ("sides",),
    ("forgotten",),
    ("groups",),
    ("undo", "shards", "initial"),
    ("describe", "describe_optim"),
    ("families",),
    ("shrink", "vocab"),
    ("width", "depth"),
    ("law",),
    ("axes",),
    ("plan",),
    ("methods", "state", "sizes"),
    ("scaling",),
    ("spaces", "index_map", "loss_curve"),
    ("errors", "support"),  # neither knows anything of growkern
)
LEAVES = (
    "reference",
    "quantised",
)  # torch only; anybody may import them who may import torch
FOLDERS = ("families", "width", "depth", "support")
TORCHLESS = {"growkern.support.text"}  # of support, what device-free modules may import
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names} | dict.fromkeys(
    LEAVES, len(LAYERS)
)
IMPORTERS = {  # what only some may import -> who
    "api": {
        "growkern",
        "cli",
        "demo_run",
        "schedule",
        "history",
        "compare",
        "checkpoint",
        "shrinking",
    },
    "families": {"describe"},
    "kernels": {"execute", "optim"},
}
STRANGERS = {"commit": {"width", "depth", "shrink"}}  # who must not know whom, although it is lower
DEVICE_FREE = {
    "law",
    "axes",
    "plan",
    "methods",
    "spaces",
    "index_map",
    "state",
    "sizes",
    "width",
    "depth",
    "shrink",
    "errors",
    "families",
}
DEVICE = {"torch", "triton", "transformers"}
LAZY = {"triton", "transformers"}  # imported where they are used, inside a function
PRINTERS = {"cli", "demo"}


def group_of(module: str) -> str:
    """``growkern.width.lossless`` -> ``width``; ``growkern`` stays."""
    return module.split(".")[1] if "." in module else module


def imports_of(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Each imported module, and whether the import runs inside a function, or never runs: for types."""
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
                names_module = base == "growkern" and alias.name in {*RANKS, *IMPORTERS}
                yield (f"growkern.{alias.name}" if names_module else base), id(node) in inside


def violations(module: str, source: str) -> list[str]:
    """Every broken rule of one file; ``module`` as it is imported, e.g. ``growkern.width.lossless``."""
    tree, group = ast.parse(source), group_of(module)
    if group == "kernels":
        return [*_kernel_violations(tree)]
    if group not in RANKS:
        return [f"{module} is in no layer: add it to LAYERS"]
    found = list[str]()
    for name, in_function in imports_of(tree):
        top = name.partition(".")[0]
        if name.startswith("."):
            found.append(f"{module}: relative import of {name!r}")
        if group in DEVICE_FREE and top in DEVICE:
            found.append(f"{module} imports {top}, but plans are made without a device")
        if top in LAZY and not in_function and group not in PRINTERS:
            found.append(f"{module} imports {top} outside a function")
        if top == "growkern":
            found += _growkern_violations(module, group, name, in_function)
    if group not in PRINTERS:
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        found += [f"{module} prints" for f in calls if isinstance(f, ast.Name) and f.id == "print"]
    return found


def _growkern_violations(module: str, group: str, name: str, in_function: bool) -> Iterator[str]:
    target = group_of(name)
    if target == group and group in FOLDERS:
        if group == "families" and module != "growkern.families":
            yield f"{module} imports another family, {name}"
        return
    if target in IMPORTERS and group not in IMPORTERS[target]:
        yield f"{module} imports {name}; only {', '.join(sorted(IMPORTERS[target]))} may"
    if target in STRANGERS.get(group, ()):
        yield f"{module} imports {name}, of which it must not know"
    if target == "kernels":
        if not in_function:
            yield f"{module} imports {name} outside a function"
    elif group in LEAVES:
        yield f"{module} imports {name}, but it is a leaf"
    elif group in DEVICE_FREE and (
        target in LEAVES or (target == "support" and name not in TORCHLESS)
    ):
        yield f"{module} imports {name}, and with it torch"
    elif target not in RANKS:
        yield f"{module} imports {name}, which is in no layer"
    elif RANKS[target] <= RANKS[group]:
        yield f"{module} imports {name}, which is not below it"


def _kernel_violations(tree: ast.AST) -> Iterator[str]:
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for name, _ in imports_of(tree):
        if name.partition(".")[0] not in allowed and not name.startswith("growkern.kernels."):
            yield f"a kernel imports {name}"


def modules() -> list[tuple[str, Path]]:
    """Module name and path of every file of the library."""
    library = [
        p for p in (ROOT / "growkern").rglob("*.py") if "kernels" not in p.parts
    ]  # a symlink; some Pythons follow it
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


def test_every_layer_has_a_file():
    groups = {group_of(module) for module, _ in modules()}

    assert set(RANKS) - groups <= {"cli", "demo"}
    assert "kernels" in groups


BROKEN = {
    "plan-imports-commit": ("growkern.plan", "from growkern.commit import commit", "not below it"),
    "errors-imports-tables": (
        "growkern.errors",
        "from growkern.support.text import table",
        "not below it",
    ),
    "commit-imports-report": ("growkern.commit", "import growkern.report", "not below it"),
    "width-imports-depth": (
        "growkern.width.lossless",
        "from growkern.depth.stack import Stack",
        "not below it",
    ),
    "report-imports-package": (
        "growkern.report",
        "from growkern import expand_inplace",
        "not below it",
    ),
    "in-a-function-too": (
        "growkern.spaces",
        "def f():\n    from growkern.plan import build",
        "not below it",
    ),
    "unknown-target": ("growkern.api", "from growkern.nowhere import x", "in no layer"),
    "unknown-module": ("growkern.nowhere", "", "in no layer"),
    "relative": ("growkern.plan", "from .errors import PlanError", "relative import"),
    "verify-imports-api": (
        "growkern.verify",
        "from growkern.api import expand_inplace",
        "only checkpoint, cli, compare, demo_run, growkern, history, schedule, shrinking may",
    ),
    "api-imports-family": (
        "growkern.api",
        "from growkern.families.gpt2 import describe",
        "only describe may",
    ),
    "family-imports-family": (
        "growkern.families.gpt2",
        "from growkern.families import llama",
        "another family",
    ),
    "commit-imports-width": (
        "growkern.commit",
        "from growkern.width import Lossless",
        "must not know",
    ),
    "commit-imports-depth": ("growkern.commit", "from growkern import depth", "must not know"),
    "tensors-imports-errors": (
        "growkern.support.named_tensors",
        "from growkern.errors import GrowthError",
        "not below it",
    ),
    "reference-imports-tensors": (
        "growkern.reference",
        "from growkern.support.named_tensors import Tensors",
        "is a leaf",
    ),
    "plan-imports-torch": ("growkern.plan", "import torch.nn", "without a device"),
    "family-imports-transformers": (
        "growkern.families.bert",
        "def f():\n    import transformers",
        "without a device",
    ),
    "state-imports-triton": ("growkern.state", "from triton import cdiv", "without a device"),
    "plan-imports-tensors": (
        "growkern.plan",
        "from growkern.support.named_tensors import Tensors",
        "with it torch",
    ),
    "eager-triton": ("growkern.execute", "import triton", "outside a function"),
    "eager-transformers": ("growkern.describe", "import transformers", "outside a function"),
    "eager-kernels": (
        "growkern.execute",
        "from growkern.kernels.expand import expand",
        "outside a function",
    ),
    "api-imports-kernels": (
        "growkern.api",
        "def f():\n    from growkern.kernels import expand",
        "only execute, optim may",
    ),
    "package-of-kernels": (
        "growkern.commit",
        "def f():\n    from growkern import kernels",
        "only execute, optim may",
    ),
    "kernel-imports-growkern": (
        "growkern.kernels.expand",
        "from growkern.reference import Piece",
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
    "down": ("growkern.plan", "from growkern.errors import PlanError\nimport json"),
    "leaf": ("growkern.commit", "import torch\nfrom growkern.support.named_tensors import Tensors"),
    "folder": ("growkern.width", "from growkern.width.lossless import Lossless"),
    "families": ("growkern.families", "from growkern.families import bert"),
    "describe": ("growkern.describe", "from growkern.families import FAMILIES"),
    "lazy": (
        "growkern.execute",
        "def f():\n    import triton\n    from growkern.kernels.expand import expand",
    ),
    "types": (
        "growkern.demo_run",
        "if TYPE_CHECKING:\n    from transformers import LlamaForCausalLM",
    ),
    "public": (
        "growkern.cli",
        "import growkern\nfrom growkern import expand_inplace, plan\nprint(growkern.__version__)",
    ),
    "sibling": (
        "growkern.kernels.expand",
        "import triton.language as tl\nfrom growkern.kernels.noise import normal\nimport math",
    ),
    "no-call": ("growkern.report", "printer = 'print(x)'\nlogger.print(1)"),
}


@pytest.mark.parametrize(("module", "source", "match"), BROKEN.values(), ids=BROKEN)
def test_rule_can_fail(module, source, match):
    found = violations(module, source)

    assert any(match in line for line in found), found


@pytest.mark.parametrize(("module", "source"), SOUND.values(), ids=SOUND)
def test_rule_lets_sound_code_pass(module, source):
    assert violations(module, source) == []
