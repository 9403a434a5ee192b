"""The table of how models are described by tracing and grow: 42 of transformers that no family describes, and nine of other code.

``PYTHONPATH=.:tests python tests/zoo.py [names]`` prints the table as Markdown, and below it the reasons for what its cells leave out. Its
columns:

- the sizes that grow;
- permuted: the largest change of the output under four permutations of the coordinates of every space;
- 2x exact, 2x, 1.5x, a block more: the change of the output after a growth of all sizes without noise and by default, after a growth of
  those sizes whose plan accepts 1.5x, and after a growth of every stack by one block;
- AdamW: the difference between the state after the growth and the state that autograd's gradients of the grown model give;
- loaded: the change of the output after a growth to 2x with a block more is saved and loaded; "same" where the loaded model generates
  what the source generates, with a cache and without.

All numbers are relative to the largest value. Models of transformers compute norms in float32, so that 1e-6 is exact for them.
"""

import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from zoo_models import DECODER, ENCODER, HEADS, MODELS
from zoo_published import PUBLISHED, ids

import growkern
from growkern.errors import GrowthError
from growkern.model.tracing.forward import call_model, evaluated, main_output
from growkern.model.tracing.permutation import permutation_error
from growkern.model.tracing.traced import trace_model
from growkern.model.tracing.trial import Tensors

__all__ = ["DECODER", "ENCODER", "ZOO", "describe", "difference", "grown", "make", "output", "targets"]  # fmt: skip
ZOO = MODELS | HEADS
SEEDS = range(4)  # of permutations


def make(name: str) -> nn.Module:
    """Make a tiny model whose weights, biases and gains are away from their initial values."""
    torch.manual_seed(0)
    if name in PUBLISHED:
        model = PUBLISHED[name]()[0]
    else:
        kind, config, fields = ZOO[name]
        own = getattr(transformers, f"{config}Config")(**fields)
        own._attn_implementation = own._experts_implementation = "eager"
        model = getattr(transformers, kind)(own)
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:  # others follow from the config, such as waves of positions
                p.add_(0.15 * torch.randn_like(p))
    return model


def example(name: str) -> Any:
    """Return inputs of a model from which growkern cannot make inputs; None for another model."""
    if name in PUBLISHED:
        return PUBLISHED[name]()[1]
    return images_and_text() if name == "qwen3_vl" else None


