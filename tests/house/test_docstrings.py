"""The docstring of every public name says what it takes, gives and refuses; its example runs, and Sphinx reads it without a warning."""

import ast
import copy
import doctest
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
import zoo
from models import Words, batch, make
from torch.distributed.checkpoint.state_dict import get_state_dict

import growkern
from growkern import errors

ROOT = Path(__file__).parents[2]
FRAMEWORKS = ["accelerate", "dcp", "hf", "lightning"]  # rooms that import a framework
ROOMS = {
    name: room
    for name, room in {"growkern": growkern, **vars(growkern)}.items()
    if name in ("growkern", *growkern.__all__) and isinstance(room, ModuleType)
}
ERRORS = {name for name in errors.__all__ if isinstance(getattr(errors, name), type)}
PROPERTIES = property | cached_property
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
SECTIONS = "Args", "Attributes", "Raises", "Returns", "Preserves", "Example", "Reference"
# names whose source is growkern itself; every other function and class names a paper, or the interface of a library
OWN = {
    *ERRORS, "Advice", "At", "Blocks", "Comparison", "GrowthPlan", "GrowthReport", "GrowthSchedule", "Hint",
    "Losses", "ModelSpec", "Outcome", "Power", "Procedure", "Recipe", "Saved", "Scale", "Stage", "Stored", "UpdateScale",
    "Verification", "compare", "describe", "embedding", "linear", "norm", "plan", "reader", "resume", "shrink_inplace", "store",
    "verify", "writer", "All", "Trains",
}  # fmt: skip
METHODS_OF = [
    growkern.Advice, growkern.Comparison, growkern.GrowthPlan, growkern.GrowthReport, growkern.GrowthSchedule, growkern.UpdateScale,
    growkern.Verification, growkern.inherit.KnowledgeInheritance, growkern.procedures.Procedure,
    growkern.trains.Trains,
]  # fmt: skip


def names_of(rooms: dict[str, ModuleType]) -> Iterator[tuple[str, object]]:
    """Yield path and object of every public function and class of rooms."""
    for room, module in rooms.items():
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isroutine(value):
                yield f"{room}.{name}", value


def is_public_method(name: str, value: object) -> bool:
    return not name.startswith("_") and (
        inspect.isroutine(value) or isinstance(value, PROPERTIES | classmethod | staticmethod)
    )


NAMES = [pytest.param(path, value, id=path) for path, value in names_of(ROOMS)]
METHODS = [
    pytest.param(
        name, value, id=f"{owner.__name__}.{name}", marks=[pytest.mark.slow] * (name == "draw")
    )
    for owner in METHODS_OF
    for name, value in inspect.getmembers(owner)
    if is_public_method(name, value)
]


