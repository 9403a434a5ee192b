"""Checkpoints of ``torch.distributed.checkpoint`` grow on disk and while they are loaded; the run then goes on as a run that grew live."""

import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import dcp_worker
import processes
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from dcp_worker import CASES, MOMENTS, ON_LOAD, STEPS, state_dict
from huggingface_hub import ModelCard
from models import EAGER, Plain, make, train
from saved import contents, invoke, said
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

import growkern
from growkern.checkpoints import dcp_target
from growkern.checkpoints.dcp_source import Source
from growkern.errors import (
    CheckpointError,
    GrowthError,
    PlanError,
    UnsupportedModelError,
    UnsupportedOptimizerError,
)

pytestmark = pytest.mark.filterwarnings("ignore")
AT = 3
BOTH = dict(to={"hidden": 48, "layers": 3})
UNEVEN = dict(to={"hidden": 36, "layers": 3}, dynamics=None)
EXACT = dict(to={"hidden": 36, "layers": 3}, dynamics="exact", width=growkern.width.Lossless(noise=0))  # fmt: skip


def adamw(model: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)


def blank(family: str, tied: bool, **changes: object) -> nn.Module:
    with torch.device("meta"):
        return make(family, tied=tied, **changes)


def trained(family="llama", tied=False, optim_of=adamw, dtype=torch.float64) -> tuple[nn.Module, torch.optim.Optimizer]:  # fmt: skip
    model = make(family, tied=tied).to(dtype)
    optim = optim_of(model)
    train(model, optim, AT)
    return model, optim


def save(path: Path, model: nn.Module, optim: torch.optim.Optimizer, layout: str = "flat") -> Path:
    dcp.save(state_dict(model, optim, layout), checkpoint_id=path)
    return path


def fill(model: nn.Module, optim: torch.optim.Optimizer, path: Path, layout: str = "flat") -> None:
    """Load a checkpoint as a loop of torch does."""
    found = state_dict(model, optim, layout)
    dcp.load(found, checkpoint_id=path)
    options, found = StateDictOptions(flatten_optimizer_state_dict=layout != "nested"), found.get("app", found)  # fmt: skip
    set_state_dict(model, optim, model_state_dict=found["model"], optim_state_dict=found["optim"], options=options)  # fmt: skip


def like(model: nn.Module, config: object, dtype: torch.dtype = torch.float64) -> nn.Module:
    config._experts_implementation = EAGER
    return type(model)(config).to(dtype)


def apart(model: nn.Module, optim, other: nn.Module, other_optim) -> list[str]:
    """Return the names of weights and state that differ; state of zeros is what the first step makes of no state."""
    names, differ = dict(other.named_parameters()), list[str]()
    for name, p in model.named_parameters():
        q = names.pop(name)
        pairs = {"": (p, q)}
        one, two = optim.state.get(p, {}), other_optim.state.get(q, {})
        pairs |= {
            k: (one.get(k, torch.zeros(())), two.get(k, torch.zeros(()))) for k in {*one, *two}
        }
        differ += [f"{name} {k}" for k, (x, y) in pairs.items() if not bool((x == y).all())]
    return [*differ, *names]


FAMILIES = {
    "llama": ("llama", False, "flat", UNEVEN),
    "gpt2, tied": ("gpt2", True, "flat", UNEVEN),
    "nested": ("llama", False, "nested", UNEVEN),
    "app": ("llama", False, "app", UNEVEN),
    "experts": ("qwen3_moe", False, "flat", UNEVEN),
    "stacked": ("llama", False, "flat", dict(to={"layers": 5}, depth=growkern.depth.Stack(), dynamics=None)),
    "next layer": ("llama", False, "flat", dict(to={"hidden": 36}, width=growkern.width.AKI(), dynamics=None)),
    "offset gains": ("gemma2", True, "flat", UNEVEN),
    "dropped": ("llama", False, "flat", UNEVEN | dict(state="drop")),
    "asymmetric": ("llama", False, "flat", UNEVEN | dict(state="asymmetric")),
    "perturbed": ("llama", False, "flat", UNEVEN | dict(state="drop", width=growkern.width.ShrinkPerturb())),
}  # fmt: skip


