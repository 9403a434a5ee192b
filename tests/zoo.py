"""Tiny models of transformers that no family describes, and the table of how they are described by tracing and grow.

``python tests/zoo.py [names]`` prints the table: the sizes that grow, and the largest change of the output, relative to its largest value,
after a growth of all of them to 2x and to 1.5x, after a block more in every stack, and of a model built from the grown config. An outcome
in words is a refusal.
"""

import sys
import warnings
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import growkern
from growkern.errors import GrowthError
from growkern.model.tracing.forward import call_model, evaluated, main_output

VOCAB, LENGTH = 97, 12
TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
WIDTHS = dict(hidden_size=48, num_attention_heads=4, num_hidden_layers=2)
BASE = WIDTHS | TOKENS | dict(vocab_size=VOCAB, max_position_embeddings=64)
DECODER = BASE | dict(num_key_value_heads=2, intermediate_size=80)
APART = DECODER | dict(head_dim=12)  # hidden is not heads x head_dim after a growth of one of them
ENCODER = BASE | dict(
    intermediate_size=80, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
)
VISION = WIDTHS | dict(intermediate_size=80, image_size=32, patch_size=16)
GPT = TOKENS | dict(n_embd=48, n_head=4, n_layer=2, vocab_size=VOCAB, n_positions=64)
BOTH = TOKENS | dict(
    d_model=48, encoder_attention_heads=4, decoder_attention_heads=4, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=80,
    decoder_ffn_dim=88, vocab_size=VOCAB, max_position_embeddings=64, decoder_start_token_id=2, dropout=0.0,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2)
SLIDING = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])

ZOO: dict[
    str, tuple[str, str, dict[str, Any]]
] = {  # name -> class, config class, fields of the config
    "phi3": ("Phi3ForCausalLM", "Phi3", DECODER),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3Text", APART | SLIDING),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2", DECODER),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3",
        DECODER
        | dict(
            num_key_value_heads=4,
            q_lora_rank=20,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=10,
            v_head_dim=14,
        )
        | dict(
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            moe_intermediate_size=28,
            first_k_dense_replace=1,
        ),
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOss",
        APART | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    ),
    "falcon": (
        "FalconForCausalLM",
        "Falcon",
        BASE | dict(num_kv_heads=2, new_decoder_architecture=True, alibi=False, bias=False),
    ),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3", DECODER | dict(no_rope_layers=[1, 0])),
    "granite_moe": (
        "GraniteMoeForCausalLM",
        "GraniteMoe",
        DECODER | dict(num_local_experts=4, num_experts_per_tok=2, residual_multiplier=0.5),
    ),
    "nemotron": ("NemotronForCausalLM", "Nemotron", DECODER | dict(partial_rotary_factor=0.5)),
    "bloom": (
        "BloomForCausalLM",
        "Bloom",
        TOKENS | dict(hidden_size=48, n_head=4, n_layer=2, vocab_size=VOCAB),
    ),
    "gptj": ("GPTJForCausalLM", "GPTJ", GPT | dict(rotary_dim=4)),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", "GPTBigCode", GPT | dict(multi_query=True)),
    "stablelm": (
        "StableLmForCausalLM",
        "StableLm",
        DECODER | dict(qk_layernorm=True, partial_rotary_factor=0.5),
    ),
    "cohere": ("CohereForCausalLM", "Cohere", DECODER | dict(use_qk_norm=True)),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2", DECODER),
    "glm4": ("Glm4ForCausalLM", "Glm4", APART | dict(partial_rotary_factor=0.5)),
    "phi": ("PhiForCausalLM", "Phi", DECODER | dict(partial_rotary_factor=0.5)),
    "olmoe": ("OlmoeForCausalLM", "Olmoe", DECODER | EXPERTS),
    "mamba": (
        "MambaForCausalLM",
        "Mamba",
        TOKENS
        | dict(
            hidden_size=48, state_size=10, num_hidden_layers=2, vocab_size=VOCAB, time_step_rank=6
        ),
    ),
    "recurrent_gemma": (
        "RecurrentGemmaForCausalLM",
        "RecurrentGemma",
        DECODER
        | dict(lru_width=56, num_hidden_layers=3, attention_window_size=8, num_key_value_heads=1),
    ),
    "deberta_v2": (
        "DebertaV2ForMaskedLM",
        "DebertaV2",
        ENCODER
        | dict(
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            share_att_key=True,
        ),
    ),
    "albert": ("AlbertForMaskedLM", "Albert", ENCODER | dict(embedding_size=20)),
    "electra": ("ElectraForMaskedLM", "Electra", ENCODER | dict(embedding_size=20)),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBert",
        dict(dim=48, n_heads=4, n_layers=2, hidden_dim=80, vocab_size=VOCAB, dropout=0.0),
    ),
    "bart": ("BartForConditionalGeneration", "Bart", BOTH),
    "marian": ("MarianMTModel", "Marian", BOTH),
    "whisper": (
        "WhisperForConditionalGeneration",
        "Whisper",
        BOTH | dict(num_mel_bins=8, max_source_positions=12, max_target_positions=64),
    ),
    "mt5": (
        "MT5ForConditionalGeneration",
        "MT5",
        dict(
            d_model=48,
            d_kv=10,
            d_ff=80,
            num_heads=4,
            num_layers=2,
            vocab_size=VOCAB,
            dropout_rate=0.0,
        ),
    ),
    "beit": (
        "BeitForImageClassification",
        "Beit",
        VISION | dict(num_labels=11, use_relative_position_bias=True),
    ),
    "swin": (
        "SwinForImageClassification",
        "Swin",
        dict(
            image_size=32,
            patch_size=4,
            embed_dim=24,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
        ),
    ),
    "siglip_vision": ("SiglipVisionModel", "SiglipVision", VISION),
}


