"""BERT of transformers: ``BertForMaskedLM``, ``BertForPreTraining``, ``BertModel``.

https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/bert/modeling_bert.py

Post-norm LayerNorm: every sum is normalized before a layer reads it, so hidden grows exactly by whole multiples only, and a
new block takes over the last LayerNorm of the block before it. The config has no head_dim (hidden = heads x head_dim). The head
is tied to the embedding and follows a transform with a LayerNorm, whose gain takes the scale factor of the tie.
"""

from typing import Protocol

from growkern.model.layers import embedding, linear, norm, post_norm_eps_reason, writer
from growkern.model.size_values import ROOT
from growkern.model.spec import KEY, QUERY, VALUE, Blocks, ModelSpec, TensorSpec

BERT_HEAD = (
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    "cls.predictions",
)
ROBERTA_HEAD = "lm_head.dense", "lm_head.layer_norm", "lm_head"
Head = tuple[str, str, str]  # names of the transform, its norm, the module of decoder and bias


class Config(Protocol):
    """The fields of ``BertConfig`` and ``RobertaConfig`` that ``describe`` reads."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_hidden_layers: int
    max_position_embeddings: int
    type_vocab_size: int
    vocab_size: int
    layer_norm_eps: float
    tie_word_embeddings: bool


def describe(
    config: Config, base: str = "bert.", mlm: Head | None = BERT_HEAD, pooler: bool = False
) -> ModelSpec:
    """Describe a BERT: ``base`` is the prefix of the backbone, ``mlm`` names the masked-LM head, ``pooler`` is True with a pooler."""
    layers = range(max(1, config.num_hidden_layers))  # block 0 also if there is none
    at = f"{base}encoder.layer"
    blocks = {
        name: axes
        for i in layers
        for heads in [f"heads.{i}"]
        for name, axes in (
            linear(f"{at}.{i}.attention.self.query", reads="residual", writes=(heads, QUERY))
            | linear(f"{at}.{i}.attention.self.key", reads="residual", writes=(heads, KEY))
            | linear(f"{at}.{i}.attention.self.value", reads="residual", writes=(heads, VALUE))
            | linear(
                f"{at}.{i}.attention.output.dense", reads=(heads, VALUE), writes="residual:sum"
            )
            | norm(
                f"{at}.{i}.attention.output.LayerNorm",
                reads="residual:sum",
                writes="residual",
                kind="layer",
            )
            | linear(f"{at}.{i}.intermediate.dense", reads="residual", writes=f"ffn.{i}")
            | linear(f"{at}.{i}.output.dense", reads=f"ffn.{i}", writes="residual:sum")
            | norm(
                f"{at}.{i}.output.LayerNorm", reads="residual:sum", writes="residual", kind="layer"
            )
        ).items()
    }
    outputs = [
        f"{part}.dense.{name}"
        for part in ("attention.output", "output")
        for name in ("weight", "bias")
    ]
    ties = (
        {
            f"{mlm[2]}.decoder.bias": f"{mlm[2]}.bias",
            f"{mlm[2]}.decoder.weight": f"{base}embeddings.word_embeddings.weight",
        }
        if mlm and config.tie_word_embeddings
        else {}
    )
    return ModelSpec(
        family=config.model_type,
        sizes={
            "hidden": config.hidden_size,
            "heads": config.num_attention_heads,
            "head_dim": config.hidden_size // config.num_attention_heads,
            "ffn": config.intermediate_size,
            "layers": config.num_hidden_layers,
            "positions": config.max_position_embeddings,
            "vocab": config.vocab_size,
            "token_types": config.type_vocab_size,
        },
        tensors=embedding(f"{base}embeddings.word_embeddings", rows="vocab", writes="residual:sum")
        | embedding(
            f"{base}embeddings.position_embeddings", rows="positions", writes="residual:sum"
        )
        | embedding(
            f"{base}embeddings.token_type_embeddings", rows="token_types", writes="residual:sum"
        )
        | {
            f"{base}embeddings.{name}": (writer((1,)), writer("positions"))
            for name in ("position_ids", "token_type_ids")
        }
        | norm(f"{base}embeddings.LayerNorm", reads="residual:sum", writes="residual", kind="layer")
        | blocks
        | (
            linear(f"{base}pooler.dense", reads="residual", writes="residual:pooled")
            if pooler
            else {}
        )
        | (
            linear("cls.seq_relationship", reads="residual:pooled", writes=(2,))
            if pooler and mlm
            else {}
        )
        | (_mlm_head(*mlm) if mlm else {}),
        ties=ties,
        blocks=Blocks(
            at,
            identity=dict.fromkeys(outputs, 0.0)
            | {"attention.output.LayerNorm.weight": 1.0, "attention.output.LayerNorm.bias": 0.0},
            carries={"output.LayerNorm.weight": 1.0, "output.LayerNorm.bias": 0.0},
            reasons=post_norm_eps_reason(config.layer_norm_eps),
        ),
        attributes={
            **{f"{at}.{i}.attention.self.num_attention_heads": "heads" for i in layers},
            **{f"{at}.{i}.attention.self.all_head_size": ("heads", "head_dim") for i in layers},
            **{f"{at}.{i}.attention.self.layer_idx": "block" for i in layers},
            **{f"{at}.{i}.attention.self.attention_head_size": "head_dim" for i in layers},
            **{f"{at}.{i}.attention.self.scaling": ROOT for i in layers},
        },
        counters=(f"{base}embeddings.position_ids",),
        config={
            "hidden_size": "hidden",
            "num_attention_heads": "heads",
            "intermediate_size": "ffn",
            "num_hidden_layers": "layers",
            "max_position_embeddings": "positions",
            "vocab_size": "vocab",
        },
        config_eps="layer_norm_eps",
        hidden_is_heads=True,
        activation_scales={QUERY: ROOT},
        post_norm=True,
    )


def _mlm_head(transform: str, layer_norm: str, at: str) -> dict[str, TensorSpec]:
    return (
        linear(transform, reads="residual", writes="residual:transform")
        | norm(layer_norm, reads="residual:transform", writes="residual:final", kind="layer")
        | linear(f"{at}.decoder", reads="residual:final", writes="vocab")
        | {f"{at}.bias": (writer("vocab"),)}
    )
