"""The wheel holds the library and the kernels, nothing else, and imports away from the checkout; the sdist builds the same wheel."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.xdist_group("packaging"),
    pytest.mark.slow,
]  # one xdist worker builds, once

ROOT = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(
    ".*", "__pycache__", "build", "dist", "*.egg-info", "results", "growkern-demo"
)
IMPORT_ALL = """
import importlib, pathlib, pkgutil, sys
import growkern, growkern.kernels
here = pathlib.Path(sys.argv[1])
names = [m.name for m in pkgutil.walk_packages(growkern.__path__, "growkern.")]
names += [m.name for m in pkgutil.iter_modules(growkern.kernels.__path__, "growkern.kernels.")]
for name in ["growkern", *names]:
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to(here), module.__file__
    print(name)
from transformers import LlamaForCausalLM
"""


def run(*command: object, cwd: Path, **env: str) -> str:
    """Run a command and return its stdout; where the command fails, its output is the assertion's message."""
    line = [str(part) for part in command]
    done = subprocess.run(
        line,
        cwd=cwd,
        env=os.environ | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sources() -> set[str]:
    """Return the paths of the library's files in a wheel."""
    library = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "growkern").rglob("*.py")
        if "kernels" not in p.parts
    }
    return (
        library
        | {f"growkern/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
        | {"growkern/py.typed"}
    )


def build(tree: Path, out: Path) -> Path:
    """Build a wheel without the network; the checkout stays clean because ``tree`` is a copy."""
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", out, tree, cwd=out)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the checkout, without build outputs."""
    tree = tmp_path_factory.mktemp("packaging") / "tree"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=LEFT_OUT)
    return tree


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist and unpack it."""
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", out, tree, cwd=out)
    archive = next(out.glob("*.tar.gz"))
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    return out / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from the checkout."""
    return build(tree, tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_the_library_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())

    info = {name for name in names if ".dist-info/" in name}
    assert names - info == sources()
    assert any(name.endswith("/licenses/LICENSE") for name in info)


def test_sdist_builds_the_same_wheel(wheel, sdist, tmp_path):
    one, other = map(zipfile.ZipFile, (wheel, build(sdist, tmp_path)))

    assert {n: one.read(n) for n in one.namelist()} == {n: other.read(n) for n in other.namelist()}


def test_wheel_states_its_requirements(wheel):
    archive = zipfile.ZipFile(wheel)
    texts = {
        Path(n).name: archive.read(n).decode()
        for n in archive.namelist()
        if n.endswith(("/METADATA", "/entry_points.txt"))
    }

    assert "growkern = growkern.cli.main:main" in texts["entry_points.txt"]
    required = [
        line
        for line in texts["METADATA"].splitlines()
        if line.startswith("Requires-Dist:") and "extra ==" not in line
    ]
    assert required == [
        "Requires-Dist: torch>=2.9",
        "Requires-Dist: typing_extensions",
        'Requires-Dist: triton>=3.5; sys_platform == "linux"',
    ]


@pytest.mark.slow
def test_installed_wheel_imports_away_from_the_checkout(wheel, tmp_path):
    """The imports run beside a folder ``kernels``, as in the checkout, which does not hide Hugging Face's package of this name."""
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    shutil.copytree(ROOT / "kernels", elsewhere / "kernels")
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
        "--target",
        target,
        wheel,
        cwd=elsewhere,
    )

    printed = run(
        sys.executable,
        "-W",
        "error",
        "-c",
        IMPORT_ALL,
        target,
        cwd=elsewhere,
        PYTHONPATH=str(target),
    )

    expected = {
        Path(name).with_suffix("").as_posix().replace("/", ".")
        for name in sources()
        if name.endswith(".py")
    }
    assert set(printed.split()) == {name.removesuffix(".__init__") for name in expected}


def test_sdist_holds_all_that_the_checkout_holds(tree, sdist):
    """Library, kernels, tests, bench and what they read: the tests run in an unpacked sdist."""
    carried = {p.relative_to(sdist) for p in sdist.rglob("*") if p.is_file()}
    needed = {p.relative_to(tree) for p in tree.rglob("*") if p.is_file()}

    assert needed - carried == set()
    kernels = {
        p.name for p in (ROOT / "kernels").glob("*.py")
    }  # an editable install finds them in the package
    assert {p.name for p in (sdist / "growkern" / "kernels").iterdir()} == kernels


def test_kernels_are_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="an sdist holds no symlink")
def test_kernels_are_reached_by_a_relative_symlink():
    link = ROOT / "growkern" / "kernels"

    assert link.is_symlink()
    assert os.readlink(link) == os.path.join("..", "kernels")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout")
def test_symlink_is_committed_as_one():
    assert run("git", "ls-files", "--stage", "growkern/kernels", cwd=ROOT).startswith("120000 ")
