"""Train and grow in an engine that shards, in one process of a group, and save what the case ended with."""

import os
import signal
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from time import perf_counter

import lightning.pytorch as lightning
import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from lightning.pytorch.strategies import ModelParallelStrategy
from models import VOCAB, Words, exact_norms, loss_of, make
from readme import IN_PROCESSES
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from transformers.distributed import DistributedConfig

import growkern
from growkern.cli.main import main as command_line
from growkern.distributed import zero as zero_state
from growkern.integrations import accelerate, hf
from growkern.integrations.lightning import GrowthCallback
from growkern.support.names import canonical

LIMIT = 240  # seconds of a case; a process that waits for another in vain ends before
STEPS, AT, PER_RANK = 15, 5, 2
TO = {"hidden": 36, "ffn": 60, "layers": 3}
ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
ZERO = {
    "adamw": (torch.optim.AdamW, dict(lr=1e-2, weight_decay=0.1)),
    "sgd": (torch.optim.SGD, dict(lr=1e-1, momentum=0.9)),
}


def joined(step: int, world: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCAB, (world * PER_RANK, 16), generator=generator)


def own(step: int, rank: int, world: int) -> torch.Tensor:
    return joined(step, world).chunk(world)[rank]


def mean_of(loss: torch.Tensor) -> float:
    """Return the mean of a loss over all processes."""
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return float(mean / dist.get_world_size())


def schedule_of(**options: object) -> growkern.GrowthSchedule:
    return growkern.GrowthSchedule([growkern.At(step=AT, to=TO, **options)])


def cosine(optim: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optim, 40)


def llama(**options: object) -> nn.Module:
    return make("llama", **({"tied": False} | options)).double()


def alone(
    world: int, tied: bool = False, clips: bool = True, n_batches: int = STEPS, rate_steps: int = 1,
    kind: str = "adamw", **how: object,
) -> dict[str, object]:  # fmt: skip
    """Train in one process on the joined batch, and grow by hand."""
    model = llama(tied=tied)
    optim = ZERO[kind][0](model.parameters(), **ZERO[kind][1])
    scheduler, losses = cosine(optim) if rate_steps else None, list[float]()
    for step in range(STEPS):
        loss = loss_of(model, joined(step % n_batches, world))
        loss.backward()
        if clips:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        if step + 1 == AT:
            growkern.expand_inplace(model, optim, to=TO, scheduler=scheduler, **how)
        for _ in range(rate_steps):
            scheduler.step()
        optim.zero_grad()
        losses.append(float(loss.detach()))
    return {"losses": losses, "weights": weights_of(model), "state": optim.state_dict()}


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    whole = {canonical(name): p.detach() for name, p in model.named_parameters()}
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in whole.items()}