def images_and_text() -> dict[str, Any]:
    """Return an image of 4 x 4 patches, of which the model reads 2 x 2 as one token, and its place in the text."""
    tokens = ids(highest=80)
    tokens[:, 1], tokens[:, 2:6], tokens[:, 6] = 92, 90, 93  # start, image, end
    pixels = torch.randn(32, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kinds, grid = (tokens == 90).long(), torch.tensor([[1, 4, 4]] * 2)
    return dict(input_ids=tokens, pixel_values=pixels, image_grid_thw=grid, mm_token_type_ids=kinds, use_cache=False)  # fmt: skip


def describe(name: str, model: nn.Module) -> Any:
    """Describe a model of the zoo by inputs that are made from its config, or by its example."""
    return growkern.describe(model, inputs=example(name))


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


def grown(name: str, to: Mapping[str, int], **how: Any) -> tuple[float, nn.Module, Tensor, Any]:
    """Grow a model as described by tracing; return the change of its output, the model, its output before and its inputs."""
    model = make(name)
    spec = describe(name, model)
    before = output(model, spec.example)
    growkern.expand_inplace(model, to=to, **how)
    return difference(output(model, spec.example), before), model, before, spec.example


def permuted(name: str) -> float:
    """Return the largest change of the output under permutations of the coordinates of every space."""
    model = make(name)
    spec = describe(name, model)
    found = trace_model(model, spec.example)
    own = Tensors(found.weights, spec.tensors, spec.ties)
    return permutation_error(model, spec.example, own, found.tape.output_dims, SEEDS)


def gradients(model: nn.Module, inputs: Any, shape: torch.Size) -> list[Tensor | None]:
    """Return the gradients of a weighted sum of the main output; the copies of a coordinate that grew share its weight."""
    model.zero_grad()
    with evaluated(model), torch.enable_grad():
        out = main_output(call_model(model, inputs))
        assert out is not None
        weights = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(out)
        for axis, (n, more) in enumerate(zip(shape, out.shape, strict=True)):
            weights = weights.index_select(axis, torch.arange(more) % n) * (n / more)
        (out * weights).sum().backward()
    return [p.grad for p in model.parameters()]


def state_error(name: str, to: Mapping[str, int]) -> float:
    """Return the largest relative difference between AdamW's state after a growth and the state that autograd gives on the grown model.

    Before the growth AdamW takes one step with a learning rate of 0, so its state is that of the source's gradients, and its weights stay.
    """
    model = make(name)
    spec, betas = describe(name, model), (0.9, 0.99)
    model.requires_grad_(True)
    optim = torch.optim.AdamW(model.parameters(), lr=0.0, betas=betas, weight_decay=0.0)
    shape = output(model, spec.example).shape
    gradients(model, spec.example, shape)
    optim.step()
    growkern.expand_inplace(model, optim, to=to, width=growkern.width.Lossless(noise=0))
    grads = gradients(model, spec.example, shape)
    largest = max(float(g.abs().max()) for g in grads if g is not None)
    worst = 0.0
    for p, grad in zip(model.parameters(), grads, strict=True):
        if grad is None or float(grad.abs().max()) < 1e-7 * largest:
            continue  # a bias of keys has no gradient but rounding
        for key, power, beta in (("exp_avg", 1, betas[0]), ("exp_avg_sq", 2, betas[1])):
            expected = (1 - beta) * grad**power
            error = (optim.state[p][key] - expected).abs().max()
            worst = max(worst, float(error / expected.abs().max()))
    return worst


def loaded(name: str, to: Mapping[str, int]) -> str:
    """Return how a checkpoint of a grown model differs after it is saved and loaded, and whether it generates the source's text."""
    _, model, before, inputs = grown(name, to)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()  # fmt: skip
    if getattr(model.config, "_experts_implementation", None) == "eager":
        again.set_experts_implementation("eager")
    text = shown(difference(output(again, inputs), before))
    if not model.can_generate() or "input_ids" not in inputs:
        return text
    pairs = zip(generated(again), generated(make(name)), strict=True)
    return text + (", same" if all(torch.equal(a, b) for a, b in pairs) else ", OTHER TEXT")


def generated(model: nn.Module) -> list[Tensor]:
    """Return what a model generates greedily, with a cache and without."""
    first = torch.arange(3, 9)[None]
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(first))  # fmt: skip
    return [model.generate(first, use_cache=cache, **options) for cache in (True, False)]


