"""Mixtures of experts of transformers: Mixtral, Qwen3-MoE, as ``...ForCausalLM`` and ``...Model``.

head_dim grows only if it is named; if the config derives head_dim, growth writes it into the config. top_k must grow by the same factor
as experts to preserve the function, because the copies of an expert share its router weight. The coefficient of the router's auxiliary
loss is divided by the factor of top_k, which multiplies the loss of a balanced router. Dense blocks between blocks with experts
(Qwen3-MoE's ``mlp_only_layers``, ``decoder_sparse_step``) keep their ffn, and a model with dense blocks cannot gain layers.
"""

from dataclasses import replace

from growkern.model.hints import Hint

_FIELDS = {
    "hidden_size": "hidden",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "num_local_experts": "experts",
    "num_experts_per_tok": "top_k",
    "num_hidden_layers": "layers",
    "vocab_size": "vocab",
}
MIXTRAL = Hint(
    fields={**_FIELDS, "intermediate_size": "ffn"},
    lists=("layer_types",),
    eps="rms_norm_eps",
    divided={"router_aux_loss_coef": "top_k"},
)
_DENSE = ("layers",), "which blocks are dense follows from their index"
QWEN3_MOE = replace(
    MIXTRAL,
    fields={**_FIELDS, "moe_intermediate_size": "ffn"},
    fixed_by={"mlp_only_layers": ([], *_DENSE), "decoder_sparse_step": (1, *_DENSE)},
)
