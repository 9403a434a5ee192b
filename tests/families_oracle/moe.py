"""Mixtures of experts of transformers: Mixtral, Qwen3-MoE, as ``...ForCausalLM`` and ``...Model``.

https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/mixtral/modeling_mixtral.py
https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/qwen3_moe/modeling_qwen3_moe.py

Llama-type decoders (pre-norm RMSNorm, RoPE, grouped-query attention) whose SwiGLU is a layer of experts in two 3-D tensors
behind a router. head_dim grows only if it is named; if the config derives head_dim, growth writes it into the config. top_k must
grow by the same factor as experts to preserve the function, because the copies of an expert share its router weight. The coefficient of
the router's auxiliary loss is divided by the factor of top_k, which multiplies the loss of a balanced router. Dense blocks between
blocks with experts (Qwen3-MoE's ``mlp_only_layers``, ``decoder_sparse_step``) keep their ffn, and a model with dense blocks cannot gain
layers.
"""

from typing import Protocol

from growkern.model.layers import embedding, head_norms, linear, norm, reader, rope_fixed, writer
from growkern.model.size_values import ROOT, Power
from growkern.model.spec import KEY, QUERY, RAW, SHARE, VALUE, Blocks, ModelSpec, TensorSpec


class Config(Protocol):
    """The config fields that ``describe`` reads, beside optional ones such as ``head_dim`` and Qwen3-MoE's ``decoder_sparse_step``."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    num_hidden_layers: int
    num_local_experts: int
    num_experts_per_tok: int
    router_aux_loss_coef: float
    vocab_size: int
    tie_word_embeddings: bool


def describe(
    config: Config,
    base: str = "model.",
    head: bool = True,
    ffn: str = "intermediate_size",
    qk_norms: bool = False,
) -> ModelSpec:
    """Describe a mixture of experts, with the ``base`` and ``head`` of Llama; ``ffn`` is the config field with the ffn of an expert."""
    bias = bool(getattr(config, "attention_bias", False))
    layers = range(config.num_hidden_layers)
    dense, coef, n = _dense(config), config.router_aux_loss_coef, config.num_experts_per_tok
    balance = Power("top_k", -1.0, coef, n)  # the loss of a balanced router is top_k
    at, normed = f"{base}layers", "residual:normed"
    blocks = {
        name: axes
        for i in layers
        for kv, q in [((f"kv_heads.{i}",), (f"kv_heads.{i}", f"group.{i}"))]
        for name, axes in (
            _norm(f"{at}.{i}.input_layernorm", "residual", normed)
            | linear(
                f"{at}.{i}.self_attn.q_proj",
                reads=normed,
                writes=(*q, RAW[QUERY] if qk_norms else QUERY),
                bias=bias,
            )
            | linear(
                f"{at}.{i}.self_attn.k_proj",
                reads=normed,
                writes=(*kv, RAW[KEY] if qk_norms else KEY),
                bias=bias,
            )
            | linear(f"{at}.{i}.self_attn.v_proj", reads=normed, writes=(*kv, VALUE), bias=bias)
            | linear(f"{at}.{i}.self_attn.o_proj", reads=(*q, VALUE), writes="residual", bias=bias)
            | (head_norms(f"{at}.{i}.self_attn") if qk_norms else {})
            | _norm(f"{at}.{i}.post_attention_layernorm", "residual", normed)
            | (
                _mlp(f"{at}.{i}.mlp", config.intermediate_size)
                if i in dense
                else _experts(f"{at}.{i}.mlp", f"ffn.{i}")
            )
        ).items()
    }
    outputs = ["self_attn.o_proj.weight", "mlp.experts.down_proj"]
    outputs += ["self_attn.o_proj.bias"] * bias
    return ModelSpec(
        family=config.model_type,
        sizes={
            "hidden": config.hidden_size,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": getattr(config, "head_dim", None)
            or config.hidden_size // config.num_attention_heads,
            "ffn": getattr(config, ffn),
            "experts": config.num_local_experts,
            "top_k": config.num_experts_per_tok,
            "layers": config.num_hidden_layers,
            "vocab": config.vocab_size,
        },
        tensors=embedding(f"{base}embed_tokens", rows="vocab", writes="residual")
        | blocks
        | _norm(f"{base}norm", "residual", "residual:final")
        | (linear("lm_head", reads="residual:final", writes="vocab", bias=False) if head else {}),
        ties={"lm_head.weight": f"{base}embed_tokens.weight"}
        if head and config.tie_word_embeddings
        else {},
        blocks=Blocks(at, identity={} if dense else dict.fromkeys(outputs, 0.0)),
        attributes={
            f"{base}vocab_size": "vocab",
            **(
                {
                    "vocab_size": "vocab",
                    "num_experts": "experts",
                    "num_experts_per_tok": "top_k",
                    "router_aux_loss_coef": balance,
                }
                if head
                else {}
            ),
            **{f"{at}.{i}.hidden_size": "hidden" for i in layers},
            **{f"{at}.{i}.mlp.hidden_size": "hidden" for i in dense},
            **{
                f"{at}.{i}.mlp.{name}": size
                for i in layers
                if i not in dense
                for name, size in {
                    "gate.hidden_dim": "hidden",
                    "gate.num_experts": "experts",
                    "gate.top_k": "top_k",
                    **({"top_k": "top_k"} if config.model_type == "mixtral" else {}),
                    "experts.hidden_dim": "hidden",
                    "experts.intermediate_dim": "ffn",
                    "experts.num_experts": "experts",
                }.items()
            },
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
            ffn: "ffn",
            "num_local_experts": "experts",
            "num_experts_per_tok": "top_k",
            "router_aux_loss_coef": balance,
            "num_hidden_layers": "layers",
            "vocab_size": "vocab",
        },
        config_lists=("layer_types",),
        config_eps="rms_norm_eps",
        activation_scales={QUERY: ROOT},
        rotary=1.0,
        rebuilt_from_config=(f"{base}rotary_emb",),
        fixed=rope_fixed(config)
        | ({"layers": "which blocks are dense follows from their index"} if dense else {}),
    )


def _dense(config: Config) -> list[int]:
    """Return the indices of blocks without experts."""
    step: int = getattr(config, "decoder_sparse_step", 1)
    only: list[int] = getattr(config, "mlp_only_layers", [])
    return [i for i in range(config.num_hidden_layers) if i in only or (i + 1) % step]


def _norm(name: str, reads: str, writes: str) -> dict[str, TensorSpec]:
    return norm(name, reads=reads, writes=writes, kind="rms", eps="variance_epsilon")


def _experts(at: str, ffn: str) -> dict[str, TensorSpec]:
    experts, normed = writer("experts"), reader("residual:normed")
    return {
        f"{at}.gate.weight": (experts, normed),
        f"{at}.experts.gate_up_proj": (experts, writer([(ffn,)] * 2), normed),
        f"{at}.experts.down_proj": (reader(SHARE), writer("residual"), reader(ffn)),
    }


def _mlp(at: str, n: int) -> dict[str, TensorSpec]:
    return (
        linear(f"{at}.gate_proj", reads="residual:normed", writes=(n,), bias=False)
        | linear(f"{at}.up_proj", reads="residual:normed", writes=(n,), bias=False)
        | linear(f"{at}.down_proj", reads=(n,), writes="residual", bias=False)
    )
