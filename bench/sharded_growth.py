"""How long does a growth of a sharded model take, and how far is the prediction of ``growkern plan --ranks`` from it?

Processes of gloo on this machine grow a Llama of ``fully_shard`` with AdamW's state: by the rows that each reads, and, in turn, with
every source gathered whole (``whole_s``). In the same processes, a gathering of 64 MiB gives the bandwidth, one of 8 bytes the latency, a
copy the memory's bandwidth, and a growth of a tiny model the host's time per tensor; from these the time is predicted. Peak memory and
bytes received are exact, and tested (tests/distributed/test_sharded_memory.py).

    python -m bench.sharded_growth                # 2, 4 and 8 processes; rows go to bench/results/sharded-<device>.csv
    python -m bench.sharded_growth --predict      # tables for 7B, 70B and 405B; nothing is grown
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from time import perf_counter
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import growkern
from bench import harness
from growkern.execution.cost import Cost, cost_of
from growkern.execution.rows import SourceReader

SMALL = dict(vocab_size=4096, hidden_size=512, num_attention_heads=8, num_key_value_heads=8)
SMALL |= dict(intermediate_size=1536, num_hidden_layers=4)
CASES = {"twice as wide": {"hidden": 1024}, "twice as wide and deep": {"hidden": 1024, "layers": 8}}
RANKS, ROUNDS = (2, 4, 8), 3
COLUMNS = (
    "case", "n_ranks", "measured_s", "predicted_s", "measured_over_predicted", "whole_s", "received_mb", "bandwidth_gb_s", "latency_us",
    "host_us", "commit",
    "date", "device", "torch",
)  # fmt: skip
SEVEN = dict(vocab_size=32000, hidden_size=4096, num_attention_heads=32, num_key_value_heads=32)
SEVEN |= dict(intermediate_size=11008, num_hidden_layers=32)
SEVENTY = dict(vocab_size=128256, hidden_size=8192, num_attention_heads=64, num_key_value_heads=8)
SEVENTY |= dict(intermediate_size=28672, num_hidden_layers=80)
LARGE = {
    "7B to 13B": (SEVEN, {"hidden": 5120, "heads": 40, "kv_heads": 40, "ffn": 13824, "layers": 40}),
    "70B to 140B": (SEVENTY, {"layers": 160}),
    "70B to 405B": (SEVENTY, {"hidden": 16384, "heads": 128, "kv_heads": 16, "ffn": 53248, "layers": 126}),
}  # fmt: skip
# GPUs: bytes per second that a GPU receives, and seconds of a collective
LINKS = {8: (300e9, 60e-6), 64: (50e9, 250e-6), 512: (50e9, 1e-3), 4096: (50e9, 2e-3)}


def llama(sizes: dict[str, int]) -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def seconds_of(call) -> float:
    dist.barrier()
    start = perf_counter()
    call()
    return perf_counter() - start


def link(world: int) -> tuple[float, float, float]:
    """Measure the bandwidth at which this process receives, the latency of a gathering, and the memory's bandwidth."""

    def gather(n: int) -> float:
        own, whole = torch.zeros(n), torch.empty(n * world)
        return median(seconds_of(lambda: dist.all_gather_into_tensor(whole, own)) for _ in range(7))

    n = (64 << 20) // 4 // world
    latency, big = gather(2), torch.zeros(16 << 20)
    copied = median(seconds_of(big.clone) for _ in range(5))
    return 4 * n * (world - 1) / gather(n), latency, big.nbytes / copied


def host(rank: int) -> float:
    """Measure the host's seconds per grown tensor: a growth of a model without much to copy, in this process alone."""
    tiny = dict(SMALL, vocab_size=64, hidden_size=16, intermediate_size=32)
    times: list[float] = []
    for _ in range(ROUNDS):
        model, optim = made(tiny, DeviceMesh("cpu", [rank]))
        plan = growkern.plan(model, to={"hidden": 32})
        n_tensors = 3 * sum(map(plan.changes, plan.tensors))  # weights and AdamW's state
        start = perf_counter()
        growkern.expand_inplace(model, optim, plan=plan)
        times.append((perf_counter() - start) / n_tensors)
    return median(times)