@pytest.mark.parametrize("part", [3000, dcp_target.PART], ids=["in parts", "whole"])
@pytest.mark.parametrize(("family", "tied", "layout", "growth"), FAMILIES.values(), ids=FAMILIES)
def test_a_checkpoint_grows_on_disk_as_the_live_run_grows(
    family, tied, layout, growth, part, tmp_path, monkeypatch
):
    monkeypatch.setattr(dcp_target, "PART", part)
    model, optim = trained(family, tied)
    path = save(tmp_path / "small", model, optim, layout)
    before = contents(path)
    small = blank(family, tied)

    report = growkern.dcp.grow(path, tmp_path / "out", small, adamw(small, lr=7.0), **growth)

    assert contents(path) == before and report.n_files == 1
    assert all(p.is_meta for p in small.parameters())
    stored = dcp.FileSystemReader(tmp_path / "out").read_metadata().state_dict_metadata.values()
    assert any(len(getattr(one, "chunks", ())) > 1 for one in stored) == (part == 3000)
    growkern.expand_inplace(model, optim, **growth)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.growkern_history == model.config.growkern_history or growth["dynamics"]
    grown = like(model, config)
    other = adamw(grown, lr=7.0)
    fill(grown, other, tmp_path / "out", layout)
    assert apart(model, optim, grown, other) == []
    rounding = 1e-6 if family == "qwen3_moe" else 1e-12  # its router computes in float32
    losses = train(model, optim, 5, AT)
    assert train(grown, other, 5, AT) == pytest.approx(losses, rel=0, abs=rounding)


@pytest.mark.parametrize("layout", ["flat", "nested"])
def test_stored_learning_rates_follow_the_law_and_growths_count_on(layout, tmp_path):
    model, optim = trained()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optim, lambda _: 1.0)
    path = save(tmp_path / "0", model, optim, layout)
    small = blank("llama", False)
    other = adamw(small, lr=7.0)

    for i, growth in enumerate((BOTH, dict(to="2x"))):
        growkern.dcp.grow(path, tmp_path / str(i + 1), small, other, **growth)
        path = tmp_path / str(i + 1)
        history = transformers.AutoConfig.from_pretrained(path).growkern_history
        small = blank("llama", False)
        other = adamw(small)
        growkern.resume(small, other, history)
        growkern.expand_inplace(model, optim, scheduler=scheduler, **growth)

    assert history == model.config.growkern_history and len(history) == 2
    grown = make("llama", tied=False, seed=1).double()
    other = adamw(grown, lr=7.0)
    growkern.resume(grown, other, history)
    fill(grown, other, path, layout)
    assert apart(model, optim, grown, other) == []
    options = ("lr", "lr_factor", "weight_decay", "lr_origin")
    groups = [[{k: g.get(k) for k in options} for g in o.param_groups] for o in (optim, other)]
    assert groups[0] == groups[1] and len({g["lr"] for g in groups[0]}) == 2
    assert train(grown, other, 5, AT) == train(model, optim, 5, AT)


LOADED = FAMILIES | {
    "mup": ("llama", False, "flat", BOTH),
    "exact": ("llama", False, "flat", EXACT),
    "exact, offset gains": ("gemma2", True, "nested", EXACT),
}


