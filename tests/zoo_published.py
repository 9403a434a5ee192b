"""Tiny models of published packages and repositories that are no dependencies: nanoGPT, nanochat, litgpt, torchtune, x-transformers, timm.

litgpt, torchtune, x-transformers and timm are imported from the environment; nanoGPT and nanochat from clones under the folder that the
environment variable ``ZOO_CLONES`` names. What torchtune and timm import and no forward uses (datasets, omegaconf, torchvision) is replaced
by stand-ins where it is not installed.
"""

import importlib
import os
import sys
import types
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCAB, LENGTH = 97, 12
Made = tuple[nn.Module, Any]  # a model and its inputs


def ids(highest: int = VOCAB) -> Tensor:
    return torch.randint(3, highest, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def image() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=generator)


class _Anything(types.ModuleType):
    """A package whose every name is a class that does nothing."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}") or _Kind(name, (_Idle,), {})


class _Idle:
    def __init__(self, *args: object, **kwargs: object) -> None:
        pass


class _Kind(type):
    """A class whose every attribute is such a class."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Kind(name, (_Idle,), {})

    def __getitem__(cls, item: object) -> Any:
        return cls


def stand_in(package: str, *modules: str) -> None:
    """Stand in for a package that is not installed, and modules inside it."""
    known = sys.modules.get(package)
    if not isinstance(known, _Anything) and (known or find_spec(package)):
        return
    for name in (package, *(f"{package}.{m}" for m in modules)):
        sys.modules.setdefault(name, _Anything(name))
        sys.modules[name].__spec__ = ModuleSpec(name, None)
        sys.modules[name].__version__ = "0.0"


def clone(repository: str, module: str) -> Any:
    """Import a module of a clone."""
    folder = Path(os.environ.get("ZOO_CLONES", "")) / repository
    if "ZOO_CLONES" not in os.environ or not folder.is_dir():
        raise ModuleNotFoundError(f"no clone of karpathy/{repository} under $ZOO_CLONES")
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(folder))


def nanogpt() -> Made:
    gpt = clone("nanoGPT", "model")
    sizes = dict(block_size=64, vocab_size=VOCAB, n_layer=2, n_head=4, n_embd=48, dropout=0.0)
    with redirect_stdout(None):
        model = gpt.GPT(gpt.GPTConfig(**sizes, bias=True))
    return model, {"idx": ids(), "targets": ids()}


def nanochat() -> Made:
    gpt = clone("nanochat", "nanochat.gpt")
    gpt.COMPUTE_DTYPE = torch.float64
    sizes = dict(sequence_len=64, vocab_size=VOCAB, n_layer=2, n_head=4, n_kv_head=2, n_embd=48)
    model = gpt.GPT(gpt.GPTConfig(**sizes, window_pattern="L"), pad_vocab_size_to=1)
    model.init_weights()
    return model, {"idx": ids()}


def _litgpt(**fields: Any) -> Made:
    from litgpt.config import Config
    from litgpt.model import GPT

    sizes = dict(block_size=64, vocab_size=VOCAB, padded_vocab_size=VOCAB, n_layer=2, n_head=4, n_embd=48)  # fmt: skip
    return GPT(Config(**sizes, **fields)), {"idx": ids()}


def litgpt_llama() -> Made:
    sizes = dict(n_query_groups=2, head_size=12, intermediate_size=80, rotary_percentage=1.0)
    kinds = dict(norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP")
    return _litgpt(**sizes, **kinds, parallel_residual=False, bias=False)


def litgpt_pythia() -> Made:
    return _litgpt(rotary_percentage=0.5)


def torchtune_llama3() -> Made:
    stand_in("datasets", "distributed")
    stand_in("omegaconf")
    stand_in("torchvision", "transforms", "transforms.v2", "transforms.v2.functional")
    from torchtune.models.llama3_1 import llama3_1

    sizes = dict(num_heads=4, num_kv_heads=2, embed_dim=48, intermediate_dim=80)
    return llama3_1(vocab_size=VOCAB, num_layers=2, max_seq_len=64, **sizes), {"tokens": ids()}


def x_transformers() -> Made:
    from x_transformers import Decoder, TransformerWrapper

    kinds = dict(rotary_pos_emb=True, ff_glu=True, ff_swish=True, use_rmsnorm=True, attn_qk_norm=True)  # fmt: skip
    layers = Decoder(dim=48, depth=2, heads=4, attn_dim_head=12, attn_kv_heads=2, **kinds)
    return TransformerWrapper(num_tokens=VOCAB, max_seq_len=64, attn_layers=layers), (ids(),)


def _timm(module: str) -> Any:
    inner = ("datasets", "datasets.folder", "models", "models.feature_extraction", "ops", "ops.misc")  # fmt: skip
    stand_in("torchvision", "transforms", "transforms.functional", *inner)
    return importlib.import_module(f"timm.models.{module}")


VIT = dict(img_size=32, patch_size=16, embed_dim=48, depth=2, num_heads=4, mlp_ratio=2, num_classes=11)  # fmt: skip


def timm_vit() -> Made:
    kind = _timm("vision_transformer").VisionTransformer
    return kind(**VIT, qkv_bias=True, init_values=0.5), (image(),)


def timm_eva02() -> Made:
    kinds = dict(swiglu_mlp=True, use_rot_pos_emb=True, scale_mlp=True, qkv_fused=False)
    return _timm("eva").Eva(**VIT, **kinds), (image(),)


class Translator(nn.Module):
    """``torch.nn.Transformer`` between embeddings and a head."""

    def __init__(
        self, width: int = 48, n_heads: int = 4, n_ffn: int = 80, n_layers: int = 2
    ) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(VOCAB, width), nn.Embedding(VOCAB, width)
        how = dict(dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.Transformer(width, n_heads, n_layers, n_layers, n_ffn, **how)
        self.head = nn.Linear(width, VOCAB)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.body(self.source(source), self.target(target)))


def torch_transformer() -> Made:
    return Translator(), (ids(), ids())


PUBLISHED: dict[str, Callable[[], Made]] = {
    make.__name__: make
    for make in (nanogpt, nanochat, litgpt_llama, litgpt_pythia, torchtune_llama3, x_transformers, timm_vit, timm_eva02, torch_transformer)
}  # fmt: skip
