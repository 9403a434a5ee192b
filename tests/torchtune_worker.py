"""Train in torchtune's recipe on the CPU, in one process of a group, grow in the middle, and resume from its checkpoints."""

import os
import shutil
import signal
import warnings
from datetime import timedelta
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from models import VOCAB
from torch import nn
from torch.distributed.tensor import DTensor

import growkern
from growkern import Blocks, ModelSpec, Power, embedding, linear, norm

LIMIT, AT, EPOCHS, BATCH, PER_EPOCH = 240, 5, 5, 4, 3  # 15 steps; a checkpoint after every third
SOURCE = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32, "intermediate_dim": 48}  # fmt: skip
TARGET = {"num_layers": 3, "num_heads": 6, "num_kv_heads": 3, "embed_dim": 48, "intermediate_dim": 72}  # fmt: skip
EVEN = TARGET | {"num_heads": 8, "num_kv_heads": 4, "embed_dim": 64}  # divides over two processes
SIZES = dict(zip(SOURCE, ("layers", "heads", "kv_heads", "hidden", "ffn"), strict=True))


def llama3(model: nn.Module, parts: int = 1) -> ModelSpec:
    """Describe torchtune's Llama 3; under tensor parallel, its attention caches the sizes of one of ``parts`` processes."""

    def rms(name: str, writes: str) -> dict[str, object]:
        return {f"{name}.scale": norm(name, reads="residual", writes=writes, kind="rms")[f"{name}.weight"]}  # fmt: skip

    normed, tensors = "residual:normed", embedding("tok_embeddings", rows="vocab", writes="residual")  # fmt: skip
    attributes: dict[str, object] = {"num_heads": "heads", "norm.normalized_shape": "hidden"}
    for i in range(len(model.layers)):
        at, kv, ffn = f"layers.{i}", f"kv_heads.{i}", f"ffn.{i}"
        query = kv, f"group.{i}"
        writes = {"q_proj": (*query, "head_dim:query"), "k_proj": (kv, "head_dim:key"), "v_proj": (kv, "head_dim:value")}  # fmt: skip
        tensors |= rms(f"{at}.sa_norm", normed) | rms(f"{at}.mlp_norm", normed)
        for name, rows in writes.items():
            tensors |= linear(f"{at}.attn.{name}", reads=normed, writes=rows, bias=False)
        tensors |= linear(f"{at}.attn.output_proj", reads=(*query, "head_dim:value"), writes="residual", bias=False)  # fmt: skip
        for name in ("w1", "w3"):
            tensors |= linear(f"{at}.mlp.{name}", reads=normed, writes=ffn, bias=False)
        tensors |= linear(f"{at}.mlp.w2", reads=ffn, writes="residual", bias=False)
        for name in ("num_heads", "num_kv_heads", "embed_dim"):
            attributes[f"{at}.attn.{name}"] = Power(SIZES[name], 1.0, base=parts)
        for name in ("sa_norm", "mlp_norm"):
            attributes[f"{at}.{name}.normalized_shape"] = "hidden"
    tensors |= rms("norm", "residual:final")
    tensors |= linear("output", reads="residual:final", writes="vocab", bias=False)
    first = model.layers[0]
    sizes = {"hidden": model.tok_embeddings.weight.shape[1], "ffn": first.mlp.w1.weight.shape[0], "layers": len(model.layers)}  # fmt: skip
    sizes |= {"heads": first.attn.num_heads * parts, "kv_heads": first.attn.num_kv_heads * parts}
    return ModelSpec(
        "torchtune.llama3", sizes | {"head_dim": first.attn.head_dim, "vocab": VOCAB}, tensors,
        blocks=Blocks("layers", identity={"attn.output_proj.weight": 0.0, "mlp.w2.weight": 0.0}), attributes=attributes,
    )  # fmt: skip


class Tokenizer:
    pad_id = 0


class Texts(torch.utils.data.Dataset):
    """Sequences of several lengths, of which the first tokens are a prompt without loss."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        pass

    def __len__(self) -> int:
        return BATCH * PER_EPOCH

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(1, VOCAB, (16 + i % 5,), generator=generator).tolist()
        n = 1 + i % 3
        return {"tokens": ids, "labels": [-100] * n + ids[n:]}


class Losses:
    """Metric logger that keeps the losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def log_config(self, config: object) -> None:
        pass

    def log_dict(self, metrics: dict[str, object], step: int) -> None:
        self.losses.append(float(metrics["loss"]))


def checkpointer(**options: object):
    """Return torchtune's checkpointer, which keeps the recipe's state of the last epoch only; this one keeps every epoch's."""
    from torchtune.training import FullModelTorchTuneCheckpointer

    class Checkpointer(FullModelTorchTuneCheckpointer):
        def save_checkpoint(self, state, epoch: int, **rest) -> None:
            super().save_checkpoint(state, epoch, **rest)
            saved = self._output_dir / "recipe_state" / "recipe_state.pt"
            if saved.exists():
                shutil.copy(saved, self._output_dir / f"epoch_{epoch}")

    return Checkpointer(**options)


def on_cpus(patch: pytest.MonkeyPatch) -> ModuleType:
    """Let torchtune's recipe, which logs the memory of accelerators and casts to float32, run on the CPU in float64; return its module."""
    import torchtune
    from torchtune import training

    patch.setattr(training, "get_memory_stats", lambda device: {})
    patch.setattr(training, "log_memory_stats", lambda stats: None)
    patch.setattr(training, "cleanup_before_training", lambda: None)
    patch.setattr(torch.Tensor, "float", lambda x: x)  # of norms, rotary embeddings and logits
    patch.setenv("TORCH_COMPILE_BACKEND", "eager")
    # no package: `tune run` runs a file of this folder
    recipes = Path(torchtune.__file__).parent.parent / "recipes"
    found = spec_from_file_location("recipe", recipes / "full_finetune_distributed.py")
    assert found is not None and found.loader is not None
    recipe = module_from_spec(found)
    found.loader.exec_module(recipe)
    patch.setattr(recipe, "init_process_group", lambda backend: None)  # it is initialized below
    return recipe