@pytest.mark.parametrize(("family", "tied", "layout", "growth"), LOADED.values(), ids=LOADED)
def test_a_checkpoint_grows_at_load_as_the_live_run_grows(family, tied, layout, growth, tmp_path):
    model, optim = trained(family, tied)
    path = save(tmp_path / "small", model, optim, layout)
    small = blank(family, tied)
    plan = growkern.plan(small, **growth)
    growkern.expand_inplace(small, adamw(small), plan=plan, backend="nan")
    grown = like(model, small.config)
    other = adamw(grown, lr=7.0)

    growkern.dcp.load(grown, other, path, plan=plan.to_json())

    growkern.expand_inplace(model, optim, **growth)
    assert apart(model, optim, grown, other) == []
    rounding = 1e-6 if family == "qwen3_moe" else 1e-12  # its router computes in float32
    losses = train(model, optim, 5, AT)
    assert train(grown, other, 5, AT) == pytest.approx(losses, rel=0, abs=rounding)


def test_a_model_without_a_record_of_the_growth_gets_one_at_load(tmp_path):
    model, optim = trained()
    path = save(tmp_path / "small", model, optim)
    plan = growkern.plan(blank("llama", False), to={"ffn": 80})
    grown = make("llama", tied=False, intermediate_size=80).double()
    other = adamw(grown)

    growkern.dcp.load(grown, other, path, plan=plan)

    growkern.expand_inplace(model, optim, plan=plan)
    assert grown.config.growkern_history == model.config.growkern_history
    growkern.expand_inplace(grown, other, to="2x")
    growkern.expand_inplace(model, optim, to="2x")
    assert apart(model, optim, grown, other) == []


def by_dim(model: nn.Module) -> Iterator[dict[str, object]]:
    yield {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}
    yield {"params": [p for p in model.parameters() if p.dim() > 1]}


OPTIMIZERS = {
    "Adam, amsgrad": lambda m: torch.optim.Adam(m.parameters(), lr=1e-3, amsgrad=True),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9),
    "SGD, fused": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9, fused=True),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-4, momentum=0.9, centered=True),
    "Adadelta": lambda m: torch.optim.Adadelta(m.parameters()),
    "Adamax": lambda m: torch.optim.Adamax(m.parameters(), lr=1e-3),
    "RAdam": lambda m: torch.optim.RAdam(m.parameters(), lr=1e-3),
    "two groups": lambda m: torch.optim.AdamW([*by_dim(m)], lr=1e-3),
}  # fmt: skip