def make(name: str) -> nn.Module:
    """Make a tiny model whose weights, biases and gains are away from their initial values."""
    kind, config, fields = ZOO[name]
    torch.manual_seed(0)
    own = getattr(transformers, f"{config}Config")(**fields)
    own._attn_implementation = own._experts_implementation = "eager"
    model = getattr(transformers, kind)(own).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn_like(p))
    return model


def output(model: nn.Module, inputs: Any) -> Tensor:
    with evaluated(model):
        out = main_output(call_model(model, inputs))
    assert out is not None
    return out


def difference(after: Tensor, before: Tensor) -> float:
    """Return the largest difference, relative to the largest value; of hidden states that grew, the first coordinates are the source's."""
    for axis, n in enumerate(before.shape):
        after = after.narrow(axis, 0, n)
    return float((after - before).abs().max() / before.abs().max())


def grown(name: str, to: dict[str, int]) -> tuple[float, nn.Module, Tensor, Any]:
    """Grow a model as described by tracing; return the change of its output, the model, its output before and its inputs."""
    model = make(name)
    spec = growkern.describe(model)
    before = output(model, spec.example)
    growkern.expand_inplace(model, to=to)
    return difference(output(model, spec.example), before), model, before, spec.example


def targets(spec: growkern.ModelSpec, factor: float) -> dict[str, int]:
    """Return the targets of all sizes that grow; those that grow by whole multiples only are left out at another factor."""
    whole = factor == int(factor)
    free = [s for s in spec.sizes if s not in spec.fixed and not s.startswith("layers")]
    to = {s: int(spec.sizes[s] * factor) for s in free if whole or s not in spec.whole_multiples}
    if "kv_heads" in to and "heads" in to:
        to["heads"] = to["kv_heads"] * (spec.sizes["heads"] // spec.sizes["kv_heads"])
    if spec.hidden_is_heads and "hidden" not in to:
        to.pop("heads", None)
    elif spec.hidden_is_heads:
        to["hidden"] = to.get("heads", spec.sizes["heads"]) * spec.sizes["head_dim"]
    return to


def row(name: str) -> list[str]:
    """Return a row of the table."""
    try:
        spec = growkern.describe(make(name))
    except GrowthError as error:
        return [name, f"refused: {error}".partition("\n")[0]]
    deeper = {stack.size: spec.sizes[stack.size] + 1 for stack in spec.stacks}
    cells = [name, ", ".join(targets(spec, 2.0))]
    for to in (targets(spec, 2.0), targets(spec, 1.5), deeper):
        try:
            cells.append(f"{grown(name, to)[0]:.0e}" if to else "none")
        except GrowthError as error:
            cells.append("refused: " + " ".join(str(error).split())[:80])
    try:
        _, model, before, inputs = grown(name, targets(spec, 2.0) | deeper)
        again = type(model)(model.config).double().eval()
        again.load_state_dict(model.state_dict())
        cells.append(f"{difference(output(again, inputs), before):.0e}")
    except (GrowthError, RuntimeError) as error:
        cells.append("does not load: " + " ".join(str(error).split())[:80])
    return cells


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    print(
        "| model | sizes that grow | 2x | 1.5x | one block more | built from the config |\n|---|---|---|---|---|---|"
    )
    for chosen in sys.argv[1:] or ZOO:
        print("|", " | ".join(row(chosen)), "|", flush=True)
