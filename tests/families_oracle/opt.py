"""OPT of transformers: ``OPTForCausalLM``, ``OPTModel``.

https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/opt/modeling_opt.py

Pre-norm LayerNorm, learned positions (two more rows precede position 0), head tied to the embedding. The config has no head_dim
(hidden = heads x head_dim). An embedding of another width than hidden (``word_embed_proj_dim``) keeps its width. ``describe`` refuses
OPT-350m's post-norm blocks (``do_layer_norm_before=False``), norms without gains, and a decoder without its last norm.
"""

from typing import Protocol

from growkern.errors import UnsupportedModelError, raise_all
from growkern.model.layers import embedding, linear, norm
from growkern.model.size_values import ROOT
from growkern.model.spec import KEY, QUERY, VALUE, Blocks, ModelSpec

OFFSET = 2  # rows of the position table before position 0


class Config(Protocol):
    """The fields of ``OPTConfig`` that ``describe`` reads."""

    hidden_size: int
    ffn_dim: int
    num_attention_heads: int
    num_hidden_layers: int
    max_position_embeddings: int
    vocab_size: int
    word_embed_proj_dim: int
    do_layer_norm_before: bool
    enable_bias: bool
    layer_norm_elementwise_affine: bool
    _remove_final_layer_norm: bool
    tie_word_embeddings: bool


def describe(config: Config, base: str = "model.decoder.", head: bool = True) -> ModelSpec:
    """Describe an OPT: ``base`` is the prefix of the decoder, ``head`` is True with a language-model head."""
    wanted = {
        "do_layer_norm_before": True,
        "layer_norm_elementwise_affine": True,
        "_remove_final_layer_norm": False,
    }
    raise_all(
        UnsupportedModelError,
        "cannot describe this OPT:",
        [
            f"{name}={getattr(config, name)} is not described; growkern describes {name}={value} only. "
            "Pass spec=ModelSpec(...) to describe it yourself."
            for name, value in wanted.items()
            if getattr(config, name) != value
        ],
    )
    layers = range(max(1, config.num_hidden_layers))  # block 0 also if there is none
    at, bias = f"{base}layers", config.enable_bias
    projected = config.word_embed_proj_dim != config.hidden_size
    token, output = (
        ("embedding", "embedding:final") if projected else ("residual", "residual:final")
    )
    blocks = {
        name: axes
        for i in layers
        for heads in [f"heads.{i}"]
        for name, axes in (
            norm(
                f"{at}.{i}.self_attn_layer_norm",
                reads="residual",
                writes="residual:normed",
                kind="layer",
            )
            | linear(
                f"{at}.{i}.self_attn.q_proj",
                reads="residual:normed",
                writes=(heads, QUERY),
                bias=bias,
            )
            | linear(
                f"{at}.{i}.self_attn.k_proj",
                reads="residual:normed",
                writes=(heads, KEY),
                bias=bias,
            )
            | linear(
                f"{at}.{i}.self_attn.v_proj",
                reads="residual:normed",
                writes=(heads, VALUE),
                bias=bias,
            )
            | linear(
                f"{at}.{i}.self_attn.out_proj", reads=(heads, VALUE), writes="residual", bias=bias
            )
            | norm(
                f"{at}.{i}.final_layer_norm",
                reads="residual",
                writes="residual:normed",
                kind="layer",
            )
            | linear(f"{at}.{i}.fc1", reads="residual:normed", writes=f"ffn.{i}", bias=bias)
            | linear(f"{at}.{i}.fc2", reads=f"ffn.{i}", writes="residual", bias=bias)
        ).items()
    }
    outputs = [
        f"{part}.{name}"
        for part in ("self_attn.out_proj", "fc2")
        for name in ("weight", "bias")[: 1 + bias]
    ]
    return ModelSpec(
        family="opt",
        sizes={
            "hidden": config.hidden_size,
            "heads": config.num_attention_heads,
            "head_dim": config.hidden_size // config.num_attention_heads,
            "ffn": config.ffn_dim,
            "layers": config.num_hidden_layers,
            "positions": config.max_position_embeddings,
            "vocab": config.vocab_size,
            **({"embedding": config.word_embed_proj_dim} if projected else {}),
        },
        tensors=embedding(f"{base}embed_tokens", rows="vocab", writes=token)
        | embedding(f"{base}embed_positions", rows=[(OFFSET,), ("positions",)], writes="residual")
        | (
            linear(f"{base}project_in", reads=token, writes="residual", bias=False)
            | linear(f"{base}project_out", reads="residual:final", writes=output, bias=False)
            if projected
            else {}
        )
        | blocks
        | norm(f"{base}final_layer_norm", reads="residual", writes="residual:final", kind="layer")
        | (linear("lm_head", reads=output, writes="vocab", bias=False) if head else {}),
        ties={"lm_head.weight": f"{base}embed_tokens.weight"}
        if head and config.tie_word_embeddings
        else {},
        blocks=Blocks(at, identity=dict.fromkeys(outputs, 0.0)),
        attributes={
            f"{base}max_target_positions": "positions",
            f"{base}vocab_size": "vocab",
            **{f"{at}.{i}.embed_dim": "hidden" for i in layers},
            **{f"{at}.{i}.self_attn.embed_dim": "hidden" for i in layers},
            **{f"{at}.{i}.self_attn.num_heads": "heads" for i in layers},
            **{f"{at}.{i}.self_attn.layer_idx": "block" for i in layers},
            **{f"{at}.{i}.self_attn.head_dim": "head_dim" for i in layers},
            **{f"{at}.{i}.self_attn.scaling": ROOT for i in layers},
        },
        config={
            "hidden_size": "hidden",
            "ffn_dim": "ffn",
            "num_attention_heads": "heads",
            "num_hidden_layers": "layers",
            "max_position_embeddings": "positions",
            "vocab_size": "vocab",
            "word_embed_proj_dim": token.replace("residual", "hidden"),
        },
        fixed={"embedding": "the checkpoint's projections are for this width"} if projected else {},
        hidden_is_heads=True,
        activation_scales={QUERY: ROOT},
    )
