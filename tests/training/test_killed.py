"""Runs of Hugging Face's Trainer and of Lightning, killed around and inside growths, end where the unbroken run ends."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("lightning.pytorch")

HERE = Path(__file__).parents[1]
WORKERS = {"hf": HERE / "killed_hf.py", "lightning": HERE / "killed_lightning.py"}
WIDER, DEEPER, STEPS = 3, 6, 8  # the steps of the two growths, and the last step


def start(framework: str, folder: Path, *die: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(WORKERS[framework]), str(folder), *die],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def end(framework: str, folder: Path) -> dict:
    """Run to the end and return the saved end of the run."""
    process = start(framework, folder)
    errors = process.communicate()[1]
    assert process.returncode == 0, errors[-4000:]
    return torch.load(folder / "end.pt", weights_only=False)


def die(framework: str, folder: Path, at: str) -> None:
    process = start(framework, folder, at)
    errors = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, errors[-4000:]


@pytest.fixture(scope="module", params=WORKERS)
def unbroken(request, tmp_path_factory) -> tuple[str, dict]:
    found = end(request.param, tmp_path_factory.mktemp(request.param))
    assert found["schedule"]["fired"] == [WIDER, DEEPER] and found["resumed"] == "None"
    return request.param, found


def assert_same(found: dict, expected: dict) -> None:
    assert found["schedule"] == expected["schedule"]
    assert found["model"].keys() == expected["model"].keys()
    for name, p in expected["model"].items():
        torch.testing.assert_close(found["model"][name], p, rtol=0, atol=1e-6, msg=name)


DEATHS = {
    "before-a-growth": [f"{WIDER - 1}"],
    "right-after-both": [f"{WIDER}", f"{DEEPER}"],
    "inside-both": [f"growing-{WIDER}", f"growing-{DEEPER}"],
    "inside-a-checkpoint": [f"saving-{DEEPER}"],
}


@pytest.mark.parametrize("deaths", DEATHS.values(), ids=DEATHS)
def test_a_killed_run_ends_where_the_unbroken_one_ends(deaths, unbroken, tmp_path):
    framework, expected = unbroken
    for at in deaths:
        die(framework, tmp_path, at)

    found = end(framework, tmp_path)

    last = int(deaths[-1].split("-")[-1]) - ("-" in deaths[-1])  # the last complete checkpoint
    assert str(last) in Path(found["resumed"]).name
    assert_same(found, expected)


def test_a_run_that_is_killed_at_a_random_moment_ends_there_too(unbroken, tmp_path):
    framework, expected = unbroken
    chance = random.SystemRandom()
    lines, wait = chance.randrange(1, STEPS), chance.uniform(0, 0.1)
    process = start(framework, tmp_path)
    for _ in range(lines):
        while not process.stdout.readline().strip().isdigit():
            assert process.poll() is None, process.stderr.read()[-4000:]
    time.sleep(wait)
    process.kill()
    process.communicate()

    found = end(framework, tmp_path)

    print(f"killed {wait:.3f} s after step {lines}; resumed from {found['resumed']}")
    assert_same(found, expected)