def as_on_accelerators() -> None:
    """Let Accelerate take these processes for processes on accelerators: on CPUs it enters DDP, and drops the plugin of FSDP in silence
    (accelerate 1.15, state.py: ``elif self.distributed_type in [MULTI_GPU, ...]``)."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)


def plugin(state_dict_type: str, **options: object) -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        state_dict_type=state_dict_type, cpu_ram_efficient_loading=False, **options,
    )  # fmt: skip


def unforced(folder: Path, rank: int, world: int) -> dict[str, object]:
    """Ask Accelerate and transformers for FSDP2 on CPUs."""
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin("FULL_STATE_DICT"))
    found = {"accelerate": accelerator.distributed_type.name}
    AcceleratorState._reset_state(True)
    trainer = trainer_of(llama(), folder, use_cpu=True)
    return found | {"trainer": trainer.accelerator.distributed_type.name, "fsdp": trainer.is_fsdp_enabled}  # fmt: skip


def accelerated(folder: Path, rank: int, world: int, kind: str, tied: bool, **options: object) -> dict[str, object]:  # fmt: skip
    """Grow by hand with the prepared objects, and by the hook; save before and after the growth, and resume; tied, without a scheduler."""
    as_on_accelerators()

    def prepared(by_hand: bool = False):
        AcceleratorState._reset_state(True)
        accelerator, model = Accelerator(fsdp_plugin=plugin(kind, **options)), llama(tied=tied)
        optim = ADAMW(model.parameters())
        model, optim, *schedulers = accelerator.prepare(model, optim, *[cosine(optim)][tied:])
        schedule = schedule_of()
        if not by_hand:
            accelerate.attach(accelerator, model, optim, schedule)
        return accelerator, model, optim, schedulers, schedule

    def train(accelerator, model, optim, schedulers, schedule, first=0, saves=()):
        losses = []
        for step in range(first, STEPS):
            loss = loss_of(model, own(step, rank, world))
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optim.step()
            if step + 1 == AT and schedule.attachment is None:
                growkern.expand_inplace(model, optim, to=TO, scheduler=schedulers or None)
            for scheduler in schedulers:
                scheduler.step()
            optim.zero_grad()
            losses.append(mean_of(loss))
            if step + 1 in saves:
                accelerator.save_state(str(folder / f"state-{step + 1}"))
        return losses

    found: dict[str, object] = {}
    for name in ("by hand", "by the hook"):
        parts = prepared(by_hand=name == "by hand")
        kept = {id(p) for p in parts[1].parameters()}
        losses = train(*parts, saves=(AT - 1, AT + 2) if name == "by the hook" else ())
        found[name] = {"losses": losses, "weights": weights_of(parts[1])}
        found[name]["kept"] = kept <= {id(p) for p in parts[1].parameters()}
        found[name]["type"] = parts[0].distributed_type.name
    for at in (AT - 1, AT + 2):  # before and after the growth
        parts = prepared()
        parts[0].load_state(str(folder / f"state-{at}"))
        steps = parts[4].counts.n_steps
        losses = train(*parts, first=at)
        found["resumed", at] = {"losses": losses, "weights": weights_of(parts[1])}
        found["resumed", at] |= {"counted": steps, "fired": parts[4].fired}
    return found


class Watched(transformers.TrainerCallback):
    """Keep which parameters a trainer has when training begins, and whether they are those with which it ends."""

    def on_train_begin(self, args, state, control, model=None, **_) -> None:
        self.began = {id(p) for p in model.parameters()}

    def on_train_end(self, args, state, control, model=None, **_) -> None:
        self.kept = self.began <= {id(p) for p in model.parameters()}


def trainer_of(model: nn.Module, out: Path, **changes: object) -> transformers.Trainer:
    options = dict(
        output_dir=str(out), max_steps=STEPS, per_device_train_batch_size=PER_RANK, learning_rate=1e-2, lr_scheduler_type="cosine",
        logging_steps=1, save_strategy="steps", save_steps=2, report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
        train_sampling_strategy="sequential", fsdp=True,
    )  # fmt: skip
    arguments = transformers.TrainingArguments(**(options | changes))
    losses: list[torch.Tensor] = []

    def loss_in_float64(
        outputs, labels, num_items_in_batch=None
    ):  # that of the model is in float32
        scores = outputs.logits[:, :-1].flatten(0, 1)
        total = nn.functional.cross_entropy(scores, labels[:, 1:].flatten(), reduction="sum")
        losses.append(total.detach() / num_items_in_batch * dist.get_world_size())
        return total / num_items_in_batch

    words = Words(64)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=words, compute_loss_func=loss_in_float64)  # fmt: skip
    trainer.losses, trainer.watched = losses, Watched()
    trainer.add_callback(trainer.watched)
    return trainer


def trained_alone(world: int) -> dict[str, object]:
    """Train as the trainer does, in one process on the joined batch."""
    model, words, n = llama(), Words(64), world * PER_RANK
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    scheduler, losses = transformers.get_scheduler("cosine", optim, 0, STEPS), list[float]()
    for step in range(STEPS):
        ids = torch.stack([words[step * n + i]["input_ids"] for i in range(n)])
        loss = loss_of(model, ids)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        scheduler.step()
        optim.zero_grad()
        if step + 1 == AT:
            growkern.expand_inplace(model, optim, to=TO, scheduler=scheduler)
        losses.append(float(loss.detach()))
    return {"losses": losses, "weights": weights_of(model)}


def run_trainer(trainer: transformers.Trainer, **options: object) -> dict[str, object]:
    schedule = schedule_of()
    hf.attach(trainer, schedule)
    trainer.train(**options)
    model = trainer.model
    found = {"losses": [mean_of(loss) for loss in trainer.losses], "weights": weights_of(model)}
    found |= {"kept": trainer.watched.kept, "fired": schedule.fired}
    return found | {"managed": sum(isinstance(m, FSDPModule) for m in model.modules())}


def trainer(folder: Path, rank: int, world: int, kind: str) -> dict[str, object]:
    as_on_accelerators()
    options = dict(fsdp_config={"version": 2, "state_dict_type": kind})
    found = {"unbroken": run_trainer(trainer_of(llama(), folder / "out", **options))}
    for at in (2, 6):  # before and after the growth
        again = trainer_of(llama(), folder / f"again-{at}", **options)
        checkpoint = str(folder / "out" / f"checkpoint-{at}")
        found["resumed", at] = run_trainer(again, resume_from_checkpoint=checkpoint)
    return found


def sharded_by_transformers(folder: Path, rank: int, world: int) -> dict[str, object]:
    """Train a model that ``from_pretrained`` has sharded, which Trainer runs on CPUs as it is."""
    if rank == 0:
        llama().save_pretrained(folder / "start")
    dist.barrier()
    config = DistributedConfig(fsdp_size=world)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "start", dtype=torch.float64, distributed_config=config
    )
    options = dict(fsdp=None, use_cpu=True, save_only_model=True, ddp_backend="gloo")
    found = run_trainer(trainer_of(model, folder / "out", **options))
    saved = transformers.AutoModelForCausalLM.from_pretrained(folder / "out" / f"checkpoint-{STEPS}", dtype=torch.float64)  # fmt: skip
    return found | {"saved": weights_of(saved)}


def example(folder: Path, rank: int, world: int) -> dict[str, object]:
    """Run README's loop under FSDP2 with Trainer, in fewer steps."""
    as_on_accelerators()
    arguments = partial(transformers.TrainingArguments, report_to=[], disable_tqdm=True, save_strategy="no")  # fmt: skip
    names = {"TrainingArguments": arguments, "Trainer": transformers.Trainer, "growkern": growkern}
    text = (
        IN_PROCESSES["trainer"]
        .replace("4000", "4")
        .replace("1000", "2")
        .replace("out", str(folder / "out"))
    )
    names |= {"model": make("llama", tied=False), "dataset": Words(64)}
    exec(text, names)
    model = names["trainer"].model
    managed = sum(isinstance(m, FSDPModule) for m in model.modules())
    return {"hidden": model.config.hidden_size, "steps": names["trainer"].state.global_step, "managed": managed}  # fmt: skip


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.losses = llama(), list[float]()

    def configure_model(self) -> None:
        if not isinstance(self.model, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            for block in self.model.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def training_step(self, ids: torch.Tensor, index: int) -> torch.Tensor:
        loss = loss_of(self.model, ids)
        self.losses.append(mean_of(loss))
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        optim = ADAMW(self.model.parameters())
        return {"optimizer": optim, "lr_scheduler": {"scheduler": cosine(optim), "interval": "step"}}  # fmt: skip

    def on_train_start(self) -> None:
        self.began = {id(p) for p in self.model.parameters()}


def model_parallel(folder: Path, rank: int, world: int, sharded: bool) -> dict[str, object]:
    # as torchrun would: processes that exist, in a group that exists
    os.environ.update(GROUP_RANK="0", LOCAL_WORLD_SIZE=str(world), TORCHELASTIC_RUN_ID="run")

    # epochs of three batches: Lightning resumes at the end of one
    loader = torch.utils.data.DataLoader([own(step, rank, world) for step in range(3)], batch_size=None)  # fmt: skip

    def parts(out: str):
        schedule = schedule_of()
        saves = lightning.callbacks.ModelCheckpoint(folder / out, filename="{step}", every_n_train_steps=3, save_top_k=-1)  # fmt: skip
        strategy = ModelParallelStrategy(world, 1, save_distributed_checkpoint=sharded)
        trainer = lightning.Trainer(
            max_epochs=STEPS // 3, accelerator="cpu", devices=world, strategy=strategy, logger=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False, callbacks=[saves, GrowthCallback(schedule)],
        )  # fmt: skip
        return Module(), schedule, trainer

    found: dict[object, object] = {}
    for at in (None, 3, 6):
        module, schedule, trainer = parts("unbroken" if at is None else f"resumed-{at}")
        path = None if at is None else str(folder / "unbroken" / f"step={at}.ckpt")
        trainer.fit(module, loader, ckpt_path=path)
        kept = module.began <= {id(p) for p in module.model.parameters()}
        run = {"losses": module.losses, "weights": weights_of(module.model), "fired": schedule.fired, "kept": kept}  # fmt: skip
        found["unbroken" if at is None else ("resumed", at)] = run
    return found


def zero_redundancy(folder: Path, rank: int, world: int, kind: str, refused: bool = False, **how: object) -> dict[str, object]:  # fmt: skip
    """Grow under ZeroRedundancyOptimizer by hand, by a schedule, and after a resume, or by the way out that its refusal names."""
    found: dict[str, object] = {}
    for name in ["way out"] if refused else ["by hand", "by a schedule", "resumed"]:
        model = llama()
        ddp = nn.parallel.DistributedDataParallel(model)
        zero = ZeroRedundancyOptimizer(model.parameters(), *ZERO[kind][:1], parameters_as_bucket_view=refused, **ZERO[kind][1])  # fmt: skip
        kept, scheduler = {id(p) for p in model.parameters()}, cosine(zero)
        run, first = {"losses": [], "refused": [], "failed": []}, 0
        if name == "by a schedule":
            schedule_of(**how).attach(model, zero, scheduler)
        if name == "resumed":
            first, saved = 6, torch.load(folder / "saved.pt")
            growkern.resume(model, zero, saved[1], scheduler=scheduler)
            for part, state in zip((model, zero, scheduler), saved, strict=True):
                part.load_state_dict(state)
        for step in range(first, STEPS):
            loss = loss_of(ddp, own(step, rank, world))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            zero.step()
            if step + 1 == AT and name != "by a schedule":
                run["refused"] = [error_of(model, optim) for optim in (zero.optim, None)]
                if refused:
                    run["refused"].append(error_of(model, zero))
                    zero, scheduler = regrown(model, zero, scheduler, rank)
                else:
                    run["failed"] = failing(model, zero, rank)
                    growkern.expand_inplace(model, zero, to=TO, scheduler=scheduler, **how)
            scheduler.step()
            zero.zero_grad()
            run["losses"].append(mean_of(loss))
            if step == 5 and name == "by hand":
                zero.consolidate_state_dict()
                if rank == 0:
                    torch.save([part.state_dict() for part in (model, zero, scheduler)], folder / "saved.pt")  # fmt: skip
                dist.barrier()
        held = [p for group in zero.optim.param_groups for p in group["params"]]
        run |= {"weights": weights_of(model), "kept": kept <= {id(p) for p in model.parameters()}}
        found[name] = run | {"held": (len(held), len(zero.optim.state), len([*model.parameters()]))}
        zero.consolidate_state_dict()
        found["state"] = zero.state_dict() if rank == 0 else None
    return found


def failing(model: nn.Module, zero: ZeroRedundancyOptimizer, rank: int) -> list[object]:
    """Let a growth fail at several places in one process, and return the errors, whether all is as before, and the seconds."""

    def state():
        sums = [float(t.sum()) for p in zero.optim.state for t in zero.optim.state[p].values() if torch.is_tensor(t)]  # fmt: skip
        shapes = [tuple(p.shape) for group in zero.optim.param_groups for p in group["params"]]
        return [id(zero.optim.state), sums, shapes, weights_of(model)["model.norm.weight"].sum()]

    def once(*_: object, **__: object) -> None:
        if not raised:  # a rollback calls the function again
            raised.append(1)
            raise MemoryError("only here")

    def no_memory(*_: object, **how: object) -> None:
        if "device" in how:  # of state of another process; votes allocate too
            raise MemoryError("only here")

    def interrupts(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)

    before, found, raised = state(), list[object](), list[int]()
    places = [
        (zero_state, "_blank", once),
        (torch, "empty_like", no_memory),
        (dist, "broadcast", interrupts),
    ]
    for place, name, fault in (*places, (zero_state, "_assign", once), (None, "", once)):
        start, options = perf_counter(), dict[str, object]()
        raised.clear()
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1 and place is None:
                options = dict(on_progress=fault)
            elif rank == 1:
                original = getattr(place, name)
                patch.setattr(place, name, partial(_faulty, original, fault))
            try:
                growkern.expand_inplace(model, zero, to=TO, **options)
                error = None
            except BaseException as caught:
                error = f"{type(caught).__name__}: {caught}"
        found.append((name, error, before == state(), perf_counter() - start))
    return found


def _faulty(original: Callable[..., object], fault: Callable[..., None], *given: object, **how: object) -> object:  # fmt: skip
    fault(*given, **how)
    return original(*given, **how)


def regrown(model, zero, scheduler, rank):
    """Gather the state, grow with an ordinary AdamW, and shard the state anew."""
    zero.consolidate_state_dict()
    state = [zero.state_dict() if rank == 0 else None]
    dist.broadcast_object_list(state)
    whole = torch.optim.AdamW(model.parameters())
    whole.load_state_dict(state[0])
    zero.optim.state.clear()
    for p in model.parameters():  # no views of the buckets any more
        p.data = p.detach().clone()
    scheduled = cosine(whole)
    scheduled.load_state_dict(scheduler.state_dict())
    growkern.expand_inplace(model, whole, to=TO, scheduler=scheduled)
    zero = ZeroRedundancyOptimizer(whole.param_groups, torch.optim.AdamW)
    for group in zero.optim.param_groups:
        for p in group["params"]:
            zero.optim.state[p] = whole.state[p]
    scheduler = cosine(zero)
    scheduler.load_state_dict(scheduled.state_dict())
    return zero, scheduler


def error_of(model: nn.Module, optim: object) -> str:
    try:
        growkern.expand_inplace(model, optim, to=TO)
    except growkern.errors.GrowthError as error:
        return str(error)
    return "nothing"


def flat(folder: Path, rank: int, world: int) -> dict[str, object]:
    """Refuse models inside FSDP1, and take the way over a checkpoint."""
    found: dict[str, object] = {"refused": [], "attached": []}
    for keeps in (True, False):
        inner = llama()
        wrapped = FullyShardedDataParallel(inner, use_orig_params=keeps, device_id=torch.device("cpu"))  # fmt: skip
        optim = ADAMW(wrapped.parameters())
        for step in range(2):
            loss_of(wrapped, own(step, rank, world)).backward()
            optim.step()
            optim.zero_grad()
        found["refused"] += [error_of(wrapped, optim), error_of(inner, optim)]
        try:
            schedule_of().attach(inner, optim)
        except growkern.errors.GrowthError as error:
            found["attached"].append(str(error))
    with torch.no_grad():
        found["before"] = mean_of(loss_of(wrapped, own(3, rank, world)))

    with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
        if rank == 0:
            inner.save_pretrained(folder / "flat")
    if rank == 0:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="0"):
            to = ["--to", "hidden=36", "--to", "layers=3"]
            patch.setattr("sys.argv", ["growkern", "grow", f"{folder}/flat", f"{folder}/grown", *to])  # fmt: skip
            command_line()
    dist.barrier()
    grown = transformers.AutoModelForCausalLM.from_pretrained(folder / "grown", dtype=torch.float64)
    wrapped = FullyShardedDataParallel(grown, device_id=torch.device("cpu"))
    with torch.no_grad():
        found["after"] = mean_of(loss_of(wrapped, own(3, rank, world)))
    return found | {"hidden": grown.config.hidden_size}


