"""Runs of Hugging Face's Trainer and of Lightning, killed around and inside growths, end where the unbroken run ends."""

import random
import signal
import time
from pathlib import Path

import processes
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("lightning.pytorch")
pytestmark = [processes.together, pytest.mark.slow]

WORKERS = {"hf": "killed_hf", "lightning": "killed_lightning"}
WIDER, DEEPER, STEPS = 3, 6, 8  # the steps of the growths, and the last one


def end(framework: str, folder: Path, *kind: str) -> dict:
    """Run to the end, and give what the run ended with."""
    folder.mkdir(exist_ok=True)
    log = folder / "log"
    more = ("", *kind) if kind else ()
    processes.end([processes.start(WORKERS[framework], folder, *more, log=log)], log)
    return torch.load(folder / "end.pt", weights_only=False)


def die(framework: str, folder: Path, at: str, *kind: str) -> None:
    folder.mkdir(exist_ok=True)
    log = folder / "log"
    process = processes.start(WORKERS[framework], folder, at, *kind, log=log)
    processes.end([process], log, -signal.SIGKILL)


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
    "before-and-after-growths": [f"{WIDER - 1}", f"{WIDER}", f"{DEEPER}"],
    "inside-growths-and-a-checkpoint": [
        f"growing-{WIDER}",
        f"growing-{DEEPER}",
        f"saving-{DEEPER}",
    ],
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
    chance, log = random.SystemRandom(), tmp_path / "log"
    lines, wait = chance.randrange(1, STEPS), chance.uniform(0, 0.1)
    process = processes.start(WORKERS[framework], tmp_path, log=log)
    processes.wait_for_lines(process, log, lines)
    time.sleep(wait)
    process.kill()
    process.join()

    found = end(framework, tmp_path)

    print(f"killed {wait:.3f} s after step {lines}; resumed from {found['resumed']}")
    assert_same(found, expected)


@pytest.mark.parametrize("kind", ["mslt", "bert2bert", "llama_pro", "ramp"])
def test_a_procedure_that_is_killed_in_a_trainer_ends_with_the_losses_of_the_unbroken_one(
    kind, tmp_path
):
    expected = end("hf", tmp_path / "whole", kind)
    for at in ("growing-3", "4"):
        die("hf", tmp_path / "killed", at, kind)

    found = end("hf", tmp_path / "killed", kind)

    assert_same(found, expected)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5, abs=0)
    assert len(found["losses"]) == STEPS
