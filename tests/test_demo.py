import re
import struct
import sys

import pytest
from typer.testing import CliRunner, Result

from growkern import cli, demo

pytestmark = pytest.mark.xdist_group("demo")  # one worker trains, once


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(
        cli.app(), ["demo", "--quick", "--device", "cpu", *map(str, arguments)]
    )


def losses(output: str) -> list[tuple[str, float, float]]:
    """Growth, loss before, loss after: the rows of the tables that stand below the reports."""
    found = re.findall(r"((?:width|layers) \d+ → \d+)\D+(\d\.\d{7})\D+(\d\.\d{7})", output)
    return [(label, float(before), float(after)) for label, before, after in found]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, str]:
    out = tmp_path_factory.mktemp("demo")
    return invoke("--out", out), str(out / "loss.png")


def test_demo_ends_well_and_prints_the_path_of_its_picture_last(compared):
    result, path = compared

    assert result.exit_code == 0, result.output
    assert result.output.rstrip().splitlines()[-1] == path


def test_picture_is_a_png_of_a_drawing(compared):
    _, path = compared

    with open(path, "rb") as file:
        content = file.read()

    width, height = struct.unpack(">II", content[16:24])
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert width >= 1000 and height >= 600
    assert len(content) > 20_000  # white paper of this size takes 5 kB


def test_both_growths_are_reported_and_keep_the_loss(compared):
    result, _ = compared

    rows = losses(result.output)

    assert result.output.count("Grew llama") == 2
    assert [label for label, _, _ in rows] == ["width 32 → 64", "layers 2 → 3"]
    assert all(after == pytest.approx(before, abs=1e-4) for _, before, after in rows)


def test_both_runs_end_at_the_same_size_and_flops(compared):
    result, _ = compared

    rows = re.findall(
        r"(grown|from scratch)\W+(\d\.\d{4})\D+(\d\.\d+e\+\d+)\W+([\d,]+)", result.output
    )

    (_, grown_loss, grown_flops, grown_params), (_, loss, flops, params) = rows
    assert grown_params == params
    assert float(grown_flops) == pytest.approx(float(flops), rel=0.02)  # half a step
    wins = float(grown_loss) < float(loss)
    assert ("Growing beat the final size from scratch" in result.output) == wins
    assert ("Growing did not beat" in result.output) != wins


def test_no_compare_trains_the_grown_run_only_and_equal_seeds_give_equal_losses(compared, tmp_path):
    result = invoke("--out", tmp_path / "new" / "folder", "--no-compare")

    assert result.exit_code == 0, result.output
    assert "scratch" not in result.output
    assert losses(result.output) == losses(compared[0].output)
    assert (tmp_path / "new" / "folder" / "loss.png").stat().st_size > 20_000


def test_growth_that_moves_the_loss_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TOLERANCE", -1.0)

    result = invoke("--out", tmp_path)

    assert result.exit_code == 1
    assert "growkern demo failed: width 32 → 64: the validation loss went from" in result.output
    assert not (tmp_path / "loss.png").exists()


def test_loss_that_is_not_a_number_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "evaluate", lambda *_: float("nan"))

    result = invoke("--out", tmp_path)

    assert result.exit_code == 1
    assert "from nan to nan" in result.output


@pytest.mark.parametrize(
    ("won", "sentence"),
    [
        (True, "Growing beat the final size from scratch: 1.000 against 2.000"),
        (False, "Growing did not beat the final size from scratch: 2.000"),
    ],
)
def test_verdict_follows_the_numbers(won, sentence):
    better = demo.Run("", flops=2.0, loss=1.0, curve=[(1.0, 1.5), (2.0, 1.0)])
    worse = demo.Run("", flops=2.0, loss=2.0, curve=[(1.0, 2.5), (2.0, 2.0)])

    text = demo.verdict([better, worse] if won else [worse, better])

    assert sentence in text
    assert ("after 50% of them" in text) == won


def test_equal_losses_are_no_win():
    same = demo.Run("", flops=1.0, loss=1.0, curve=[(1.0, 1.0)])

    assert "did not beat" in demo.verdict([same, same])


def test_learning_rate_rises_then_falls_to_its_floor():
    factor = demo.schedule(1000)

    rates = [factor(step) for step in range(1001)]

    assert rates[0] == pytest.approx(0.01)
    assert rates.index(max(rates)) == 99
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] == pytest.approx(demo.FLOOR)


@pytest.mark.parametrize("missing", ["matplotlib", "rich", "typer", "transformers"])
def test_missing_extra_is_named_with_the_way_out(missing, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(
        sys, "argv", ["growkern", "demo", "--quick", "--out", str(tmp_path / "out")]
    )

    with pytest.raises(SystemExit, match="1"):
        cli.main()

    assert f'{missing} is missing: pip install "growkern[demo]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--device", "abacus"], "torch cannot use 'abacus'"),
        (["--seed", "-1"], "--seed"),
        (["--out", __file__], "is a file"),
    ],
    ids=["device", "seed", "out"],
)
def test_bad_option_is_refused_before_anything_runs(arguments, match):
    result = CliRunner().invoke(cli.app(), ["demo", "--quick", *arguments])

    assert result.exit_code == 2
    assert match in re.sub(r"[\s│]+", " ", result.output)


def test_command_line_without_a_command_shows_help():
    result = CliRunner().invoke(cli.app(), [])

    assert "demo" in result.output
