"""Gemma 2 of transformers: ``Gemma2ForCausalLM``, ``Gemma2Model``.

https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/gemma2/modeling_gemma2.py

A decoder with RMSNorms before and after attention and MLP, whose gains are ``1 + weight``. A new block is the identity because its
post-norm gains are 0 (weight -1); with zero projections instead, the norms would have a derivative of ``1 / sqrt(eps)``. The embedding
is multiplied by ``sqrt(hidden)``. Scores are divided by ``sqrt(query_pre_attn_scalar)`` for any head_dim; growth does not change this
field. Logits and scores are capped element by element. head_dim grows only if it is named.
"""

from typing import Protocol

from growkern.model.layers import embedding, linear, norm, rope_fixed
from growkern.model.size_values import Power
from growkern.model.spec import KEY, QUERY, VALUE, Blocks, ModelSpec, TensorSpec

POST_NORMS = "post_attention_layernorm.weight", "post_feedforward_layernorm.weight"
SCALE = Power("hidden", 0.5)  # scale of the embedding


class Config(Protocol):
    """The fields of ``Gemma2Config`` that ``describe`` reads."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_hidden_layers: int
    vocab_size: int
    attention_bias: bool
    tie_word_embeddings: bool


def describe(config: Config, base: str = "model.", head: bool = True) -> ModelSpec:
    """Describe a Gemma 2: ``base`` is the prefix of the backbone, ``head`` is True with a language-model head."""
    bias = config.attention_bias
    layers = range(config.num_hidden_layers)
    at, normed, branch = f"{base}layers", "residual:normed", "residual:branch"
    blocks = {
        name: axes
        for i in layers
        for kv, q in [((f"kv_heads.{i}",), (f"kv_heads.{i}", f"group.{i}"))]
        for name, axes in (
            _norm(f"{at}.{i}.input_layernorm", "residual", normed)
            | linear(f"{at}.{i}.self_attn.q_proj", reads=normed, writes=(*q, QUERY), bias=bias)
            | linear(f"{at}.{i}.self_attn.k_proj", reads=normed, writes=(*kv, KEY), bias=bias)
            | linear(f"{at}.{i}.self_attn.v_proj", reads=normed, writes=(*kv, VALUE), bias=bias)
            | linear(f"{at}.{i}.self_attn.o_proj", reads=(*q, VALUE), writes=branch, bias=bias)
            | _norm(f"{at}.{i}.post_attention_layernorm", branch, "residual")
            | _norm(f"{at}.{i}.pre_feedforward_layernorm", "residual", normed)
            | linear(f"{at}.{i}.mlp.gate_proj", reads=normed, writes=f"ffn.{i}", bias=False)
            | linear(f"{at}.{i}.mlp.up_proj", reads=normed, writes=f"ffn.{i}", bias=False)
            | linear(f"{at}.{i}.mlp.down_proj", reads=f"ffn.{i}", writes=branch, bias=False)
            | _norm(f"{at}.{i}.post_feedforward_layernorm", branch, "residual")
        ).items()
    }
    return ModelSpec(
        family="gemma2",
        sizes={
            "hidden": config.hidden_size,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "ffn": config.intermediate_size,
            "layers": config.num_hidden_layers,
            "vocab": config.vocab_size,
        },
        tensors=embedding(f"{base}embed_tokens", rows="vocab", writes="residual:embedded")
        | blocks
        | _norm(f"{base}norm", "residual", "residual:final")
        | (linear("lm_head", reads="residual:final", writes="vocab", bias=False) if head else {}),
        ties={"lm_head.weight": f"{base}embed_tokens.weight"}
        if head and config.tie_word_embeddings
        else {},
        blocks=Blocks(at, identity=dict.fromkeys(POST_NORMS, -1.0), outputs=POST_NORMS),
        attributes={
            f"{base}vocab_size": "vocab",
            **({"vocab_size": "vocab"} if head else {}),
            f"{base}embed_tokens.embed_scale": SCALE,
            f"{base}embed_tokens.scalar_embed_scale": SCALE,
            **{f"{at}.{i}.hidden_size": "hidden" for i in layers},
            **{f"{at}.{i}.mlp.hidden_size": "hidden" for i in layers},
            **{f"{at}.{i}.mlp.intermediate_size": "ffn" for i in layers},
            **{f"{at}.{i}.self_attn.num_key_value_groups": "group" for i in layers},
            **{f"{at}.{i}.self_attn.layer_idx": "block" for i in layers},
            **{f"{at}.{i}.self_attn.head_dim": "head_dim" for i in layers},
        },
        config={
            "hidden_size": "hidden",
            "num_attention_heads": "heads",
            "num_key_value_heads": "kv_heads",
            "head_dim": "head_dim",
            "intermediate_size": "ffn",
            "num_hidden_layers": "layers",
            "vocab_size": "vocab",
        },
        config_lists=("layer_types",),
        config_eps="rms_norm_eps",
        activation_scales={"residual:embedded": SCALE},
        rotary=1.0,
        save_requires_multiple=("hidden", "heads"),
        rebuilt_from_config=(f"{base}rotary_emb",),
        fixed=rope_fixed(config),
    )


def _norm(name: str, reads: str, writes: str) -> dict[str, TensorSpec]:
    return norm(name, reads=reads, writes=writes, kind="rms", offset=1.0)
