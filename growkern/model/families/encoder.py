"""Encoders of torch: ``torch.nn.TransformerEncoder``, ``torch.nn.TransformerEncoderLayer``.

https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/transformer.py

LayerNorm at the start of each branch (``norm_first``) or after each sum, fused ``in_proj`` (q, k, v). There is no config: sizes are
read from the module, and hidden = heads x head_dim. The input of an encoder comes from outside, so an encoder by itself grows in ffn
and layers only. To grow it as part of a model, describe the encoder under its name (``base``) and merge its tensors, sizes, blocks
and attributes into the spec of the model.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from growkern.errors import UnsupportedModelError, raise_all
from growkern.model.layers import linear, norm, post_norm_eps_reason, reader, writer
from growkern.model.size_values import ROOT
from growkern.model.spec import KEY, QUERY, VALUE, Blocks, ModelSpec, TensorSpec

OUTSIDE = (
    "the encoder reads what another module writes (a ModelSpec of the whole model covers both)"
)
CONSTANTS = {"weight": 1.0, "bias": 0.0}  # parameters of a norm that only normalizes


class Leaf(Protocol):
    """The attributes of ``torch.nn.Linear`` (``out_features``) and ``torch.nn.LayerNorm`` (``eps``) that this module reads."""

    out_features: int
    eps: float
    bias: object


class Attention(Protocol):
    """The attributes of ``torch.nn.MultiheadAttention`` that this module reads."""

    embed_dim: int
    num_heads: int
    head_dim: int


class Layer(Protocol):
    """The attributes of ``torch.nn.TransformerEncoderLayer`` that this module reads."""

    self_attn: Attention
    linear1: Leaf
    norm1: Leaf
    norm_first: bool


class Encoder(Protocol):
    """The attributes of ``torch.nn.TransformerEncoder`` that this module reads."""

    layers: Sequence[Layer]
    norm: Leaf | None


def describe(encoder: Encoder, base: str = "") -> ModelSpec:
    """Describe an encoder at the prefix ``base`` (``"encoder."``); the last norm, if there is one, writes ``residual:final``."""
    raise_all(UnsupportedModelError, "cannot describe this encoder:", _problems(encoder))
    first, at, n = encoder.layers[0], f"{base}layers", len(encoder.layers)
    layer_spec = describe_layer(first, f"{at}.0.")
    names = ["weight", "bias"][: 1 + (first.linear1.bias is not None)]
    outputs = [f"{part}.{name}" for part in ("self_attn.out_proj", "linear2") for name in names]
    norms = [] if first.norm_first else names  # a torch layer has all biases or none
    return replace(
        layer_spec,
        sizes={**layer_spec.sizes, "layers": n},
        tensors={
            name: axes
            for i in range(n)
            for name, axes in _layer(f"{at}.{i}.", f".{i}", first).items()
        }
        | (_last(f"{base}norm", encoder.norm) if encoder.norm else {}),
        blocks=Blocks(
            at,
            identity=dict.fromkeys(outputs, 0.0) | {f"norm1.{k}": CONSTANTS[k] for k in norms},
            carries={f"norm2.{k}": CONSTANTS[k] for k in norms},
            reasons=() if first.norm_first else post_norm_eps_reason(first.norm1.eps),
        ),
        attributes={f"{base}num_layers": "layers"}
        | {
            name: size
            for i in range(n)
            for name, size in describe_layer(first, f"{at}.{i}.").attributes.items()
        },
    )


def _last(name: str, own: Leaf) -> dict[str, TensorSpec]:
    bias = own.bias is not None
    return norm(name, reads="residual", writes="residual:final", kind="layer", bias=bias)


def _problems(encoder: Encoder) -> list[str]:
    """Return the differences from an encoder of torch layers that are all alike."""
    parts = [("TransformerEncoderLayer", layer) for layer in encoder.layers]
    parts += [("LayerNorm", encoder.norm)] if encoder.norm is not None else []
    strange = {(kind, type(m).__name__) for kind, m in parts if type(m).__name__ != kind}
    alike = strange or len({(m.norm_first, m.self_attn.num_heads) for m in encoder.layers}) == 1
    return [
        f"the encoder has a {actual} in place of a {kind}; pass spec=ModelSpec(...) to describe it yourself."
        for kind, actual in sorted(strange)
    ] + (
        []
        if alike
        else [
            "the layers differ in norm_first or in heads; pass spec=ModelSpec(...) to describe them yourself."
        ]
    )


def describe_layer(layer: Layer, base: str = "") -> ModelSpec:
    """Describe one layer at the prefix ``base``."""
    attention = f"{base}self_attn"
    return ModelSpec(
        family="encoder",
        sizes={
            "hidden": layer.self_attn.embed_dim,
            "heads": layer.self_attn.num_heads,
            "head_dim": layer.self_attn.head_dim,
            "ffn": layer.linear1.out_features,
        },
        tensors=_layer(base, "", layer),
        attributes={
            f"{attention}.embed_dim": "hidden",
            f"{attention}.kdim": "hidden",
            f"{attention}.vdim": "hidden",
            f"{attention}.num_heads": "heads",
            f"{attention}.head_dim": "head_dim",
        },
        hidden_is_heads=True,
        activation_scales={QUERY: ROOT},
        post_norm=not layer.norm_first,
        fixed=dict.fromkeys(("hidden", "heads"), OUTSIDE),
    )


def _layer(base: str, index: str, layer: Layer) -> dict[str, TensorSpec]:
    """Return the tensors of one layer; ``index`` is the suffix of the names of the layer's spaces."""
    heads, attention = f"heads{index}", f"{base}self_attn"
    fused = writer([(heads, stream) for stream in (QUERY, KEY, VALUE)])
    bias, first = layer.linear1.bias is not None, layer.norm_first
    normed = "residual:normed" if first else "residual"
    summed = "residual" if first else "residual:sum"
    return (
        {f"{attention}.in_proj_weight": (fused, reader(normed))}
        | ({f"{attention}.in_proj_bias": (fused,)} if bias else {})
        | linear(f"{attention}.out_proj", reads=(heads, VALUE), writes=summed, bias=bias)
        | linear(f"{base}linear1", reads=normed, writes=f"ffn{index}", bias=bias)
        | linear(f"{base}linear2", reads=f"ffn{index}", writes=summed, bias=bias)
        | norm(f"{base}norm1", reads=summed, writes=normed, kind="layer", bias=bias)
        | norm(f"{base}norm2", reads=summed, writes=normed, kind="layer", bias=bias)
    )
