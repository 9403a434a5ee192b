"""The command line says what it knows, takes ids of the Hub, prints nothing if told so, and has an example for every command."""

import re
import shlex
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import typer.main
from hub import REVISION, serving
from huggingface_hub import ModelCard
from huggingface_hub.utils import are_progress_bars_disabled
from saved import contents, invoke, said, save
from typer.testing import CliRunner

import growkern
from growkern import depth, width
from growkern.cli import main as cli


def test_a_model_of_the_hub_grows_by_its_id(tmp_path, monkeypatch):
    save(tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("---\nlicense: mit\n---\n")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    with serving() as hub:
        hub.files["me/small"] = contents(tmp_path / "source") | {"pytorch_model.bin": b"pickle"}
        by_id = invoke("grow", "me/small", tmp_path / "one")
        assert by_id.stderr == "" and not are_progress_bars_disabled()  # stderr is no terminal
        of_revision = invoke("describe", f"me/small@{REVISION}")
        gone = invoke("plan", "me/nothing")
        words = (tmp_path / "one" / "README.md").read_text().split("```\n")[-2].split()
        shutil.copy(tmp_path / "one" / words[-1], tmp_path)
        again = invoke(*words[1:])

    assert by_id.exit_code == of_revision.exit_code == 0, by_id.output + of_revision.output
    assert words[2] == f"me/small@{REVISION}" and again.exit_code == 0, again.output
    assert contents(tmp_path / "OUT") == contents(tmp_path / "one")
    assert not [*(tmp_path / "cache").rglob("*.bin")]
    card = ModelCard.load(tmp_path / "one" / "README.md")
    assert (card.data.base_model, card.data.license) == ("me/small", "mit")
    assert f"revision: {REVISION}" in (tmp_path / "one" / "growkern_recipe.yaml").read_text()
    assert invoke("grow", tmp_path / "source", tmp_path / "two").exit_code == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert gone.exit_code == 1 and "the Hub does not give a model of this id" in said(gone)


def test_a_folder_is_preferred_to_a_model_of_the_hub(tmp_path, monkeypatch):
    save(tmp_path / "me" / "small")
    monkeypatch.chdir(tmp_path)

    with serving() as hub:
        hub.files["me/small"] = {}
        result = invoke("describe", "me/small")

    assert result.exit_code == 0 and "llama" in result.output


def test_the_tables_name_every_method_family_and_procedure():
    methods, families, procedures = (invoke(n).output for n in ("methods", "families", "procedures"))  # fmt: skip

    for name in (*width.__all__, *depth.__all__):
        assert f"\n{name} " in methods
    assert "2310.07999" in methods and "by tracing" in families
    assert re.search(
        r"\nLlamaForCausalLM +transformers +hidden, heads, kv_heads, head_dim, ffn, layers, vocab",
        families,
    )
    assert re.search(r"\nTransformerEncoder +torch.nn ", families)
    for name in growkern.procedures.__all__:
        assert (f"\n{name} " in procedures) == (name not in ("Procedure", "Stage", "g_stack_tokens"))  # fmt: skip
    assert "2405.15319" in procedures


def test_quiet_prints_errors_only(tmp_path):
    save(tmp_path / "source")
    words = "-q", "grow", tmp_path / "source", tmp_path / "out"

    done, again = invoke(*words), invoke(*words)

    assert done.exit_code == 0 and done.output == "" and (tmp_path / "out").is_dir()
    assert again.exit_code == 1 and again.stdout == "" and "exists" in again.stderr


def test_the_version_is_that_of_the_package():
    assert invoke("--version").output == f"growkern {growkern.__version__}\n"


def test_a_shell_completes_commands_and_options():
    def completed(words: str) -> list[str]:
        told = {"_GROWKERN_COMPLETE": "complete_bash", "COMP_WORDS": words}
        told["COMP_CWORD"] = str(len(words.split()) - 1)
        result = CliRunner().invoke(cli.app(), [], prog_name="growkern", env=told)
        return result.output.split()

    assert completed("growkern gro") == ["grow"]
    assert completed("growkern grow --rec") == ["--recipe"]


def commands() -> dict[str, typer.main.TyperCommand]:
    group = typer.main.get_command(cli.app())
    store = group.commands.pop("inherit").commands
    return group.commands | {f"inherit {name}": command for name, command in store.items()}


@pytest.mark.parametrize("name", commands())
def test_every_help_has_an_example_whose_arguments_the_command_takes(name, tmp_path, monkeypatch):
    command = commands()[name]
    for file in ("curve.csv", "corpus.txt"):
        Path(tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)

    words = shlex.split(command.epilog.removeprefix("Example: "))

    assert " ".join(words).startswith(f"growkern {name}")
    command.make_context(name, words[1 + len(name.split()) :])
    shown = " ".join(invoke(*name.split(), "--help").output.split())
    assert words[-1] in shown


def test_the_help_says_what_exit_codes_mean():
    shown = said(invoke("--help"))

    assert "0 when the command is done; 1 when it fails" in shown and "2 when the arg" in shown
