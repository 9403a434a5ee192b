"""A grown checkpoint has a model card of its own, which the Hub accepts; its license is the source's."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub import problems_of, serving
from huggingface_hub import HfApi, ModelCard
from models import batch, logits
from saved import contents, invoke, save

from growkern.checkpoints.card import METHODS, hub_id, papers
from growkern.checkpoints.grow import grow

SMALL = """---
license: other
license_name: small-license
license_link: LICENSE
language: [en, de]
datasets: [me/words]
pipeline_tag: text-generation
base_model: me/base
tags: [trl]
model-index: [{name: small}]
metrics: [accuracy]
---
# small
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save(tmp_path / "source")
    return tmp_path / "source"


def cached(folder: Path) -> Path:
    """Move a checkpoint to where Hugging Face's cache keeps the model me/small."""
    snapshot = folder.parent / "models--me--small" / "snapshots" / "1a"
    snapshot.parent.mkdir(parents=True)
    return folder.rename(snapshot)


def test_the_card_says_what_grew_and_carries_the_license(source, tmp_path):
    source = cached(source)
    (source / "README.md").write_text(SMALL)

    grown = grow(source, tmp_path / "large", to={"hidden": "2x", "layers": 4})

    card = ModelCard.load(tmp_path / "large" / "README.md")
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    assert card.data.to_dict() == {
        "license": "other",
        "license_name": "small-license",
        "license_link": "LICENSE",
        "language": ["en", "de"],
        "datasets": ["me/words"],
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "base_model": "me/small",
        "base_model_relation": "finetune",
        "tags": ["trl", "growkern", "model-growth"],
    }
    before, after = grown.n_params
    for text in (
        "[me/small](https://huggingface.co/me/small)",
        "| hidden | 24 | 48 |",
        f"| parameters | {before:,} | {after:,} |",
        "`Lossless(noise=None, norms=None)` ([arXiv:2104.11390](https://arxiv.org/abs/2104.11390)",
        "`IdentityBlocks()` ([arXiv:2401.02415](https://arxiv.org/abs/2401.02415))",
        "The growth preserves the function.",
        'LlamaForCausalLM.from_pretrained("FOLDER")',
        f"- {grown.notes[0]}",
    ):
        assert text in card.text
    assert "# small" not in card.text and str(tmp_path) not in card.text


def test_the_command_of_the_card_repeats_the_growth(source, tmp_path, monkeypatch):
    """The card's command grows by the recipe beside the card."""
    options = ("--to", "hidden=36,layers=3", "--width", "Net2Wider(noise=0.1)", "--seed", 7)
    assert invoke("grow", source, tmp_path / "large", *options).exit_code == 0
    text = (tmp_path / "large" / "README.md").read_text()
    assert "is not function preserving: " in text
    words = shlex.split(text.split("```\n")[-2])
    assert words[:2] == ["growkern", "grow"]
    shutil.copy(tmp_path / "large" / words[-1], tmp_path)
    monkeypatch.chdir(tmp_path)

    again = invoke(*words[1:])

    assert again.exit_code == 0, again.output
    assert contents(tmp_path / "OUT") == contents(tmp_path / "large")


def test_a_source_without_a_card_gets_one_that_names_no_model_of_the_hub(source, tmp_path):
    grow(source, tmp_path / "large")

    card = ModelCard.load(tmp_path / "large" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "tags": ["growkern", "model-growth"],
    }
    assert "grown from `source` (" in card.text and not problems_of(str(card))
    assert invoke("grow", source, tmp_path / "large", "--overwrite").exit_code == 0


def test_only_snapshots_in_the_cache_are_models_of_the_hub():
    cache = Path("models--me--small")
    others = cache / "files" / "abc", Path("me/snapshots/abc"), Path("abc")

    assert hub_id(cache / "snapshots" / "abc") == "me/small"
    assert [hub_id(folder) for folder in others] == [None] * 3


@pytest.mark.parametrize(
    "text",
    ["---\nlicense: [\n---\n", "---\n- mit\n---\n", b"---\nlicense: \xff\n---\n", "---\na: !!python/name:os.system\n---\n"],
    ids=["yaml", "list", "bytes", "object"],
)  # fmt: skip
def test_an_unreadable_card_is_said_and_does_not_stop_the_growth(text, source, tmp_path):
    (source / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())

    grown = grow(source, tmp_path / "large")

    card = ModelCard.load(tmp_path / "large" / "README.md")
    said = "no license was carried over: the metadata of the source's README.md is unreadable: "
    assert said in card.text and any(note.startswith(said) for note in grown.notes)


def test_fields_that_no_card_has_are_not_carried_over(source, tmp_path):
    (source / "README.md").write_text(
        "---\nlicense: {a: b}\nlanguage: [1]\ntags: trl\nextra_gated_prompt: x\n---\n"
    )

    grow(source, tmp_path / "large")

    fields = ModelCard.load(tmp_path / "large" / "README.md").data.to_dict()
    assert {*fields} == {"library_name", "tags"} and fields["tags"][0] == "trl"


def test_a_card_behind_a_link_that_leaves_the_checkpoint_is_not_read(source, tmp_path):
    (tmp_path / "card").write_text("---\nlicense: mit\n---\n")
    (source / "README.md").symlink_to(tmp_path / "card")

    grow(source, tmp_path / "large")

    assert ModelCard.load(tmp_path / "large" / "README.md").data.license is None


def test_every_method_from_a_paper_has_its_link():
    without = {name for name in METHODS if not papers(f"{name}()")}

    assert without == {"Zero", "MeanCov"}  # rules without a paper, for new tokens
    assert papers("Mine(noise=1)") == []


def test_the_hub_takes_card_and_checkpoint(source, tmp_path):
    source = cached(source)
    (source / "README.md").write_text(SMALL)
    grow(source, tmp_path / "large")
    card = ModelCard.load(tmp_path / "large" / "README.md")

    with serving() as hub:
        api = HfApi(hub.url, token="stand-in")
        api.create_repo("me/large")
        card.validate()
        card.push_to_hub("me/large", token="stand-in")
        pushed = {**hub.files["me/large"]}
        api.upload_folder(repo_id="me/large", folder_path=tmp_path / "large")
        with pytest.raises(ValueError, match="license: 'unheard of'"):
            ModelCard(str(card).replace("license: other", "license: unheard of")).validate()

    assert hub.validated[0] == str(card)
    assert pushed == {"README.md": str(card).encode()}
    assert hub.files["me/large"] == {
        path.name: path.read_bytes() for path in (tmp_path / "large").iterdir()
    }


WITHOUT = """
import sys

import torch, transformers


class Refuse:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "growkern":
            raise ImportError("growkern cannot be imported here")


sys.meta_path.insert(0, Refuse())
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
assert not any(name.partition(".")[0] == "growkern" for name in sys.modules)
"""


@pytest.mark.slow
def test_the_target_loads_where_growkern_cannot_be_imported(tmp_path):
    model = save(tmp_path / "source")
    grow(tmp_path / "source", tmp_path / "large", to={"hidden": "2x", "layers": 4})
    torch.save(ids := batch(), tmp_path / "ids")
    paths = [tmp_path / name for name in ("large", "ids", "logits")]

    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *paths], capture_output=True, text=True, cwd=tmp_path
    )

    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "logits")
    torch.testing.assert_close(found, logits(model, ids), rtol=0, atol=1e-5)
