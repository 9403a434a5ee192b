"""Wrap models as other libraries do, in a process of its own; print the errors of growths: ``main(what)``."""

import os
from collections.abc import Iterable

import torch
from models import make
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import growkern


def refused(models: Iterable[nn.Module], *rest: object) -> None:
    for model in models:
        try:
            growkern.expand_inplace(model, *rest)
        except growkern.errors.UnsupportedModelError as error:
            print("REFUSED", str(error).replace("\n", " "))


def wrapped() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    cpu = torch.device("cpu")
    refused([FullyShardedDataParallel(make("llama", tied=False), device_id=cpu)])
    refused([nn.DataParallel(make("llama", tied=False))])


def adapters() -> None:
    import peft

    lora = peft.LoraConfig(target_modules=["q_proj"])
    outside, inside = (make("llama", tied=False) for _ in range(2))
    outside = peft.get_peft_model(outside, lora)
    inside.add_adapter(lora)
    refused([outside, outside.base_model, outside.base_model.model, inside])
    merged = outside.merge_and_unload()
    growkern.expand_inplace(merged)
    print("GREW", merged.config.hidden_size)


def engine() -> None:
    import deepspeed

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")  # fmt: skip
    model = make("llama", tied=False)
    adam = dict(type="Adam", params=dict(lr=1e-3, torch_adam=True))
    made, optim, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=dict(train_batch_size=1, optimizer=adam)
    )  # fmt: skip
    refused((made, model), optim)


def main(what: str) -> None:
    torch.set_num_threads(1)
    {"wrapped": wrapped, "adapters": adapters, "engine": engine}[what]()