def made(sizes: dict[str, int], mesh: DeviceMesh) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a sharded model with AdamW's state."""
    model = llama(sizes)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optim = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optim.step()
    optim.zero_grad()
    return model, optim


def measure(rank: int, world: int, folder: str) -> None:
    """Grow every case in one process of a group; the first process saves the rows."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    bandwidth, latency, memory = link(world)
    per_tensor = host(rank)
    rows: list[harness.Row] = []
    for case, to in CASES.items():
        times: dict[bool, list[float]] = {False: [], True: []}
        cost = None
        for whole in (False, True) * ROUNDS:
            model, optim = made(SMALL, init_device_mesh("cpu", (world,)))
            plan = growkern.plan(model, to=to)
            cost = cost_of(
                plan,
                world,
                bandwidth=bandwidth,
                latency=latency,
                memory_bandwidth=memory,
                host=per_tensor,
            )
            chooses = mock.patch.object(SourceReader, "of", lambda *_: None)
            with chooses if whole else nullcontext():
                times[whole].append(
                    seconds_of(lambda: growkern.expand_inplace(model, optim, plan=plan))  # noqa: B023
                )
        assert cost is not None, "ROUNDS is not 0"
        measured, predicted = median(times[False]), cost.total.seconds
        rows.append(
            {
                "case": case,
                "n_ranks": world,
                "measured_s": measured,
                "predicted_s": predicted,
                "measured_over_predicted": measured / predicted,
                "whole_s": median(times[True]),
                "received_mb": cost.total.n_bytes_received / 1e6,
                "bandwidth_gb_s": bandwidth / 1e9,
                "latency_us": latency * 1e6,
                "host_us": per_tensor * 1e6,
            }
        )
    if rank == 0:
        torch.save(rows, Path(folder) / "rows.pt")
    dist.destroy_process_group()


def measured() -> Iterator[harness.Row]:
    machine = harness.machine()
    for world in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(measure, (world, folder), nprocs=world)
            for row in torch.load(Path(folder) / "rows.pt"):
                yield row | {name: machine[name] for name in ("commit", "date", "device", "torch")}


def predicted(name: str, n_gpus: int) -> Cost:
    """Predict a growth of a large model: inside a node by NVLink, over nodes by 400 Gb/s per GPU, with more latency for more GPUs."""
    sizes, to = LARGE[name]
    with torch.device("meta"):
        plan = growkern.plan(llama(sizes), to=to)
    bandwidth, latency = LINKS[n_gpus]
    return cost_of(plan, n_gpus, bandwidth=bandwidth, latency=latency)


def tables() -> None:
    """Print a line per large model and number of GPUs, as Markdown."""
    print("| growth | GPUs | shards before, after | peak beyond, stage / lean | received | time |")
    print("|---|---|---|---|---|---|")
    for name in LARGE:
        for n in LINKS:
            cost = predicted(name, n)
            shards = cost.n_bytes_source, cost.n_bytes_target
            gb = [f"{b / 1e9:.3g}" for b in (*shards, *cost.peak_bytes.values())]
            received = f"{cost.total.n_bytes_received / 1e9:.3g} GB"
            cells = name, f"{n:,}", f"{gb[0]}, {gb[1]} GB", f"{gb[2]} / {gb[3]} GB", received
            print(f"| {' | '.join(cells)} | {cost.total.seconds:.2g} s |")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sharded_growth", description=__doc__)
    parser.add_argument("--predict", action="store_true", help="print tables for large models")
    if parser.parse_args().predict:
        tables()
        return
    path = harness.RESULTS / f"sharded-{harness.slug(harness.machine()['device'])}.csv"
    harness.record(path, COLUMNS, measured(), 8)


if __name__ == "__main__":
    main()
