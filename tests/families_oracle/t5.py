"""T5 of transformers: ``T5ForConditionalGeneration``, ``T5Model``, ``T5EncoderModel``.

https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/t5/modeling_t5.py

Pre-norm RMSNorm, unscaled attention scores, gated or plain FFNs. Encoder and decoder share the embedding and hence the residual
space. The first block of each stack holds the table of relative positions, one column per head. All blocks of the stack add the
table to their scores, so the self-attentions of a stack share one space of heads. With a tied head (``scale_decoder_outputs``), the
output of the decoder's last norm is divided by ``sqrt(hidden)``. head_dim (``d_kv``) grows only if it is named. ``layers`` and
``decoder_layers`` are independent sizes. If the decoder is deeper than the encoder, ``generate()`` of transformers 5.23 needs a
cache made from ``model.decoder.config``, because its default cache has ``num_layers`` layers.
"""

from typing import Protocol

from growkern.model.layers import embedding, linear, norm
from growkern.model.size_values import Power, Size
from growkern.model.spec import KEY, QUERY, VALUE, Blocks, ModelSpec, TensorSpec


class Config(Protocol):
    """The fields of ``T5Config`` that ``describe`` reads."""

    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    relative_attention_num_buckets: int
    vocab_size: int
    is_gated_act: bool
    scale_decoder_outputs: bool


def describe(config: Config, decoder: bool = True, head: bool = True) -> ModelSpec:
    """Describe a T5: ``decoder`` is True with a decoder, ``head`` is True with a language-model head."""
    depths = {"encoder": config.num_layers}
    depths |= {"decoder": config.num_decoder_layers} if decoder else {}
    tables = ["shared", *(f"{stack}.embed_tokens" for stack in depths)]
    tied = [*tables[1:], "lm_head"] if head else tables[1:]
    scaled = head and config.scale_decoder_outputs
    stacks = [_blocks(stack) for stack in depths]
    return ModelSpec(
        family="t5",
        sizes={
            "hidden": config.d_model,
            "heads": config.num_heads,
            "head_dim": config.d_kv,
            "ffn": config.d_ff,
            "layers": config.num_layers,
            **({"decoder_layers": config.num_decoder_layers} if decoder else {}),
            "vocab": config.vocab_size,
        },
        tensors={
            name: axes
            for table in tables
            for name, axes in embedding(table, rows="vocab", writes="residual").items()
        }
        | {
            name: axes
            for stack, n in depths.items()
            for i in range(n)
            for name, axes in _block(config, stack, i).items()
        }
        | {
            name: axes
            for stack in depths
            for name, axes in _norm(f"{stack}.final_layer_norm", f"residual:{stack}").items()
        }
        | (linear("lm_head", reads="residual:decoder", writes="vocab", bias=False) if head else {}),
        ties={f"{name}.weight": "shared.weight" for name in tied},
        blocks=stacks[0],
        extra_stacks=tuple(stacks[1:]),
        attributes={
            **({"model_dim": "hidden"} if head else {}),
            **{
                f"{stack}.block.{i}.layer.{k}.{kind}.{name}": size
                for stack, n in depths.items()
                for i in range(n)
                for k, kind in enumerate(_attentions(stack))
                for name, size in ATTENTION.items()
            },
        },
        config={
            "d_model": "hidden",
            "d_kv": "head_dim",
            "d_ff": "ffn",
            "num_heads": "heads",
            "num_layers": "layers",
            **({"num_decoder_layers": "decoder_layers"} if decoder else {}),
            **({"decoder.num_layers": "decoder_layers"} if decoder else {}),
            "vocab_size": "vocab",
        },
        config_eps="layer_norm_epsilon",
        activation_scales={"residual:decoder": Power("hidden", -0.5)} if scaled else {},
    )


ATTENTION: dict[str, Size] = {
    "d_model": "hidden",
    "key_value_proj_dim": "head_dim",
    "n_heads": "heads",
    "inner_dim": ("heads", "head_dim"),
    "layer_idx": "block",
}


def _attentions(stack: str) -> tuple[str, ...]:
    """Return the names of the attentions of a block, in order; the FFN comes last."""
    return ("SelfAttention",) if stack == "encoder" else ("SelfAttention", "EncDecAttention")


def _blocks(stack: str) -> Blocks:
    kinds = _attentions(stack)
    outputs = [f"layer.{k}.{kind}.o.weight" for k, kind in enumerate(kinds)]
    outputs.append(f"layer.{len(kinds)}.DenseReluDense.wo.weight")
    size = "layers" if stack == "encoder" else "decoder_layers"
    identity = dict.fromkeys(outputs, 0.0)
    return Blocks(f"{stack}.block", identity=identity, first_copied=1, size=size)


def _block(config: Config, stack: str, i: int) -> dict[str, TensorSpec]:
    at, kinds = f"{stack}.block.{i}.layer", _attentions(stack)
    table = f"{at}.0.SelfAttention.relative_attention_bias"
    tensors = {
        name: axes
        for k, kind in enumerate(kinds)
        for name, axes in (
            _norm(f"{at}.{k}.layer_norm", "residual:normed")
            | _attention(f"{at}.{k}.{kind}", stack, i)
        ).items()
    }
    if i == 0:
        buckets = (config.relative_attention_num_buckets,)
        tensors |= embedding(table, rows=buckets, writes=f"heads.{stack}")
    ffn, mlp = f"ffn.{stack}.{i}", f"{at}.{len(kinds)}.DenseReluDense"
    tensors |= _norm(f"{at}.{len(kinds)}.layer_norm", "residual:normed")
    for name in ("wi_0", "wi_1") if config.is_gated_act else ("wi",):
        tensors |= linear(f"{mlp}.{name}", reads="residual:normed", writes=ffn, bias=False)
    return tensors | linear(f"{mlp}.wo", reads=ffn, writes="residual", bias=False)


def _attention(at: str, stack: str, i: int) -> dict[str, TensorSpec]:
    across = at.endswith("EncDecAttention")
    read = "residual:encoder" if across else "residual:normed"
    heads = f"heads.across.{i}" if across else f"heads.{stack}"
    return (
        linear(f"{at}.q", reads="residual:normed", writes=(heads, QUERY), bias=False)
        | linear(f"{at}.k", reads=read, writes=(heads, KEY), bias=False)
        | linear(f"{at}.v", reads=read, writes=(heads, VALUE), bias=False)
        | linear(f"{at}.o", reads=(heads, VALUE), writes="residual", bias=False)
    )


def _norm(name: str, writes: str) -> dict[str, TensorSpec]:
    return norm(name, reads="residual", writes=writes, kind="rms", eps="variance_epsilon")
