"""Llama-type decoders of transformers: Llama, Mistral, Qwen2, Qwen3, as ``...ForCausalLM`` and ``...Model``.

https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/llama/modeling_llama.py

Pre-norm RMSNorm, RoPE, grouped-query attention, SwiGLU. The axis of query heads is kv_heads x group, so that growth keeps groups
together. head_dim grows only if it is named; Qwen2's config derives head_dim from hidden, so growth writes head_dim into the config.
"""

from typing import Protocol

from growkern.model.layers import embedding, head_norms, linear, norm, rope_fixed
from growkern.model.size_values import ROOT
from growkern.model.spec import KEY, QUERY, RAW, VALUE, Blocks, ModelSpec


class Config(Protocol):
    """The config fields that ``describe`` reads, beside ``head_dim``, ``attention_bias`` and ``mlp_bias`` of some architectures."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    num_hidden_layers: int
    vocab_size: int
    tie_word_embeddings: bool


def describe(config: Config, base: str = "model.", head: bool = True) -> ModelSpec:
    """Describe a Llama-type decoder: ``base`` is the prefix of the backbone, ``head`` is True with a language-model head."""
    attention_bias = bool(getattr(config, "attention_bias", False))
    qkv_bias = attention_bias or config.model_type == "qwen2"
    mlp_bias, qk_norms = bool(getattr(config, "mlp_bias", False)), config.model_type == "qwen3"
    layers = range(max(1, config.num_hidden_layers))  # block 0 also if there is none
    at = f"{base}layers"
    blocks = {
        name: axes
        for i in layers
        for kv, q in [((f"kv_heads.{i}",), (f"kv_heads.{i}", f"group.{i}"))]
        for name, axes in (
            norm(
                f"{at}.{i}.input_layernorm",
                reads="residual",
                writes="residual:normed",
                kind="rms",
                eps="variance_epsilon",
            )
            | linear(
                f"{at}.{i}.self_attn.q_proj",
                reads="residual:normed",
                writes=(*q, RAW[QUERY] if qk_norms else QUERY),
                bias=qkv_bias,
            )
            | linear(
                f"{at}.{i}.self_attn.k_proj",
                reads="residual:normed",
                writes=(*kv, RAW[KEY] if qk_norms else KEY),
                bias=qkv_bias,
            )
            | linear(
                f"{at}.{i}.self_attn.v_proj",
                reads="residual:normed",
                writes=(*kv, VALUE),
                bias=qkv_bias,
            )
            | linear(
                f"{at}.{i}.self_attn.o_proj",
                reads=(*q, VALUE),
                writes="residual",
                bias=attention_bias,
            )
            | (head_norms(f"{at}.{i}.self_attn") if qk_norms else {})
            | norm(
                f"{at}.{i}.post_attention_layernorm",
                reads="residual",
                writes="residual:normed",
                kind="rms",
                eps="variance_epsilon",
            )
            | linear(
                f"{at}.{i}.mlp.gate_proj", reads="residual:normed", writes=f"ffn.{i}", bias=mlp_bias
            )
            | linear(
                f"{at}.{i}.mlp.up_proj", reads="residual:normed", writes=f"ffn.{i}", bias=mlp_bias
            )
            | linear(f"{at}.{i}.mlp.down_proj", reads=f"ffn.{i}", writes="residual", bias=mlp_bias)
        ).items()
    }
    outputs = ["self_attn.o_proj.weight", "mlp.down_proj.weight"]
    outputs += ["self_attn.o_proj.bias"] * attention_bias + ["mlp.down_proj.bias"] * mlp_bias
    return ModelSpec(
        family=config.model_type,
        sizes={
            "hidden": config.hidden_size,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": getattr(config, "head_dim", None)
            or config.hidden_size // config.num_attention_heads,
            "ffn": config.intermediate_size,
            "layers": config.num_hidden_layers,
            "vocab": config.vocab_size,
        },
        tensors=embedding(f"{base}embed_tokens", rows="vocab", writes="residual")
        | blocks
        | norm(
            f"{base}norm",
            reads="residual",
            writes="residual:final",
            kind="rms",
            eps="variance_epsilon",
        )
        | (linear("lm_head", reads="residual:final", writes="vocab", bias=False) if head else {}),
        ties={"lm_head.weight": f"{base}embed_tokens.weight"}
        if head and config.tie_word_embeddings
        else {},
        blocks=Blocks(at, identity=dict.fromkeys(outputs, 0.0)),
        attributes={
            **{f"{base}vocab_size": "vocab"},
            **({"vocab_size": "vocab"} if head else {}),
            **{f"{at}.{i}.hidden_size": "hidden" for i in layers},
            **{f"{at}.{i}.mlp.hidden_size": "hidden" for i in layers},
            **{f"{at}.{i}.mlp.intermediate_size": "ffn" for i in layers},
            **{f"{at}.{i}.self_attn.num_key_value_groups": "group" for i in layers},
            **{f"{at}.{i}.self_attn.layer_idx": "block" for i in layers},
            **{f"{at}.{i}.self_attn.head_dim": "head_dim" for i in layers},
            **{f"{at}.{i}.self_attn.scaling": ROOT for i in layers},
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
        activation_scales={QUERY: ROOT},
        rotary=1.0,
        save_requires_multiple=("hidden", "heads") if config.model_type == "llama" else None,
        rebuilt_from_config=(f"{base}rotary_emb",),
        fixed=rope_fixed(config),
    )
