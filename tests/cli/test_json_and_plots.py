"""Commands print JSON on stdout with nothing else there, draw pictures to files, and show progress on a terminal only."""

import json
import re
from pathlib import Path

import pytest
from saved import invoke, load, said, save

import growkern
from growkern.planning.growth_plan import GrowthPlan

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # of a terminal
CURVE = "tokens,loss\n" + "".join(
    f"{1000 * i},{2 + 30 * (1000 * i) ** -0.4}\n" for i in range(1, 60)
)
SMALL = ("--steps", 2, "--tokens", 8, "--batch-size", 2)
COMMANDS = {
    "describe": (),
    "plan": ("--to", "layers=3"),
    "grow": ("grown", "--to", "layers=3"),
    "verify": ("target",),
    "compare": ("--methods", "Lossless", "--methods", "DepthUpscale", "--to", "hidden=2x,layers=3", *SMALL),
    "advise": ("--params", 1e5, "--target-params", 3e5, "--budget", 1e12),
    "methods": (), "families": (), "procedures": (),
}  # fmt: skip
TABLES = {  # text of each table
    "describe": "self_attn.q_proj", "plan": "Growth plan for llama", "grow": "Grew llama", "verify": "logits error",
    "compare": "logits off by", "advise": "lowest in", "methods": "what it does", "families": "class", "procedures": "what it does",
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a checkpoint and one that it did not grow into."""
    folder = tmp_path_factory.mktemp("models")
    save(folder / "source")
    assert invoke("grow", folder / "source", folder / "target", "--width", "AKI").exit_code == 0
    (folder / "curve.csv").write_text(CURVE)
    return folder


def words(command: str, models: Path, out: Path) -> list[object]:
    first = {"advise": models / "curve.csv", "methods": None, "families": None, "procedures": None}
    source = first.get(command, models / "source")
    places = {"grown": out / "grown", "target": models / "target"}
    return [command, *([source] if source else []), *(places.get(w, w) for w in COMMANDS[command])]


@pytest.mark.parametrize("quiet", [(), ("-q",)], ids=["", "quiet"])
@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_alone_on_stdout(command, quiet, models, tmp_path):
    result = invoke(*quiet, *words(command, models, tmp_path), "--json", "-")

    assert result.exit_code == (command == "verify"), result.output
    json.loads(result.stdout, parse_constant=pytest.fail)  # NaN is no JSON
    assert result.stdout.count("\n") == 1 and result.stderr == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_json_in_a_file_comes_with_the_table(command, models, tmp_path):
    asked = words(command, models, tmp_path)

    result = invoke(*asked, "--json", tmp_path / "out.json")

    assert TABLES[command] in result.stdout, result.output
    assert json.loads((tmp_path / "out.json").read_text())
    nowhere = [w if w != tmp_path / "grown" else tmp_path / "again" for w in asked]
    refused = invoke(*nowhere, "--json", tmp_path / "nowhere" / "out.json")
    assert refused.exit_code == 1 and "pass --json another file" in said(refused)


def read(command: str, models: Path, out: Path) -> object:
    return json.loads(invoke(*words(command, models, out), "--json", "-").stdout)


def test_the_json_holds_the_numbers_of_the_functions(models, tmp_path):
    described, grown, verified = (read(name, models, tmp_path) for name in ("describe", "grow", "verify"))  # fmt: skip

    source = save(tmp_path / "again")
    spec = growkern.describe(source)
    assert described["sizes"] == dict(spec.sizes)
    assert described["tensors"] == {name: [*map(str, axes)] for name, axes in spec.tensors.items()}
    target = load(source, tmp_path / "grown")
    assert grown["n_params"] == [sum(p.numel() for p in m.parameters()) for m in (source, target)]
    assert grown["target_sizes"]["layers"] == 3 and grown["out"] == str(tmp_path / "grown")
    assert verified["same_function"] is False and verified["logits_error"] > verified["tolerance"]


def test_a_method_that_refuses_the_model_has_no_numbers_in_the_json(models, tmp_path):
    none, lossless, refused = read("compare", models, tmp_path)["outcomes"]

    assert refused["loss"] is None and "grow to an even number" in refused["refused"]
    assert lossless["loss"] == pytest.approx(none["loss"], rel=1e-5) and none["seconds"] is None


def test_the_plan_on_stdout_is_the_plan_that_grow_takes(models, tmp_path):
    result = invoke("plan", models / "source", "--to", "layers=3", "--ranks", 2, "--json", "-")

    assert GrowthPlan.from_json(result.stdout).target_sizes["layers"] == 3
    assert "Predicted for every one of 2 processes" in result.stderr
    (tmp_path / "plan.json").write_text(result.stdout)
    grown = invoke("grow", models / "source", tmp_path / "out", "--plan", tmp_path / "plan.json")
    assert grown.exit_code == 0, grown.output


@pytest.mark.parametrize("command", ["plan", "compare"])
def test_a_picture_is_drawn_to_a_file(command, models, tmp_path):
    asked = words(command, models, tmp_path)

    drawn = invoke(*asked, "--plot", tmp_path / "a.png")
    refused = invoke(*asked, "--plot", tmp_path / "a.nothing")

    assert drawn.exit_code == 0 and TABLES[command] in drawn.stdout, drawn.output
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert refused.exit_code == 2 and "cannot draw" in said(refused) and "nothing" in said(refused)


SHOWN = {"describe": "loading", "plan": "loading", "grow": "growing", "verify": "comparing", "compare": "comparing"}  # fmt: skip


@pytest.mark.parametrize("command", SHOWN)
def test_progress_is_shown_on_a_terminal_only_and_not_when_quiet(command, models, tmp_path, monkeypatch):  # fmt: skip
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    elsewhere = invoke(*words(command, models, tmp_path / "a"))
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal

    shown = invoke(*words(command, models, tmp_path / "b"))
    quiet = invoke("-q", *words(command, models, tmp_path / "c"))

    assert elsewhere.stderr == quiet.stderr == ""
    text = ESCAPES.sub("", shown.stderr)
    assert SHOWN[command] in text and re.search(r"\d:\d\d:\d\d|-:--:--", text)
    assert TABLES[command] in shown.stdout and quiet.stdout == ""
