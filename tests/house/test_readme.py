"""The examples of README and of the guides run; the loops grow at an earlier step than they say."""

import json
import re
import shlex

import pytest
import torch
import traps
import zoo
from models import Plain, batch, make
from readme import BLOCKS, EXAMPLES, IN_PROCESSES, PAGES, README, ROOT, example
from saved import invoke, said, tokenizer

import growkern
from growkern import depth, width

CONSOLE = [(page, text) for page, kind, text in BLOCKS if kind == "console"]


def test_every_example_runs_in_a_test():
    texts = {text for _, kind, text in BLOCKS if kind == "python"}

    assert texts == {*map(example, EXAMPLES), *IN_PROCESSES.values()}
    assert {kind for _, kind, _ in BLOCKS} <= {"python", "console", "text"}
    indented = [
        (page, line)
        for page, whole in PAGES.items()
        for line in re.sub(r"^```.*?^```$", "", whole, flags=re.DOTALL | re.MULTILINE).splitlines()
        if line.startswith("    ")
    ]
    assert not indented, "code without a fence is not run"


def test_readme_fits_in_300_lines():
    assert len(README.splitlines()) < 300


@pytest.mark.parametrize("page", PAGES)
def test_a_link_to_a_file_of_the_repository_leads_to_one(page):
    folder = ROOT if page[0].isupper() else ROOT / "growkern" / "guides"
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", PAGES[page])

    gone = [to for to in links if "://" not in to and not (folder / to).exists()]
    assert not gone


def test_the_two_calls_at_the_top_run_and_preserve_the_function():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = model(batch()).logits
    calls = example("top").replace("1024", "96").replace("24}", "4}")

    exec(calls, {"model": model, "optim": optim})

    assert calls.count("expand_inplace(") == 2
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (96, 4)
    assert torch.allclose(model(batch()).logits, before, atol=1e-4)


def test_the_example_that_runs_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}

    exec(example("runs"), names)

    assert names["model"].config.hidden_size == 128
    assert (tmp_path / "grown" / "model.safetensors").exists()
    printed = capsys.readouterr().out
    assert "Growth plan for llama" in printed and "Grew llama" in printed


def test_a_model_of_your_own_grows_by_its_spec():
    model = Plain()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = model(batch())

    exec(example("by hand"), {"model": model, "optim": optim})

    assert (len(model.blocks), model.wte.embedding_dim) == (3, 36)
    assert torch.allclose(model(batch()), before, atol=1e-4)


def test_a_model_of_your_own_is_traced(capsys):
    model = traps.make(traps.Decoder)
    optim, before = torch.optim.AdamW(model.parameters()), model(traps.ids())

    exec(
        example("traced"),
        {"growkern": growkern, "model": model, "optim": optim, "ids": traps.ids()},
    )

    assert len(example("traced").splitlines() + example("saved and loaded").splitlines()) < 14
    assert "Decoder, by tracing: hidden 48" in capsys.readouterr().out
    assert model.blocks[0].up.weight.shape == (176, 96)
    assert torch.allclose(model(traps.ids()), before, rtol=0, atol=1e-9)


def test_a_model_of_your_own_is_saved_and_loaded(tmp_path, monkeypatch):
    def build():
        model = traps.make(traps.Decoder)
        return model, torch.optim.AdamW(model.parameters())

    def train(model, optim):
        optim.zero_grad()
        (loss := model(traps.ids()).square().mean()).backward()
        optim.step()
        return loss.item()

    monkeypatch.chdir(tmp_path)
    model, optim = build()
    train(model, optim)
    names = {"growkern": growkern, "torch": torch, "model": model, "optim": optim, "build": build}
    names["ids"] = traps.ids()

    exec(example("traced") + example("saved and loaded"), names)

    assert names["model"] is not model
    going_on = [train(*pair) for pair in [(model, optim)] * 3]
    assert [train(names["model"], names["optim"]) for _ in range(3)] == going_on


def test_the_vocabulary_of_a_model_of_transformers_grows_by_a_hint():
    model = zoo.make("phi3")
    optim = torch.optim.AdamW(model.parameters())

    exec(
        example("hinted").replace("50_304", "128"),
        {"growkern": growkern, "model": model, "optim": optim},
    )

    assert model.config.vocab_size == len(model.lm_head.weight) == 128


def test_the_spec_of_the_example_has_under_40_lines():
    assert len(example("by hand").splitlines()) < 40


