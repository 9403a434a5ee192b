"""Small decoders of a user's own, each with one thing that a description by tracing has to know or to refuse."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB, WIDTH, HEADS, LENGTH = 97, 48, 4, 12


class Block(nn.Module):
    """Pre-norm attention and FFN."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 88), nn.Linear(88, width)

    def split(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT * q.shape[-1] ** -0.5

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = map(self.split, self.qkv(x).chunk(3, -1))
        later = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        mixed = self.scores(q, k).masked_fill(later, -math.inf).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """A decoder without a trap."""

    block = Block

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = (
            nn.Embedding(VOCAB, WIDTH),
            nn.Parameter(torch.randn(1, 64, WIDTH)),
        )
        self.blocks = nn.ModuleList(self.block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def embed(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.places[:, : ids.shape[1]]

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.run(self.embed(ids))))


class Temperature(Decoder):
    """Queries and keys have length 1, and every head has a learned temperature."""

    class block(Block):
        def __init__(self) -> None:
            super().__init__()
            self.tau = nn.Parameter(torch.randn(HEADS, 1, 1))

        def scores(self, q: Tensor, k: Tensor) -> Tensor:
            return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.tau.exp()


class Width(Decoder):
    """Logits are divided by the root of the width that the forward sees."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.run(self.embed(ids)))
        return self.head(x) / math.sqrt(x.shape[-1])


class CachedRoot(Decoder):
    """The embedding is multiplied by a root of the width that was computed once."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = WIDTH**0.5

    def embed(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) * self.factor + self.places[:, : ids.shape[1]]


class CachedSplit(Decoder):
    """Sizes of queries, keys and values are a list."""

    class block(Block):
        def __init__(self) -> None:
            super().__init__()
            self.sizes = [WIDTH, WIDTH, WIDTH]

        def attend(self, x: Tensor) -> Tensor:
            q, k, v = map(self.split, self.qkv(x).split(self.sizes, -1))
            return self.out(
                F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            )


class TrainingOnly(Decoder):
    """A branch that evaluation never runs, with a width as a number."""

    def embed(self, ids: Tensor) -> Tensor:
        x = super().embed(ids)
        return x.view(-1, ids.shape[1], 48) if self.training else x


class TrainingScale(Decoder):
    """Training divides by the width that it sees; evaluation does not."""

    def embed(self, ids: Tensor) -> Tensor:
        x = super().embed(ids)
        return x * (48 / x.shape[-1]) if self.training else x


class TrainingHead(Decoder):
    """A parameter that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.run(self.embed(ids)))
        return self.head(x) + self.extra(x) if self.training else self.head(x)


class Random(Decoder):
    """Dropout that evaluation does not turn off."""

    def embed(self, ids: Tensor) -> Tensor:
        return F.dropout(super().embed(ids), 0.5, training=True)


class Interleaved(Decoder):
    """Neighboring features are rotated in pairs."""

    def embed(self, ids: Tensor) -> Tensor:
        x = super().embed(ids)
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) + x


class Rolled(Decoder):
    """Features move by one place."""

    def embed(self, ids: Tensor) -> Tensor:
        return super().embed(ids).roll(1, -1)


class Sorted(Decoder):
    """Features are sorted by their values."""

    def embed(self, ids: Tensor) -> Tensor:
        return super().embed(ids).sort(-1).values


class Accumulated(Decoder):
    """Features are summed up to their place."""

    def embed(self, ids: Tensor) -> Tensor:
        return super().embed(ids).cumsum(-1)


class Grouped(Decoder):
    """A norm over groups of features."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = nn.GroupNorm(4, WIDTH)

    def embed(self, ids: Tensor) -> Tensor:
        return self.groups(super().embed(ids).mT).mT


class Doubled(Decoder):
    """The stream is concatenated with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.join = nn.Linear(2 * WIDTH, WIDTH)

    def embed(self, ids: Tensor) -> Tensor:
        x = super().embed(ids)
        return self.join(torch.cat([x, x.tanh()], -1))


class Halves(Decoder):
    """One half of the stream gates the other."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Linear(WIDTH // 2, WIDTH)

    def embed(self, ids: Tensor) -> Tensor:
        a, b = super().embed(ids).chunk(2, -1)
        return self.widen(a * b.sigmoid())


class Shared(Decoder):
    """One block runs twice."""

    def run(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](self.blocks[0](x)))


class Depthwise(Decoder):
    """A convolution over positions, one per feature."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH)

    def embed(self, ids: Tensor) -> Tensor:
        x = super().embed(ids)
        return x + self.conv(F.pad(x.mT, (2, 0))).mT


class InPlace(Decoder):
    """Operations that write into their inputs."""

    def run(self, x: Tensor) -> Tensor:
        x = x.clone()
        for block in self.blocks:
            x += block.attend(block.norm1(x))
            x.add_(block.down(block.up(block.norm2(x)).relu_()))
        return x


class Routed(Decoder):
    """Which FFN runs depends on a value; the example reaches one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def run(self, x: Tensor) -> Tensor:
        return super().run(self.experts[int(x.mean() > 100)](x))


class ShapeOnly(Decoder):
    """A parameter of which the forward uses the shape alone."""

    def __init__(self) -> None:
        super().__init__()
        self.like = nn.Parameter(torch.zeros(WIDTH))

    def embed(self, ids: Tensor) -> Tensor:
        return super().embed(ids)[..., : len(self.like)]


class Maximum(Decoder):
    """The largest feature gates the output."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.run(self.embed(ids))
        return self.head(self.norm(x)) * x.amax(-1, keepdim=True)


class Length(Decoder):
    """The length of the stream's vector gates the output."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.run(self.embed(ids))
        return self.head(self.norm(x)) * x.norm(dim=-1, keepdim=True)


class Frozen(Decoder):
    """A buffer that is no parameter is added to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.randn(WIDTH))

    def embed(self, ids: Tensor) -> Tensor:
        return super().embed(ids) + self.shift


class Detached(Decoder):
    """The forward uses a copy of a weight that it made once."""

    def __init__(self) -> None:
        super().__init__()
        self.copy: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        if not self.copy:
            self.copy.append(self.head.weight.detach().clone())
        return self.norm(self.run(self.embed(ids))) @ self.copy[0].mT + self.head(
            self.norm(self.embed(ids))
        )


class LowRank(Decoder):
    """A product of two matrices of rank 6, the second of zeros, is added to a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, WIDTH)), nn.Parameter(torch.zeros(VOCAB, 6))

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.norm(self.run(self.embed(ids))), self.head.weight + self.b @ self.a)


class Einsum(Decoder):
    """Attention by einsum on four-dimensional weights."""

    class block(Block):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = None
            self.w = nn.Parameter(torch.randn(3, HEADS, WIDTH, WIDTH // HEADS) / 7)

        def attend(self, x: Tensor) -> Tensor:
            q, k, v = torch.einsum("btd,shde->sbhte", x, self.w)
            return self.out(
                torch.einsum("bhts,bhse->bthe", self.scores(q, k).softmax(-1), v).flatten(2)
            )


class Pooled(Decoder):
    """The mean over features is subtracted without a norm."""

    def embed(self, ids: Tensor) -> Tensor:
        x = super().embed(ids)
        return x - x.mean(-1, keepdim=True)


TRAPS = [
    kind for kind in [*globals().values()] if isinstance(kind, type) and issubclass(kind, Decoder)
]


def ids(length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))


def make(kind: type[Decoder]) -> Decoder:
    """Make a model in float64 whose weights are away from their initial values, in the mode that a user trains in."""
    torch.manual_seed(0)
    model = kind().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model
