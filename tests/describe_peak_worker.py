"""Describe a model in a process of its own and run its check; print the peaks of memory of both, and the bytes of the model."""

import sys
from pathlib import Path

import torch
import transformers
from peak_worker import resident

import growkern
from growkern.engine.forward_check import ForwardCheck
from growkern.model.tracing.traced import describe_by_tracing


def peak(run) -> tuple[int, object]:
    """Return by how much the resident memory of a function exceeds that before it, and what it returns."""
    start = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    result = run()
    return resident("VmHWM") - start, result


def main(layers: int) -> None:
    torch.set_num_threads(1)
    sizes = dict(n_embd=32, n_head=2, n_layer=1, vocab_size=97, n_positions=32)
    tokens = dict(bos_token_id=1, eos_token_id=2)
    describe_by_tracing(
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **tokens))
    )  # imports what is needed once
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=layers))
    described, spec = peak(lambda: describe_by_tracing(model))

    def check() -> None:
        own = ForwardCheck(model, spec.example, lambda: None)
        own.measure_rounding()
        own.compare(preserved=True)

    checked, _ = peak(check)
    n_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    assert isinstance(spec, growkern.ModelSpec) and "hidden" in spec.sizes
    print("peaks", described, checked, n_bytes)


if __name__ == "__main__":
    main(int(sys.argv[1]))
