"""What is cut short, changed, absurd or hostile in the files of a source is an error, or has no effect."""

import json
import os
import re
from contextlib import nullcontext
from pathlib import Path

import processes
import pytest
import torch
import transformers
from limits import bounded
from models import batch, logits
from safetensors.torch import load_file, save_file
from saved import INDEX, contents, invoke, load, said, save

from growkern.checkpoints import grow as checkpoint
from growkern.checkpoints import load as saved
from growkern.errors import CheckpointError

WEIGHTS = "model.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save(tmp_path / "source", shard="1GB")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    return tmp_path / "source"


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def overwritten(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\0" * 100)


def replaced(path: Path) -> None:
    """Replace a file by one of the same size and time."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    (copy := path.with_name("copy")).write_bytes(path.read_bytes())
    os.utime(copy, ns=times)
    copy.rename(path)


CHANGES = {
    "weights overwritten": (WEIGHTS, overwritten),
    "weights appended to": (WEIGHTS, lambda path: path.write_bytes(path.read_bytes() + b"\0")),
    "weights replaced": (WEIGHTS, replaced),
    "config removed": ("config.json", Path.unlink),
    "tokenizer changed": ("tokenizer.json", lambda path: path.write_text("[]")),
}


@pytest.mark.parametrize(("name", "change"), CHANGES.values(), ids=CHANGES)
def test_a_source_that_changes_while_it_is_read_is_refused(name, change, source, tmp_path):
    changed = []

    def once(*_):
        if not changed:
            change(source / name)
            changed.append(name)

    with pytest.raises(CheckpointError, match=f"changed while it was read \\({name}\\)"):
        checkpoint.grow(source, tmp_path / "out", on_progress=once)

    assert changed and [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_file_that_is_not_read_may_change(source, tmp_path):
    log = source / "trainer_state.json"
    checkpoint.grow(source, tmp_path / "out", on_progress=lambda *n: log.write_text(str(n)))

    assert log.exists() and (tmp_path / "out" / WEIGHTS).exists()


@processes.together
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "command", "when"),
    [("llama", "grow", "growth"), ("mixtral", "grow", "load"), ("llama", "verify", "load")],
    ids=str,
)
def test_a_source_cut_short_while_it_is_read_is_refused(family, command, when, tmp_path):
    save(tmp_path / "source", family)
    log = tmp_path / "log"

    started = processes.start(
        "cut_worker", tmp_path / "source", tmp_path / "out", command, when, log=log
    )
    processes.end([started], log)

    assert re.search(r"refused: .*(failed to fill whole buffer|cut short)", log.read_text())
    assert {path.name for path in tmp_path.iterdir()} == {"source", "log"}


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool], ids=str)
def test_weights_stored_as_integers_are_refused_by_name(dtype, source, tmp_path):
    tensors = load_file(source / WEIGHTS)
    stored = {n: (t * 50).to(dtype) if "q_proj" in n else t for n, t in tensors.items()}
    save_file(stored, source / WEIGHTS, {"format": "pt"})

    for words in (["plan", source], ["grow", source, tmp_path / "out"], ["verify", source, source]):
        result = invoke(*words)

        said_what = f"q_proj.weight: is stored as {str(dtype)[6:]}; dequantize the tensor"
        assert result.exit_code == 1 and said_what in said(result), result.output
    assert not (tmp_path / "out").exists()


def test_experts_stored_as_integers_are_refused_by_name(tmp_path):
    save(tmp_path / "source", "mixtral", shard="1GB")
    file = tmp_path / "source" / WEIGHTS
    stored = {n: t.to(torch.int8) if ".w2." in n else t for n, t in load_file(file).items()}
    save_file(stored, file, {"format": "pt"})

    with pytest.raises(CheckpointError, match=r"experts\.\*\.w2\.weight: is stored as int8"):
        saved.load(tmp_path / "source")


def test_stored_integers_that_are_no_weights_are_left_out(tmp_path):
    model = save(tmp_path / "source", "bert", shard="1GB")
    file = tmp_path / "source" / WEIGHTS
    positions = {"bert.embeddings.position_ids": torch.arange(64)[None]}  # as older releases did
    save_file(load_file(file) | positions, file, {"format": "pt"})

    checkpoint.grow(tmp_path / "source", tmp_path / "out")

    grown = load(model, tmp_path / "out")
    torch.testing.assert_close(logits(grown, batch()), logits(model, batch()), rtol=0, atol=1e-5)


CONFIGS = {
    "too deep": ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
    "deep": (dict(a=json.loads("[" * 40 + "]" * 40)), "a: is nested more than 20 levels deep"),
    "no object": ("[1]", "contains no JSON object"),
    "no text": (b"\xff\xfe\x00", "cannot read .*config.json"),
    "digits": ('{"a": ' + "9" * 5000 + "}", "cannot read .*config.json"),
    "nan": (dict(rms_norm_eps=float("nan")), "rms_norm_eps: contains NaN"),
    "nan inside": (dict(rope_parameters={"a": [float("nan")]}), "rope_parameters: contains NaN"),
    # large enough to break the bounds, and not the machine of a test that fails
    "depth": (dict(num_hidden_layers=20_000), r"num_hidden_layers: is 20000, and \d+ tensors"),
    "depth below 0": (dict(num_hidden_layers=-1), r"num_hidden_layers: is -1, and \d+ tensors"),
    "depth as a float": (dict(num_hidden_layers=1e9), "num_hidden_layers: is 1000000000.0"),
    "labels": (dict(num_labels=300_000), "num_labels: is 300000"),
    "hidden": (dict(hidden_size=10**6), r"a LlamaForCausalLM of [\d,]+ elements, and [\d,]+ are"),
    "vocab": (dict(vocab_size=3 * 10**7), r"a LlamaForCausalLM of [\d,]+ elements, and [\d,]+ are"),
    "no size": (dict(vocab_size=10**40), "transformers cannot load"),
    "type": (dict(model_type=[]), "transformers cannot load"),
    "method": (dict(to_dict=1), "to_dict: is no field of a LlamaConfig"),
    "class": (dict(__class__="x"), "__class__: is no field of a LlamaConfig"),
    "history": (dict(growkern_history=5), "growkern_history is a int"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "match"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_of_no_model_is_refused_in_little_time_and_memory(config, match, source, tmp_path):
    path = source / "config.json"
    if isinstance(config, dict):
        edit(path, **config)
    else:
        path.write_bytes(config if isinstance(config, bytes) else config.encode())

    for words in (["plan", source], ["grow", source, tmp_path / "out", "--seed", 0]):
        result = bounded(*words)

        assert result.exit_code == 1 and re.search(match, said(result)), result.output
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_positions_that_are_computed_are_not_allocated(tmp_path):
    save(tmp_path / "source", "bert")
    edit(tmp_path / "source" / "config.json", max_position_embeddings=10**10)

    result = bounded("plan", tmp_path / "source")

    assert result.exit_code == 1 and "elements, and" in said(result)


def test_an_infinite_field_that_transformers_wrote_is_kept(source, tmp_path):
    config = transformers.AutoConfig.from_pretrained(source)
    config.own_limit = float("inf")
    config.save_pretrained(source)

    checkpoint.grow(source, tmp_path / "out")

    assert saved.load(source).model.config.own_limit == float("inf")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").own_limit == float("inf")


HOSTILE = {
    "attn_implementation": "evil/kernel",
    "_attn_implementation": "evil/kernel",
    "experts_implementation": "evil/kernel",
    "fusion_config": {"patch_embeddings": True},
    "transformers_weights": "other.safetensors",
    "auto_map": {"AutoModelForCausalLM": "evil.Evil"},
}


def test_a_config_chooses_no_code_and_no_other_files(source, tmp_path):
    edit(source / "config.json", **HOSTILE)
    (source / "evil.py").write_text("raise SystemExit('executed')")
    base = {"base_model_name_or_path": str(tmp_path), "peft_type": "LORA"}
    (source / "adapter_config.json").write_text(json.dumps(base))

    model = saved.load(source).model
    checkpoint.grow(source, tmp_path / "out")

    assert model.config._attn_implementation == "sdpa" and not hasattr(model, "peft_config")
    grown = json.loads((tmp_path / "out" / "config.json").read_text())
    assert HOSTILE.keys() & grown.keys() == {"auto_map"}


@pytest.mark.parametrize("whole", [True, False])
def test_transformers_logs_after_a_load_what_it_did_before(whole, source):
    logging, path = transformers.utils.logging, source / "config.json"
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    if not whole:
        edit(path, hidden_size=48)
    try:
        logging.set_verbosity_info()
        logging.enable_progress_bar()
        with nullcontext() if whole else pytest.raises(CheckpointError, match="cannot load"):
            saved.load(source)
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before[0])
        if not before[1]:
            logging.disable_progress_bar()


def test_a_quantized_checkpoint_is_refused(source):
    edit(source / "config.json", quantization_config={"quant_method": "bitsandbytes"})

    assert "is quantized" in said(invoke("plan", source))


def header(change):
    """Return a function that changes the header of a shard, as text, and keeps its length in step."""

    def write(path: Path) -> None:
        data = path.read_bytes()
        n = int.from_bytes(data[:8], "little")
        text = change(json.loads(data[8 : 8 + n]))
        new = (text if isinstance(text, str) else json.dumps(text)).encode()
        path.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + n :])

    return write


def larger(tensors: dict) -> dict:
    tensors["model.norm.weight"]["shape"] = [10**12]
    return tensors


def beyond(tensors: dict) -> dict:
    tensors["model.norm.weight"]["data_offsets"] = [10**12, 10**12 + 96]
    return tensors


SHARDS = {
    "empty": lambda path: path.write_bytes(b""),
    "no header": lambda path: path.write_bytes(b"\xff" * 100),
    "header cut": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "data cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "data appended": lambda path: path.write_bytes(path.read_bytes() + b"\0" * 8),
    "shape": header(larger),
    "offsets": header(beyond),
    "deep": header(lambda _: "[" * 100_000),
}


@pytest.mark.parametrize("change", SHARDS.values(), ids=SHARDS)
def test_a_shard_that_is_not_whole_is_refused(change, source, tmp_path):
    change(source / WEIGHTS)

    result = bounded("grow", source, tmp_path / "out")

    assert result.exit_code == 1 and "model.safetensors: is damaged" in said(result)
    assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


OUTSIDE = "is not the name of a file in the folder"
INDICES = {
    "name too long": ("a" * 5000, "aaa...: cannot be read"),
    "absolute": ("/etc/passwd", f"/etc/passwd: {OUTSIDE}"),
    "outside": ("../other.safetensors", f"../other.safetensors: {OUTSIDE}"),
    "below": ("onnx/model.safetensors", f"onnx/model.safetensors: {OUTSIDE}"),
    "itself": (".", OUTSIDE),
    "parent": ("..", "is missing"),
    "missing": ("none.safetensors", "none.safetensors: is missing, with 1 tensors"),
    "no shard": ("config.json", "config.json: is damaged"),
    "number": (5, "has no weight_map"),
    "null byte": ("a\0b", "is missing"),
}


@pytest.mark.parametrize(("file", "match"), INDICES.values(), ids=INDICES)
def test_an_index_of_no_shards_is_refused(file, match, tmp_path):
    save(tmp_path / "source")
    path = tmp_path / "source" / INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = file
    path.write_text(json.dumps(index))
    before = contents(tmp_path)

    result = bounded("grow", tmp_path / "source", tmp_path / "out")

    assert result.exit_code == 1 and match in said(result), result.output
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["[]", '{"weight_map": []}', '{"weight_map": {}}', "{" * 10**6])
def test_an_index_that_cannot_be_read_is_refused(text, tmp_path):
    save(tmp_path / "source")
    (tmp_path / "source" / INDEX).write_text(text)

    assert bounded("plan", tmp_path / "source").exit_code == 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit", "qwen3"])
def test_weights_that_need_no_conversion_are_not_read_to_plan(family, tmp_path):
    save(tmp_path / "source", family, tied=True)

    source = saved.load(tmp_path / "source", mapped=True)

    read = [n for n, t in source.model.named_parameters() if source.stored.name_of(t) is None]
    assert read == []
