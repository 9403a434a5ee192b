"""GPT-2 of transformers: ``GPT2LMHeadModel``, ``GPT2Model``.

https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/gpt2/modeling_gpt2.py

Pre-norm LayerNorm, learned positions, ``Conv1D`` weights (in, out), fused ``c_attn`` (q, k, v), head tied to the embedding.
The config has no head_dim (hidden = heads x head_dim). Blocks cannot be added under ``scale_attn_by_inverse_layer_idx``, because
the function of a block depends on the depth of the block. Cross attention is not described.
"""

from typing import Protocol

from growkern.model.layers import embedding, linear, norm
from growkern.model.size_values import ROOT
from growkern.model.spec import KEY, QUERY, VALUE, Blocks, ModelSpec


class Config(Protocol):
    """The fields of ``GPT2Config`` that ``describe`` reads."""

    n_embd: int
    n_head: int
    n_inner: int | None
    n_layer: int
    n_positions: int
    vocab_size: int
    scale_attn_weights: bool
    scale_attn_by_inverse_layer_idx: bool
    tie_word_embeddings: bool


def describe(config: Config, base: str = "transformer.", head: bool = True) -> ModelSpec:
    """Describe a GPT-2: ``base`` is the prefix of the backbone, ``head`` is True with a language-model head."""
    layers = range(max(1, config.n_layer))  # block 0 also if there is none
    h, scaled, own = f"{base}h", config.scale_attn_weights, config.scale_attn_by_inverse_layer_idx
    blocks = {
        name: axes
        for i in layers
        for name, axes in (
            norm(f"{h}.{i}.ln_1", reads="residual", writes="residual:normed", kind="layer")
            | linear(
                f"{h}.{i}.attn.c_attn",
                reads="residual:normed",
                writes=[(f"heads.{i}", stream) for stream in (QUERY, KEY, VALUE)],
                transposed=True,
            )
            | linear(
                f"{h}.{i}.attn.c_proj",
                reads=(f"heads.{i}", VALUE),
                writes="residual",
                transposed=True,
            )
            | norm(f"{h}.{i}.ln_2", reads="residual", writes="residual:normed", kind="layer")
            | linear(
                f"{h}.{i}.mlp.c_fc", reads="residual:normed", writes=f"ffn.{i}", transposed=True
            )
            | linear(f"{h}.{i}.mlp.c_proj", reads=f"ffn.{i}", writes="residual", transposed=True)
        ).items()
    }
    return ModelSpec(
        family="gpt2",
        sizes={
            "hidden": config.n_embd,
            "heads": config.n_head,
            "head_dim": config.n_embd // config.n_head,
            "ffn": config.n_inner or 4 * config.n_embd,
            "layers": config.n_layer,
            "positions": config.n_positions,
            "vocab": config.vocab_size,
        },
        tensors=embedding(f"{base}wte", rows="vocab", writes="residual")
        | embedding(f"{base}wpe", rows="positions", writes="residual")
        | blocks
        | norm(f"{base}ln_f", reads="residual", writes="residual:final", kind="layer")
        | (linear("lm_head", reads="residual:final", writes="vocab", bias=False) if head else {}),
        ties={"lm_head.weight": f"{base}wte.weight"} if head and config.tie_word_embeddings else {},
        blocks=Blocks(
            h,
            identity=dict.fromkeys(
                ["attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"],
                0.0,
            ),
        ),
        attributes={
            f"{base}embed_dim": "hidden",
            **{
                f"{h}.{i}.attn.{name}": "hidden"
                for i in layers
                for name in ("embed_dim", "split_size")
            },
            **{f"{h}.{i}.attn.num_heads": "heads" for i in layers},
            **{f"{h}.{i}.attn.layer_idx": "block" for i in layers},
            **{f"{h}.{i}.attn.head_dim": "head_dim" for i in layers},
            **{f"{h}.{i}.attn.scaling": ROOT for i in layers if scaled and not own},
        },
        config={
            "n_embd": "hidden",
            "n_head": "heads",
            "n_inner": "ffn",
            "n_layer": "layers",
            "n_positions": "positions",
            "vocab_size": "vocab",
        },
        config_eps="layer_norm_epsilon",
        hidden_is_heads=True,
        activation_scales={QUERY: ROOT} if scaled else {},
        fixed=dict.fromkeys(
            ("layers", "head_dim"),
            "scale_attn_by_inverse_layer_idx makes a block depend on its depth",
        )
        if own
        else {},
    )
