"""Train in DeepSpeed on the CPU, save, gather and grow the checkpoint, and initialize anew, in one process of a group."""

import os
import signal
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from models import VOCAB, loss_of, make

import growkern
from growkern.cli.main import main as command_line

LIMIT = 600  # DeepSpeed compiles an operator when it is first initialized: four minutes on a busy machine


def error_of(model: object, optim: object) -> str:
    try:
        growkern.expand_inplace(model, optim, to="2x")
    except growkern.errors.GrowthError as error:
        return str(error)
    return "nothing"


def main(folder: Path, rank: int, world: int, stage: int) -> None:
    signal.alarm(LIMIT)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), DS_ACCELERATOR="cpu")  # fmt: skip
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29500")
    store, patience = f"file://{folder / 'store'}", timedelta(seconds=LIMIT // 2)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=patience)  # fmt: skip
    import deepspeed
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    deepspeed.init_distributed("gloo")
    config = {
        "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}, "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    }  # fmt: skip

    def initialized(model: torch.nn.Module):
        return deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())[0]  # fmt: skip

    def step(engine, ids: torch.Tensor) -> float:
        loss = loss_of(engine, ids)
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    generator = torch.Generator().manual_seed(rank)
    batches = [torch.randint(0, VOCAB, (2, 16), generator=generator) for _ in range(4)]
    model = make("llama", tied=False)
    engine = initialized(model)
    for ids in batches[:3]:
        step(engine, ids)
    found = {"refused": [error_of(model, None), error_of(engine, engine.optimizer), error_of(model, engine.optimizer)]}  # fmt: skip
    with torch.no_grad():
        found["before"] = float(loss_of(engine, batches[3]))
    engine.save_checkpoint(folder / "saved", tag="last")
    dist.barrier()
    if rank == 0:
        gathered = get_fp32_state_dict_from_zero_checkpoint(folder / "saved", tag="last")
        plain = transformers.AutoModelForCausalLM.from_config(model.config)
        plain.load_state_dict({name: t.clone() for name, t in gathered.items()})
        plain.save_pretrained(folder / "small")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="0"):
            to = ["--to", "hidden=48", "--to", "layers=3"]
            patch.setattr("sys.argv", ["growkern", "grow", f"{folder}/small", f"{folder}/grown", *to])  # fmt: skip
            command_line()
    dist.barrier()
    grown = transformers.AutoModelForCausalLM.from_pretrained(folder / "grown")
    engine = initialized(grown)
    found |= {"hidden": grown.config.hidden_size, "after": step(engine, batches[3])}
    found["next"] = step(engine, batches[3])
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
