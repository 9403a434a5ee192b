"""Helpers that save and load checkpoints of tiny models and run the command line."""

import re
from pathlib import Path

import tokenizers
import transformers
from models import make
from torch import nn
from typer.testing import CliRunner, Result

from growkern.cli import main as cli

INDEX = "model.safetensors.index.json"
MADE = {"README.md", "growkern_recipe.yaml"}  # files that a growth adds to those of save_pretrained


def tokenizer(folder: Path) -> None:
    """Save a tokenizer of the words ``w0`` to ``w59``."""
    words = {f"w{i}": i for i in range(60)} | {"[UNK]": 60, "[MASK]": 61}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", mask_token="[MASK]"
    ).save_pretrained(folder)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app(), [*map(str, arguments)])


def said(result: Result) -> str:
    """Return the output without the frames and line breaks that typer adds."""
    return re.sub(r"[\s│]+", " ", result.output)


def save(
    folder: Path, family: str = "llama", *, tied: bool = True, shard: str = "20KB", **changes
) -> nn.Module:
    model = make(family, tied=tied, **changes).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def load(model: nn.Module, folder: Path, **options: object) -> nn.Module:
    """Load a checkpoint by stock transformers, and assert that no tensor is missing, unexpected or of another shape."""
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return loaded.eval()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }
