"""GPT-NeoX of transformers: ``GPTNeoXForCausalLM``, ``GPTNeoXModel`` (e.g. Pythia).

https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/gpt_neox/modeling_gpt_neox.py

Pre-norm LayerNorm, RoPE on a part of each head, attention and MLP in parallel (``use_parallel_residual``) or in sequence, with the
same axes. ``query_key_value`` holds q, k, v head by head. The config has no head_dim (hidden = heads x head_dim).
"""

from collections.abc import Mapping
from typing import Protocol

from growkern.model.layers import embedding, linear, norm, rope_fixed
from growkern.model.size_values import ROOT
from growkern.model.spec import KEY, QUERY, VALUE, Blocks, ModelSpec


class Config(Protocol):
    """The fields of ``GPTNeoXConfig`` that ``describe`` reads."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_hidden_layers: int
    vocab_size: int
    attention_bias: bool
    tie_word_embeddings: bool
    rope_parameters: Mapping[str, float]


def describe(config: Config, base: str = "gpt_neox.", head: bool = True) -> ModelSpec:
    """Describe a GPT-NeoX: ``base`` is the prefix of the backbone, ``head`` is True with a language-model head."""
    layers = range(max(1, config.num_hidden_layers))  # block 0 also if there is none
    at, bias = f"{base}layers", config.attention_bias
    rotary: float = config.rope_parameters.get("partial_rotary_factor", 1.0)
    blocks = {
        name: axes
        for i in layers
        for name, axes in (
            norm(
                f"{at}.{i}.input_layernorm",
                reads="residual",
                writes="residual:normed",
                kind="layer",
            )
            | linear(
                f"{at}.{i}.attention.query_key_value",
                reads="residual:normed",
                writes=(f"heads.{i}", (QUERY, KEY, VALUE)),
                bias=bias,
            )
            | linear(
                f"{at}.{i}.attention.dense",
                reads=(f"heads.{i}", VALUE),
                writes="residual",
                bias=bias,
            )
            | norm(
                f"{at}.{i}.post_attention_layernorm",
                reads="residual",
                writes="residual:normed",
                kind="layer",
            )
            | linear(f"{at}.{i}.mlp.dense_h_to_4h", reads="residual:normed", writes=f"ffn.{i}")
            | linear(f"{at}.{i}.mlp.dense_4h_to_h", reads=f"ffn.{i}", writes="residual")
        ).items()
    }
    outputs = ["attention.dense.weight", "mlp.dense_4h_to_h.weight", "mlp.dense_4h_to_h.bias"]
    outputs += ["attention.dense.bias"] * bias
    return ModelSpec(
        family="gpt_neox",
        sizes={
            "hidden": config.hidden_size,
            "heads": config.num_attention_heads,
            "head_dim": config.hidden_size // config.num_attention_heads,
            "ffn": config.intermediate_size,
            "layers": config.num_hidden_layers,
            "vocab": config.vocab_size,
        },
        tensors=embedding(f"{base}embed_in", rows="vocab", writes="residual")
        | blocks
        | norm(f"{base}final_layer_norm", reads="residual", writes="residual:final", kind="layer")
        | (linear("lm_head", reads="residual:final", writes="vocab", bias=False) if head else {}),
        ties={"lm_head.weight": f"{base}embed_in.weight"}
        if head and config.tie_word_embeddings
        else {},
        blocks=Blocks(at, identity=dict.fromkeys(outputs, 0.0)),
        attributes={
            **{f"{at}.{i}.attention.head_size": "head_dim" for i in layers},
            **{f"{at}.{i}.attention.layer_idx": "block" for i in layers},
            **{f"{at}.{i}.attention.scaling": ROOT for i in layers},
        },
        config={
            "hidden_size": "hidden",
            "num_attention_heads": "heads",
            "intermediate_size": "ffn",
            "num_hidden_layers": "layers",
            "vocab_size": "vocab",
        },
        config_eps="layer_norm_eps",
        hidden_is_heads=True,
        activation_scales={QUERY: ROOT},
        rotary=rotary,
        rebuilt_from_config=(f"{base}rotary_emb",),
        fixed=rope_fixed(config),
    )