@pytest.mark.parametrize("optim_of", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_zeros_for_new_blocks_are_what_the_first_step_would_make(optim_of, tmp_path):
    model, optim = trained(optim_of=optim_of)
    path = save(tmp_path / "small", model, optim)
    small = blank("llama", False)

    growkern.dcp.grow(path, tmp_path / "out", small, optim_of(small), **UNEVEN)

    growkern.expand_inplace(model, optim, **UNEVEN)
    grown = like(model, transformers.AutoConfig.from_pretrained(tmp_path / "out"))
    other = optim_of(grown)
    fill(grown, other, tmp_path / "out")
    assert train(grown, other, 5, AT) == train(model, optim, 5, AT)


def test_bfloat16_and_a_model_of_your_own_grow(tmp_path):
    model = Plain(tied=True).bfloat16()
    optim = adamw(model)
    train(model, optim, AT)
    path = save(tmp_path / "small", model, optim)
    with torch.device("meta"):
        small = Plain(tied=True)

    growkern.dcp.grow(path, tmp_path / "out", small, adamw(small), to="2x", spec=small.spec(), dynamics=None)  # fmt: skip

    growkern.expand_inplace(model, optim, to="2x", spec=model.spec(), dynamics=None)
    grown = Plain(48, 8, tied=True).bfloat16()
    other = adamw(grown)
    fill(grown, other, tmp_path / "out")
    assert apart(model, optim, grown, other) == []
    assert not (tmp_path / "out" / "config.json").exists()


def test_blocks_of_your_own_model_that_would_be_drawn_are_refused(tmp_path):
    model = Plain(tied=True)
    optim = adamw(model)
    train(model, optim, 1)
    path = save(tmp_path / "small", model, optim)

    with pytest.raises(PlanError, match="with the code of a live model"):
        growkern.dcp.grow(
            path, tmp_path / "out", model, optim, to={"layers": 3}, spec=model.spec(), depth=growkern.depth.Fresh(init=nn.Module.train),
            dynamics=None,
        )  # fmt: skip


def test_entries_of_other_things_are_copied_byte_for_byte(tmp_path):
    model, optim = trained()
    path = save(tmp_path / "small", model, optim, "torchtitan")
    (path / "notes.txt").write_text("seen")
    (path / "README.md").write_text("---\nlicense: mit\n---\nThe small model.")
    small = blank("llama", False)

    report = growkern.dcp.grow(path, tmp_path / "out", small, adamw(small), **BOTH)

    assert any(note.startswith("lr_scheduler.base_lrs: has one") for note in report.notes)
    before, after = Source(path), Source(tmp_path / "out")
    seen = [one.contents(["dataloader.seen"])["dataloader.seen"].getvalue() for one in (before, after)]  # fmt: skip
    assert seen[0] == seen[1] and len(seen[0]) > 100
    assert torch.equal(after.tensor("train_state.step"), before.tensor("train_state.step"))
    assert after.paths["optimizer.state.lm_head.weight.exp_avg"] == ("optimizer", "state.lm_head.weight.exp_avg")  # fmt: skip
    assert after.of("lm_head.weight").shape == (66, 48)
    assert (tmp_path / "out" / "notes.txt").read_text() == "seen"
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "mit" and "| hidden | 24 | 48 |" in card.text
    assert "The small model." not in card.text and "from_pretrained" not in card.text


def test_the_command_line_grows_a_checkpoint(tmp_path):
    model, optim = trained()
    path, out = save(tmp_path / "small", model, optim), tmp_path / "out"
    words = ["grow", path, out, "--to", "hidden=48,layers=3"]

    assert "pass --config" in said(invoke(*words))
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path / "own")
    words += ["--config", tmp_path / "own"]
    assert "optim= (--optim)" in said(invoke(*words)) and not out.exists()
    result = invoke(*words, "--optim", "AdamW", "--dynamics", "none")

    assert result.exit_code == 0 and "preserves the function" in said(result), result.output
    assert "exists" in said(invoke(*words, "--optim", "AdamW"))
    growkern.expand_inplace(model, optim, **BOTH, dynamics=None)
    grown = like(model, transformers.AutoConfig.from_pretrained(out))
    other = adamw(grown)
    fill(grown, other, out)
    assert apart(model, optim, grown, other) == []
    assert invoke("grow", out, out, "--optim", "AdamW").exit_code == 1


def test_the_command_line_does_not_read_a_pickle_beside_safetensors(tmp_path):
    make("llama", tied=False).save_pretrained(tmp_path / "small")
    (tmp_path / "small" / ".metadata").write_bytes(pickle.dumps(Opened(tmp_path / "opened")))

    result = invoke("grow", tmp_path / "small", tmp_path / "out")

    assert result.exit_code == 0 and not (tmp_path / "opened").exists()


class Opened:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def changed(change: Callable[[dict], object]) -> Callable[[Path], Path]:
    """Return a function that saves a checkpoint with a change to its state dict."""

    def saved(folder: Path) -> Path:
        state = state_dict(*trained())
        change(state)
        dcp.save(state, checkpoint_id=folder / "changed")
        return folder / "changed"

    return saved


def with_state(**changes: object) -> Callable[[Path], Path]:
    """Return a function that saves a checkpoint with other state of one parameter."""
    return changed(
        lambda s: s["optim"].update({f"state.{NAME}.{k}": v for k, v in changes.items()})
    )


def with_options(**changes: object) -> Callable[[Path], Path]:
    """Return a function that saves a checkpoint with other options of one parameter's group."""
    own = {f"param_groups.{NAME}.{k}": v for k, v in changes.items()}
    return changed(lambda s: s["optim"].update(own))


def without_groups(state: dict) -> None:
    for key in [key for key in state["optim"] if "param_groups" in key]:
        del state["optim"][key]


