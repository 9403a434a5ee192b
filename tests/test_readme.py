"""The README's examples run as they stand."""

import re
from pathlib import Path

import torch
from models import Plain, batch

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_first_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}

    exec(EXAMPLES[1], names)

    assert names["model"].config.hidden_size == 128
    assert (tmp_path / "grown" / "model.safetensors").exists()
    printed = capsys.readouterr().out
    assert "Growth plan for llama" in printed and "Grew llama" in printed


def test_a_model_of_your_own_grows_by_its_spec():
    model = Plain()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = model(batch())

    exec(EXAMPLES[2], {"model": model, "optim": optim})

    assert (len(model.blocks), model.wte.embedding_dim) == (3, 36)
    assert torch.allclose(model(batch()), before, atol=1e-4)


def test_the_spec_of_the_example_has_under_40_lines():
    assert "ModelSpec(" in EXAMPLES[2] and len(EXAMPLES[2].splitlines()) < 40