def sections_of(said: str) -> dict[str, str]:
    """Return the sections of a docstring by their titles; "" is what comes before them."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", inspect.cleandoc(said), flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def arguments_of(value: object) -> set[str]:
    """Return the arguments of a function or of a constructor; frameworks give those of their hooks."""
    if inspect.isclass(value) and (is_dataclass(value) or hasattr(value, "_fields")):
        return {f.name for f in fields(value)} if is_dataclass(value) else {*value._fields}
    if inspect.isclass(value) and issubclass(value, Exception):
        return set()
    kept = inspect.signature(value).parameters if callable(value) else {}
    return {*kept} - {"self", "args", "kwargs"}


def raised_by(value: object) -> set[str]:
    """Return the errors that the code of a function or of a constructor raises itself."""
    if inspect.isclass(value):
        own = [vars(value)[name] for name in ("__init__", "__post_init__") if name in vars(value)]
        return {error for function in own for error in raised_by(function)} if own else set()
    value = inspect.unwrap(value.fget if isinstance(value, property) else value)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(value)))
    except OSError:  # what a decorator has written
        return set()
    (function,) = tree.body
    raising = [node for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    raising += [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "raise_all"]  # fmt: skip
    raising += function.decorator_list  # that check the types of the arguments
    return {n.id for node in raising for n in ast.walk(node) if isinstance(n, ast.Name)} & ERRORS


def missing_from(name: str, value: object) -> list[str]:
    """Return what the docstring of a public name leaves out."""
    said = inspect.getdoc(value) or ""
    if value.__doc__ is None or said.startswith(f"{name}("):  # inherited, or a dataclass's own
        return ["a docstring"]
    first, parts = said.splitlines()[0], sections_of(said)
    told, fields, refused = (parts.get(title, "") for title in ("Args", "Attributes", "Raises"))
    found = [
        f"argument {a}"
        for a in sorted(arguments_of(value))
        if not has_entry(told, rf"(\w+, )*{a}(, \w+)*") and not has_entry(fields, a)
    ]
    found += [f"error {e}" for e in sorted(raised_by(value)) if not has_entry(refused, e)]
    if not (first[0].isupper() or first[0] == "`") or not first.endswith((".", ":")):
        found.append("a sentence at its start")
    gives = inspect.isroutine(value) and inspect.signature(value).return_annotation is not None
    if gives and "Returns" not in parts and not re.match("Returns? |True ", first):
        found.append("what it returns")
    return found


def has_entry(section: str, name: str) -> bool:
    return bool(re.search(rf"^    {name}: ", section, re.MULTILINE))


def not_rst(said: str) -> list[str]:
    """Return what docutils says of a docstring that Sphinx's napoleon has converted."""
    napoleon = pytest.importorskip("sphinx.ext.napoleon")
    from docutils.core import publish_doctree
    from docutils.utils import Reporter

    config = napoleon.Config(napoleon_use_ivar=True, napoleon_custom_sections=["Preserves", "Reference"])  # fmt: skip
    text = str(napoleon.GoogleDocstring(inspect.cleandoc(said), config))
    tree = publish_doctree(text, settings_overrides={"report_level": Reporter.SEVERE_LEVEL, "warning_stream": False})  # fmt: skip
    return [node.astext() for node in tree.findall(lambda n: n.tagname in ("system_message", "problematic"))]  # fmt: skip


def examples_of_machinery() -> Iterator[doctest.DocTest]:
    """Yield the examples of names that are not public, and of methods of all classes but the main ones."""
    known = {param.values[1].__doc__ for param in (*NAMES, *METHODS)}
    for path in sorted((ROOT / "growkern").rglob("*.py")):
        if ">>>" not in path.read_text("utf-8") or path.stem in (*FRAMEWORKS, "hf_inherit"):
            continue
        module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        yield from (
            test
            for test in doctest.DocTestFinder().find(module)
            if test.examples and test.docstring not in known
        )


def run_example(path: str, value: object, names: dict[str, object]) -> None:
    (test,) = doctest.DocTestFinder(recurse=False).find(value, path, globs=names)
    run(test)


def run(test: doctest.DocTest) -> None:
    told, path = list[str](), test.name
    ran = doctest.DocTestRunner(verbose=False, optionflags=FLAGS).run(test, out=told.append)  # fmt: skip
    assert ran.attempted >= 1, f"{path} has no example"
    assert ran.failed == 0, "".join(told)


@cache
def phi():
    return zoo.make("phi3")


@pytest.fixture
def names(tmp_path, monkeypatch):
    """The names that examples use; their models are tiny."""
    monkeypatch.chdir(tmp_path)
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    given = [{"input_ids": batch(i), "labels": batch(i)} for i in range(2)]
    words = Words(8)
    return {
        "growkern": growkern, "torch": torch, "transformers": transformers, "model": model, "optim": optim, "batches": given,
        "batch": given[0], "teacher": make("llama", tied=False), "mixture": make("mixtral", tied=True), "words": words,
        "shallow": make("llama", tied=True, num_hidden_layers=1), "phi": copy.deepcopy(phi()),
        **{name: getattr(growkern, name) for name in ("width", "depth", "shrink", "vocab")},
    }  # fmt: skip


def names_of_hf(names, model, optim):
    options = dict(
        output_dir="run",
        max_steps=4,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_steps=3,
    )
    args = transformers.TrainingArguments(dataloader_pin_memory=False, **options)
    trainers = [
        transformers.Trainer(m, args, train_dataset=names["words"])
        for m in (model, copy.deepcopy(model))
    ]
    for trainer in trainers:
        trainer.remove_callback(transformers.PrinterCallback)
    growkern.hf.attach(
        trainers[0], growkern.GrowthSchedule([growkern.At(step=2, to={"hidden": 48})])
    )
    trainers[0].train()
    return {"trainer": trainers[1]}


