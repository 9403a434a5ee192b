"""Pages that are made from the code: the public names, and one page per method and procedure."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from torch import nn

import growkern
from bench.savings import campaign
from growkern import depth, procedures, shrink, vocab, width

ROOT = Path(__file__).parents[2]
METHODS = {"width": width, "depth": depth, "shrink": shrink, "vocab": vocab}
INTEGRATIONS = "hf", "lightning", "accelerate", "dcp"
CALLS = (
    "expand_inplace", "shrink_inplace", "plan", "upcycle", "resume", "describe", "verify", "compare", "advise", "learn",
    "expert_utility",
)  # fmt: skip
LOOPS = "GrowthSchedule", "At", "WhenPlateau", "WhenSlope"
FORMULAS = {  # W[o, i]: weight; g: index map from target to source coordinates; C(j): copies of source coordinate j
    "Lossless": "pads:    W'[new, i] = 0 where o is a new residual coordinate (LayerNorm: mean of W)\n"
    "         W'[o, new] ~ N(0, std(W)^2) where i is a new residual coordinate\n"
    "         W'[new, i] ~ N(0, std(W)^2), W'[o, new] = 0 for new heads and FFN units\n"
    "         gain' = gain * sqrt(n / n'), eps' = eps * n / n' (RMSNorm)\n"
    "copies:  W'[o, i] = W[g(o), g(i)] / C(g(i)) + N[o, i] with N(twin) = -N",
    "FPI": "g(i) = i for i < n; above, drawn from 0 .. n-1 (maps='cyclic': i mod n)\nW'[o, i] = W[g(o), g(i)] / C(g(i))",
    "Net2Wider": "W'[o, i] = W[g(o), g(i)] / C(g(i)) + N[o, i] with N(twin) = -N, g as FPI",
    "AKI": "W'[o, i] = W_l[o, g(i)] / C(g(i))           for o < n\n"
    "W'[o, i] = W_{l+1}[g(o), g(i)] / C(g(i))    for o >= n, in layer l",
    "AKIPro": "as AKI, where g(o) stays inside the query heads of one kv head",
    "HyperClone": "W'[o, i] = W[o mod n, i mod n] / k  (+N on one block of columns, -N on its twin)",
    "Lemon": "W'[o, i] = a_i * W[g(o), g(i)], where the a_i of the copies of a coordinate\nare unequal and sum to 1",
    "CopyAndPad": "W' = [[W, A], [B, C]], drawn but for\n"
    "B = C = 0 where W writes the residual stream, A = C = 0 where W reads heads or FFN units",
    "Sparkling": "W'[o, i] = s * W[g(o), g(i)]\n"
    "s = 1 / sqrt(1 + 3c), c <= 1 new coordinates per old one, copies on both sides\n"
    "s = 1 / (1 + c), c > 1;  s = sqrt(d / d') without copies on both sides",
    "FreshFeatures": "W'[o, i] = W[o, i] for old o and i\nW'[new, i] ~ N(0, std(W)^2);  W'[o, new] = 0",
    "ShrinkPerturb": "W' = shrink * pad(W) + N(0, s^2)\ns = std * sqrt(n / n')  (output matrices: std * n / n'; embeddings: std)",
    "CopyExperts": "expert'_e = expert_g(e);  router'[e] = router[g(e)] + N for a copy e",
    "IdentityBlocks": "block'(x) = x + 0 * f(x): attention output and down projection are 0",
    "Stack": "layer l copies source layer l mod n",
    "TopCopies": "layer l copies source layer l for l < n, above a layer of the top",
    "Interpose": "layer l copies source layer l // k\nhalve_branches=True: what it adds to the stream, divided by the number of copies",
    "DepthUpscale": "layers copy [0 .. n - m - 1] + [m .. n - 1]",
    "Layers": "layer l copies source layer order[l]",
    "Middle": "blocks copy [1 .. c] + [c .. n], c = ceil(n / 2), in blocks of `size` layers",
    "Fresh": "the parameters of new layers are drawn as the model's own code initializes them",
    "WeightSelection": "coordinate i of n keeps i * N / n\n(i * (N - 1) / (n - 1), rounded, where n does not divide N)",
    "FirstCopies": "W'[o, i] = C(i) * W[first(o), first(i)]",
    "Zero": "e_t = 0",
    "MeanCov": "e_t ~ N(mean(E), scale * cov(E))",
    "CLPTransfer": "e_t = sum over shared tokens o of w_o e_o,  w_o = cos(h_t, h_o) / sum cos",
}


NAMES = (
    "In the examples, `model` is a tiny Llama, `optim` its AdamW, `batch` one of two `batches` of token ids and labels, `teacher` a "
    "second Llama, `mixture` a tiny Mixtral, `shallow` a Llama of one layer, and `phi` a tiny Phi-3."
)


def tiny(layers: int = 2, experts: int = 0) -> nn.Module:
    """Return the model of the pictures: a Llama, 4 wide with 2 heads (of experts: a Mixtral)."""
    kind = "Mixtral" if experts else "Llama"
    more = {"num_local_experts": experts, "num_experts_per_tok": 1} if experts else {}
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=4, num_attention_heads=2, num_key_value_heads=2, intermediate_size=6, num_hidden_layers=layers, vocab_size=8,
        tie_word_embeddings=False, **more,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def plan_of(room: str, name: str) -> Any:
    """Plan the growth (or shrinking) of the tiny model that a method's page shows."""
    if room == "width":
        if name == "CopyExperts":
            return growkern.plan(tiny(experts=2), to={"experts": 4}, width=width.CopyExperts())
        to = {"hidden": "2x", "ffn": "2x", "kv_heads": 2} if name == "AKIPro" else "2x"
        state = "drop" if name == "ShrinkPerturb" else "exact"
        return growkern.plan(tiny(), to=to, width=getattr(width, name)(), state=state)
    if room == "depth":
        method = depth.Layers((0, 1, 1, 2, 3)) if name == "Layers" else getattr(depth, name)()
        n = {"DepthUpscale": 6, "Layers": 5, "Middle": 6}.get(name, 8)
        return growkern.plan(tiny(4), to={"layers": n}, depth=method)
    if room == "shrink":
        return growkern.plan(tiny(4), to="0.5x", shrink=getattr(shrink, name)())
    if name == "CLPTransfer":
        return None
    return growkern.plan(tiny(), to={"vocab": 12}, width=getattr(vocab, name)())


