"""Tiny models that the tests share: stock transformers, and plain modules with a spec."""

import os
from dataclasses import replace

import torch
import transformers
from templates import Template
from torch import Tensor, nn

import growkern
from growkern import Blocks, ModelSpec, embedding, linear, norm
from growkern.model.families import encoder

DEVICE = os.environ.get(
    "GROWKERN_TEST_DEVICE", "cpu"
)  # gpu_check.py puts the models and batches of the tests on "cuda"
VOCAB, LENGTH = 66, 16
LLAMA = dict(
    hidden_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=40,
    num_hidden_layers=2,
    vocab_size=VOCAB,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=1,
)
EAGER = "eager"  # the other implementations of experts in transformers refuse float64
LLAMA_LIKE = ["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "gemma2"]
POST_NORM = ["bert", "roberta", "modernbert", "encoder_post"]  # hidden grows by whole multiples
FAMILIES = ["gpt2", "gpt_neox", "opt", *LLAMA_LIKE, *POST_NORM, "t5", "vit", "encoder", "plain"]
POSITIONS = ["gpt2", "opt", "bert", "roberta", "plain", "encoder", "encoder_post"]
NAMES = {  # family -> prefix and suffix of its class names
    "gpt2": ("GPT2", "LMHeadModel"),
    "gpt_neox": ("GPTNeoX", "ForCausalLM"),
    "opt": ("OPT", "ForCausalLM"),
    "qwen3_moe": ("Qwen3Moe", "ForCausalLM"),
    "bert": ("Bert", "ForMaskedLM"),
    "roberta": ("Roberta", "ForMaskedLM"),
    "modernbert": ("ModernBert", "ForMaskedLM"),
    "t5": ("T5", "ForConditionalGeneration"),
    "vit": ("ViT", "ForImageClassification"),
}
GPT2 = dict(n_embd=24, n_head=4, n_layer=2, n_positions=64, vocab_size=VOCAB)
HIDDEN = dict(hidden_size=24, num_attention_heads=4, num_hidden_layers=2)
BERT = HIDDEN | dict(intermediate_size=40, vocab_size=VOCAB)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
SIZES = {
    "gpt2": GPT2
    | dict(bos_token_id=0, eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "gpt_neox": BERT | dict(max_position_embeddings=64, bos_token_id=0, eos_token_id=1),
    "opt": HIDDEN
    | dict(ffn_dim=40, vocab_size=VOCAB, max_position_embeddings=64, dropout=0.0)
    | dict(
        activation_function="gelu"
    )  # a ReLU that is off for a whole batch has no gradient, grown or not
    | dict(word_embed_proj_dim=24, bos_token_id=0, eos_token_id=1),
    "bert": BERT | NO_DROPOUT | dict(max_position_embeddings=64),
    "roberta": BERT | NO_DROPOUT | dict(max_position_embeddings=64),
    "modernbert": BERT
    | dict(num_hidden_layers=3, max_position_embeddings=64, local_attention=8, pad_token_id=0)
    | dict(bos_token_id=0, eos_token_id=1, cls_token_id=0, sep_token_id=1),
    "vit": HIDDEN | dict(intermediate_size=40, image_size=8, patch_size=4, num_labels=VOCAB),
    "t5": dict(d_model=24, d_kv=6, d_ff=40, num_heads=4, num_layers=2, num_decoder_layers=2)
    | dict(vocab_size=VOCAB, dropout_rate=0.0, feed_forward_proj="gated-gelu")
    | dict(relative_attention_num_buckets=8, relative_attention_max_distance=12)
    | dict(decoder_start_token_id=0),
    "qwen2": LLAMA,
    "gemma2": LLAMA
    | dict(head_dim=6, query_pre_attn_scalar=10, sliding_window=8)
    | dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "mixtral": LLAMA | dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": LLAMA
    | dict(head_dim=6, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40),
}


def make(family: str, *, tied: bool, seed: int = 0, **changes: object) -> nn.Module:
    """Make a tiny model and move all weights (biases and gains too) away from their initial values.

    A second model of equal arguments is a copy of the first as it was made, and leaves the same random state.
    """
    defaults = torch.get_default_dtype(), torch.get_default_device()
    key = (family, tied, seed, repr(sorted(changes.items())), *defaults)
    if key not in TEMPLATES:
        TEMPLATES[key] = Template(_moved(family, tied, seed, changes))
    return TEMPLATES[key].copy()


TEMPLATES: dict[tuple[object, ...], Template] = {}


def _moved(family: str, tied: bool, seed: int, changes: dict) -> nn.Module:
    torch.manual_seed(seed)
    model = _make(family, tied, changes)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model if DEVICE == "cpu" else model.to(DEVICE)


def _make(family: str, tied: bool, changes: dict) -> nn.Module:
    if family == "plain":
        return Plain(tied=tied, **changes)
    if family.startswith("encoder"):
        return Encoding(tied=tied, norm_first=family == "encoder", **changes)
    name, kind = NAMES.get(family, (family.capitalize(), "ForCausalLM"))
    config = getattr(transformers, f"{name}Config")(
        **(SIZES.get(family, LLAMA | {"head_dim": 6}) | changes), tie_word_embeddings=tied
    )
    config._experts_implementation = EAGER
    config.tie_word_embeddings = tied  # T5's config reads the argument as a scale
    return getattr(transformers, f"{name}{kind}")(config)


def spec_of(model: nn.Module) -> ModelSpec | None:
    """Return the spec of a model, or None where a family describes the model."""
    return model.spec() if isinstance(model, Plain | Encoding) else None


def inputs(model: nn.Module, ids: Tensor) -> Tensor | dict[str, Tensor]:
    """Return the model's inputs: ids, an image made of ids, or ids for encoder and decoder."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return {"input_ids": ids.flip(1), "decoder_input_ids": ids}
    if getattr(model, "main_input_name", "") != "pixel_values":
        return ids
    waves = torch.sin(ids[:, :, None] * torch.arange(1, 13, device=ids.device))
    return waves.view(len(ids), 3, 8, 8)


def run(model: nn.Module, ids: Tensor):
    given = inputs(model, ids)
    return model(**given) if isinstance(given, dict) else model(given)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    out = run(model, ids)
    return out if isinstance(out, Tensor) else out.logits


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the cross entropy with the next token, or with the first token where the model predicts one label."""
    out = logits(model, ids)
    if out.dim() == 2:
        return nn.functional.cross_entropy(out, ids[:, 0])
    return nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def batch(seed: int = 0, n: int = 2) -> Tensor:
    ids = torch.randint(0, VOCAB, (n, LENGTH), generator=torch.Generator().manual_seed(seed))
    return ids.to(DEVICE)


class Words(torch.utils.data.Dataset):
    """``n`` rows of 12 random tokens, for trainers of transformers."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.randint(0, VOCAB, (12,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


class Attention(nn.Module):
    def __init__(self, width: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1)
        )
        return self.out(
            nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            .transpose(1, 2)
            .flatten(2)
        )


class Block(nn.Module):
    def __init__(self, width: int, n_head: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, n_head)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))
        return x + self.down(nn.functional.gelu(self.up(self.ln_2(x))))


class Plain(nn.Module):
    """A decoder in the style of nanoGPT, which uses nothing of transformers."""

    def __init__(
        self, width: int = 24, n_head: int = 4, n_layer: int = 2, tied: bool = True
    ) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, width), nn.Embedding(64, width)
        self.blocks = nn.ModuleList(Block(width, n_head) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))

    def spec(self) -> ModelSpec:
        heads, width = self.blocks[0].attention.n_head, self.wte.embedding_dim
        tensors = embedding("wte", rows="vocab", writes="residual") | embedding(
            "wpe", rows="positions", writes="residual"
        )
        for i in range(len(self.blocks)):
            at, qkv = f"blocks.{i}", (f"heads.{i}", "head_dim")
            tensors |= norm(f"{at}.ln_1", reads="residual", writes="residual:normed", kind="layer")
            tensors |= linear(
                f"{at}.attention.qkv", reads="residual:normed", writes=[qkv, qkv, qkv]
            )
            tensors |= linear(f"{at}.attention.out", reads=qkv, writes="residual")
            tensors |= norm(f"{at}.ln_2", reads="residual", writes="residual:normed", kind="layer")
            tensors |= linear(f"{at}.up", reads="residual:normed", writes=f"ffn.{i}")
            tensors |= linear(f"{at}.down", reads=f"ffn.{i}", writes="residual")
        tensors |= norm("ln_f", reads="residual", writes="residual:final", kind="layer")
        tensors |= linear("head", reads="residual:final", writes="vocab", bias=False)
        outputs = ["attention.out.weight", "attention.out.bias", "down.weight", "down.bias"]
        return ModelSpec(
            family="plain",
            sizes={
                "hidden": width,
                "heads": heads,
                "head_dim": width // heads,
                "ffn": self.blocks[0].up.out_features,
                "layers": len(self.blocks),
                "vocab": VOCAB,
                "positions": self.wpe.num_embeddings,
            },
            tensors=tensors,
            ties={"head.weight": "wte.weight"} if self.head.weight is self.wte.weight else {},
            blocks=Blocks("blocks", identity=dict.fromkeys(outputs, 0.0)),
            attributes={f"blocks.{i}.attention.n_head": "heads" for i in range(len(self.blocks))},
        )


class Encoding(nn.Module):
    """``torch.nn.TransformerEncoder`` between an embedding and a head."""

    def __init__(self, tied: bool, norm_first: bool, eps: float = 1e-12) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, 24), nn.Embedding(64, 24)
        layer = nn.TransformerEncoderLayer(
            24, 4, 40, 0.0, "gelu", layer_norm_eps=eps, batch_first=True, norm_first=norm_first
        )
        last = nn.LayerNorm(24) if norm_first or tied else None
        self.encoder = nn.TransformerEncoder(layer, 2, last, enable_nested_tensor=False)
        self.head = nn.Linear(24, VOCAB, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.encoder(x))

    def spec(self) -> ModelSpec:
        part = encoder.describe(self.encoder, "encoder.")
        last = "residual" if self.encoder.norm is None else "residual:final"
        own = {"vocab": VOCAB, "positions": self.wpe.num_embeddings}
        return replace(
            part,
            sizes={**part.sizes, **own},
            tensors=embedding("wte", rows="vocab", writes="residual")
            | embedding("wpe", rows="positions", writes="residual")
            | part.tensors
            | linear("head", reads=last, writes="vocab", bias=False),
            ties={"head.weight": "wte.weight"} if self.head.weight is self.wte.weight else {},
            fixed={},
        )


def exact_norms(monkeypatch) -> None:
    """Let RMSNorms, eager softmax and Gemma's embedding scale, which transformers computes in float32, compute in the input's dtype:
    rounding to float32 would hide errors that float64 shows."""
    for name in [*LLAMA_LIKE, "t5"]:
        module = getattr(getattr(transformers.models, name), f"modeling_{name}")
        prefix = NAMES.get(name, (name.capitalize(),))[0]
        kind = getattr(module, "T5LayerNorm" if name == "t5" else f"{prefix}RMSNorm")
        monkeypatch.setattr(kind, "forward", _rms_norm)
    scaled = transformers.models.gemma2.modeling_gemma2.Gemma2TextScaledWordEmbedding
    monkeypatch.setattr(scaled, "forward", _scaled_embedding)
    softmax = nn.functional.softmax
    monkeypatch.setattr(nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))


def _rms_norm(self: nn.Module, x: Tensor) -> Tensor:
    gemma = type(self).__name__.startswith("Gemma")
    gain, eps = (1 + self.weight, self.eps) if gemma else (self.weight, self.variance_epsilon)
    return gain * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


def _scaled_embedding(self: nn.Embedding, ids: Tensor) -> Tensor:
    assert abs(self.embed_scale / self.scalar_embed_scale - 1) < 1e-7  # embed_scale is in float32
    return nn.functional.embedding(ids, self.weight, self.padding_idx) * self.scalar_embed_scale


def train(
    model: nn.Module, optim: torch.optim.Optimizer, steps: int, first: int = 0
) -> list[float]:
    """Take ordinary steps on one batch each and return the losses; the last loss tensor stays alive, as in an ordinary loop."""
    losses = []
    for i in range(first, first + steps):
        loss = loss_of(model, batch(seed=i))
        optim.zero_grad()
        loss.backward()
        optim.step()
        losses.append(loss.item())
    return losses


def grow(
    model: nn.Module, optim: torch.optim.Optimizer | None = None, **options: object
) -> growkern.GrowthReport:
    return growkern.expand_inplace(model, optim, spec=spec_of(model), **options)
