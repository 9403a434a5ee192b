"""The commands plan, verify and compare read checkpoints; grow keeps to its memory, obeys Ctrl-C and draws a progress bar."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import torch
import transformers
import zoo
from models import make
from safetensors.torch import load_file, save_file
from saved import contents, invoke, said, save, tokenizer
from typer.testing import CliRunner

from growkern.cli import main as cli


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save(tmp_path / "source")
    return tmp_path / "source"


def test_a_saved_plan_grows_the_same(source, tmp_path):
    asked = ("--to", "hidden=36,layers=3", "--width", "Lossless(noise=0.5)", "--depth", "Stack", "--seed", 7)  # fmt: skip
    before = contents(source)

    shown = invoke("plan", source, *asked, "--json", tmp_path / "plan.json")

    assert shown.exit_code == 0, shown.output
    assert (
        "Growth plan for llama: Lossless(noise=0.5" in shown.output and "24x36" not in shown.output
    )
    assert contents(source) == before and sorted(os.listdir(tmp_path)) == ["plan.json", "source"]
    assert invoke("grow", source, tmp_path / "one", *asked).exit_code == 0
    planned = invoke("grow", source, tmp_path / "two", "--plan", tmp_path / "plan.json")
    assert planned.exit_code == 0, planned.output
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    refused = invoke("grow", source, tmp_path / "three", "--plan", tmp_path / "plan.json", *asked)
    assert refused.exit_code == 2 and "leave --to" in said(refused)
    other = invoke("grow", tmp_path / "one", tmp_path / "three", "--plan", tmp_path / "plan.json")
    assert other.exit_code == 1 and not (tmp_path / "three").exists()


def test_describe_shows_axes_of_a_family_and_of_a_model_that_is_traced(source, tmp_path):
    shown = invoke("describe", source)
    zoo.make("phi3").save_pretrained(tmp_path / "phi3")
    traced = invoke("describe", tmp_path / "phi3")

    assert shown.exit_code == traced.exit_code == 0, shown.output + traced.output
    assert re.search(r"mlp.down_proj +weight +writer residual \| reader ffn", shown.output)
    assert "Phi3ForCausalLM, by tracing: hidden 48" in traced.output
    assert "traced on input_ids int64 2x12" in traced.output


def test_a_checkpoint_that_no_family_describes_grows(tmp_path):
    model = zoo.make("phi3")
    model.save_pretrained(tmp_path / "phi3")

    grown = invoke("grow", tmp_path / "phi3", tmp_path / "grown")

    assert grown.exit_code == 0, grown.output
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "grown", dtype=torch.float64
    )
    ids = torch.arange(3, 15)[None]
    assert again.config.hidden_size == 2 * model.config.hidden_size
    torch.testing.assert_close(again.eval()(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_a_growth_that_no_config_describes_is_refused_and_writes_nothing(tmp_path):
    zoo.make("bloom").save_pretrained(tmp_path / "bloom")

    refused = invoke("grow", tmp_path / "bloom", tmp_path / "grown")

    assert refused.exit_code == 1 and not (tmp_path / "grown").exists()
    assert re.search(r"self_attention.query_key_value.weight: would be \(144, 96\), and a model of", said(refused))  # fmt: skip


def test_plan_predicts_a_growth_on_many_processes(source):
    slow, fast = (invoke("plan", source, "--ranks", 8, *more) for more in (["--bandwidth", 1e-3], []))  # fmt: skip

    assert slow.exit_code == fast.exit_code == 0, slow.output
    for shown in (slow, fast):
        assert "Predicted for every one of 8 processes" in shown.output
    last = [re.search(r"^all .* ([\d.e-]+)$", shown.output, re.MULTILINE) for shown in (slow, fast)]
    assert float(last[0][1]) > float(last[1][1]) > 0
    alone = invoke("plan", source, "--bandwidth", 3)
    assert alone.exit_code == 2 and "pass --ranks" in said(alone)
    endless = invoke("plan", source, "--ranks", 8, "--bandwidth", "inf")
    assert endless.exit_code == 2 and "inf is not a number of GB per second" in said(endless)


def test_plan_refuses_what_transformers_would_not_load(source):
    result = invoke("plan", source, "--to", "hidden=25")

    assert result.exit_code == 1
    assert "accepts no llama of hidden=25" in said(result) and "not a multiple" in said(result)


def test_verify_tells_a_growth_that_kept_the_function_from_one_that_did_not(source, tmp_path):
    for name, method in (("kept", "Lossless"), ("not", "AKI")):
        assert invoke("grow", source, tmp_path / name, "--width", method).exit_code == 0

    kept = invoke("verify", source, tmp_path / "kept")
    other = invoke("verify", source, tmp_path / "not", "--tokens", 16)

    assert kept.exit_code == 0 and re.search(r"logits error +\S+e-\d+ of \S+ +ok", kept.output)
    assert other.exit_code == 1 and "DIFFERENT" in other.output


@pytest.mark.parametrize("family", ["vit", "mixtral", "bert"])
def test_verify_takes_what_the_model_takes(family, tmp_path):
    save(tmp_path / "source", family)
    assert invoke("grow", tmp_path / "source", tmp_path / "out").exit_code == 0

    result = invoke("verify", tmp_path / "source", tmp_path / "out")

    assert result.exit_code == 0, result.output


def test_verify_sees_one_weight_that_was_changed(source, tmp_path):
    invoke("grow", source, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] += 0.5
    save_file(tensors, file, {"format": "pt"})

    assert invoke("verify", source, tmp_path / "out").exit_code == 1


@pytest.mark.parametrize(
    ("family", "changes", "options", "match"),
    [
        ("gpt2", {}, [], "a LlamaForCausalLM of 66 tokens did not grow into a GPT2LMHeadModel"),
        ("llama", {"vocab_size": 50}, [], "of 66 tokens did not grow into a .* of 50"),
        ("llama", {}, ["--tokens", "63"], "the model has 64 positions; pass --tokens 62"),
    ],
    ids=["class", "vocab", "tokens"],
)
def test_verify_refuses_what_cannot_be_compared(family, changes, options, match, source, tmp_path):
    save(tmp_path / "other", family, **changes)

    result = invoke("verify", source, tmp_path / "other", *options)

    assert result.exit_code == 1 and re.search(match, said(result)), result.output


SMALL = ("--steps", "2", "--tokens", "8", "--batch-size", "2")


def test_compare_shows_a_row_per_method(source, tmp_path):
    before = contents(source)

    result = invoke(
        "compare", source, "--to", "hidden=2x,layers=3", "--methods", "Lossless", "--methods", "AKI() + Stack()",
        "--methods", "DepthUpscale", *SMALL,
    )  # fmt: skip

    assert result.exit_code == 0, result.output
    rows = re.findall(r"^(\S.*?)  +(trajectory|function|nothing) ", result.output, re.MULTILINE)
    assert rows == [
        ("(none)", "trajectory"),
        ("Lossless()", "function"),
        ("AKI() + Stack()", "nothing"),
    ]
    assert "DepthUpscale(): DepthUpscale: 2 layers grow to an even number" in result.output
    assert contents(source) == before


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "bert", "vit"])
def test_compare_has_a_loss_for_every_kind_of_head(family, tmp_path):
    save(tmp_path / "source", family)

    result = invoke("compare", tmp_path / "source", "--methods", "Lossless", *SMALL)

    assert result.exit_code == 0, result.output
    losses = re.findall(r"(?:trajectory|function) +\S+ +(\d+\.\d{4}) ", result.output)
    assert len(losses) == 2 and losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_compare_trains_on_a_text_by_the_tokenizer_of_the_checkpoint(family, tmp_path):
    save(tmp_path / "source", family)
    tokenizer(tmp_path / "source")
    (tmp_path / "text").write_text("w1 w2 " * 100)

    results = [
        invoke("compare", tmp_path / "source", "--methods", "Lossless", *SMALL[2:], "--steps", steps,
               "--lr", "0.01", "--text", tmp_path / "text")
        for steps in (1, 30)
    ]  # fmt: skip

    after = [float(re.search(r"\(none\).*?\d\.\d{4}  (\d\.\d{4})", r.output)[1]) for r in results]
    assert after[1] < 0.5 * after[0]  # the model learns two alternating words


@pytest.mark.parametrize(
    ("words", "with_tokenizer", "match"),
    [
        ("w1 " * 15, True, "has 15 tokens, and a batch of 2 x 8 takes 16"),
        ("w1 " * 40, False, "cannot read .* with the tokenizer of .* Leave --text out"),
    ],
    ids=["short", "no tokenizer"],
)
def test_a_text_that_cannot_be_used_is_refused(words, with_tokenizer, match, source, tmp_path):
    if with_tokenizer:
        tokenizer(source)
    (tmp_path / "text").write_text(words)

    result = invoke("compare", source, "--methods", "Lossless", *SMALL, "--text", tmp_path / "text")

    assert result.exit_code == 1 and re.search(match, said(result)), result.output


def test_compare_refuses_a_model_without_a_loss(tmp_path):
    make("llama", tied=True).model.save_pretrained(tmp_path / "source")

    result = invoke("compare", tmp_path / "source", "--methods", "Lossless", *SMALL)

    assert result.exit_code == 1 and "a LlamaModel has no loss to compare" in said(result)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["plan", "x", "--width", "Stack"], "--width: there is no method 'Stack'"),
        (["plan", "x", "--depth", "Stack(n=)"], "--depth: cannot read"),
        (["plan", "x", "--to", "hidden", "--to", "2x"], "--to: cannot read 'hidden'"),
        (["plan", "x", "--to", "hidden=2x", "--to", "4x"], "--to: cannot read '4x'"),
        (["plan", "x", "--seed", "-1"], "--seed"),
        (["grow", "x"], "Missing argument"),
        (["grow", "x", "y", "--plan", "nowhere.json"], "does not exist"),
        (["grow", "x", "y", "--plan", __file__], "--plan: cannot read the plan"),
        (["compare", "x"], "Missing option '--methods'"),
        (["compare", "x", "--methods", "Lossy"], "--methods: there is no method 'Lossy'"),
        (["verify", "x", "y", "--tokens", "0"], "--tokens"),
        (["verify", "x", "y", "--seed", "9" * 30], "--seed"),
        (["plan", "x", "--seed", "9" * 5000], "--seed"),
        (["compare", "x", "--methods", "Lossless", "--lr", "nan"], "--lr"),
    ],
    ids=lambda v: " ".join(v[:1] + v[2:3]) if isinstance(v, list) else "",
)
def test_wrong_options_are_refused_before_anything_is_read(arguments, match):
    result = invoke(*arguments)

    assert result.exit_code == 2 and match in said(result), result.output


def test_the_largest_seed_of_a_plan_is_that_of_the_command_line(source, tmp_path):
    largest = 2**64 - 1

    planned = invoke("plan", source, "--seed", largest)
    compared = invoke("compare", source, "--methods", "Lossless", *SMALL, "--seed", largest)
    beyond = invoke("plan", source, "--seed", largest + 1)

    assert planned.exit_code == compared.exit_code == 0, planned.output + compared.output
    assert f"seed {largest}" in planned.output and beyond.exit_code == 2


def test_a_name_without_a_size_is_refused(source):
    result = invoke("plan", source, "--to", "hidden")

    assert result.exit_code == 1 and "cannot read to='hidden'" in said(result), result.output


LARGE = "9" * 5000
TOO_LARGE = {
    "size": (["--to", f"hidden={LARGE}"], "hidden: cannot read '999"),
    "factor": (["--to", f"{LARGE}x"], "cannot read to='999"),
    "factor of a size": (["--to", f"hidden=1.{LARGE}x"], "hidden: cannot read '1.999"),
    "above the limit": (["--to", "hidden=" + "9" * 18], "above the limit"),
    "name": (["--to", "h" * 5000 + "=2x"], "unknown size 'hhh"),
    "shards": (["--max-shard-size", LARGE + "GB"], "cannot read the size '999"),
    "path": (["--overwrite", "--max-shard-size", "1" * 400], "cannot read the size '111"),
}


@pytest.mark.parametrize(("options", "match"), TOO_LARGE.values(), ids=TOO_LARGE)
def test_numbers_and_names_that_are_too_long_are_refused_in_short(options, match, source, tmp_path):
    result = invoke("grow", source, tmp_path / "out", *options)

    assert result.exit_code == 1 and match in said(result), result.output
    assert len(result.output) < 1000 and [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("option", ["--batch-size", "--steps"])
@pytest.mark.parametrize("family", ["llama", "vit"])
def test_batches_that_do_not_fit_in_memory_are_refused(family, option, tmp_path):
    save(tmp_path / "source", family)

    result = invoke(
        "compare", tmp_path / "source", "--methods", "Lossless", "--tokens", 8, option, 10**14
    )

    assert result.exit_code == 1 and "GB are free; lower --tokens" in said(result), result.output


def test_a_path_that_the_system_refuses_is_an_error(tmp_path):
    result = invoke("plan", tmp_path / ("a" * 5000))

    assert result.exit_code == 1 and "File name too long" in said(result), result.output


def test_the_code_of_a_tokenizer_is_not_executed(source, tmp_path):
    tokenizer(source)
    config = json.loads((source / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    (tmp_path / "text").write_text("w1 w2 " * 100)

    words = ["compare", source, "--methods", "Lossless", *SMALL, "--text", tmp_path / "text"]
    result = CliRunner().invoke(cli.app(), [*map(str, words)], input="y\n")  # to a question

    assert result.exit_code == 1 and "Leave --text out" in said(result), result.output
    assert not (tmp_path / "executed").exists()


WIDTH = 512
BIG = dict(hidden_size=WIDTH, num_attention_heads=8, num_key_value_heads=4, intermediate_size=3 * WIDTH, num_hidden_layers=6)  # fmt: skip


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a Llama of about 90 MB in one file and a Mixtral of about 120 MB in shards of 8 MB."""
    folder = tmp_path_factory.mktemp("big")
    config = transformers.LlamaConfig(**BIG, vocab_size=6000, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    config = transformers.MixtralConfig(
        **(BIG | {"intermediate_size": WIDTH // 2}), vocab_size=6000, num_local_experts=8
    )
    transformers.MixtralForCausalLM(config).save_pretrained(
        folder / "mixtral", max_shard_size="8MB"
    )
    return folder


@processes.together
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("family", "to", "share"),
    [
        ("llama", "2x", 0.2),  # share of the target's bytes
        ("llama", {"layers": 7}, 0.4),
        ("mixtral", "2x", 0.7),  # loading stacks the experts: the source is resident
    ],
    ids=str,
)
def test_peak_memory_stays_far_under_the_size_of_the_target(family, to, share, big, tmp_path):
    save(tmp_path / "small")

    log = tmp_path / "log"
    started = processes.start(
        "peak_worker", tmp_path / "small", big / family, tmp_path, to, log=log
    )
    processes.end([started], log)

    peak, n_source, n_target = map(int, log.read_text().split()[-3:])
    assert n_source > 60e6, "too small to measure"
    assert peak < share * n_target, (peak / n_target, peak, n_source, n_target)


@processes.together
@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_leaves_nothing_behind(big, tmp_path):
    before = contents(big / "llama")
    for _ in range(5):  # on a busy machine the command may have ended before the signal is sent
        process = subprocess.Popen(
            [sys.executable, "-m", "growkern", "grow", big / "llama", tmp_path / "out"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while not list(tmp_path.glob(".out.*.part/*")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=120)
        if process.returncode != 0:
            break
        assert [p.name for p in tmp_path.iterdir()] == ["out"], (
            "it has ended, and the signal is lost"
        )
        shutil.rmtree(tmp_path / "out")

    assert process.returncode != 0 and "Traceback" not in error, (out, error)
    assert list(tmp_path.iterdir()) == []
    assert contents(big / "llama") == before


def grow_and_send(number: int, source: Path, folder: Path, log: Path, ready: str = "/*"):
    """Start a growth and send it a signal while it writes; return its exit code."""
    for _ in range(5):  # on a busy machine the growth may have ended before the signal is sent
        process = processes.start("cli_worker", "grow", source, folder / "out", log=log)
        while not list(folder.glob(f".out.*.part{ready}")) and process.is_alive():
            time.sleep(0.001)
        os.kill(process.pid, number)
        process.join()
        if not (folder / "out").exists():
            break
        shutil.rmtree(folder / "out")
    return process.exitcode


@processes.together
@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_leaves_nothing_behind(name, big, tmp_path):
    (folder := tmp_path / "folder").mkdir()
    number = getattr(signal, name)

    status = grow_and_send(number, big / "llama", folder, log := tmp_path / "log")

    assert status == 128 + number and "Traceback" not in log.read_text(), log.read_text()
    assert list(folder.iterdir()) == []


@processes.together
@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
def test_what_a_killed_growth_left_is_removed_by_the_next_one(source, big, tmp_path):
    (folder := tmp_path / "folder").mkdir()
    status = grow_and_send(signal.SIGKILL, big / "llama", folder, tmp_path / "log")
    (left,) = folder.iterdir()

    result = invoke("grow", source, folder / "out")

    assert status == -signal.SIGKILL and result.exit_code == 0
    assert [path.name for path in folder.iterdir()] == ["out"]
    assert left.name in said(result).replace(" ", "") and "was removed" in said(result)


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch, capsys):
    """``nohup`` ignores SIGHUP."""
    before = {number: signal.getsignal(number) for number in cli.ENDING}
    try:
        signal.signal(cli.ENDING[-1], signal.SIG_IGN)
        signal.signal(cli.ENDING[0], signal.SIG_DFL)
        monkeypatch.setattr(sys, "argv", ["growkern", "--help"])
        with pytest.raises(SystemExit):
            cli.main()

        assert signal.getsignal(cli.ENDING[-1]) is signal.SIG_IGN
        assert signal.getsignal(cli.ENDING[0]) is cli._end
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_names_that_are_no_text_are_printed(source, tmp_path, monkeypatch):
    before = {number: signal.getsignal(number) for number in cli.ENDING}
    out = os.fsdecode(os.fsencode(tmp_path / "out") + b"\xff")
    stream = io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "argv", ["growkern", "grow", str(source), out])
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

    assert not ended.value.code and os.path.isdir(out)
    assert b"out\\udcff: 1 file of weights" in stream.buffer.getvalue()


def test_a_bar_shows_the_bytes_and_the_summary_what_was_done(source, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal
    result = invoke("grow", source, tmp_path / "out", "--max-shard-size", "50KB")

    assert result.exit_code == 0, result.output
    out, error = result.stdout, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", result.stderr)
    n_bytes = sum(
        t.numel() * t.element_size()
        for path in (tmp_path / "out").glob("*.safetensors")
        for t in load_file(path).values()
    )
    assert f"{n_bytes / 1e3:.1f}/{n_bytes / 1e3:.1f} kB" in error and "growing" in error
    assert f"{n_bytes:,}" in out and "preserves the function" in out and "growing" not in out
