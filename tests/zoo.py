"""Tiny models of transformers that no family describes, and the table of how they are described by tracing and grow.

``python tests/zoo.py [names]`` prints the table. Its columns: the sizes that grow; the largest change of the output, relative to its
largest value, after a growth of all of them to 2x (without noise, and by default), to 1.5x, and after a block more in every stack; the
largest difference of AdamW's grown state from the state that autograd gives on the grown model; the change of the output after a growth to
2x with a block more is saved and loaded, and whether the loaded model generates what the source generates, with a cache and without. An
outcome in words is a refusal.
"""

import sys
import warnings
from collections.abc import Callable
from tempfile import TemporaryDirectory
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
TEXT_TOWER = TOKENS | dict(
    hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=72, vocab_size=VOCAB, max_position_embeddings=64
)  # fmt: skip
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
    "falcon_mqa": (
        "FalconForCausalLM",
        "Falcon",
        BASE | dict(multi_query=True, new_decoder_architecture=False, alibi=False, bias=False),
    ),
    "llama_classifier": ("LlamaForSequenceClassification", "Llama", DECODER | dict(num_labels=3)),
    "gpt2_heads": ("GPT2DoubleHeadsModel", "GPT2", GPT),
    "bert_choice": ("BertForMultipleChoice", "Bert", ENCODER),
    "bert_answers": ("BertForQuestionAnswering", "Bert", ENCODER),
    "roberta_tokens": ("RobertaForTokenClassification", "Roberta", ENCODER | dict(num_labels=3)),
    "bart_classifier": ("BartForSequenceClassification", "Bart", BOTH | dict(num_labels=3)),
    "clip": (
        "CLIPModel",
        "CLIP",
        dict(text_config=TEXT_TOWER, vision_config=VISION, projection_dim=20),
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        "Llava",
        dict(
            text_config=DECODER | dict(model_type="llama"),
            vision_config=VISION | dict(model_type="clip_vision_model", projection_dim=20),
            image_token_index=90,
            image_seq_length=4,
        ),
    ),
    "whisper_audio": (
        "WhisperForAudioClassification",
        "Whisper",
        BOTH | dict(num_mel_bins=8, max_source_positions=12, max_target_positions=64, num_labels=3),
    ),
    "ast": (
        "ASTForAudioClassification",
        "AST",
        WIDTHS
        | dict(
            intermediate_size=80,
            max_length=32,
            num_mel_bins=16,
            patch_size=8,
            frequency_stride=8,
            time_stride=8,
            num_labels=5,
        ),
    ),
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
            if p.requires_grad:  # others follow from the config, such as waves of positions
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


def grown(name: str, to: dict[str, int], **how: Any) -> tuple[float, nn.Module, Tensor, Any]:
    """Grow a model as described by tracing; return the change of its output, the model, its output before and its inputs."""
    model = make(name)
    spec = growkern.describe(model)
    before = output(model, spec.example)
    growkern.expand_inplace(model, to=to, **how)
    return difference(output(model, spec.example), before), model, before, spec.example


def gradients(model: nn.Module, inputs: Any) -> list[Tensor | None]:
    """Return the gradients of a weighted sum of the main output."""
    model.zero_grad()
    with evaluated(model), torch.enable_grad():
        out = main_output(call_model(model, inputs))
        assert out is not None
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        (out * weights).sum().backward()
    return [p.grad for p in model.parameters()]


def state_error(name: str, to: dict[str, int]) -> str:
    """Return the largest relative difference between AdamW's state after a growth and the state that autograd gives on the grown model.

    Before the growth AdamW takes one step with a learning rate of 0, so its state is that of the source's gradients, and its weights stay.
    """
    model = make(name)
    spec, betas = growkern.describe(model), (0.9, 0.99)
    model.requires_grad_(True)
    optim = torch.optim.AdamW(model.parameters(), lr=0.0, betas=betas, weight_decay=0.0)
    shape = output(model, spec.example).shape
    gradients(model, spec.example)
    optim.step()
    growkern.expand_inplace(model, optim, to=to, width=growkern.width.Lossless(noise=0))
    if output(model, spec.example).shape != shape:
        return "returns hidden states"  # a loss on some of their coordinates tells copies apart
    grads = gradients(model, spec.example)
    largest = max(float(g.abs().max()) for g in grads if g is not None)
    worst = 0.0
    for p, grad in zip(model.parameters(), grads, strict=True):
        if grad is None or float(grad.abs().max()) < 1e-7 * largest:
            continue  # a bias of keys has no gradient but rounding
        for key, power, beta in (("exp_avg", 1, betas[0]), ("exp_avg_sq", 2, betas[1])):
            expected = (1 - beta) * grad**power
            error = (optim.state[p][key] - expected).abs().max()
            worst = max(worst, float(error / expected.abs().max()))
    return f"{worst:.0e}"


def generated(model: nn.Module) -> list[Tensor]:
    """Return what a model generates greedily, with a cache and without."""
    ids = torch.arange(3, 9)[None]
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids))  # fmt: skip
    return [model.generate(ids, use_cache=cache, **options) for cache in (True, False)]


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
    twice, quiet = targets(spec, 2.0), growkern.width.Lossless(noise=0)
    cells = [name, ", ".join(twice) or "none"]
    half = targets(spec, 1.5)
    for to, how in ((twice, {"width": quiet}), (twice, {}), (half, {}), (deeper, {})):
        cells.append(_said(lambda to=to, how=how: f"{grown(name, to, **how)[0]:.0e}") if to else "none")  # fmt: skip
    if left := [size for size in twice if size not in half]:
        cells[4] += f", without {' and '.join(left)}"
    cells.append(_said(lambda: state_error(name, twice)) if twice else "none")
    why = spec.reload_problem
    cells.append(f"refused: {why}" if why else _said(lambda: _again(name, twice | deeper)))
    return cells


def _said(cell: Callable[[], str]) -> str:
    """Return a cell, or the first words of the refusal."""
    try:
        return cell()
    except (GrowthError, RuntimeError) as error:
        return "refused: " + " ".join(str(error).split())[:80]


def _again(name: str, to: dict[str, int]) -> str:
    """Return how a checkpoint of a grown model differs after it is saved and loaded, and whether it generates the source's tokens."""
    _, model, before, inputs = grown(name, to)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()  # fmt: skip
    if getattr(model.config, "_experts_implementation", None) == "eager":
        again.set_experts_implementation("eager")
    text = f"{difference(output(again, inputs), before):.0e}"
    if not model.can_generate() or "input_ids" not in inputs:
        return text
    pairs = zip(generated(again), generated(make(name)), strict=True)
    return text + (", generates the same" if all(torch.equal(a, b) for a, b in pairs) else ", GENERATES OTHER TOKENS")  # fmt: skip


COLUMNS = "model", "sizes that grow", "2x, noise 0", "2x", "1.5x", "one block more", "AdamW", "saved, loaded"  # fmt: skip

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print("|", " | ".join(COLUMNS), "|\n|" + "---|" * len(COLUMNS))
    for chosen in sys.argv[1:] or ZOO:
        print("|", " | ".join(row(chosen)), "|", flush=True)
