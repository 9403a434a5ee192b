"""Train in torchtitan's Trainer on the CPU, in one process of a group, grow in the middle, and resume from its checkpoints."""

import os
import signal
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from zlib import crc32

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import VOCAB
from readme import IN_PROCESSES
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

import growkern
from growkern import Blocks, ModelSpec, embedding, linear, norm

LIMIT, STEPS, AT, SEQ, BATCH = 240, 15, 5, 16, 4
TO = {"hidden": 48, "heads": 6, "kv_heads": 3, "ffn": 72, "layers": 3}


def llama3(model: nn.Module) -> ModelSpec:
    """Describe torchtitan's Llama 3, with one projection for queries, keys and values, or three."""
    residual, normed = "residual", "residual:normed"
    query, key, value = "head_dim:query", "head_dim:key", "head_dim:value"
    first = model.layers["0"]
    attention, tensors = first.attention, embedding("tok_embeddings", rows="vocab", writes=residual)
    group = attention.n_heads // attention.n_kv_heads
    for i in range(len(model.layers)):
        at, kv, ffn = f"layers.{i}", f"kv_heads.{i}", f"ffn.{i}"
        qkv, out = f"{at}.attention.qkv_linear", (kv, group, value)
        if hasattr(attention.qkv_linear, "wqkv"):
            writes = {"wqkv": (kv, (query,) * group + (key, value))}
        else:
            writes = {"wq": (kv, group, query), "wk": (kv, key), "wv": (kv, value)}
        tensors |= norm(f"{at}.attention_norm", reads=residual, writes=normed, kind="rms")
        for name, rows in writes.items():
            tensors |= linear(f"{qkv}.{name}", reads=normed, writes=rows, bias=False)
        tensors |= linear(f"{at}.attention.wo", reads=out, writes=residual, bias=False)
        tensors |= norm(f"{at}.ffn_norm", reads=residual, writes=normed, kind="rms")
        for name in ("w1", "w3"):
            tensors |= linear(f"{at}.feed_forward.{name}", reads=normed, writes=ffn, bias=False)
        tensors |= linear(f"{at}.feed_forward.w2", reads=ffn, writes=residual, bias=False)
    tensors |= norm("norm", reads=residual, writes="residual:final", kind="rms")
    tensors |= linear("lm_head", reads="residual:final", writes="vocab", bias=False)
    vocab, hidden = model.tok_embeddings.weight.shape
    counts = {"n_heads": "heads", "n_kv_heads": "kv_heads"}
    sizes = {"hidden": hidden, "heads": attention.n_heads, "kv_heads": attention.n_kv_heads, "head_dim": attention.head_dim}  # fmt: skip
    sizes |= {"ffn": first.feed_forward.w1.weight.shape[0], "layers": len(model.layers)}
    return ModelSpec(
        "torchtitan.llama3", sizes | {"vocab": vocab}, tensors,
        blocks=Blocks("layers", identity={"attention.wo.weight": 0.0, "feed_forward.w2.weight": 0.0}),
        attributes={f"layers.{i}.attention.{name}": size for i in range(len(model.layers)) for name, size in counts.items()},
    )  # fmt: skip


def on_cpus(patch: pytest.MonkeyPatch) -> None:
    """Let torchtitan, which knows accelerators only, run on the CPU in float64."""
    import torchtitan.tools.utils as tools

    patch.setattr(tools, "get_local_device", lambda: torch.device("cpu"))
    patch.setattr(tools, "device_type", "cpu")
    patch.setattr(tools, "device_module", SimpleNamespace(set_device=lambda _: None))
    # the modules below take the names above when they are imported
    import torchtitan.config
    import torchtitan.distributed.utils
    import torchtitan.trainer
    from torchtitan.components import metrics
    from torchtitan.models.common.attention import ScaledDotProductAttention

    patch.setitem(torchtitan.config.TORCH_DTYPE_MAP, "float64", torch.float64)
    patch.setattr(torchtitan.distributed.utils, "set_pg_timeouts", lambda **_: None)
    patch.setattr(torchtitan.trainer.time, "sleep", lambda _: None)
    memory = SimpleNamespace(device_name="cpu", reset_peak_stats=lambda: None)
    memory.get_peak_stats = lambda: metrics.DeviceMemStats(*[0] * 6)
    patch.setattr(metrics, "build_device_memory_monitor", lambda: memory)
    patch.setattr(ScaledDotProductAttention, "sdpa_backends", [torch.nn.attention.SDPBackend.MATH])