def without_metadata(folder: Path) -> Path:
    ignored = shutil.ignore_patterns(".metadata")
    return shutil.copytree(folder / "small", folder / "bare", ignore=ignored)


def nadam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.NAdam(model.parameters())


def narrower() -> nn.Module:
    return blank("llama", False, intermediate_size=48)


NAME = "model.layers.0.mlp.up_proj.weight"
BYTES = torch.ones(40, 24, dtype=torch.uint8)
NUMBERED = {"state": {0: {"step": torch.ones(())}}}
OTHER_PLAN = growkern.plan(make("llama", tied=True, intermediate_size=48))
REFUSED = {  # checkpoint (None: as it is), arguments of grow, error, match
    "a block too few": (
        None, dict(model=lambda: blank("llama", False, num_hidden_layers=1)), CheckpointError, "layers.1.*is of a block that the"),
    "a list of optimizers": (
        None, dict(optim=lambda m: [torch.optim.AdamW([p]) for p in m.parameters()]), UnsupportedOptimizerError, "grows with one"),
    "no folder": (lambda folder: folder / "none", {}, CheckpointError, "is no folder"),
    "no metadata": (without_metadata, {}, CheckpointError, "has no file .metadata"),
    "no optimizer": (None, dict(optim=None), CheckpointError, "optim.state.model.embed_tokens.weight.step.*left out: pass optim="),
    "no state": (changed(lambda s: s.pop("optim")), {}, CheckpointError, "has no state of an optimizer's parameters"),
    "a missing tensor": (changed(lambda s: s["model"].pop(NAME)), {}, CheckpointError, rf"model.{NAME}: is missing"),
    "another size": (None, dict(model=narrower), CheckpointError, r"has shape \(40, 24\), and the model has \(48, 24\)"),
    "another model": (
        changed(lambda s: s.update(model={"a": torch.ones(2)})), {}, CheckpointError, "no tensors by the names.*under model, optim"),
    "two models": (changed(lambda s: s.update(ema=s["model"])), {}, CheckpointError, "several copies of the model, under 'ema.', 'model.'"),
    "two optimizers": (
        changed(lambda s: s.update(other=s["optim"])), {}, CheckpointError, "several optimizers, under 'optim.', 'other.'"),
    "by number": (changed(lambda s: s.update(optim=NUMBERED)), {}, CheckpointError, "optim.state.0.step: is state by number"),
    "8 bits": (with_state(exp_avg=BYTES), {}, UnsupportedOptimizerError, "exp_avg: is stored in 8 bits"),
    "an unknown key": (with_state(twist=torch.ones(40, 24)), {}, UnsupportedOptimizerError, "unknown state 'twist'"),
    "state of another shape": (with_state(exp_avg=torch.ones(40, 25)), {}, UnsupportedOptimizerError, r"has shape \(40, 25\)"),
    "scaled updates": (with_options(update_scale={"scales": 1}), {}, CheckpointError, "have the factors of an UpdateScale"),
    "other groups": (with_options(lr=0.5), {}, CheckpointError, f"{NAME} are in one param group.*other options"),
    "no groups": (changed(without_groups), {}, PlanError, "in no param group: pass dynamics=None"),
    "uneven factors": (
        None, dict(to={"ffn": 60}, width=growkern.width.FPI()), PlanError, "not one learning rate per parameter: pass dynamics=None"),
    "exact dynamics": (None, EXACT, PlanError, "not one learning rate per parameter: pass dynamics=None"),
    "no zeros": (None, dict(optim=nadam, to={"layers": 3}), UnsupportedOptimizerError, "starts without state of torch.optim.nadam.NAdam"),
    "drawn blocks": (None, dict(to={"layers": 3}, depth=growkern.depth.Fresh()), PlanError, "with the code of a live model"),
    "a plan for another model": (None, dict(plan=OTHER_PLAN), PlanError, "plan again"),
    "a plan and a size": (None, dict(plan=OTHER_PLAN, to={"ffn": 80}), PlanError, "plan= already says what to grow"),
    "an optimizer's name": (None, dict(optim=lambda _: "AdamW"), UnsupportedOptimizerError, "expected a torch.optim.Optimizer, got str"),
    "a model's name": (None, dict(model=lambda: "llama", optim=None), UnsupportedModelError, "expected a torch.nn.Module, got str"),
    "a target in the source": (None, dict(target="small/out"), CheckpointError, "is, is inside, or contains the source"),
    "a target without a folder": (None, dict(target="no/out"), CheckpointError, "does not exist"),
}  # fmt: skip


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("stored") / "small", *trained())