ALONE = {  # a scheduler that Accelerate has prepared steps once per process
    "accelerate": partial(alone, rate_steps=2),
    "accelerate tied": partial(alone, rate_steps=0, tied=True),
    "trainer": trained_alone,
    "sharded by transformers": trained_alone,
    "lightning": partial(alone, clips=False, n_batches=3),
    "zero sgd": partial(alone, kind="sgd"),
    "zero exact": partial(alone, dynamics="exact"),
}
CASES = {
    "unforced": unforced,
    "accelerate": partial(accelerated, kind="SHARDED_STATE_DICT", tied=False),
    "accelerate tied, full": partial(accelerated, kind="FULL_STATE_DICT", tied=True),
    "accelerate, checkpointed": partial(
        accelerated, kind="SHARDED_STATE_DICT", tied=False, activation_checkpointing=True
    ),
    "accelerate, checkpointed, full": partial(
        accelerated, kind="FULL_STATE_DICT", tied=False, activation_checkpointing=True
    ),
    "trainer": partial(trainer, kind="FULL_STATE_DICT"),
    "trainer, sharded": partial(trainer, kind="SHARDED_STATE_DICT"),
    "sharded by transformers": sharded_by_transformers,
    "example": example,
    "lightning": partial(model_parallel, sharded=True),
    "lightning, full": partial(model_parallel, sharded=False),
    "zero adamw": partial(zero_redundancy, kind="adamw"),
    "zero sgd": partial(zero_redundancy, kind="sgd"),
    "zero exact": partial(zero_redundancy, kind="adamw", dynamics="exact"),
    "zero way out": partial(zero_redundancy, kind="adamw", refused=True),
    "fsdp1": flat,
}


def main(folder: Path, rank: int, world: int, case: str) -> None:
    signal.alarm(LIMIT)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="localhost"
    )
    store, patience = f"file://{folder / 'store'}", timedelta(seconds=LIMIT // 2)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=patience)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        exact_norms(patch)
        found = CASES[case](folder, rank, world)
        if rank == 0:
            found["alone"] = ALONE.get(case.partition(",")[0], alone)(world)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
