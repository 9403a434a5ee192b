"""The command inherit store writes the logits that the function stores, goes on after a kill, and says what it cannot read."""

import shutil
from pathlib import Path

import pytest
import torch
from saved import invoke, said, save
from test_commands import tokenizer

from growkern.inherit import Stored, store


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save(tmp_path / "source")
    tokenizer(tmp_path / "source")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i * i % 60}" for i in range(70)))
    return tmp_path / "source"


def test_the_command_stores_what_the_function_stores(source, tmp_path):
    asked = ("inherit", "store", source, tmp_path / "text.txt", tmp_path / "out")
    asked += ("--tokens", 16, "--batch-size", 3, "--sampled", 5)

    result = invoke(*asked)

    assert result.exit_code == 0, result.output
    assert "64 in sequences of 16" in result.output and "sampled, 5 per position" in result.output
    ids = torch.tensor([i * i % 60 for i in range(64)]).view(4, 16)
    batches = [{"input_ids": part} for part in ids.split(3)]
    made, at = Stored(tmp_path / "out"), torch.arange(4) * 16
    expected = store(save(tmp_path / "again"), batches, tmp_path / "by-hand", sampled=5)
    for mine, other in zip(made.read(at, ids), expected.read(at, ids), strict=True):
        assert torch.equal(mine, other)
    assert made.header.teacher == str(source) and made.header.tokenizer

    (tmp_path / "out" / "index.json").unlink()
    assert invoke(*asked).exit_code == 0 and Stored(tmp_path / "out").n_rows == 64


@pytest.mark.parametrize(
    ("options", "code", "match"),
    [
        (("--tokens", 99), 1, "does not fit|do not fit"),
        (("--tokens", 60, "--top-k", 67), 1, "top_k: 67 is more than the vocabulary of 66"),
        (("--tokens", 16, "--top-k", 5, "--sampled", 5), 1, "exclude each other"),
        (("--tokens", 16, "--tau", 0), 1, "tau: 0.0 is not positive"),
        (("--tokens", 16, "--sampled", 0), 2, "--sampled"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_stored_is_refused(options, code, match, source, tmp_path):
    result = invoke("inherit", "store", source, tmp_path / "text.txt", tmp_path / "out", *options)

    assert result.exit_code == code and any(part in said(result) for part in match.split("|"))
    assert not (tmp_path / "out").exists()


def test_a_short_text_another_model_and_a_missing_tokenizer_are_refused(source, tmp_path):
    (tmp_path / "short.txt").write_text("w1 w2")
    short = invoke("inherit", "store", source, tmp_path / "short.txt", tmp_path / "out")
    assert short.exit_code == 1
    short = invoke("inherit", "store", source, tmp_path / "short.txt", tmp_path / "out", "--tokens", 8)  # fmt: skip
    assert short.exit_code == 1 and "has 2 tokens, and a sequence takes 8" in said(short)
    save(tmp_path / "bert", "bert")
    shutil.copy(source / "tokenizer.json", tmp_path / "bert")
    masked = invoke("inherit", "store", tmp_path / "bert", tmp_path / "text.txt", tmp_path / "out", "--tokens", 8)  # fmt: skip
    assert masked.exit_code == 1 and "predicts no next tokens" in said(masked)
