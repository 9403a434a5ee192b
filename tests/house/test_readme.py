"""The README's examples run; the loops grow at an earlier step than the README says."""

import re

import pytest
import torch
import traps
import zoo
from models import Plain, batch, make
from readme import BLOCKS, IN_PROCESSES, README

import growkern

PAIR = next(text for text in BLOCKS if "torch.optim.Muon" in text)
TRACED, HINTED = (
    next(text for text in BLOCKS if call in text)
    for call in ("growkern.describe(model, inputs=ids)", "growkern.Hint(")
)
EXAMPLES = [text for text in BLOCKS if text not in (PAIR, TRACED, HINTED, *IN_PROCESSES.values())]


def test_the_two_calls_at_the_top_run_and_preserve_the_function():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = model(batch()).logits
    calls = EXAMPLES[0].replace("1024", "96").replace("24}", "4}")

    exec(calls, {"model": model, "optim": optim})

    assert calls.count("expand_inplace(") == 2
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (96, 4)
    assert torch.allclose(model(batch()).logits, before, atol=1e-4)


def test_the_example_that_runs_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}

    exec(EXAMPLES[1], names)

    assert names["model"].config.hidden_size == 128
    assert (tmp_path / "grown" / "model.safetensors").exists()
    printed = capsys.readouterr().out
    assert "Growth plan for llama" in printed and "Grew llama" in printed


def test_a_model_of_your_own_grows_by_its_spec():
    model = Plain()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = model(batch())

    exec(EXAMPLES[-1], {"model": model, "optim": optim})

    assert (len(model.blocks), model.wte.embedding_dim) == (3, 36)
    assert torch.allclose(model(batch()), before, atol=1e-4)


def test_a_model_of_your_own_is_traced(capsys):
    model = traps.make(traps.Decoder)
    optim, before = torch.optim.AdamW(model.parameters()), model(traps.ids())

    exec(TRACED, {"growkern": growkern, "model": model, "optim": optim, "ids": traps.ids()})

    assert "Decoder, by tracing: hidden 48" in capsys.readouterr().out
    assert model.blocks[0].up.weight.shape == (176, 96)
    assert torch.allclose(model(traps.ids()), before, rtol=0, atol=1e-9)


def test_the_vocabulary_of_a_model_of_transformers_grows_by_a_hint():
    model = zoo.make("phi3")
    optim = torch.optim.AdamW(model.parameters())

    exec(HINTED.replace("50_304", "128"), {"growkern": growkern, "model": model, "optim": optim})

    assert model.config.vocab_size == len(model.lm_head.weight) == 128


def test_the_spec_of_the_example_has_under_40_lines():
    assert "ModelSpec(" in EXAMPLES[-1] and len(EXAMPLES[-1].splitlines()) < 40


def test_muon_with_adamw_grows():
    names = {
        "model": make("llama", tied=False),
        "torch": torch,
        "growkern": growkern,
        "ids": batch(),
    }

    exec(PAIR, names)

    assert names["model"].config.hidden_size == 48
    for optim in (names["muon"], names["adamw"]):
        params = [p for group in optim.param_groups for p in group["params"]]
        assert all(optim.state[p] for p in params)
    assert names["model"].model.layers[0].mlp.up_proj.weight.shape == (80, 48)


def test_the_other_way_runs():
    model = make("llama", tied=True, num_hidden_layers=4)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)

    exec(EXAMPLES[-2], {"model": model, "optim": optim, "growkern": growkern})

    assert (len(model.model.layers), model.config.hidden_size) == (2, 12)


LOOPS = EXAMPLES[2:-3]
AT = ("step=1000", "step=2"), ("step == 1000", "step == 2"), ("max_steps=4000", "max_steps=5")


def loop(index: int, **names: object) -> dict:
    """Run a loop of the README that grows at step 2."""
    text = LOOPS[index]
    for long, short in AT:
        text = text.replace(long, short)
    names |= {"growkern": growkern, "torch": torch}
    exec(text, names)
    return names