def public(module: Any) -> list[str]:
    """Return the public names of a module that are its own classes and functions."""
    return [n for n in module.__all__ if callable(getattr(module, n))]


def rst(kind: str, path: str, *options: str) -> str:
    """Return a block that documents one name from its docstring."""
    lines = [f".. auto{kind}:: {path}", *(f"   :{option}:" for option in options)]
    return "\n".join(["```{eval-rst}", *lines, "```", ""])


def documented(path: str, value: object) -> str:
    """Return the block of a class, with its public members, or of a function."""
    if not inspect.isclass(value):
        return rst("function", path)
    if issubclass(value, Exception):
        return rst("exception", path)
    return rst("class", path, "members")


def names() -> Iterator[tuple[str, str]]:
    """Yield path and text of the pages of public names."""
    flat = {n: getattr(growkern, n) for n in growkern.__all__}
    flat = {n: value for n, value in flat.items() if not inspect.ismodule(value)}
    objects = [n for n in flat if n[0].isupper() and n not in LOOPS]
    helpers = [n for n in flat if n[0].islower() and n not in CALLS]
    groups = (
        ("calls", "Calls", CALLS, "growkern"),
        ("loops", "Schedules and triggers", LOOPS, "growkern"),
        ("objects", "What calls take and return", objects, "growkern"),
        ("specs", "Writing a spec", helpers, "growkern"),
        ("trains", "Who trains", [*public(growkern.trains)], "growkern.trains"),
        ("inherit", "Knowledge inheritance", [*public(growkern.inherit)], "growkern.inherit"),
        ("optim", "Optimizers", ["AdamW"], "growkern.optim"),
        ("recipes", "Recipes", [*public(growkern.recipes)], "growkern.recipes"),
        ("errors", "Errors", [*public(growkern.errors)], "growkern.errors"),
    )
    for name, title, members, module in groups:
        found = [documented(f"{module}.{m}", getattr(_module(module), m)) for m in members]
        yield f"api/{name}.md", "\n".join([f"# {title}", "", NAMES, "", *found])
    text = ["# Trainer, Lightning, Accelerate, checkpoints of torch.distributed", "", NAMES, ""]
    for name in INTEGRATIONS:
        module = getattr(growkern, name)
        text += [f"## growkern.{name}", ""]
        text += [
            documented(f"growkern.{name}.{m}", getattr(module, m)) for m in sorted(module.__all__)
        ]
    yield "api/integrations.md", "\n".join(text)


