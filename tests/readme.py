"""The examples of README and of the guides (``growkern/guides``)."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = {
    path.name: path.read_text(encoding="utf-8")
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
        *sorted((ROOT / "growkern" / "guides").glob("*.md")),
    )
}
README = PAGES["README.md"]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = [  # (page, language, text) of every block of code
    (page, language, text)
    for page, whole in PAGES.items()
    for language, text in FENCED.findall(whole)
]


def block(part: str) -> str:
    """Return the example that contains a text: the only one, or several equal ones."""
    (found,) = {text for _, _, text in BLOCKS if part in text}
    return found


EXAMPLES = {  # name -> text that no other example contains; each runs in tests/house/test_readme.py
    "top": "# every width x 2, function preserved",
    "runs": "copy, torch, transformers, growkern",
    "plain loop": "WhenPlateau(patience=5",
    "muon": "torch.optim.Muon(",
    "trainer": "transformers.Trainer(model, arguments",
    "lightning": "lightning.Trainer(",
    "accelerate": "accelerator.prepare(",
    "ddp": "DistributedDataParallel(model)",
    "one line": '[growkern.At(step=1000, to="2x")]).attach(model, optim)\n',
    "traced": "spec = growkern.describe(model, inputs=ids)",
    "saved and loaded": '"grown.pt"',
    "hinted": "growkern.Hint(",
    "by hand": "ModelSpec(",
    "procedure": "print(schedule)",
    "advice": "growkern.advise(",
    "inheritance": "KnowledgeInheritance(",
    "ramp": "ramp=5000",
    "experts and vocabulary": "growkern.upcycle(",
    "shrink": "shrink_inplace(",
    "worked numbers": "grown_down",
}
IN_PROCESSES = {  # they run in tests/distributed, tests/integrations and tests/checkpoints
    "fsdp": block("fully_shard(block)"),
    "trainer": block("fsdp=True"),
    "torchtitan": block("torchtitan.trainer"),
    "dcp.grow": block("growkern.dcp.grow("),
    "dcp.load": block("growkern.dcp.load("),
}


def example(name: str) -> str:
    """Return an example by its name. The one line of a loop is a block of its own, and part of others."""
    found = {t for _, kind, t in BLOCKS if kind == "python" and EXAMPLES[name] in t}
    if name == "one line":
        found = {text for text in found if text.count("\n") == 1}
    (text,) = found
    return text
