"""Hypothesis draws arguments of the command line: a call does its work, or says by a short message what is wrong with the arguments."""

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits import EXAMPLES, bounded
from saved import contents, invoke, save

# fmt: off
# numbers are small, or so large that the call must be refused: between them lies work that takes its time
NUMBERS = ["0", "1", "2", "3", "8", "-1", "1.5", "1e-3", "1e400", "1e-400", "nan", "inf", "-inf", "0x10", "١٢", "1_0", ""]
NUMBERS += ["9" * n for n in (15, 19, 30, 400, 5000)]
SIZES = ["2x", "1.5x", "3x", "hidden=36", "hidden=2x,layers=3", "layers=4", "ffn=60", "heads=8", "hidden=25", "2x,2x", "hidden", "hidden="]
SIZES += ["=2x", "x", "0x", "0.0x", "-2x", ".x", "hidden=1." + "9" * 5000 + "x", "a" * 5000 + "=1"]
SIZES += [f"{name}={n}" for name in ("hidden", "layers", "vocab", "head_dim", "heads") for n in NUMBERS]
SIZES += [f"{n}x" for n in NUMBERS] + [f"hidden={n}x" for n in NUMBERS]
METHODS = ["Lossless", "FPI()", "Stack", "IdentityBlocks", "HyperClone(noise_db=10)", "AKI()+Stack()", "Lossless(noise=1e400)"]
METHODS += ["Layers(())", "Layers((0,0,1))", "Layers((9,))", "Lossless(noise=-1)", "Lossless('isometric')", "HyperClone(noise_db=nan)"]
METHODS += ["Lossless(noise=" + "9" * 400 + ")", "Layers((" + "0," * 3000 + "))", "Lossless()()", "1+1", "-" * 5000 + "1"]
METHODS += ["Lossless(**{})", "Lossless(" + "[" * 500, "Stack(ignore_first=-1)", "(" * 300, "Stack(ignore_first=" + "9" * 30 + ")"]
BYTES = ["1", "50KB", "5GB", "0", "1.5MB", "-1", "1e3", "KB", *NUMBERS, *(f"{n}GB" for n in NUMBERS)]
PATHS = ["source", "grown", "curve.csv", "nowhere", "a/b/c", ".", "..", "", "/", "a" * 300, "source/config.json", "/dev/null", "new"]
# fmt: on
CURVE = "tokens,loss\n" + "".join(f"{1000 * 2**i},{4 - 0.2 * i}\n" for i in range(8))
ODD = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=20)


def mostly(good, odd):
    """Draw a value that works, in three of four cases, or an odd one."""
    return st.one_of(*[st.sampled_from(good)] * 3, odd)


sizes = mostly(SIZES[:5], st.sampled_from(SIZES) | ODD)
methods = mostly(["Lossless", "HyperClone(noise_db=10)"], st.sampled_from(METHODS) | ODD)
depths = mostly(["Stack", "IdentityBlocks"], st.sampled_from(METHODS) | ODD)
shard_sizes = mostly(["50KB", "5GB"], st.sampled_from(BYTES) | ODD)
numbers = mostly(NUMBERS[2:5], st.sampled_from(NUMBERS) | ODD)
source, target, new, curve = (
    mostly([name], st.sampled_from(PATHS)) for name in ("source", "grown", "new", "curve.csv")
)
REQUEST = {"--to": sizes, "--width": methods, "--depth": depths, "--seed": numbers}
COMMANDS = {  # command -> positional arguments and options
    "plan": ([source], REQUEST | {"--json": new | st.just("-"), "--plot": new}),
    "grow": ([source, new], REQUEST | {"--plan": new, "--overwrite": None, "--max-shard-size": shard_sizes}),
    "verify": ([source, target], {"--tokens": numbers, "--seed": numbers}),
    "compare": (
        [source],
        {"--methods": methods, "--to": sizes, "--text": curve, "--steps": numbers, "--tokens": numbers,
         "--batch-size": numbers, "--lr": numbers, "--seed": numbers},
    ),
    "advise": (
        [curve],
        {"--params": mostly(["1e5"], numbers), "--target-params": mostly(["3e5"], numbers), "--budget": mostly(["1e12"], numbers),
         "--spent": numbers, "--tokens-per-step": numbers, "--other": st.just("curve.csv:4e4") | ODD, "--kind": ODD, "--recipe": ODD},
    ),
    "demo": ([], {"--device": st.sampled_from(["meta", "cuda:99", "x", ""]), "--seed": numbers}),
}  # fmt: skip
NEEDED = {
    "compare": ["--methods"],
    "advise": ["--params", "--target-params", "--budget"],
    "demo": ["--device"],
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save a checkpoint and the one that it grows into."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save(folder / "source", max_position_embeddings=128)
    assert invoke("grow", folder / "source", folder / "grown").exit_code == 0
    return {name: folder / name for name in ("source", "grown")}


@st.composite
def calls(draw):
    """Draw the words of a call."""
    command = draw(st.sampled_from(sorted(COMMANDS)))
    positional, options = COMMANDS[command]
    words = [command, *(draw(value) for value in positional)]
    names = NEEDED.get(command, []) + draw(st.lists(st.sampled_from(sorted(options)), max_size=3))
    for name in names:
        words += [name] if options[name] is None else [name, draw(options[name])]
    return words + (draw(st.lists(ODD, max_size=1)) if draw(st.integers(0, 9)) == 0 else [])


@pytest.mark.slow
@settings(max_examples=EXAMPLES, suppress_health_check=[*HealthCheck])
@given(words=calls())
def test_a_call_does_its_work_or_says_what_is_wrong(
    words, checkpoints, tmp_path_factory, monkeypatch
):
    folder = tmp_path_factory.mktemp("work")
    for name, path in checkpoints.items():
        shutil.copytree(path, folder / name)
    (folder / "curve.csv").write_text(CURVE)
    monkeypatch.chdir(folder)
    before = contents(folder / "source")

    bounded(*words)

    assert contents(Path("source")) == before or "--json" in words
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]
