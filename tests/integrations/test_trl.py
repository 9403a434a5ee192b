"""TRL's SFTTrainer grows as a Trainer does: the losses are those of a run that never grows. Skipped where TRL is not installed."""

import pytest
import torch
import transformers
from models import make
from saved import tokenizer

import growkern

pytest.importorskip("trl")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
AT, STEPS = 2, 4


def losses(folder, grows: bool) -> tuple[list[float], int]:
    """Train on words, and grow after step ``AT`` by a width that preserves the trajectory."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer(folder)
    words = transformers.AutoTokenizer.from_pretrained(folder, eos_token="w2", pad_token="w1")
    texts = [" ".join(f"w{3 + i * j % 50}" for j in range(1, 30)) for i in range(1, 17)]
    config = SFTConfig(
        str(folder / "out"), max_steps=STEPS, per_device_train_batch_size=2, logging_steps=1, report_to=[], use_cpu=True,
        save_strategy="no", max_length=32, learning_rate=1e-3, disable_tqdm=True, bf16=False, max_grad_norm=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = make("llama", tied=True, max_position_embeddings=64).float()
    dataset = Dataset.from_list([{"text": text} for text in texts])
    trainer = SFTTrainer(model, args=config, train_dataset=dataset, processing_class=words)
    if grows:
        even = growkern.width.Lossless(noise=0)
        event = growkern.At(step=AT, to="2x", width=even, dynamics="exact")
        growkern.hf.attach(trainer, growkern.GrowthSchedule([event]))
    trainer.train()
    logged = [row["loss"] for row in trainer.state.log_history if "grad_norm" in row]
    return logged, trainer.model.config.hidden_size


def test_a_growth_in_sft_trainer_keeps_the_trajectory(tmp_path):
    source, grown = (losses(tmp_path / str(grows), grows) for grows in (False, True))

    assert (source[1], grown[1]) == (24, 48) and len(grown[0]) == STEPS
    assert grown[0] == pytest.approx(source[0], rel=1e-4)
