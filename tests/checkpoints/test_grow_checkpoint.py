"""``growkern grow`` writes checkpoints that stock transformers loads; a refused or failed growth writes nothing."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from models import batch, logits, make
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved import INDEX, MADE, contents, invoke, load, said, save
from states import fail_at

import growkern
from growkern import depth, width
from growkern.checkpoints import grow as checkpoint
from growkern.checkpoints import load as saved
from growkern.checkpoints import output, shards
from growkern.errors import CheckpointError, InsufficientMemoryError
from growkern.execution import sets
from growkern.planning.growth_record import digest_of, read

OTHERS = [
    "gpt_neox",
    "opt",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "roberta",
    "modernbert",
    "vit",
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save(tmp_path / "source")
    return tmp_path / "source"


TIED = [(family, tied) for family in ("gpt2", "llama") for tied in (True, False)]
TIED += [(family, i % 2 == 0) for i, family in enumerate(["bert", "mixtral", *OTHERS])]


@pytest.mark.parametrize(("family", "tied"), TIED, ids=str)
def test_a_sharded_checkpoint_grows_into_one_of_equal_logits(family, tied, tmp_path):
    model = save(tmp_path / "source", family, tied=tied)
    before = contents(tmp_path / "source")
    assert INDEX in before and sum(name.endswith(".safetensors") for name in before) > 2
    out = tmp_path / "out"

    result = invoke(
        "grow", tmp_path / "source", out, "--to", "hidden=2x,layers=4", "--max-shard-size", "60KB"
    )

    assert result.exit_code == 0, result.output
    assert "preserves the function" in said(result) and str(out) in said(result).replace(" ", "")
    grown = load(model, out)
    ids = batch()
    torch.testing.assert_close(logits(grown, ids), logits(model, ids), rtol=0, atol=1e-5)
    growkern.expand_inplace(model, to={"hidden": "2x", "layers": 4})
    live, stored = model.state_dict(), grown.state_dict()
    assert live.keys() == stored.keys()
    assert all(torch.equal(live[name], stored[name]) for name in live)
    model.save_pretrained(tmp_path / "live", max_shard_size="60KB")
    fields = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("live", "out")]
    assert fields[0] == fields[1]
    places = [json.loads((tmp_path / f / INDEX).read_text())["weight_map"] for f in ("live", "out")]
    assert places[0].keys() == places[1].keys()
    assert contents(tmp_path / "source") == before
    assert {p.name for p in tmp_path.iterdir()} == {"source", "out", "live"}


PERTURBED = {
    "llama": ("2x", "ShrinkPerturb", dict(to="2x", width=width.ShrinkPerturb(), state="drop")),
    "mixtral": ("experts=7", "CopyExperts", dict(to={"experts": 7}, width=width.CopyExperts())),
}


@pytest.mark.parametrize("family", PERTURBED)
def test_noise_in_a_checkpoint_is_that_of_a_growth_in_memory(family, tmp_path):
    to, method, options = PERTURBED[family]
    model = save(tmp_path / "source", family, tied=False)

    result = invoke("grow", tmp_path / "source", tmp_path / "out", "--to", to, "--width", method)

    assert result.exit_code == 0, result.output
    grown = load(model, tmp_path / "out").state_dict()
    growkern.expand_inplace(model, **options)
    assert all(torch.equal(p, grown[name]) for name, p in model.state_dict().items())


def test_shards_hold_what_the_index_says_and_no_more_than_was_asked(source, tmp_path):
    out = tmp_path / "out"

    result = invoke("grow", source, out, "--max-shard-size", "50KB")

    assert result.exit_code == 0, result.output
    index = json.loads((out / INDEX).read_text())
    files = sorted(out.glob("*.safetensors"))
    held = {}
    for path in files:
        tensors = load_file(path)
        assert sum(t.numel() * t.element_size() for t in tensors.values()) <= 50_000
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        held |= dict.fromkeys(tensors, path.name)
    assert index["weight_map"] == held and len(files) > 2
    assert index["metadata"]["total_size"] == sum(
        t.numel() * t.element_size() for path in files for t in load_file(path).values()
    )


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("7", 7), ("50KB", 50_000), ("1.5 mb", 1_500_000), ("5GB", 5 * 10**9), ("1TB", 10**12)],
)
def test_sizes_of_shards_are_read_as_transformers_reads_them(text, n_bytes):
    assert shards.n_bytes_of(text) == n_bytes


def test_every_tensor_lies_at_a_multiple_of_its_element_size(tmp_path):
    """A reader that maps the file uses the tensors in place."""
    tensors = {"a": torch.ones(3, dtype=torch.bool), "b": torch.ones(3).bfloat16()}
    tensors |= {"c": torch.ones(3), "d": torch.ones(1, dtype=torch.float64)}
    written = shards.Shards(tmp_path, {n: t.to("meta") for n, t in tensors.items()}, 10**6)
    for name, t in tensors.items():
        written.write(name, t)
    written.close()

    file = tmp_path / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    fields = json.loads(file.read_bytes()[8:header])
    starts = {n: header + fields[n]["data_offsets"][0] for n in tensors}
    assert all(start % tensors[n].element_size() == 0 for n, start in starts.items())
    assert all(torch.equal(t, tensors[n]) for n, t in load_file(file).items())


def test_a_small_target_is_one_file_without_an_index(source, tmp_path):
    checkpoint.grow(source, tmp_path / "out")

    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors",
    } | MADE  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_dtype_of_the_checkpoint_is_kept(dtype, tmp_path):
    model = make("llama", tied=True).to(dtype).eval()
    model.save_pretrained(tmp_path / "source")

    checkpoint.grow(tmp_path / "source", tmp_path / "out", to={"layers": 3})

    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {dtype}
    one, other = (load(model, tmp_path / name, dtype="auto") for name in ("source", "out"))
    assert torch.equal(logits(one, batch()), logits(other, batch()))


@pytest.mark.parametrize("wide", [True, False], ids=["norms and routers", "all others"])
def test_each_tensor_of_a_mixed_checkpoint_keeps_its_own_dtype_and_precision(wide, tmp_path):
    """Tensors stored in float32 are those of a model that grew in float32; all others are its tensors, rounded."""

    def dtype_of(name):
        return torch.float32 if ("norm" in name or "gate" in name) == wide else torch.bfloat16

    model = save(tmp_path / "source", "mixtral", shard="1GB")
    file = tmp_path / "source" / "model.safetensors"
    save_file({n: t.to(dtype_of(n)) for n, t in load_file(file).items()}, file, {"format": "pt"})
    live = load(model, tmp_path / "source", dtype=torch.float32)

    checkpoint.grow(tmp_path / "source", tmp_path / "out", to={"hidden": "2x", "layers": 3})

    growkern.expand_inplace(live, to={"hidden": "2x", "layers": 3})
    live.save_pretrained(tmp_path / "live")
    grown, expected = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "live"))
    assert grown.keys() == expected.keys()
    for name, t in grown.items():
        assert t.dtype == dtype_of(name) and torch.equal(t, expected[name].to(t.dtype)), name
    assert {t.dtype for t in grown.values()} == {torch.float32, torch.bfloat16}
    load(model, tmp_path / "out")


def test_new_experts_are_stored_in_the_dtypes_of_the_experts_that_they_copy(tmp_path):
    model = save(tmp_path / "source", "mixtral", shard="1GB")
    file, wide = tmp_path / "source" / "model.safetensors", (".w2.", ".w3.")
    stored = {n: t if any(part in n for part in wide) else t.bfloat16() for n, t in load_file(file).items()}  # fmt: skip
    save_file(stored, file, {"format": "pt"})

    checkpoint.grow(tmp_path / "source", tmp_path / "out", to={"experts": 8, "top_k": 4})

    grown = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(".w3." in name for name in grown) == 2 * 8
    for name, t in grown.items():
        assert (t.dtype == torch.float32) == any(part in name for part in wide), name
    load(model, tmp_path / "out")


def test_names_without_the_prefix_of_the_class_are_read(tmp_path):
    model = save(tmp_path / "source", "gpt2", shard="1GB")
    file = tmp_path / "source" / "model.safetensors"
    names = load_file(file)
    short = {n.removeprefix("transformer."): t for n, t in names.items()}
    save_file(short, file, {"format": "pt"})  # the first GPT-2 checkpoints have no prefix

    checkpoint.grow(tmp_path / "source", tmp_path / "out")

    assert load_file(tmp_path / "out" / "model.safetensors").keys() == names.keys()
    grown = load(model, tmp_path / "out")
    torch.testing.assert_close(logits(grown, batch()), logits(model, batch()), rtol=0, atol=1e-5)


def test_rows_of_the_next_layer_are_those_of_a_growth_in_memory(tmp_path):
    model = save(tmp_path / "source")
    to, methods = {"hidden": "2x", "layers": 4}, {"width": width.AKI(), "depth": depth.Stack()}

    checkpoint.grow(tmp_path / "source", tmp_path / "out", to=to, **methods)

    growkern.expand_inplace(model, to=to, **methods)
    live, stored = model.state_dict(), load(model, tmp_path / "out").state_dict()
    assert all(torch.equal(live[name], stored[name]) for name in live)


def test_growths_are_on_record_and_draw_other_noise(source, tmp_path):
    first = checkpoint.grow(source, tmp_path / "one", to={"ffn": 60})
    second = checkpoint.grow(tmp_path / "one", tmp_path / "two", to={"ffn": 80})

    config = transformers.AutoConfig.from_pretrained(tmp_path / "two")
    kept = [digest_of(read(text)) for text in config.growkern_history]
    assert kept == [digest_of(first.plan), digest_of(second.plan)]
    assert (first.plan.seed, second.plan.seed) == (0, 1)
    assert config.intermediate_size == 80


def cached(source: Path, cache: Path) -> Path:
    """Move a checkpoint into a cache as the hub's client lays it out; return the folder that the client returns."""
    (cache / "blobs").mkdir(parents=True)
    (folder := cache / "snapshots" / "1a2b").mkdir(parents=True)
    for i, path in enumerate(sorted(source.iterdir())):
        if path.is_file():
            path.rename(cache / "blobs" / str(i))
            (folder / path.name).symlink_to(f"../../blobs/{i}")
        else:
            path.rename(folder / path.name)
    return folder