def _module(path: str) -> Any:
    found: Any = growkern
    for part in path.split(".")[1:]:
        found = getattr(found, part)
    return found


def method_pages(out: Path) -> Iterator[tuple[str, str]]:
    """Yield path and text of the page of every method; write the pictures of the maps below ``out``."""
    guide = (ROOT / "growkern" / "guides" / "methods.md").read_text("utf-8")
    for room, module in METHODS.items():
        for name in public(module):
            plan = plan_of(room, name)
            text = [f"# {room}.{name}", "", "```text", FORMULAS[name], "```", ""]
            if plan is not None:
                path = f"methods/{room}-{name}.svg"
                plan.plot().savefig(out / path)
                text += [f"Preserves in the growth of the picture: **{plan.preserves}**.", ""]
                text += [f"![The maps of {name} on a tiny model]({room}-{name}.svg)", ""]
            text += [rst("class", f"growkern.{room}.{name}"), *figures(room, name, guide)]
            yield f"methods/{room}-{name}.md", "\n".join(text)


def figures(room: str, name: str, guide: str) -> Iterator[str]:
    """Yield the tables of the guide on methods with the rows of one method, and what these tables are."""
    used = {
        recipe
        for recipe, made in campaign.RECIPES.items()
        if type(made.growth.get(room)).__name__ == name
        or (name == "Lossless" and room == "width" and not {"width", "depth"} & set(made.growth))
    }
    for table in re.findall(r"(?:^\|.*\n)+", guide, re.MULTILINE):
        head, line, *rows = table.splitlines()
        if not head.startswith(("| run |", "| method | gpt2 |")):
            continue
        mine = [
            row
            for row in rows
            if _first(row) in used or re.search(rf"`{name}\(", row.split("|")[1])
        ]
        if mine:
            drift = head.startswith("| method |")
            of = "Error of the logits at twice the size" if drift else "Landing and annealed losses"
            rest = [] if drift else [row for row in rows if not _first(row)]
            yield "\n".join([f"## {of}", "", head, line, *mine, *rest, ""])
            yield "From [the guide on methods](../guides/methods.md), which says how these were measured.\n"


def _first(row: str) -> str:
    """Return the name in backticks in the first cell of a row, or nothing."""
    found = re.match(r"\| `([^`]*)`", row)
    return found[1] if found else ""


def procedure_pages(out: Path) -> Iterator[tuple[str, str]]:
    """Yield path and text of the page of every procedure; write the pictures of the runs below ``out``."""
    guide = (ROOT / "growkern" / "guides" / "procedures.md").read_text("utf-8")
    for line in re.findall(r"`(procedures\.\w+\(model.*?\))` \|$", guide, re.MULTILINE):
        name = line.partition("(")[0].removeprefix("procedures.")
        model = bert(3)
        schedule = eval(line, {"procedures": procedures, "model": model})
        path = f"procedures/{name}.svg"
        schedule.plot().savefig(out / path)
        text = [f"# {name}", "", "```python", line, "```", "", "```text", str(schedule), "```", ""]
        text += [f"![Size and FLOPs over the run of {name}]({name}.svg)", ""]
        text.append(rst("function", f"growkern.procedures.{name}"))
        yield f"procedures/{name}.md", "\n".join(text)


def bert(layers: int) -> nn.Module:
    """Return the BERT that the pages of procedures grow."""
    config = transformers.BertConfig(
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=256,
        num_hidden_layers=layers,
        vocab_size=256,
    )
    return transformers.BertForMaskedLM(config)
