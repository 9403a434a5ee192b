"""Save a checkpoint of ``torch.distributed.checkpoint``, or grow it and print the peak of the process's memory."""

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import transformers
from peak_worker import resident
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)

import growkern
from growkern.support import memory

SMALL, BIG = (64, 100, 2), (512, 16384, 4)  # hidden, vocab, layers


def make(hidden: int, vocab: int, layers: int) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        hidden_size=hidden, num_attention_heads=8, num_key_value_heads=4, intermediate_size=2 * hidden, num_hidden_layers=layers,
        vocab_size=vocab,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def save(sizes: tuple[int, int, int], path: Path) -> None:
    model = make(*sizes)
    optim = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optim.step()
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optim, options=flat)
    dcp.save({"model": get_model_state_dict(model), "optim": state}, checkpoint_id=path)


def grow(sizes: tuple[int, int, int], path: Path, out: Path) -> growkern.checkpoints.grow.GrownCheckpoint:  # fmt: skip
    with torch.device("meta"):
        model = make(*sizes)
    return growkern.dcp.grow(path, out, model, torch.optim.AdamW(model.parameters()))


def main(folder: Path, what: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if what == "save":
        save(SMALL, folder / "small")
        save(BIG, folder / "big")
        return
    grow(SMALL, folder / "small", folder / "first")
    peaks = list[int]()
    for name in (
        "again",
        "grown",
    ):  # on a busy machine, a thread of the writer lets go of a tensor late
        memory.trim()
        start = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        grown = grow(BIG, folder / "big", folder / name)
        peaks.append(resident("VmHWM") - start)
    stored = dcp.FileSystemReader(folder / "grown").read_metadata().state_dict_metadata.values()
    largest = max(4 * one.size.numel() for one in stored if hasattr(one, "size"))
    print("peak", min(peaks), largest, *grown.n_bytes)
