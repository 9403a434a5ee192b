"""ViT of transformers: ``ViTForImageClassification``, ``ViTModel``.

https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/vit/modeling_vit.py

Pre-norm LayerNorm, a convolution over patches, a class token, learned positions. Patches, channels and labels are fixed sizes,
because a model for other images has another function. The config has no head_dim (hidden = heads x head_dim). The mask token of
masked image modeling is not described.
"""

from collections.abc import Sequence
from typing import Protocol

from growkern.model.layers import linear, norm, reader, writer
from growkern.model.size_values import ROOT
from growkern.model.spec import KEY, QUERY, VALUE, Blocks, ModelSpec


class Config(Protocol):
    """The fields of ``ViTConfig`` that ``describe`` reads."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_hidden_layers: int
    num_channels: int
    num_labels: int
    pooler_output_size: int
    image_size: int | Sequence[int]
    patch_size: int | Sequence[int]
    qkv_bias: bool


def describe(config: Config, base: str = "vit.", head: bool = True) -> ModelSpec:
    """Describe a ViT: ``base`` is the prefix of the backbone; ``head`` is True with a classifier, False with a pooler."""
    layers = range(max(1, config.num_hidden_layers))  # block 0 also if there is none
    at, bias = f"{base}layers", config.qkv_bias
    (image_h, image_w), (patch_h, patch_w) = _pair(config.image_size), _pair(config.patch_size)
    n_positions = (image_h // patch_h) * (image_w // patch_w) + 1  # plus the class token
    pooled = config.pooler_output_size == config.hidden_size
    blocks = {
        name: axes
        for i in layers
        for heads in [f"heads.{i}"]
        for name, axes in (
            norm(
                f"{at}.{i}.layernorm_before",
                reads="residual",
                writes="residual:normed",
                kind="layer",
            )
            | linear(
                f"{at}.{i}.attention.q_proj",
                reads="residual:normed",
                writes=(heads, QUERY),
                bias=bias,
            )
            | linear(
                f"{at}.{i}.attention.k_proj",
                reads="residual:normed",
                writes=(heads, KEY),
                bias=bias,
            )
            | linear(
                f"{at}.{i}.attention.v_proj",
                reads="residual:normed",
                writes=(heads, VALUE),
                bias=bias,
            )
            | linear(f"{at}.{i}.attention.o_proj", reads=(heads, VALUE), writes="residual")
            | norm(
                f"{at}.{i}.layernorm_after",
                reads="residual",
                writes="residual:normed",
                kind="layer",
            )
            | linear(f"{at}.{i}.mlp.fc1", reads="residual:normed", writes=f"ffn.{i}")
            | linear(f"{at}.{i}.mlp.fc2", reads=f"ffn.{i}", writes="residual")
        ).items()
    }
    outputs = [
        f"{part}.{name}" for part in ("attention.o_proj", "mlp.fc2") for name in ("weight", "bias")
    ]
    unit_axis, patches = writer((1,)), f"{base}embeddings.patch_embeddings.projection"
    return ModelSpec(
        family="vit",
        sizes={
            "hidden": config.hidden_size,
            "heads": config.num_attention_heads,
            "head_dim": config.hidden_size // config.num_attention_heads,
            "ffn": config.intermediate_size,
            "layers": config.num_hidden_layers,
        },
        tensors={
            f"{base}embeddings.cls_token": (unit_axis, unit_axis, writer("residual")),
            f"{base}embeddings.position_embeddings": (
                unit_axis,
                writer((n_positions,)),
                writer("residual"),
            ),
            f"{patches}.weight": (
                writer("residual"),
                *(reader((n,)) for n in (config.num_channels, patch_h, patch_w)),
            ),
            f"{patches}.bias": (writer("residual"),),
        }
        | blocks
        | norm(f"{base}layernorm", reads="residual", writes="residual:final", kind="layer")
        | (
            linear("classifier", reads="residual:final", writes=(config.num_labels,))
            if head
            else linear(
                "pooler.dense",
                reads="residual:final",
                writes="residual:pooled" if pooled else (config.pooler_output_size,),
            )
        ),
        blocks=Blocks(at, identity=dict.fromkeys(outputs, 0.0)),
        attributes={
            f"{at}.{i}.attention.{name}": size
            for i in layers
            for name, size in {
                "num_attention_heads": "heads",
                "head_dim": "head_dim",
                "scaling": ROOT,
            }.items()
        },
        config={
            "hidden_size": "hidden",
            "num_attention_heads": "heads",
            "intermediate_size": "ffn",
            "num_hidden_layers": "layers",
            **({"pooler_output_size": "hidden"} if pooled else {}),
        },
        config_eps="layer_norm_eps",
        hidden_is_heads=True,
        activation_scales={QUERY: ROOT},
    )


def _pair(size: int | Sequence[int]) -> Sequence[int]:
    return (size, size) if isinstance(size, int) else size