def test_what_goes_with_a_model_is_copied_and_the_rest_is_named(source, tmp_path):
    for name in ("tokenizer.json", "optimizer.pt", "trainer_state.json"):
        (source / name).write_text("{}")
    (source / "onnx").mkdir()
    hub = cached(source, tmp_path / "hub")

    result = invoke("grow", hub, tmp_path / "out")

    assert "not copied: onnx/, optimizer.pt, trainer_state.json." in said(result)
    out = {p.name for p in (tmp_path / "out").iterdir()}
    held = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert out == held | MADE
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())


def test_tensors_that_the_class_has_no_place_for_are_named(tmp_path):
    model = save(tmp_path / "source", "bert", shard="1GB")
    file = tmp_path / "source" / "model.safetensors"
    more = load_file(file) | {"cls.seq_relationship.weight": torch.ones(2, 24)}
    save_file(more, file, {"format": "pt"})

    grown = checkpoint.grow(tmp_path / "source", tmp_path / "out")

    assert "1 stored tensors are not of a BertForMaskedLM" in str(grown)
    load(model, tmp_path / "out")


def cut(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])


def edit(name: str, **fields):
    def change(folder: Path) -> None:
        held = json.loads((folder / name).read_text()) | fields
        (folder / name).write_text(json.dumps({k: v for k, v in held.items() if v is not None}))

    return change


