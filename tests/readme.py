"""The examples of the README."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block(text: str) -> str:
    """Return the only example that contains a text."""
    (found,) = (each for each in BLOCKS if text in each)
    return found


IN_PROCESSES = {  # they run in tests/distributed, tests/integrations and tests/checkpoints
    "fsdp": block("fully_shard(block)"),
    "trainer": block("fsdp=True"),
    "torchtitan": block("torchtitan.trainer"),
    "dcp.grow": block("growkern.dcp.grow("),
    "dcp.load": block("growkern.dcp.load("),
}
