"""How long does a description by tracing take, and how much memory, beside the bytes of the model? Each model has a process of its own.

``describe_s`` is a first description, and ``cpu_s`` its CPU time in all threads; ``again_s`` is that of a second model of equal class and
config. ``check_mb`` is the memory of the check of a growth: its forwards, before and after.

    python -m bench.described [MODEL ...]         # rows go to bench/results/described-<device>.csv
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
import transformers
from torch import nn

from bench import harness
from growkern.engine.forward_check import ForwardCheck
from growkern.model.tracing.traced import describe_by_tracing

LLAMA = dict(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
    tie_word_embeddings=True,
)  # fmt: skip
TOKENS = dict(bos_token_id=1, eos_token_id=2)
TINY = dict(n_embd=32, n_head=2, n_layer=1, vocab_size=97, n_positions=32) | TOKENS
MODELS: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {  # name -> class, config, dtype
    "GPT-2 124M": ("GPT2", {}, torch.float32),
    "Llama 1B": ("Llama", LLAMA, torch.bfloat16),
}
COLUMNS = (
    "model", "parameters", "model_mb", "describe_s", "cpu_s", "describe_mb", "check_mb", "again_s", "threads", "commit", "date", "device",
    "torch",
)  # fmt: skip


def build(kind: str, fields: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """Return a language model of transformers with random weights."""
    config = getattr(transformers, f"{kind}Config")(**fields)
    head = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    return getattr(transformers, head)._from_config(config, dtype=dtype).eval()


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def peak(call: Callable[[], Any]) -> tuple[int, Any]:
    """Return by how many bytes the resident memory of a call exceeds that before it, and what it returns."""
    start = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    result = call()
    return _resident("VmHWM") - start, result


def check(model: nn.Module, inputs: Any) -> None:
    """Run every forward that the check of a growth runs."""
    own = ForwardCheck(model, inputs, lambda: None)
    own.measure_rounding()
    own.compare(preserved=True)


def measure(name: str) -> harness.Row:
    """Describe a model, check it, and describe another of the same config."""
    describe_by_tracing(build("GPT2", TINY, torch.float32))  # imports what is needed once
    model = build(*MODELS[name])
    start, cpu = perf_counter(), process_time()
    described, spec = peak(lambda: describe_by_tracing(model))
    seconds, cpu = perf_counter() - start, process_time() - cpu
    checked, _ = peak(lambda: check(model, spec.example))
    again = build(*MODELS[name])
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "model_mb": harness.n_bytes(model.parameters()) / 1e6,
        "describe_s": seconds,
        "cpu_s": cpu,
        "describe_mb": described / 1e6,
        "check_mb": checked / 1e6,
        "again_s": harness.wall(lambda: describe_by_tracing(again)),
        "threads": torch.get_num_threads(),
    }


def measured(names: list[str]) -> Iterator[harness.Row]:
    machine = harness.machine()
    for name in names:
        lines: list[str] = []
        status, tail = harness.follow(["bench.described", "--measure", name], lines.append)
        if status:
            raise SystemExit(tail)
        row = json.loads(lines[-1])
        yield row | {key: machine[key] for key in ("commit", "date", "device", "torch")}


def main(words: list[str]) -> None:
    if words[:1] == ["--measure"]:
        print(json.dumps(measure(words[1])))
        return
    path = harness.RESULTS / f"described-{harness.slug(harness.machine()['device'])}.csv"
    harness.record(path, COLUMNS, measured(words or [*MODELS]), 9)


if __name__ == "__main__":
    main(sys.argv[1:])