def drop_tensor(index_too: bool):
    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        file = folder / index["weight_map"].pop("model.norm.weight")
        tensors = load_file(file)
        del tensors["model.norm.weight"]
        save_file(tensors, file, {"format": "pt"})
        if index_too:
            (folder / INDEX).write_text(json.dumps(index))

    return change


def pickled(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"")


def swap_shape(folder: Path) -> None:
    edit("config.json", hidden_size=48)(folder)


SOURCES = {
    "no-folder": (lambda f: f.rename(f.with_name("elsewhere")), "is no folder"),
    "no-config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "bad-config": (lambda f: (f / "config.json").write_text("{"), "cannot read"),
    "list-config": (lambda f: (f / "config.json").write_text("[]"), "contains no JSON object"),
    "other-class": (
        edit("config.json", architectures=["MambaForCausalLM"]),
        "23 tensors of MambaForCausalLM are not stored",
    ),
    "unknown-class": (edit("config.json", architectures=["My"]), "has no class 'My'"),
    "no-class": (edit("config.json", architectures=None), "does not name the model's class"),
    "quantized": (edit("config.json", quantization_config={}), "is quantized"),
    "unknown-type": (edit("config.json", num_attention_heads="x"), "transformers cannot load"),
    "shapes": (swap_shape, "transformers cannot load .* as a LlamaForCausalLM"),
    "missing-shard": (
        lambda f: (f / "model-00002-of-00003.safetensors").unlink(),
        r"model-00002-of-00003.safetensors: is missing, with \d+ tensors",
    ),
    "cut-shard": (cut, "model-00002-of-00003.safetensors: is damaged or cut short"),
    "no-weights": (
        lambda f: [p.unlink() for p in [*f.glob("*.safetensors"), f / INDEX]],
        "has no model.safetensors and no",
    ),
    "no-index": (lambda f: (f / INDEX).unlink(), "has no model.safetensors and no"),
    "bad-index": (lambda f: (f / INDEX).write_text("{}"), "has no weight_map"),
    "not-in-its-shard": (drop_tensor(False), "model.norm.weight: is not in model-0000"),
    "missing-tensor": (drop_tensor(True), "1 tensors of LlamaForCausalLM are not stored \\(model.norm"),
    "pickled": (pickled, "pytorch_model-00001-of-00002.bin: load the checkpoint by from_pretrained and save"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "match"), SOURCES.values(), ids=SOURCES)
def test_a_checkpoint_that_is_not_whole_is_refused_and_nothing_is_written(
    change, match, source, tmp_path
):
    change(source)
    before = contents(tmp_path)

    for command in (["plan", source], ["grow", source, tmp_path / "out"]):
        result = invoke(*command)

        assert result.exit_code == 1, result.output
        assert re.search(match, said(result)), result.output
        assert contents(tmp_path) == before and not (tmp_path / "out").exists()


def test_every_missing_shard_is_named_at_once(source):
    for path in sorted(source.glob("*.safetensors"))[1:]:
        path.unlink()

    with pytest.raises(CheckpointError, match="00002-of-00003.*\n.*00003-of-00003"):
        saved.load(source)


def test_tensors_of_other_dtypes_are_refused(tmp_path):
    save(tmp_path / "source", shard="1GB")
    file = tmp_path / "source" / "model.safetensors"
    coded = {n: t.to(torch.float8_e4m3fn) for n, t in load_file(file).items()}
    save_file(coded, file, {"format": "pt"})

    with pytest.raises(CheckpointError, match="has tensors of F8_E4M3; growkern grows"):
        saved.load(tmp_path / "source")


def existing(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")


OUTS = {
    "itself": ("source", [], None, "is, is inside, or contains the source"),
    "inside": ("source/out", [], None, "is, is inside, or contains the source"),
    "around": (".", ["--overwrite"], None, "is, is inside, or contains the source"),
    "no-parent": ("a/b", [], None, "does not exist; make it first"),
    "exists": ("out", [], existing, "exists; name another folder, or pass --overwrite"),
    "no-checkpoint": ("out", ["--overwrite"], existing, "so it is no checkpoint; remove the folder yourself"),
    "file": ("out", ["--overwrite"], lambda out: out.write_text(""), "is no folder; name another path"),
    "link": ("out", ["--overwrite"], lambda out: out.symlink_to("x"), "is no folder; name another path"),
    "shard-size": ("out", ["--max-shard-size", "big"], None, "cannot read the size 'big'"),
    "plan": ("out", ["--to", "hidden=12"], None, "the target 12 is smaller"),
    "config": ("out", ["--to", "hidden=25"], None, "accepts no llama of hidden=25.*not a multiple"),
}  # fmt: skip


@pytest.mark.parametrize(("out", "options", "make_it", "match"), OUTS.values(), ids=OUTS)
def test_a_target_that_cannot_be_is_refused_and_nothing_is_written(
    out, options, make_it, match, source, tmp_path
):
    if make_it:
        make_it(tmp_path / out)
    before = contents(tmp_path)

    result = invoke("grow", source, tmp_path / out, *options)

    assert result.exit_code == 1, result.output
    assert re.search(match, said(result)), result.output
    assert contents(tmp_path) == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_disk_that_is_too_full_is_refused_with_the_figures(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=10**5))

    with pytest.raises(CheckpointError, match="takes 0.000161 GB, and 0.0001 GB are free"):
        checkpoint.grow(source, tmp_path / "out")

    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "error", "overwrite"),
    [  # every pair of two of the three
        (stage, error, (i + j) % 2 == 1)
        for i, stage in enumerate(["write", "close", "_sync"])
        for j, error in enumerate(
            [OSError(28, "No space left"), KeyboardInterrupt(), MemoryError()]
        )
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, BaseException) else str(v),
)
def test_a_growth_that_fails_on_its_way_leaves_what_was_there(
    stage, error, overwrite, source, tmp_path, monkeypatch
):
    if overwrite:
        checkpoint.grow(source, tmp_path / "out", to={"layers": 3})
    before = contents(tmp_path)
    owner = output if stage == "_sync" else shards.Shards
    failures = fail_at(monkeypatch, owner, stage, error, 1 if stage == "close" else 5)
    expected = CheckpointError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        checkpoint.grow(source, tmp_path / "out", overwrite=overwrite, max_shard_size="50KB")

    assert failures and contents(tmp_path) == before
    assert {p.name for p in tmp_path.iterdir()} == {"source"} | ({"out"} if overwrite else set())


