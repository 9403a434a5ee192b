"""Batches for a transformers model, from random inputs or from a text."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growkern.errors import GrowthError
from growkern.support.memory import free_bytes

MASKED = 0.15  # share of masked tokens, as in BERT's training
SKIPPED = -100  # labels that cross entropy ignores
OFFSET = 2  # positions that RoBERTa and OPT reserve


def random_inputs(model: Any, n_rows: int, n_tokens: int, seed: int) -> dict[str, Tensor]:
    """Draw random inputs of a model: token ids (n_rows, n_tokens), or images if the model takes pixel values.

    Raises:
        GrowthError: ``n_tokens`` exceeds the number of positions of the model, or the inputs do not fit in memory.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    if model.main_input_name == "pixel_values":
        size = config.image_size
        side: list[int] = [*size] if isinstance(size, list | tuple) else [size, size]  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        _refuse_large(n_rows * config.num_channels * math.prod(side))
        pixels = torch.randn(n_rows, config.num_channels, *side, generator=generator)
        return {"pixel_values": pixels.to(model.dtype)}
    _refuse_long(config, n_tokens)
    _refuse_large(n_rows * n_tokens * config.vocab_size)  # the logits
    ids = torch.randint(0, config.vocab_size, (n_rows, n_tokens), generator=generator)
    if getattr(config, "is_encoder_decoder", False):
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    return {"input_ids": ids}


def common_inputs(
    source: Any, target: Any, n_rows: int, n_tokens: int, seed: int
) -> dict[str, Tensor]:
    """Draw random inputs for two models; raise GrowthError if their classes or vocabulary sizes differ."""
    kinds = type(source).__name__, type(target).__name__
    sizes = [getattr(model.config, "vocab_size", None) for model in (source, target)]
    if kinds[0] != kinds[1] or sizes[0] != sizes[1]:
        raise GrowthError(
            f"a {kinds[0]} of {sizes[0]} tokens did not grow into a {kinds[1]} of {sizes[1]}; pass a source and its own target."
        )
    return random_inputs(source, n_rows, n_tokens, seed)