def test_muon_with_adamw_grows():
    names = {
        "model": make("llama", tied=False),
        "torch": torch,
        "growkern": growkern,
        "ids": batch(),
    }

    exec(example("muon"), names)

    assert names["model"].config.hidden_size == 48
    for optim in (names["muon"], names["adamw"]):
        params = [p for group in optim.param_groups for p in group["params"]]
        assert all(optim.state[p] for p in params)
    assert names["model"].model.layers[0].mlp.up_proj.weight.shape == (80, 48)


def test_the_other_way_runs():
    model = make("llama", tied=True, num_hidden_layers=4)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)

    exec(example("shrink"), {"model": model, "optim": optim, "growkern": growkern})

    assert (len(model.model.layers), model.config.hidden_size) == (2, 12)


LOOPS = "plain loop", "trainer", "lightning", "accelerate", "ddp", "one line"
AT = ("step=1000", "step=2"), ("step == 1000", "step == 2"), ("max_steps=4000", "max_steps=5")


def loop(name: str, **names: object) -> dict:
    """Run a loop of README that grows at step 2."""
    text = example(name)
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
    exec(example("advice"), names)

    printed = capsys.readouterr().out
    assert "58,656 -> 217,664 parameters" in printed and "Growing now would save" in printed
    assert names["advice"].budget == 1e9


def things():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optim, lambda t: 1 / (1 + t))
    return model, optim, scheduler, [batch(seed) for seed in range(5)]


def test_every_loop_has_under_ten_lines():
    texts = [*map(example, LOOPS), *IN_PROCESSES.values()]

    assert all(len(text.splitlines()) < 10 for text in texts)


def test_the_one_line_grows_a_model_of_your_own():
    model = traps.make(traps.Decoder)
    optim = torch.optim.AdamW(model.parameters())

    loop("one line", model=model, optim=optim)
    for _ in range(2):
        model(traps.ids()).sum().backward()
        optim.step()

    assert model.blocks[0].up.weight.shape == (176, 96)


def test_the_plain_loop():
    model, optim, scheduler, batches = things()

    names = loop("plain loop", model=model, optim=optim, scheduler=scheduler, batches=batches)

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

    loop("trainer", transformers=transformers, model=model, arguments=arguments, dataset=dataset)

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
    loop("lightning", lightning=lightning, module=module, loader=loader)

    assert module.model.config.hidden_size == 48


@pytest.mark.filterwarnings("ignore")
def test_the_loop_of_accelerate():
    accelerate = pytest.importorskip("accelerate")

    model, optim, scheduler, batches = things()
    loader = torch.utils.data.DataLoader(torch.cat(batches), batch_size=2)
    accelerator = accelerate.Accelerator(cpu=True)

    loop(
        "accelerate",
        accelerator=accelerator,
        model=model,
        optim=optim,
        scheduler=scheduler,
        batches=loader,
    )

    assert model.config.hidden_size == 48


def test_the_loop_of_distributed_data_parallel():
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, optim, _, batches = things()
        names = loop("ddp", model=model, optim=optim, batches=batches)
        assert model.config.hidden_size == 48 and names["ddp"].module is model
    finally:
        dist.destroy_process_group()


PROCEDURES = re.findall(r"\| `(procedures\.(\w+)\(.*\))` \|$", PAGES["procedures.md"], re.MULTILINE)


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


