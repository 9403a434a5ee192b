"""Tiny real models, shared by the tests: stock transformers, and a plain module with its spec."""

import os

import torch
import transformers
from torch import Tensor, nn

import growkern
from growkern import Blocks, ModelSpec, embedding, linear, norm

DEVICE = os.environ.get(
    "GROWKERN_TEST_DEVICE", "cpu"
)  # "cuda": models and batches of the tests, as in gpu_check.py
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
FAMILIES = ["gpt2", "llama", "mistral", "qwen2", "qwen3", "bert", "plain"]


def make(family: str, *, tied: bool, seed: int = 0, **changes: object) -> nn.Module:
    """A tiny model with all weights (biases, gains) away from their initial values."""
    torch.manual_seed(seed)
    model = _make(family, tied, changes)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model if DEVICE == "cpu" else model.to(DEVICE)


def _make(family: str, tied: bool, changes: dict) -> nn.Module:
    if family == "plain":
        return Plain(tied=tied, **changes)
    if family == "gpt2":
        sizes = dict(
            n_embd=24,
            n_head=4,
            n_layer=2,
            n_positions=64,
            vocab_size=VOCAB,
            bos_token_id=0,
            eos_token_id=1,
        )
        drop = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**(sizes | drop | changes), tie_word_embeddings=tied)
        )
    if family == "bert":
        sizes = dict(
            hidden_size=24,
            num_attention_heads=4,
            intermediate_size=40,
            num_hidden_layers=2,
            vocab_size=VOCAB,
        )
        rest = dict(
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            tie_word_embeddings=tied,
        )
        return transformers.BertForMaskedLM(transformers.BertConfig(**(sizes | rest | changes)))
    name = family.capitalize()
    own = {} if family == "qwen2" else {"head_dim": 6}
    config = getattr(transformers, f"{name}Config")(
        **(LLAMA | own | changes), tie_word_embeddings=tied
    )
    return getattr(transformers, f"{name}ForCausalLM")(config)


def spec_of(model: nn.Module) -> ModelSpec | None:
    """The spec to pass: only the plain model needs one."""
    return model.spec() if isinstance(model, Plain) else None


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    out = model(ids)
    return out if isinstance(out, Tensor) else out.logits


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Next-token (or, for BERT, same-token) cross entropy."""
    return nn.functional.cross_entropy(
        logits(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )


def batch(seed: int = 0, n: int = 2) -> Tensor:
    ids = torch.randint(0, VOCAB, (n, LENGTH), generator=torch.Generator().manual_seed(seed))
    return ids.to(DEVICE)


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
    """A nanoGPT-style decoder: nothing of transformers in it."""

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


def exact_norms(monkeypatch) -> None:
    """Let the RMSNorms of transformers compute in the input's dtype: they round to float32, which hides what float64 shows."""
    for name in ("llama", "mistral", "qwen2", "qwen3"):
        module = getattr(transformers.models, name)
        kind = getattr(getattr(module, f"modeling_{name}"), f"{name.capitalize()}RMSNorm")
        monkeypatch.setattr(kind, "forward", _rms_norm)


def _rms_norm(self: nn.Module, x: Tensor) -> Tensor:
    return self.weight * (
        x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
    )


def train(
    model: nn.Module, optim: torch.optim.Optimizer, steps: int, first: int = 0
) -> list[float]:
    """Ordinary steps, one batch each; the old loss stays alive as in an ordinary loop."""
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