def training_batches(
    model: Any, folder: Path, text: Path | None, n: int, n_rows: int, n_tokens: int, seed: int
) -> list[dict[str, Tensor]]:
    """Make batches with labels: next tokens, masked tokens, or random classes of images.

    Args:
        model: Model of the checkpoint.
        folder: Folder of the checkpoint, with the tokenizer.
        text: Text file, read from its start; None for random inputs.
        n: Number of batches; fewer if the text is shorter.
        n_rows: Rows per batch.
        n_tokens: Tokens per row.
        seed: Seed of random inputs, masks and classes.

    Raises:
        GrowthError: The text is too short, no tokenizer of the model can read the text, or the model class has no loss.
    """
    _refuse_large(2 * n * n_rows * n_tokens)  # token ids take 8 bytes
    inputs = [random_inputs(model, n_rows, n_tokens, seed + i) for i in range(n)]
    mask: int | None = None
    if text is not None and "input_ids" in inputs[0]:
        ids, tokenizer = _tokens(folder, text)
        mask = tokenizer.mask_token_id
        n = min(n, len(ids) // (n_rows * n_tokens))  # batches of a short text repeat
        if not n:
            raise GrowthError(
                f"{text} has {len(ids)} tokens, and a batch of {n_rows} x {n_tokens} takes {n_rows * n_tokens}; pass a longer "
                "text, or lower --tokens or --batch-size."
            )
        _refuse_unknown(ids, model, folder, text)
        rows = ids[: n * n_rows * n_tokens].view(n, n_rows, n_tokens)
        inputs = [{"input_ids": row} for row in rows]
    return [*_labelled(model, inputs, mask, torch.Generator().manual_seed(seed))]


def _labelled(
    model: Any, inputs: list[dict[str, Tensor]], mask: int | None, generator: torch.Generator
) -> Iterator[dict[str, Tensor]]:
    for batch in inputs:
        ids = batch.get("input_ids")
        if ids is None:
            n = len(batch["pixel_values"])
            classes = torch.randint(0, model.config.num_labels, (n,), generator=generator)
            yield batch | {"labels": classes}
        elif type(model).__name__.endswith("ForMaskedLM"):
            hidden = torch.rand(ids.shape, generator=generator) < MASKED
            hidden[:, 0] = True  # a batch without masked tokens has no loss
            drawn = torch.randint(0, model.config.vocab_size, ids.shape, generator=generator)
            seen = drawn if mask is None else torch.full_like(ids, mask)
            yield {
                "input_ids": torch.where(hidden, seen, ids),
                "labels": ids.masked_fill(~hidden, SKIPPED),
            }
        elif type(model).__name__.endswith("ForConditionalGeneration"):
            yield {"input_ids": ids, "labels": ids}
        elif type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
            yield batch | {"labels": ids}
        else:
            raise GrowthError(
                f"a {type(model).__name__} has no loss to compare; call growkern.compare, which takes loss=."
            )


def sequences(model: Any, folder: Path, text: Path, n_tokens: int) -> tuple[Tensor, Any]:
    """Cut a text into whole sequences of tokens, and leave out the rest.

    Args:
        model: Model of the checkpoint, which predicts the next token.
        folder: Folder of the checkpoint, with the tokenizer.
        text: Text file.
        n_tokens: Tokens per sequence.

    Returns:
        Token ids (n, n_tokens), and the tokenizer.

    Raises:
        GrowthError: The model predicts no next tokens, the text is too short, or no tokenizer of the model can read it.
    """
    name = type(model).__name__
    if not name.endswith(("ForCausalLM", "LMHeadModel")):
        raise GrowthError(
            f"a {name} predicts no next tokens of a text; call growkern.inherit.store with batches of your own, which hold the masks."
        )
    _refuse_long(model.config, n_tokens)
    ids, tokenizer = _tokens(folder, text)
    if len(ids) < n_tokens:
        raise GrowthError(
            f"{text} has {len(ids)} tokens, and a sequence takes {n_tokens}; pass a longer text, or lower --tokens."
        )
    _refuse_unknown(ids, model, folder, text)
    return ids[: len(ids) // n_tokens * n_tokens].view(-1, n_tokens), tokenizer


def _refuse_unknown(ids: Tensor, model: Any, folder: Path, text: Path) -> None:
    if (highest := int(ids.max())) >= model.config.vocab_size:
        raise GrowthError(
            f"the tokenizer of {folder} makes token {highest} of {text}, and the model has {model.config.vocab_size} tokens; leave "
            "--text out for random tokens (compare), or save the tokenizer of the model there."
        )


def _tokens(folder: Path, text: Path) -> tuple[Tensor, Any]:
    """Return the token ids of a text, and the tokenizer."""
    from transformers import AutoTokenizer

    try:
        load: Any = getattr(AutoTokenizer, "from_pretrained")  # noqa: B009  (untyped)
        tokenizer: Any = load(str(folder.resolve()), local_files_only=True, trust_remote_code=False)
        words = text.read_text(encoding="utf-8", errors="replace")
        ids: list[int] = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GrowthError(
            f"cannot read {text} with the tokenizer of {folder}: {error}. Leave --text out for random tokens (compare), or save the "
            "tokenizer of the model there."
        ) from error
    return torch.tensor(ids), tokenizer


def _refuse_large(n: int) -> None:
    """Raise GrowthError if ``n`` numbers of 4 bytes do not fit in memory."""
    free = free_bytes(torch.device("cpu"))
    if free is not None and 4 * n > free:
        needed = 4 * min(n, 10**300) / 1e9  # a larger number is no float
        raise GrowthError(
            f"the inputs and outputs take {needed:.3g} GB at least, and {free / 1e9:.3g} GB are free; lower --tokens, --batch-size or "
            "--steps."
        )


def _refuse_long(config: Any, n_tokens: int) -> None:
    room = getattr(config, "max_position_embeddings", None)
    if room is not None and n_tokens > room - OFFSET:
        raise GrowthError(
            f"{n_tokens} tokens do not fit: the model has {room} positions; pass --tokens {room - OFFSET}."
        )