def test_the_advice(capsys):
    curve = [(3e5 * 10 ** (i / 20 - 1), 1 + 10 ** (-0.3 * (i / 20 - 1))) for i in range(21)]
    model, optim, *_ = things()
    schedule = growkern.GrowthSchedule([growkern.At(step=1000, to="2x")])
    schedule.attach(model, optim)
    for i in range(1, 41):
        schedule.observe(tokens=100, loss=1 + i**-0.3)

    names = {"growkern": growkern, "curve": curve, "schedule": schedule}
    exec(EXAMPLES[-3], names)

    printed = capsys.readouterr().out
    assert "58,656 -> 217,664 parameters" in printed and "Growing now would save" in printed
    assert names["advice"].budget == 1e9


def things():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optim, lambda t: 1 / (1 + t))
    return model, optim, scheduler, [batch(seed) for seed in range(5)]


def test_there_are_five_loops_of_under_ten_lines():
    assert len(LOOPS) == 5 and all(
        len(text.splitlines()) < 10 for text in (*LOOPS, *IN_PROCESSES.values())
    )


def test_the_plain_loop():
    model, optim, scheduler, batches = things()

    names = loop(0, model=model, optim=optim, scheduler=scheduler, batches=batches)

    assert model.config.hidden_size == 48 and names["schedule"].fired == [2]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_the_loop_of_transformers(tmp_path):
    pytest.importorskip("accelerate")
    import transformers

    model, *_ = things()
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=1, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    dataset = [{"input_ids": row, "labels": row} for row in batch(n=8)]

    loop(1, transformers=transformers, model=model, arguments=arguments, dataset=dataset)

    assert model.config.hidden_size == 48


@pytest.mark.filterwarnings("ignore")
def test_the_loop_of_lightning(tmp_path, monkeypatch):
    lightning = pytest.importorskip("lightning")

    monkeypatch.chdir(tmp_path)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = things()[0]

        def training_step(self, ids, _):
            return self.model(ids, labels=ids).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    module = Module()
    loader = torch.utils.data.DataLoader(batch(n=16), batch_size=2)
    loop(2, lightning=lightning, module=module, loader=loader)

    assert module.model.config.hidden_size == 48


@pytest.mark.filterwarnings("ignore")
def test_the_loop_of_accelerate():
    accelerate = pytest.importorskip("accelerate")

    model, optim, scheduler, batches = things()
    loader = torch.utils.data.DataLoader(torch.cat(batches), batch_size=2)
    accelerator = accelerate.Accelerator(cpu=True)

    loop(3, accelerator=accelerator, model=model, optim=optim, scheduler=scheduler, batches=loader)

    assert model.config.hidden_size == 48


def test_the_loop_of_distributed_data_parallel():
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, optim, _, batches = things()
        names = loop(4, model=model, optim=optim, batches=batches)
        assert model.config.hidden_size == 48 and names["ddp"].module is model
    finally:
        dist.destroy_process_group()


PROCEDURES = re.findall(r"\| `(procedures\.(\w+)\(.*\))` \|$", README, re.MULTILINE)


@pytest.mark.parametrize(("line", "name"), PROCEDURES, ids=[name for _, name in PROCEDURES])
def test_a_line_of_the_table_of_procedures_gives_a_schedule_that_is_attached(line, name):
    model = make("bert", tied=True, num_hidden_layers=3)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optim, lambda t: 1.0)

    schedule = eval(line, {"procedures": growkern.procedures, "model": model})
    schedule.attach(model, optim, scheduler)

    assert "FLOPs" in str(schedule) and schedule.stages[-1].n_params > schedule.stages[0].n_params


def test_the_table_has_every_procedure():
    made = {name for name in growkern.procedures.__all__ if name.islower()}

    assert {name for _, name in PROCEDURES} == made - {"g_stack_tokens"}


LEARNED = re.findall(r"\| `(growkern\.learn\(.*\))` \|$", README, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("line", LEARNED)
def test_a_line_on_learned_growth_runs(line):
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    names = {"growkern": growkern, "depth": growkern.depth, "width": growkern.width}

    names |= {"model": model, "optim": optim, "batches": [batch()]}

    report = eval(line[:-1] + ", steps=3)", names)

    assert len(LEARNED) == 3 and report.learned.steps == 3 and "learned" in str(report)