def config_of(folder: Path, name: str, sizes: dict[str, int], epoch: int | None, **options: object):
    """Return a config of the recipe: a fresh run, or one that resumes after ``epoch``."""
    from omegaconf import OmegaConf

    parts = options.get("tensor_parallel_dim", 1)
    fresh = {"checkpoint_files": ["model.pt"]}
    saved = {"checkpoint_files": [f"epoch_{epoch}/model-00001-of-00001.bin"]}
    saved["recipe_checkpoint"] = f"epoch_{epoch}/recipe_state.pt"
    return OmegaConf.create({
        "model": {"_component_": "torchtune.models.llama3.llama3", "vocab_size": VOCAB, "max_seq_len": 32, **sizes},
        "tokenizer": {"_component_": "torchtune_worker.Tokenizer"}, "dataset": {"_component_": "torchtune_worker.Texts"},
        "metric_logger": {"_component_": "torchtune_worker.Losses"},
        "checkpointer": {
            "_component_": "torchtune_worker.checkpointer", "checkpoint_dir": str(folder / f"source-{dist.get_rank()}"),
            "output_dir": str(folder / name), "model_type": "LLAMA3", **(fresh if epoch is None else saved),
        },
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-2, "weight_decay": 0.1},
        "lr_scheduler": {"_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_warmup_steps": 2},
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "resume_from_checkpoint": epoch is not None, "output_dir": str(folder / name), "device": "cpu", "dtype": "fp64", "seed": 0,
        "shuffle": True, "batch_size": BATCH * parts // dist.get_world_size(), "epochs": EPOCHS, "max_steps_per_epoch": None,
        "gradient_accumulation_steps": 1, "clip_grad_norm": 1.0, **options,
    })  # fmt: skip


def whole(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t.detach().clone()


def trained(recipe: ModuleType, config, target: dict[str, int], epsilons: dict[str, float]) -> dict[str, object]:  # fmt: skip
    """Train to the end and grow on the way, or set the ``epsilons`` of a grown checkpoint again, which torchtune does not save."""
    parts = config.get("tensor_parallel_dim", 1)
    # torchtune logs one learning rate for all param groups: dynamics=None splits none
    growth = {"to": {SIZES[name]: n for name, n in target.items()}, "dynamics": None}

    class GrowingRecipe(recipe.FullFinetuneRecipeDistributed):
        def setup(self, cfg) -> None:
            super().setup(cfg)
            model, self.fired, self.epsilons = self._model, [], {}
            if (ahead := AT - self.global_step) > 0:
                schedule = growkern.GrowthSchedule([growkern.At(step=ahead, **growth)])
                schedule.attach(model, self._optimizer, self._lr_scheduler, spec=lambda m: llama3(m, parts))  # fmt: skip
                self.epsilons = growkern.plan(model, spec=llama3(model, parts), **growth).eps
                self.fired = schedule.fired
            else:
                for name, factor in epsilons.items():
                    model.get_submodule(name.rpartition(".")[0]).eps *= factor

    run = GrowingRecipe(config)
    run.setup(config)
    kept = {id(p) for p in run._model.parameters()}
    run.train()
    names = growkern.support.names.named_parameters(run._model)
    return {
        "losses": run._metric_logger.losses if dist.get_rank() == 0 else None, "weights": {n: whole(p) for n, p in names},
        "fired": run.fired, "epsilons": dict(run.epsilons), "kept": kept <= {id(p) for p in run._model.parameters()},
        "heads": {(b.attn.num_heads, b.attn.num_kv_heads, type(b.attn.num_heads)) for b in run._model.layers},
    }  # fmt: skip


def main(folder: Path, rank: int, world: int) -> None:
    signal.alarm(LIMIT)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # torchtune divides the loss by an integer tensor
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    store, patience = f"file://{folder / 'store'}", timedelta(seconds=LIMIT // 2)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=patience)  # fmt: skip
    from torchtune.models.llama3 import llama3 as build

    torch.manual_seed(0)
    source = folder / f"source-{rank}"
    source.mkdir()
    torch.save(build(vocab_size=VOCAB, max_seq_len=32, **SOURCE).state_dict(), source / "model.pt")
    with pytest.MonkeyPatch.context() as patch:
        recipe = on_cpus(patch)

        def run(name: str, sizes=SOURCE, target=TARGET, epoch=None, epsilons=(), **options):
            return trained(recipe, config_of(folder, name, sizes, epoch, **options), target, dict(epsilons))  # fmt: skip

        plan = {"_component_": "torchtune.models.llama3.base_llama_tp_plan"}
        # the gains of the norms are plain tensors, and clip_grad_norm_ refuses them beside DTensors
        parallel = {"tensor_parallel_dim": world, "tensor_parallel_plan": plan, "clip_grad_norm": None}  # fmt: skip
        found = {"unbroken": run("run"), "parallel": run("parallel", target=EVEN, **parallel)}
        if world > 1:
            found["compiled"] = run("compiled", compile=True, enable_activation_checkpointing=True)
            epsilons = found["unbroken"]["epsilons"]
            found["resumed", 6] = run("run", TARGET, epoch=1, epsilons=epsilons)
            found["resumed", 3] = run("run", epoch=0)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