def names_of_lightning(names, model, optim):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, index):
            return self.model(**batch).loss

        def configure_optimizers(self):
            return optim

    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options = dict.fromkeys(quiet, False) | dict(max_epochs=2, accelerator="cpu", devices=1)
    return {"lightning": lightning, "module": Module(), "options": options}


def names_of_accelerate(names, model, optim):
    return {"accelerator": pytest.importorskip("accelerate").Accelerator(cpu=True)}


def names_of_dcp(names, model, optim):
    weights, state = get_state_dict(model, optim)
    torch.distributed.checkpoint.save(
        {"model": weights, "optim": state}, checkpoint_id="run/step-1000"
    )
    return {"config": model.config}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of frameworks
@pytest.mark.parametrize("room", FRAMEWORKS)
def test_names_that_import_a_framework(room, names):
    loader = torch.utils.data.DataLoader(names["batches"], batch_size=None)
    for path, value in names_of({room: getattr(growkern, room)}):
        model = copy.deepcopy(names["model"])
        optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
        own = names | {"model": model, "optim": optim, "loader": loader}
        run_example(path, value, own | globals()[f"names_of_{room}"](names, model, optim))
        test_a_public_name_says_what_it_takes_gives_and_refuses(path, value)
        test_sphinx_reads_the_docstrings_of_a_name_and_of_its_methods(path, value)


@pytest.mark.parametrize(("path", "value"), NAMES)
def test_a_public_name_says_what_it_takes_gives_and_refuses(path, value):
    name, said = value.__name__, value.__doc__ or ""

    missing = missing_from(name, value)
    own = name in OWN and path.partition(".")[0] not in FRAMEWORKS
    assert own == ("\n    Reference:\n" not in said), "a reference"
    if path.partition(".")[0] in ("width", "depth", "shrink", "vocab"):
        missing += [] if "Preserves:" in said else ["what it preserves"]
    assert not missing, missing


@pytest.mark.parametrize("room", ROOMS)
def test_a_module_says_what_its_constants_are(room):
    module = ROOMS[room]
    callables = [name for name in module.__all__ if callable(getattr(module, name))]
    constants = {n for n in module.__all__ if not isinstance(getattr(module, n), ModuleType)} - {*callables}  # fmt: skip

    told = sections_of(module.__doc__).get("Attributes", "")
    assert not [name for name in constants if not has_entry(told, name)]
    assert not (warned := not_rst(module.__doc__)), warned


@pytest.mark.parametrize(("path", "value"), NAMES)
def test_its_example_runs(path, value, names):
    run_example(path, value, names)


@pytest.mark.parametrize(("name", "value"), [p for p in METHODS if ">>>" in p.values[1].__doc__])
def test_the_example_of_a_method_runs(name, value, names):
    run_example(name, value, names)


@pytest.mark.parametrize("test", [*examples_of_machinery()], ids=lambda test: test.name)
def test_every_other_example_runs(test, names):
    test.globs |= {**names, **test.globs}
    run(test)


@pytest.mark.parametrize(("name", "value"), METHODS)
def test_a_method_says_what_it_takes_gives_and_refuses(name, value):
    assert not (missing := missing_from(name, value)), missing


@pytest.mark.parametrize(("path", "value"), NAMES)
def test_sphinx_reads_the_docstrings_of_a_name_and_of_its_methods(path, value):
    inner = vars(value).items() if inspect.isclass(value) else ()
    methods = {
        name: method.__doc__ or "" for name, method in inner if is_public_method(name, method)
    }
    bare = [
        name for name, said in methods.items() if not said.partition("\n")[0].endswith((".", ":"))
    ]
    warned = [warning for said in (value.__doc__, *methods.values()) for warning in not_rst(said)]
    # napoleon takes what comes before a colon, at the start of the docstring of a property, for its type
    typed = [
        name for name, method in inner
        if isinstance(method, PROPERTIES) and ": " in re.sub("``.*?``", "", methods.get(name, "").partition("\n")[0])
    ]  # fmt: skip
    assert not bare and not warned and not typed, (bare, warned, typed)