def test_a_target_that_cannot_be_renamed_gives_back_what_it_was_to_replace(
    source, tmp_path, monkeypatch
):
    checkpoint.grow(source, tmp_path / "out", to={"layers": 3})
    before, rename, calls = contents(tmp_path), Path.rename, []

    def fails(path, to):
        calls.append(path.name)
        if len(calls) == 2:  # the first rename has moved the old checkpoint aside
            raise OSError(5, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(CheckpointError, match="Input/output error. Nothing was changed"):
        checkpoint.grow(source, tmp_path / "out", overwrite=True)

    assert contents(tmp_path) == before and len(calls) == 3
    assert {p.name for p in tmp_path.iterdir()} == {"source", "out"}


def test_overwrite_replaces_a_checkpoint_whole(source, tmp_path):
    assert invoke("grow", source, tmp_path / "out", "--max-shard-size", "50KB").exit_code == 0
    again = invoke("grow", source, tmp_path / "out")
    assert again.exit_code == 1 and "exists" in again.output

    result = invoke("grow", source, tmp_path / "out", "--overwrite", "--to", "layers=3")

    assert result.exit_code == 0, result.output
    assert {p.name for p in tmp_path.iterdir()} == {"source", "out"}
    assert not (tmp_path / "out" / INDEX).exists()
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.hidden_size, config.num_hidden_layers) == (24, 3)


def test_a_config_that_asks_for_attentions_is_kept_whatever_attention_this_process_uses(
    source, tmp_path
):
    config = source / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"output_attentions": True}))

    checkpoint.grow(source, tmp_path / "out", to="2x")

    assert json.loads((tmp_path / "out" / "config.json").read_text())["output_attentions"] is True


def test_memory_for_the_largest_tensor_and_its_source_is_enough(source, tmp_path, monkeypatch):
    checkpoint.grow(source, tmp_path / "out")
    before, after = (
        {n: t.nbytes for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
        for folder in (source, tmp_path / "out")
    )
    needed = max(n + before[name] for name, n in after.items())
    assert needed < sum(after.values()) / 4
    monkeypatch.setattr(sets, "free_bytes", lambda device: needed)

    checkpoint.grow(source, tmp_path / "again")

    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    monkeypatch.setattr(sets, "free_bytes", lambda device: needed - 1)
    with pytest.raises(InsufficientMemoryError, match=r"largest tensors need.*GiB on cpu; free"):
        checkpoint.grow(source, tmp_path / "other")
    assert not (tmp_path / "other").exists()