@pytest.mark.parametrize(("checkpoint", "options", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_grow_is_refused_and_nothing_is_written(
    checkpoint, options, error, match, stored, tmp_path
):
    shutil.copytree(stored, tmp_path / "small")
    source = tmp_path / "small" if checkpoint is None else checkpoint(tmp_path)
    before, options = contents(tmp_path), {"to": "2x"} | options
    model = options.pop("model", lambda: blank("llama", False))()
    optim_of = options.pop("optim", adamw)
    optim = optim_of and optim_of(model)
    if "plan" in options and "ffn" not in options["to"]:
        del options["to"]

    with pytest.raises(error, match=f"(?s){match}"):
        growkern.dcp.grow(source, tmp_path / options.pop("target", "out"), model, optim, **options)

    assert contents(tmp_path) == before


def target_of(**changes: object) -> Callable[[], nn.Module]:
    return lambda: make("llama", tied=False, **changes).double()


WIDER = target_of(intermediate_size=80)
DEEPER = target_of(num_hidden_layers=3)
HEADS = dict(num_attention_heads=6, num_key_value_heads=3, head_dim=6)
FFN, LAYERS = dict(to={"ffn": 80}), dict(to={"layers": 3})
FRESH = LAYERS | dict(depth=growkern.depth.Fresh())


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1.0)


class Several(list):
    """Optimizers without state."""

    state = ()


REFUSED_AT_LOAD = {  # checkpoint, arguments of the plan, model, optimizer, match
    "the source's size": (None, FFN, target_of(), adamw, r"up_proj.weight: has shape \(40, 24\), and the plan grows it to \(80, 24\)"),
    "a block too few": (None, LAYERS, target_of(), adamw, "model.layers.2.* is not in the model"),
    "a block too many": (None, FFN, target_of(num_hidden_layers=3, intermediate_size=80), adamw, "model.layers.2.* is not in the plan"),
    "no memory": (None, FFN, lambda: blank("llama", False, intermediate_size=80), adamw, "is on the meta device"),
    "another epsilon": (
        None, dict(to={"hidden": 36}), target_of(hidden_size=36, intermediate_size=60, **HEADS), adamw, "multiplies this epsilon by 0.666"),
    "another optimizer": (None, FFN, WIDER, sgd, "is no state that growth knows of torch.optim.sgd.SGD"),
    "other groups": (with_options(lr=0.5), FFN, WIDER, adamw, "stored options differ"),
    "8 bits": (with_state(exp_avg=BYTES), FFN, WIDER, adamw, "is stored in 8 bits"),
    "a list of optimizers": (None, FFN, WIDER, lambda m: Several(torch.optim.AdamW([p]) for p in m.parameters()), "grows with one"),
    "a missing tensor": (changed(lambda s: s["model"].pop(NAME)), FFN, WIDER, adamw, "is missing"),
    "drawn blocks": (None, FRESH, DEEPER, adamw, "computes new weights from whole tensors"),
}  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_with_other_ties_than_the_plan_is_refused(tied, tmp_path):
    small, optim = trained("llama", tied)
    path = save(tmp_path / "small", small, optim)
    plan = growkern.plan(small, **FFN)
    model = make("llama", tied=not tied, intermediate_size=80).double()

    for optim in (adamw(model), None):
        before = {name: p.clone() for name, p in model.state_dict().items()}
        with pytest.raises(PlanError, match="lm_head.weight: is tied to model.embed_tokens.weight in the"):  # fmt: skip
            growkern.dcp.load(model, optim, path, plan=plan)
        assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize(
    ("checkpoint", "growth", "model", "optim_of", "match"), REFUSED_AT_LOAD.values(), ids=REFUSED_AT_LOAD
)  # fmt: skip
def test_what_cannot_be_loaded_is_refused_and_nothing_changes(
    checkpoint, growth, model, optim_of, match, stored, tmp_path
):
    source = stored if checkpoint is None else checkpoint(tmp_path)
    plan = growkern.plan(make("llama", tied=False), **growth)
    model = model()
    optim = optim_of(model)
    before = [p.detach().clone() for p in model.parameters()]

    with pytest.raises(GrowthError, match=f"(?s){match}"):
        growkern.dcp.load(model, optim, source, plan=plan)

    assert not optim.state
    assert all(p.is_meta or torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))  # fmt: skip


