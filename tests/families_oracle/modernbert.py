"""ModernBERT of transformers: ``ModernBertForMaskedLM``, ``ModernBertModel``.

https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/modernbert/modeling_modernbert.py

Pre-norm LayerNorm, RoPE, fused ``Wqkv`` (q, k, v) and ``Wi`` (input, gate), alternating global and local attention
(``layer_types``). The embedding is normalized, and the attention of block 0 reads the output of this norm without a norm of its own.
Hence hidden grows exactly by whole multiples only, and new blocks copy any block but the first. The config has no head_dim
(hidden = heads x head_dim).
"""

from typing import Protocol

from growkern.model.layers import embedding, linear, norm, rope_fixed
from growkern.model.size_values import ROOT
from growkern.model.spec import KEY, QUERY, VALUE, Blocks, ModelSpec


class Config(Protocol):
    """The fields of ``ModernBertConfig`` that ``describe`` reads."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_hidden_layers: int
    vocab_size: int
    norm_bias: bool
    attention_bias: bool
    mlp_bias: bool
    classifier_bias: bool
    decoder_bias: bool
    tie_word_embeddings: bool


def describe(config: Config, base: str = "model.", mlm: bool = True) -> ModelSpec:
    """Describe a ModernBERT: ``base`` is the prefix of the backbone, ``mlm`` is True with a masked-LM head."""
    layers = range(config.num_hidden_layers)
    at, tokens = f"{base}layers", f"{base}embeddings.tok_embeddings"
    attention_bias, mlp_bias, norm_bias = config.attention_bias, config.mlp_bias, config.norm_bias

    def layer_norm(name: str, reads: str, writes: str):
        return norm(name, reads=reads, writes=writes, kind="layer", bias=norm_bias)

    blocks = {
        name: axes
        for i in layers
        for heads, normed in [(f"heads.{i}", "residual:normed")]
        for name, axes in (
            (layer_norm(f"{at}.{i}.attn_norm", "residual", normed) if i else {})
            | linear(
                f"{at}.{i}.attn.Wqkv",
                reads=normed if i else "residual",
                writes=[(heads, stream) for stream in (QUERY, KEY, VALUE)],
                bias=attention_bias,
            )
            | linear(
                f"{at}.{i}.attn.Wo", reads=(heads, VALUE), writes="residual", bias=attention_bias
            )
            | layer_norm(f"{at}.{i}.mlp_norm", "residual", normed)
            | linear(f"{at}.{i}.mlp.Wi", reads=normed, writes=[(f"ffn.{i}",)] * 2, bias=mlp_bias)
            | linear(f"{at}.{i}.mlp.Wo", reads=f"ffn.{i}", writes="residual", bias=mlp_bias)
        ).items()
    }
    outputs = ["attn.Wo.weight", "mlp.Wo.weight"]
    outputs += ["attn.Wo.bias"] * attention_bias + ["mlp.Wo.bias"] * mlp_bias
    return ModelSpec(
        family="modernbert",
        sizes={
            "hidden": config.hidden_size,
            "heads": config.num_attention_heads,
            "head_dim": config.hidden_size // config.num_attention_heads,
            "ffn": config.intermediate_size,
            "layers": config.num_hidden_layers,
            "vocab": config.vocab_size,
        },
        tensors=embedding(tokens, rows="vocab", writes="residual:embedded")
        | layer_norm(f"{base}embeddings.norm", "residual:embedded", "residual")
        | blocks
        | layer_norm(f"{base}final_norm", "residual", "residual:final")
        | (
            linear(
                "head.dense",
                reads="residual:final",
                writes="residual:transform",
                bias=config.classifier_bias,
            )
            | layer_norm("head.norm", "residual:transform", "residual:head")
            | linear("decoder", reads="residual:head", writes="vocab", bias=config.decoder_bias)
            if mlm
            else {}
        ),
        ties={"decoder.weight": f"{tokens}.weight"} if mlm and config.tie_word_embeddings else {},
        blocks=Blocks(at, identity=dict.fromkeys(outputs, 0.0), first_copied=1),
        attributes={
            f"{at}.{i}.{name}": size
            for i in layers
            for name, size in {
                "layer_idx": "block",
                "attn.layer_idx": "block",
                "attn.head_dim": "head_dim",
            }.items()
        },
        config={
            "hidden_size": "hidden",
            "num_attention_heads": "heads",
            "intermediate_size": "ffn",
            "num_hidden_layers": "layers",
            "vocab_size": "vocab",
        },
        config_lists=("layer_types",),
        config_eps="norm_eps",
        hidden_is_heads=True,
        activation_scales={QUERY: ROOT},
        rotary=1.0,
        rebuilt_from_config=(f"{base}rotary_emb",),
        fixed=rope_fixed(config),
        post_norm=True,
    )