def config_of(folder: Path, fused: bool, compiled: bool, load: int):
    """Return a config of torchtitan for a tiny Llama 3 on batches that are functions of the step."""
    from torchtitan.components.checkpointer import CheckpointManager
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.components.metrics import MetricsProcessor
    from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.config import CompileConfig, DebugConfig, ParallelismConfig, TrainingConfig
    from torchtitan.distributed.activation_checkpoint import SelectiveAC
    from torchtitan.models import llama3 as family
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.protocols.model_spec import ModelSpec
    from torchtitan.trainer import Trainer

    class Words(BaseDataLoader):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseDataLoader.Config):
            pass

        def __init__(self, config, *, dp_world_size: int, dp_rank: int, **_) -> None:
            self.place, self.step = (dp_world_size, dp_rank), 0

        def __iter__(self):
            while True:
                generator = torch.Generator().manual_seed(self.step)
                ids = torch.randint(0, VOCAB, (BATCH, SEQ + 1), generator=generator)
                own = ids.chunk(self.place[0])[self.place[1]]
                self.step += 1
                yield {"input": own[:, :-1].contiguous()}, own[:, 1:].contiguous()

        def state_dict(self):
            return {"step": self.step}

        def load_state_dict(self, state) -> None:
            self.step = state["step"]

    class Tokenizer(BaseTokenizer):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseTokenizer.Config):
            pass

        def __init__(self, config, **_) -> None:
            super().__init__()

        encode = decode = get_vocab_size = None

    dim, heads = 32, 4
    layers = family._build_llama3_layers(
        n_layers=2, dim=dim, n_heads=heads, n_kv_heads=2, hidden_dim=48, fuse_qkv=fused, attn_backend="flex",
        rope=family.ComplexRoPE.Config(dim=dim // heads, max_seq_len=SEQ, theta=10000),
    )  # fmt: skip
    for layer in layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    model = family.Llama3Model.Config(
        dim=dim, vocab_size=VOCAB, layers=layers,
        tok_embeddings=family.Embedding.Config(num_embeddings=VOCAB, embedding_dim=dim, param_init=family._EMBEDDING_INIT),
        norm=family.RMSNorm.Config(normalized_shape=dim, param_init=family._NORM_INIT),
        lm_head=family.Linear.Config(in_features=dim, out_features=VOCAB, param_init=family._output_linear_init(dim)),
    )  # fmt: skip
    optimizer = default_adamw(lr=1e-2)
    optimizer.implementation = "foreach"
    precision = dict.fromkeys(["dtype", "mixed_precision_param", "mixed_precision_reduce"], "float64")  # fmt: skip
    return Trainer.Config(
        model_spec=ModelSpec(name="llama3", flavor="tiny", model=model, parallelize_fn=family.parallelize_llama,
                             pipelining_fn=None, post_optimizer_build_fn=None, state_dict_adapter=None),
        dump_folder=str(folder), tokenizer=Tokenizer.Config(), dataloader=Words.Config(), loss=CrossEntropyLoss.Config(),
        optimizer=optimizer, lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2, decay_type="cosine", total_steps=40),
        training=TrainingConfig(
            local_batch_size=BATCH // dist.get_world_size(), seq_len=SEQ, steps=STEPS, disable_cuda_graphs=True, **precision,
        ),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"), activation_checkpoint=SelectiveAC.Config(),
        compile=CompileConfig(enable=compiled, backend="eager", components=["model"]),
        checkpoint=CheckpointManager.Config(enable=True, interval=3, load_step=load), metrics=MetricsProcessor.Config(log_freq=1),
        debug=DebugConfig(seed=0, enable_structured_logging=False),
    )  # fmt: skip


def whole(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t.detach().clone()


def start_alike(model: nn.Module) -> None:
    """Draw the weights by their names: torchtitan's initialization depends on the number of processes."""
    for name, p in growkern.support.names.named_parameters(model):
        generator = torch.Generator().manual_seed(crc32(name.encode()))
        drawn = torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3
        drawn = drawn + 1 if p.ndim == 1 else drawn
        p.data.copy_(distribute_tensor(drawn, p.device_mesh, p.placements))


def trained(folder: Path, fused: bool, compiled: bool = False, load: int = -1) -> dict[str, object]:
    import torchtitan.trainer

    losses: list[float] = []
    names = {"torchtitan": torchtitan, "growkern": growkern, "dcp": dcp, "llama3": llama3}
    exec(IN_PROCESSES["torchtitan"].replace('step=1000, to="2x"', f"step={AT}, to={TO}"), names)

    class Recorded(names["GrowingTrainer"]):
        def forward_backward_step(self, **inputs):
            loss = super().forward_backward_step(**inputs)
            total = loss.detach().clone()
            dist.all_reduce(total)
            losses.append(float(total))
            return loss

    trainer = Recorded(config_of(folder, fused, compiled, load))
    model = trainer.model_parts[0]
    if load == -1:
        start_alike(model)
    kept = {id(p) for p in model.parameters()}
    trainer.train()
    held = {n: whole(p) for n, p in growkern.support.names.named_parameters(model)}
    live, saved = model.state_dict(), trainer.checkpointer.states["model"].state_dict()
    same = live.keys() == saved.keys() and all(torch.equal(whole(live[n]), whole(saved[n])) for n in live)  # fmt: skip
    trainer.close()
    return {
        "losses": losses, "weights": held, "fired": trainer.checkpointer.states["growth"].fired,
        "rates": trainer.lr_schedulers.get_metrics(),
        "kept": kept <= {id(p) for p in model.parameters()},
        "saves what is live": same,
    }  # fmt: skip


def main(folder: Path, rank: int, world: int, fused: bool) -> None:
    signal.alarm(LIMIT)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.autograd.set_multithreading_enabled(False)  # as torchtitan does
    store, patience = f"file://{folder / 'store'}", timedelta(seconds=LIMIT // 2)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=patience)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        on_cpus(patch)
        found = {"unbroken": trained(folder / "run", fused)}
        if world > 1:
            found["compiled"] = trained(folder / "compiled", fused, compiled=True)
            for at in (3, 6):  # before and after the growth
                found["resumed", at] = trained(folder / "run", fused, load=at)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