@pytest.fixture(scope="module")
def run_in(tmp_path_factory) -> Callable[..., dict]:
    """Return a function that runs a function of dcp_worker.py in n processes, once, and returns what they return."""
    folder, known = tmp_path_factory.mktemp("dcp"), {}

    def run(what: str, n: int, *options: object) -> dict:
        name = "-".join(map(str, (what, n, *options)))
        if name not in known:
            log = folder / "log"
            started = [processes.start("dcp_worker", folder, what, rank, n, *options, log=log) for rank in range(n)]  # fmt: skip
            processes.end(started, log)
            known[name] = [torch.load(folder / f"{name}-{rank}.pt") for rank in range(n)]
        return known[name]

    run.folder = folder
    return run


slow = [processes.together, pytest.mark.slow]


def assert_goes_on(found, expected) -> None:
    """Assert that weights, state and losses are those of the run that grew live."""
    (begun, losses), (own, live) = found, expected
    assert begun.keys() == own.keys()
    for key, value in own.items():
        torch.testing.assert_close(begun[key], value, rtol=1e-10, atol=1e-14, msg=str(key))
    assert losses == pytest.approx(live, rel=0, abs=1e-9)


class TestProcesses:
    pytestmark = slow

    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize(("grown_by", "n"), [(1, 4), (2, 2)])
    def test_any_number_of_processes_grows_and_any_goes_on(self, grown_by, n, case, run_in):
        (expected, _) = run_in("save", 2)
        run_in("grow", grown_by)

        found = run_in("go_on", n, grown_by)[0]

        assert_goes_on(found[case], expected[case])

    @pytest.mark.parametrize("case", CASES)
    def test_a_run_moves_from_two_processes_to_four_and_back(self, case, run_in):
        (expected, _) = run_in("save", 2)
        run_in("grow", 1)
        run_in("go_on", 4, 1)

        losses = run_in("finish", 2, 1, 4)[0][case]

        assert losses == pytest.approx(expected[case][1][len(losses) - STEPS :][-len(losses) :], rel=0, abs=1e-9)  # fmt: skip

    @pytest.mark.parametrize("case", CASES | ON_LOAD)
    @pytest.mark.parametrize("n", [4, 2])
    def test_a_checkpoint_grows_at_load_on_any_number_of_processes(self, n, case, run_in):
        (expected, _) = run_in("save", 2)

        found = run_in("load", n)[0]

        assert_goes_on(found[case], expected[case])

    @pytest.mark.parametrize("case", ["width", "both"])
    def test_a_checkpoint_grows_at_load_under_tensor_parallelism(self, case, run_in):
        (expected, _) = run_in("save", 2)

        found = run_in("load_parallel", 4)[0]

        assert_goes_on(found[case], expected[case])

    def test_a_process_reads_the_rows_of_its_own_shards(self, run_in):
        run_in("save", 2)
        n = sum(p.numel() for p in dcp_worker.small("meta").parameters())

        for world in (2, 4):
            read = [found["read", "stacked"] for found in run_in("load", world)]

            # 4 blocks copy 2: weights and two moments, of which every process has a part of all blocks, and step counts
            assert all(count < 2.1 * 3 * n / world for count in read), (read, n)

    @pytest.mark.parametrize("victim", [0, 1])
    @pytest.mark.parametrize("moment", [*MOMENTS][:3])
    def test_a_failure_in_one_process_leaves_nothing(self, moment, victim, run_in):
        run_in("save", 2)

        said = run_in("failed", 2, moment, victim)

        here, other = said[victim], said[1 - victim]
        if (moment, victim) == ("metadata", 1):  # process 0 alone writes it
            assert said == ["nothing"] * 2
            return
        assert "boom" in here and "boom" in other and f"process {victim} failed" in other
        assert not [*run_in.folder.glob(f"*failed-{moment}-{victim}*")]

    @pytest.mark.parametrize("victim", [0, 1])
    @pytest.mark.parametrize("place", ["plan", "read"])
    def test_a_failure_at_load_in_one_process_fails_in_all(self, place, victim, run_in):
        run_in("save", 2)

        said = run_in("failed_load", 2, place, victim)

        assert all(same for _, same in said)
        other = said[1 - victim][0]
        assert f"process {victim} failed" in other
        assert ("Nothing was changed" if place == "plan" else "weights are written in part") in other  # fmt: skip

    @pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
    @pytest.mark.parametrize("what", ["to", "seed", "target"])
    def test_other_arguments_in_another_process_are_an_error_in_every_process(self, what, run_in):
        run_in("save", 2)

        for error in run_in("apart", 2, what):
            assert "do not agree on the plan and the folder" in error
        assert not [*run_in.folder.glob("*mixed*")]

    def test_the_examples_of_the_readme_grow_the_run(self, run_in):
        for found in run_in("readme", 2):
            grown_live, grown_on_disk = found["losses"]
            assert found["hidden"] == 48
            assert grown_on_disk == pytest.approx(grown_live, rel=0, abs=1e-5)
            assert found["loaded"] == pytest.approx(grown_live[:1], rel=0, abs=1e-5)

    @pytest.mark.parametrize(("n", "victim"), [(1, 0), (2, 0), (2, 1)])
    @pytest.mark.parametrize("moment", MOMENTS)
    def test_a_killed_growth_leaves_nothing_or_all(self, moment, n, victim, run_in):
        run_in("save", 2)
        if victim == 1 and moment in ("metadata", "config", "rename"):
            pytest.skip("process 0 alone does it")
        folder, out = run_in.folder, f"killed-{moment}-{n}-{victim}"
        before, log = contents(folder / "flat"), folder / f"log-{moment}-{n}-{victim}"

        started = [processes.start("dcp_worker", folder, "killed", rank, n, moment, victim, log=log) for rank in range(n)]  # fmt: skip
        for process in started:
            process.join()

        assert started[victim].exitcode == -9
        if n == 2:
            assert started[1 - victim].exitcode == 1
            assert "growkern.errors.CheckpointError: another process has ended" in log.read_text()
        assert contents(folder / "flat") == before
        assert not (folder / out).exists()
        dcp_worker.grow_once(folder, out)
        assert [p.name for p in folder.iterdir() if out in p.name and "store" not in p.name] == [
            out
        ]

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_peak_memory_is_below_two_of_the_largest_tensors(self, tmp_path):
        for what in ("save", "grow"):
            log = tmp_path / what
            processes.end([processes.start("dcp_peak_worker", tmp_path, what, log=log)], log)

        peak, largest, n_source, n_target = map(int, log.read_text().split()[-4:])
        assert largest > 60e6 and n_target > 12 * largest, "too small to measure"
        assert peak < 2 * largest, (peak / largest, peak, largest, n_source, n_target)
