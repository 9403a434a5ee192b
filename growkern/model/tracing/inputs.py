"""Example inputs of models of transformers, made from their config."""

import inspect
from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

BATCH, LENGTH = 2, 12
IMAGE_TOKEN = "image_token_id", "image_token_index"  # fields of configs
SEED = 0


def example_inputs(model: nn.Module) -> dict[str, object] | None:
    """Return inputs that reach the whole model: ids, ids of the decoder, pixels or features; None where the config does not tell.

    Args:
        model: Any model; one without a config of transformers gets None.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict") or not hasattr(model, "main_input_name"):
        return None
    accepted = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(SEED)
    first: Any = next(model.parameters())
    made: Mapping[str, Any] = {
        "input_ids": lambda: _headed(model, _ids(config, generator, images="pixel_values" in accepted)),
        "decoder_input_ids": lambda: _ids(config, generator) if getattr(config, "is_encoder_decoder", False) else None,
        "pixel_values": lambda: _pixels(config, generator),
        "input_features": lambda: _features(config, generator),
        "input_values": lambda: _wave(config, generator) if hasattr(config, "conv_stride") else _spectrogram(config, generator),
    }  # fmt: skip
    inputs: dict[str, object] = {}
    for name, make in made.items():
        value = make() if name in accepted else None
        if isinstance(value, Tensor):
            inputs[name] = value.to(first.device, first.dtype if value.is_floating_point() else None)  # fmt: skip
    if not inputs:
        return None
    if (masked := _masked(model, config, accepted, generator)) is not None:
        inputs["bool_masked_pos"] = masked.to(first.device)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def _ids(config: Any, generator: torch.Generator, images: bool = False) -> Tensor | None:
    """Return ids that are not special; where a model writes the features of an image over ids, these ids first."""
    text = config.get_text_config()
    n = getattr(text, "vocab_size", None)
    if not isinstance(n, int):
        return None
    special = set[Any]()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):  # several tokens may end a text
        own: Any = getattr(text, name, None)
        special |= {*own} if isinstance(own, list) else {own}  # pyright: ignore[reportUnknownVariableType]
    fields = (getattr(config, name, None) for name in IMAGE_TOKEN)
    image = next((field for field in fields if isinstance(field, int)), None)
    special.add(image)
    longest = getattr(text, "max_position_embeddings", None) or LENGTH
    plain = torch.tensor([i for i in range(min(n, 1 << 16)) if i not in special])
    ids = plain[torch.randint(0, len(plain), (BATCH, min(LENGTH, longest)), generator=generator)]
    if image is None or not images:
        return ids
    vision = getattr(config, "vision_config", config)
    n_features = getattr(config, "mm_tokens_per_image", 0) or (vision.image_size // vision.patch_size) ** 2  # fmt: skip
    return torch.cat([torch.full((BATCH, n_features), image), ids], 1)


def _headed(model: nn.Module, ids: Tensor | None) -> Tensor | None:
    """Return ids as the head of a model takes them: several choices per row, or rows that end with the end token of BART's classifier."""
    kind, config = type(model).__name__, cast(Any, model.config)
    if ids is not None and "MultipleChoice" in kind:
        return torch.stack([ids, ids.flip(1)], 1)
    if ids is not None and "Classification" in kind and getattr(config, "is_encoder_decoder", False):  # fmt: skip
        ids[:, -1] = config.eos_token_id
    return ids


def _pixels(config: Any, generator: torch.Generator) -> Tensor | None:
    own = getattr(config, "vision_config", config)
    size = getattr(own, "image_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(BATCH, getattr(own, "num_channels", 3), height, width, generator=generator)


def _masked(model: nn.Module, config: Any, accepted: Collection[str], generator: torch.Generator) -> Tensor | None:  # fmt: skip
    """Return which patches of an image a mask token replaces, in a model that has one and passes the argument on."""
    named = (name for name, _ in model.named_parameters() if name.endswith("mask_token"))
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    takes = {"bool_masked_pos", "kwargs"} & {*accepted}
    if not takes or not isinstance(size, int) or not isinstance(patch, int) or not any(named):
        return None
    return torch.rand(BATCH, (size // patch) ** 2, generator=generator) < 0.5


def _features(config: Any, generator: torch.Generator) -> Tensor | None:
    bins, length = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", 0)
    return torch.randn(BATCH, bins, 2 * length, generator=generator) if bins and length else None


def _wave(config: Any, generator: torch.Generator) -> Tensor | None:
    strides = getattr(config, "conv_stride", None)
    if not strides:
        return None
    length = 10 * int(torch.tensor(strides).prod())
    return torch.randn(BATCH, length + sum(config.conv_kernel), generator=generator)


def _spectrogram(config: Any, generator: torch.Generator) -> Tensor | None:
    length, bins = getattr(config, "max_length", None), getattr(config, "num_mel_bins", None)
    return torch.randn(BATCH, length, bins, generator=generator) if length and bins else None