LEARNED = re.findall(r"\| `(growkern\.learn\(.*\))` \|$", PAGES["learned.md"], re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("line", LEARNED)
def test_a_line_on_learned_growth_runs(line):
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    names = {"growkern": growkern, "depth": growkern.depth, "width": growkern.width}

    names |= {"model": model, "optim": optim, "batches": [batch()]}

    report = eval(line[:-1] + ", steps=3)", names)

    assert len(LEARNED) == 3 and report.learned.steps == 3 and "learned" in str(report)


def test_the_procedure_prints_the_run_to_come(capsys):
    model = make("bert", tied=True, num_hidden_layers=3)

    exec(example("procedure"), {"growkern": growkern, "model": model})

    assert "FLOPs" in capsys.readouterr().out


def test_a_student_learns_from_a_teacher(tmp_path, monkeypatch):
    from transformers import Trainer, TrainingArguments

    monkeypatch.chdir(tmp_path)
    model, teacher = make("llama", tied=True), make("llama", tied=False, seed=1)
    rows = {"input_ids": batch(), "labels": batch()}
    arguments = TrainingArguments("out", report_to=[], use_cpu=True)
    hidden = model.model(batch()).last_hidden_state
    names = {"growkern": growkern, "model": model, "teacher": teacher, "batch": rows}
    names |= {"optim": torch.optim.AdamW(model.parameters()), "head": model.lm_head}
    names |= {"trainer": Trainer(model, arguments, train_dataset=[rows]), "batches": [rows]}
    names |= {"micro_batches": [rows], "hidden": hidden, "labels": batch()}
    *lines, last = example("inheritance").splitlines()

    exec("\n".join(lines), names)
    at = len(batch()[0]) * torch.arange(len(batch()))  # where the stored sequences start
    names["batch"] = rows | {"teacher_at": at}
    exec(last, names)

    assert names["loss"].kl > 0 and model.lm_head.weight.grad.abs().sum() > 0


def test_the_worked_numbers_are_those_of_autograd(capsys):
    names = {}

    exec(example("worked numbers"), names)

    assert capsys.readouterr().out.startswith("11.0\ntensor([2., 2., 2.])\ntensor([[3., 5., 3.]])")
    source_up, source_down = names["up"].requires_grad_(), names["down"].requires_grad_()
    (source_down @ (source_up @ names["x"])).backward()
    g, u = names["g"], names["u"]
    assert torch.equal(names["grown_up"].grad, source_up.grad[g] * u[:, None])
    assert torch.equal(names["grown_down"].grad, source_down.grad[:, g])


def test_the_ramps_are_events():
    names = {"growkern": growkern, "width": width, "depth": depth}
    *_, wide, deep = example("ramp").splitlines()

    exec(example("ramp"), names)

    assert eval(wide, names).ramp == eval(deep, names).ramp == 5000


def test_experts_vocabulary_and_mixtures_grow():
    moe, model, llama = (make(name, tied=False) for name in ("mixtral", "llama", "llama"))
    moe_line, vocab_line, mixture_line = example("experts and vocabulary").splitlines()
    for line, grown in (
        (moe_line, moe),
        (vocab_line.replace("50_304", "128"), model),
        (mixture_line, llama),
    ):
        names = {"growkern": growkern, "moe": grown, "model": grown, "llama": grown}
        exec(line, names | {"optim": torch.optim.AdamW(grown.parameters())}, names)

    assert (moe.config.num_local_experts, model.config.vocab_size) == (8, 128)
    assert names["mixture"].config.num_local_experts == 8


def commands(start: str) -> list[tuple[str, str]]:
    """Return page and text of every line of a console that begins with a word."""
    return [
        (page, line.partition("  #")[0].strip())
        for page, text in CONSOLE
        for line in text.splitlines()
        if line.startswith(start)
    ]


def test_the_lines_of_a_console_begin_with_programs_that_tests_run():
    lines = [line for _, text in CONSOLE for line in text.splitlines()]

    assert {line.split()[0] for line in lines} == {"pip", "make", "growkern"}


def test_the_targets_of_make_exist():
    known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)

    assert {line.split()[1] for _, line in commands("make")} <= {*known}


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({page for page, _ in commands("growkern")}))
def test_the_commands_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make("llama", tied=False, max_position_embeddings=256).save_pretrained("small")
    tokenizer(tmp_path / "small")
    curve = [{"step": i, "loss": 1 + 3 * i**-0.3} for i in range(1, 60_000, 1000)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": curve}))
    rows = [f"{65536 * row['step']},{row['loss'] * 1.1}" for row in curve]
    (tmp_path / "small.csv").write_text("\n".join(["tokens,loss", *rows]))
    (tmp_path / "corpus.txt").write_text(" ".join(f"w{i * i % 60}" for i in range(9000)))
    lines = [line for at, line in commands("growkern") if at == page]

    for line in lines:
        if "OWNER/NAME" in line:  # of the Hub: tests/cli/test_contact.py, against a stand-in
            continue
        ran = invoke(*shlex.split(line)[1:])
        assert ran.exit_code == 0, said(ran)

    assert lines


@pytest.mark.parametrize("tied", [True, False])
def test_adam_raises_after_resize_token_embeddings_as_the_table_says(tied):
    model = make("llama", tied=tied)
    optim = torch.optim.Adam(model.parameters())

    def step():
        optim.zero_grad()
        model(batch(), labels=batch()).loss.backward()
        optim.step()

    step()
    model.resize_token_embeddings(128)

    with pytest.raises(RuntimeError, match="size"):
        step()
