"""``growkern demo`` grows a model twice, prints a verdict that follows from its losses, and draws a picture."""

import re
import struct
import sys

import pytest
from typer.testing import CliRunner, Result

from growkern.cli import demo, demo_run
from growkern.cli import main as cli

pytestmark = [pytest.mark.xdist_group("demo"), pytest.mark.slow]  # one xdist worker trains, once


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(
        cli.app(), ["demo", "--quick", "--device", "cpu", *map(str, arguments)]
    )


def losses(output: str) -> list[tuple[str, float, float]]:
    """Read the tables below the reports: growth, loss before and loss after, per row."""
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
    assert len(content) > 20_000  # a blank picture of this size takes 5 kB


def test_both_growths_are_reported_and_keep_the_loss(compared):
    result, _ = compared

    rows = losses(result.output)

    assert result.output.count("Grew llama") == 2
    assert [label for label, _, _ in rows] == ["width 32 → 64", "layers 2 → 3"]
    assert all(after == pytest.approx(before, abs=1e-4) for _, before, after in rows)


def test_all_runs_spend_the_budget_within_half_a_step_and_grown_and_scratch_end_at_the_same_size(
    compared,
):
    setup = demo.QUICK
    step = demo_run.flops_per_step(demo_run.build(setup.target, 0, "meta"), setup.training)

    rows = re.findall(
        r"(grown|from scratch, lr [\d.]+|never grows)\W+\d\.\d{4}\W+(\d\.\d+e\+\d+)\W+([\d,]+)",
        compared[0].output,
    )

    assert len(rows) == 5
    for _, flops, _ in rows:
        # the printed FLOPs are rounded
        assert float(flops) == pytest.approx(setup.budget * step, abs=0.501 * step)
    sizes = {name.partition(",")[0]: n for name, _, n in rows}
    assert sizes["grown"] == sizes["from scratch"] != sizes["never grows"]


def test_printed_verdict_follows_the_printed_losses(compared):
    output = compared[0].output

    found = dict(re.findall(r"(grown|from scratch, lr [\d.]+|never grows)\W+(\d\.\d{4})", output))

    losses = {name: float(loss) for name, loss in found.items()}
    best = min(loss for name, loss in losses.items() if "scratch" in name)
    saves = losses["grown"] < best
    assert ("Growing saves" in output) == saves
    assert ("Growing does not save" in output) != saves
    lowest = losses["never grows"] < min(losses["grown"], best)
    assert ("The source that never grows ends lower" in output) == lowest
    assert "python -m bench.savings measures with several" in output


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
    monkeypatch.setattr(demo_run, "evaluate", lambda *_: float("nan"))

    result = invoke("--out", tmp_path)

    assert result.exit_code == 1
    assert "from nan to nan" in result.output


def lines(grown: float, never: float) -> list[demo.Line]:
    """Make the lines of a run that grew at 8 of 16 FLOPs, of two runs from scratch (at best 3 nats at 8 and 2 at 16), and of the source."""
    growth = demo.Growth(8.0, "width 32 → 64", 3.0, 3.0)
    return [
        demo.Line("grown", ends=[(16.0, grown)], growths=[growth]),
        demo.Line("from scratch, lr 1", ends=[(8.0, 3.0), (16.0, 2.5)]),
        demo.Line("from scratch, lr 2", ends=[(8.0, 3.5), (16.0, 2.0)]),
        demo.Line("never grows", ends=[(16.0, never)]),
    ]


@pytest.mark.parametrize(
    ("grown", "charged", "sunk"),
    [
        (1.0, "saves about 50% of the compute", "saves about 75% of the compute"),  # from scratch, 1 nat takes 32 FLOPs
        (2.0, "saves nothing", "saves 50% of the compute"),
        (2.5, "does not save: 41% more compute", "saves 29% of the compute"),
        (3.5, "does not save: about 183% more compute", "does not save: about 41% more compute"),
    ],
    ids=["saves", "equal", "saves-when-sunk", "never-saves"],
)  # fmt: skip
def test_verdict_follows_the_numbers(grown, charged, sunk):
    first, second, third, *rest = demo.verdict(lines(grown, never=4.0)).split("\n")

    assert first == f"Growing {charged}, both phases charged"
    assert second == f"Where the source is there already, growing {sunk}"
    assert f"{grown:.3f}" in third
    assert "2.000 at equal FLOPs, 3.000 at the FLOPs after the source" in third
    assert rest == [demo.SEVERAL]


@pytest.mark.parametrize(
    ("never", "lower"), [(1.4, True), (1.6, False), (2.1, False)], ids=["both", "scratch", "none"]
)
def test_verdict_says_that_the_target_is_too_large_where_the_source_ends_lower(never, lower):
    text = demo.verdict(lines(1.5, never))

    assert ("never growing beats both\n" in text) == lower
    assert ("never grows ends lower, at 1.400: the target is too large" in text) == lower


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
