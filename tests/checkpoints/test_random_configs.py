"""Hypothesis changes ``config.json`` at random: growkern grows the checkpoint, or refuses the config by a short message."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits import EXAMPLES, bounded
from saved import contents, save

FAMILIES = ["llama", "gpt2", "mixtral", "bert", "t5", "gemma2", "vit"]
FIELDS = """
attn_implementation _attn_implementation experts_implementation quantization_config auto_map fusion_config num_labels
id2label num_experts growkern_history pruned_heads rope_parameters rope_scaling rope_theta head_dim layer_types
sliding_window sub_configs to_dict save_pretrained validate __class__ __dict__ __init__ num_layers torch_dtype
is_encoder_decoder output_attentions per_layer_config transformers_weights text_config return_dict chunk_size_feed_forward
dtype name_or_path _name_or_path attribute_map use_cache max_length num_beams tie_encoder_decoder pad_token_id problem_type
base_model_tp_plan keys_to_ignore_at_inference model_type transformers_version is_decoder
"""
NUMBERS = [0, -1, 1, 2, 3, 7, 24, 48, 97, 4096, 2**31, 10**9, 10**18, 2**63, 10**40, True, False]
NUMBERS += [0.0, -0.0, 0.5, 1e-320, 1e308, -1.0, 1e9, float("nan"), float("inf"), float("-inf")]
TEXTS = [
    "",
    "x",
    "eager",
    "sdpa",
    "evil/kernel",
    "float32",
    "2",
    "a" * 3000,
    "../../x",
    "\x00",
    "None",
]
LEAVES = st.sampled_from([*NUMBERS, *TEXTS, None]) | st.integers() | st.floats() | st.text()
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=6,
)
TEXT_FILES = [
    "", "[]", "null", "{", '{"a":' * 100_000 + "1" + "}" * 100_000, '{"a":' * 300 + "1" + "}" * 300, "\ufeff{}",
]  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {family: tmp_path_factory.mktemp(family) / "source" for family in FAMILIES}
    for family, folder in folders.items():
        save(folder, family)
    return folders


@st.composite
def changes(draw):
    """Draw new values of a config's own fields (by number) and of other fields; ``...`` removes a field."""
    keys = st.lists(
        st.integers(0, 40) | st.sampled_from(FIELDS.split()) | st.text(max_size=12),
        min_size=1,
        max_size=3,
    )
    return {key: draw(st.just(...) | VALUES) for key in draw(keys)}


def edited(config: dict, fields: dict) -> dict:
    names = sorted(config)
    new = {names[k % len(names)] if isinstance(k, int) else k: v for k, v in fields.items()}
    return {name: value for name, value in (config | new).items() if value is not ...}


@pytest.mark.slow
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
@given(
    family=st.sampled_from(FAMILIES),
    fields=changes(),
    text=st.integers(0, 9).flatmap(lambda n: st.none() if n else st.sampled_from(TEXT_FILES)),
    command=st.sampled_from(["plan", "grow"]),
)
def test_a_config_is_grown_or_refused(family, fields, text, command, sources):
    folder = sources[family]
    config, out = folder / "config.json", folder.parent / "out"
    original = config.read_text()
    config.write_text(json.dumps(edited(json.loads(original), fields)) if text is None else text)
    before = contents(folder.parent)
    try:
        result = bounded(command, folder, *([out] if command == "grow" else []))

        grown = command == "grow" and result.exit_code == 0
        after = contents(folder.parent)
        assert {k: v for k, v in after.items() if not (grown and k.startswith("out/"))} == before
        assert {p.name for p in folder.parent.iterdir()} == {"source"} | (
            {"out"} if grown else set()
        )
        assert not grown or bounded("plan", out).exit_code == 0
    finally:
        config.write_text(original)
        shutil.rmtree(out, ignore_errors=True)