def targets(spec: growkern.ModelSpec, factor: float) -> dict[str, int]:
    """Return the targets of all sizes that grow; those that grow by whole multiples only are left out at another factor."""
    whole = factor == int(factor)
    free = [s for s in spec.sizes if s not in spec.fixed and not s.startswith("layers")]
    to = {s: int(spec.sizes[s] * factor) for s in free if whole or s not in spec.whole_multiples}
    if spec.hidden_is_heads and "hidden" not in to:
        to.pop("heads", None)
    if "kv_heads" in to and "heads" not in to:
        del to["kv_heads"]
    elif "kv_heads" in to:
        to["heads"] = to["kv_heads"] * (spec.sizes["heads"] // spec.sizes["kv_heads"])
    if spec.hidden_is_heads and "hidden" in to:
        to["hidden"] = to.get("heads", spec.sizes["heads"]) * spec.sizes["head_dim"]
    return {size: n for size, n in to.items() if n != spec.sizes[size]}


def shown(error: float) -> str:
    return f"{error:.0e}".replace("e-0", "e-").replace("0e+00", "0")


class Row:
    """A row of the table, and why its cells leave something out.

    Attributes:
        cells: The cells.
        notes: Column and reason of everything that is left out.
    """

    def __init__(self, name: str) -> None:
        self.name, self.cells, self.notes = name, [name], list[tuple[str, str]]()
        try:
            self.model = make(name)
            self.spec = describe(name, self.model)
        except (GrowthError, ImportError) as error:
            self.notes.append(("not described", _reason(error)))
            return
        spec = self.spec
        twice, quiet = targets(spec, 2.0), growkern.width.Lossless(noise=0)
        deeper = {stack.size: spec.sizes[stack.size] + 1 for stack in spec.stacks}
        self.cells.append(_sizes(twice) or "none")
        self.measure("permuted", lambda: shown(permuted(name)))
        self.measure("2x", lambda: shown(grown(name, twice, width=quiet)[0]), twice)
        self.measure("2x", lambda: shown(grown(name, twice)[0]), twice)
        half = self.accepted(twice)
        only = "" if half.keys() == twice.keys() else f" ({_sizes(half)})"
        self.measure("1.5x", lambda: shown(grown(name, half)[0]) + only, half)
        self.measure("a block more", lambda: shown(grown(name, deeper)[0]), deeper)
        self.measure("AdamW", lambda: shown(state_error(name, twice)), twice)
        if name in PUBLISHED:
            self.cells.append("")
        else:
            self.measure("loaded", lambda: loaded(name, twice | deeper))
        self.notes += [("loaded", f"{spec.reload_problem}")] if spec.reload_problem else []
        for size, why in spec.fixed.items():
            if size.startswith("layers"):
                self.notes.append(("a block more", why.partition("gains no blocks: ")[2] or why))
            elif size != "head_dim":
                self.notes.append(("stays", f"{size}: {why}"))

    def measure(self, column: str, cell: Callable[[], str], to: Mapping[str, int] | None = None) -> None:  # fmt: skip
        """Add a cell, or a dash and the reason of a refusal."""
        try:
            self.cells.append("-" if to is not None and not to else cell())
        except (GrowthError, RuntimeError) as error:
            self.cells.append("-")
            if column != "loaded" or not self.spec.reload_problem:  # which is a note of its own
                self.notes.append((column, _reason(error)))

    def accepted(self, twice: Mapping[str, int]) -> dict[str, int]:
        """Return the targets at 1.5x of the sizes that a plan accepts, and note why it does not accept the others."""
        spec = self.spec
        to, kept = targets(spec, 1.5), dict[str, int]()
        whole = {s: why for s, why in spec.whole_multiples.items() if s in twice}
        self.notes += [("1.5x", f"{_plain(s)}: {why}") for s, why in whole.items()]
        wide = {s for s in to if s.startswith("hidden")}
        heads = {"heads", "kv_heads"}
        units = [wide | heads, set[str]()] if spec.hidden_is_heads else [wide, heads]
        for unit in (*units, *({size} for size in to if size not in wide | heads)):
            tried = {s: n for s, n in to.items() if s in kept or s in unit}
            try:
                if tried.keys() != kept.keys():
                    growkern.plan(self.model, spec=spec, to=tried)
            except GrowthError as error:
                if not whole:
                    self.notes.append(
                        ("1.5x", f"{_plain(next(s for s in to if s in unit))}: {_reason(error)}")
                    )
            else:
                kept = tried
        return kept


def _sizes(to: Mapping[str, int]) -> str:
    return ", ".join(size.replace("kv_heads", "kv") for size in to)


def _plain(size: str) -> str:
    return "heads" if size == "kv_heads" else size.rstrip("0123456789")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())


def _general(reason: str) -> str:
    """Return a reason without the names of tensors and modules and without numbers, for which there are many."""
    text = re.sub(
        r"cannot \w+ \w+ (from|to) .*?: |; nearest.*|; name .*| \(RuntimeError.*", "", reason
    )
    leaf = re.compile(r"\.(weight|bias)$")
    text = re.sub(r"\b[a-zA-Z_][\w*]*(\.[\w*]+)+\b", lambda path: leaf.sub("", path[0]).rpartition(".")[2], text)  # fmt: skip
    return re.sub(r"^\d+ tensors", "tensors", text)[:150]


COLUMNS = "model", "sizes that grow", "permuted", "2x exact", "2x", "1.5x", "a block more", "AdamW", "loaded"  # fmt: skip

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print("|", " | ".join(COLUMNS), "|\n|" + "---|" * len(COLUMNS))
    why: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for chosen in sys.argv[1:] or [*MODELS, *PUBLISHED]:
        row = Row(chosen)
        print("|", " | ".join(row.cells + [""] * (len(COLUMNS) - len(row.cells))), "|", flush=True)
        for column, reason in row.notes:
            why[column, _general(reason)][chosen] = None
    print()
    for (column, reason), names in sorted(why.items()):
        print(f"- {column}: {reason}: {', '.join(names)}")
