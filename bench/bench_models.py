"""How long does it take to grow a whole model with its optimizer, and how long do other methods take?

The lines are ``expand_inplace`` by default, and with copies, with and without twin noise; the roof, a cold ``copy_`` of the same bytes;
and baselines, two of them written after published methods (``bench.baselines``). The steps of the default growth are rows too
(``GrowthReport.steps``). *Repeat and divide* drops the optimizer, so its times are compared per byte.

Every case runs in its own process (``python -m bench.bench_models CASE FILE``). Its *first* and *busy* rows come from processes that build
the model, make one call and end: nothing is touched before the call, as in a user's process. *Cold* rows come from one process that
touches memory before each call (``harness.touch``). The logits of every grown model are compared with the logits of the source; a red
case has no rows.

*host* is the time of Python in a growth on a GPU, from the call to its return, in a model with the tensors of a large one, but narrow: the
table of the kernels is built, and no kernel is launched.
"""

import gc
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim import AdamW

import growkern
from bench import harness
from bench.baselines import (
    DOUBLE,
    MOMENTS,
    REPEAT,
    SELECT,
    index_selects,
    repeat_and_divide,
    state_dict_double,
)
from growkern.commit.commit import grown_config
from growkern.execution import execute
from growkern.execution.pieces import Group
from growkern.planning.growth_plan import GrowthPlan
from growkern.support.progress import Meter
from growkern.width import Lossless

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
OURS = "triton" if GPU else "torch"
REPEATS = 3
TOLERANCE = {"fp32": 1e-4, "bf16": 4e-2}  # of logits, relative to the largest logit
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Job = tuple[Tensor, tuple[int, ...]]  # a source and the shape of its target
Call = Callable[[], object]
Line = tuple[str, str]  # backend and phase
Sample = tuple[float, int]  # seconds and peak bytes
STEP = ": "  # in a backend: a step of a growth, which moves no bytes of its own
HOST, N_HOST = "host", 10  # a backend, and its number of samples
ROOM = {DOUBLE: 0.65, REPEAT: 0.25}  # share of a case's memory that is touched before a call
OTHER_ROOM = 0.5
DEFAULT = f"{OURS} default"
METHODS = {DEFAULT: Lossless()} | {
    f"{OURS} noise={noise:g}": Lossless(noise) for noise in (1.0, 0.0)
}


@dataclass(frozen=True, slots=True)
class Case:
    """A model and its target sizes.

    Attributes:
        family: ``"GPT2"`` or ``"Llama"``.
        config: Fields of the model's config that differ from the defaults.
        to: Target sizes.
        scope: Scope that runs the case: ``"quick"``, ``"cpu"`` (on a GPU too), ``"gpu"``, or ``"test"`` (tests only, in one process).
        memory: Total bytes that the case needs.
        dtype: Dtype of the weights; moments are float32.
        doubles: True if every grown axis is doubled and the depth stays, as all baselines require.
        busy: True for rows under one spinning process per core, too.
        narrow: True for a model that has the tensors of a large one, for the time of the host alone.
    """

    family: str
    config: Mapping[str, object]
    to: str | Mapping[str, int | str]
    scope: str
    memory: int
    dtype: str = "fp32"
    doubles: bool = False
    busy: bool = False
    narrow: bool = False


GB = 10**9
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT2_XL = NO_DROPOUT | {"n_embd": 1600, "n_layer": 48, "n_head": 25}
WIDER = {"hidden": 2432}  # 38 heads of 64
LLAMA_125M = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 2048,
    "vocab_size": 32000,
}
ENDS = {"bos_token_id": 0, "eos_token_id": 1}
TINY = ENDS | {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 256, "n_positions": 64}
TINY_LLAMA = {
    **{"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6},
    **{"num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 256},
}
GPT2_WIDE, XL_WIDE = "GPT-2 124M 2x wide", "GPT-2 XL to 2432 wide"
HOST_124M, HOST_XL = "tensors of GPT-2 124M 2x wide", "tensors of GPT-2 XL 2x wide"
HOST_200 = "tensors of 200 layers 2x wide"
NARROW = NO_DROPOUT | ENDS | {"vocab_size": 256, "n_positions": 64}
CASES = {
    "tiny GPT-2 2x wide": Case(
        "GPT2", NO_DROPOUT | TINY, "2x", "quick", GB // 4, doubles=True, busy=True
    ),
    "tensors of tiny GPT-2": Case("GPT2", NO_DROPOUT | TINY, "2x", "quick", GB // 4, narrow=True),
    HOST_124M: Case(
        "GPT2", NARROW | {"n_embd": 24, "n_layer": 12, "n_head": 12}, "2x", "cpu", GB, narrow=True
    ),
    HOST_XL: Case(
        "GPT2", NARROW | {"n_embd": 50, "n_layer": 48, "n_head": 25}, "2x", "cpu", GB, narrow=True
    ),
    HOST_200: Case(
        "GPT2", NARROW | {"n_embd": 50, "n_layer": 200, "n_head": 25}, "2x", "cpu", GB, narrow=True
    ),
    "tiny Llama 2x wide": Case("Llama", TINY_LLAMA, "2x", "test", GB // 4, doubles=True),
    GPT2_WIDE: Case("GPT2", NO_DROPOUT, "2x", "cpu", 12 * GB, doubles=True, busy=True),
    "Llama 125M 2x wide": Case("Llama", LLAMA_125M, "2x", "cpu", 12 * GB, doubles=True),
    "GPT-2 124M 2x deep": Case("GPT2", NO_DROPOUT, {"layers": "2x"}, "cpu", 3 * GB),
    XL_WIDE: Case("GPT2", GPT2_XL, WIDER, "gpu", 90 * GB),
    f"{XL_WIDE} bf16": Case("GPT2", GPT2_XL, WIDER, "gpu", 75 * GB, "bf16"),
    "Llama 7B 2x deep": Case("Llama", {}, {"layers": "2x"}, "gpu", 118 * GB),
    "Llama 7B 2x deep bf16": Case("Llama", {}, {"layers": "2x"}, "gpu", 90 * GB, "bf16"),
}


def chosen(scope: str) -> list[str]:
    """Return the cases of a scope that fit in memory."""
    scopes = {"quick": ("quick",), "cpu": ("cpu",), "gpu": ("cpu", "gpu")}[scope]
    room = harness.available_bytes()
    return [name for name, case in CASES.items() if case.scope in scopes and case.memory <= room]


def build(case: Case) -> tuple[nn.Module, AdamW]:
    """Return the source model and an AdamW with filled moments, as after training."""
    import transformers

    config = getattr(transformers, f"{case.family}Config")(**case.config)
    kind = getattr(transformers, {"GPT2": "GPT2LMHeadModel"}.get(case.family, "LlamaForCausalLM"))
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = kind(config).to(DTYPES[case.dtype]).eval()
    return model, filled(AdamW(model.parameters(), lr=1e-3))


def filled(optim: AdamW) -> AdamW:
    """Fill the moments of every parameter."""
    for group in optim.param_groups:
        for p in group["params"]:
            avg = torch.full_like(p, 1e-3, dtype=torch.float32).add_(p.detach(), alpha=1e-2)
            optim.state[p] = {"step": torch.tensor(9.0), MOMENTS[0]: avg, MOMENTS[1]: avg.square()}
    return optim


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Return the logits of a model on a fixed batch."""
    ids = torch.arange(2 * 16, device=DEVICE).view(2, 16) % 251
    return model(ids).logits.float().clone()


def jobs(model: nn.Module, optim: AdamW, plan: GrowthPlan) -> tuple[list[Job], list[Job]]:
    """Return every source tensor that the plan grows, with the shape of its target: weights, and moments."""
    parameters = dict(model.named_parameters())
    rows = [row for row in plan.tensors if plan.changes(row)]
    weights = [(parameters[row.source].detach(), plan.shapes(row)[1]) for row in rows]
    moments = [
        (optim.state[parameters[row.source]][key], plan.shapes(row)[1])
        for row in rows
        for key in MOMENTS
        if row.state == "law"
    ]
    return weights, moments


def moved(work: Sequence[Job]) -> tuple[int, int]:
    """Return bytes read, each source once, and bytes written."""
    sources = {id(t): t for t, _ in work}.values()
    written = sum(torch.Size(shape).numel() * t.element_size() for t, shape in work)
    return harness.n_bytes(sources), written


def roof(work: Sequence[Job]) -> Call:
    """Return a call that allocates every target and fills it by copies; on a GPU, a call that copies the same number of bytes."""
    if GPU:
        return harness.gpu_roof(sum(moved(work)))

    def copy() -> object:
        targets = [torch.empty(shape, dtype=t.dtype) for t, shape in work]
        harness.roof([source for source, _ in work], targets)()
        return targets

    return copy


def host(case: Case) -> dict[str, list[float]]:
    """Return the seconds of growths that build the table of the kernels and write zeros, less the seconds of the zeros.

    ``"warm"``: growths of new models. ``"again"``: the next growth of each.
    """
    from growkern.kernels.expand import tabled

    zeroing: list[float] = []

    def unlaunched(groups: Sequence[Group], backend: str | None, meter: Meter) -> None:
        tabled(groups)
        targets = [target for group in groups for target in group.targets]
        zeroing.append(harness.wall(lambda: [target.zero_() for target in targets]))

    seconds: dict[str, list[float]] = {"warm": [], "again": []}
    for _ in range(1 + N_HOST):  # the first call imports modules
        model, optim = build(case)
        for own in seconds.values():
            with mock.patch.object(execute, "_run", unlaunched):
                whole = harness.wall(lambda: growkern.expand_inplace(model, optim, to=case.to))  # noqa: B023
            own.append(whole - zeroing.pop())
    return {phase: own[1:] for phase, own in seconds.items()}


def baselines(
    case: Case, model: nn.Module, optim: AdamW
) -> tuple[dict[str, Call], tuple[list[Job], list[Job]]]:
    """Return the roof and the other methods as calls that leave the source as it is, and the jobs of weights and of moments."""
    plan = growkern.plan(model, optim, to=case.to, width=Lossless(noise=0.0))
    work = jobs(model, optim, plan)
    everything = [*work[0], *work[1]]
    calls: dict[str, Call] = {harness.ROOF: roof(everything)}  # fmt: skip
    if case.doubles:
        config = grown_config(plan, model, model.config, "")
        shapes = {row.name: plan.shapes(row)[1] for row in plan.tensors}
        calls[SELECT] = partial(index_selects, everything)
        calls[DOUBLE] = partial(state_dict_double, model, optim, config)
        calls[REPEAT] = partial(repeat_and_divide, model, config, shapes)
    return calls, work


def grow(
    case: Case, backend: str, model: nn.Module, optim: AdamW, room: int = 0
) -> tuple[Sample, growkern.GrowthReport]:
    """Time a growth; return its sample and its report.

    Raises:
        AssertionError: The logits of the grown model differ from the logits of the source.
    """
    reports: list[growkern.GrowthReport] = []
    before = logits(model)
    call = partial(growkern.expand_inplace, to=case.to, width=METHODS[backend], dynamics=None)
    sample = harness.measured(lambda: reports.append(call(model, optim)), room)
    off = float((logits(model) - before).abs().max() / before.abs().max())
    assert off <= TOLERANCE[case.dtype], f"{backend}: logits are off by {off:.2g}"
    return sample, reports[0]


def first(name: str, backend: str) -> tuple[Sample, int | None]:
    """Time the first call of this process: no memory is touched before, and kernels are compiled.

    Args:
        name: Name of a case in ``CASES``.
        backend: Key of ``METHODS``, or of the calls of ``baselines``.

    Returns:
        Sample, and the peak bytes that growkern's report states; None for a baseline.
    """
    case = CASES[name]
    with TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        model, optim = build(case)
        if backend in METHODS:
            sample, report = grow(case, backend, model, optim)
            return sample, report.peak_bytes
        return harness.measured(baselines(case, model, optim)[0][backend]), None


def run(name: str, repeats: int = REPEATS, say: Callable[[str], object] = str) -> list[harness.Row]:
    """Time the lines of a case in turn, ``repeats`` times.

    Args:
        name: Name of a case in ``CASES``.
        repeats: Samples per line.
        say: Function that gets progress messages.

    Returns:
        Rows of the case.

    Raises:
        AssertionError: The logits of a grown model differ from the logits of the source.
    """
    case = CASES[name]
    if case.narrow:
        say(HOST)
        line = partial(
            harness.row, "model", name, case.dtype, HOST, moved=0, peak=0, tensor_bytes=0
        )
        return [line(*own) for own in host(case).items()]
    samples: dict[Line, list[Sample]] = {}
    promised: dict[Line, int | None] = {}

    def keep(line: Line, sample: Sample, peak: int | None = None) -> None:
        samples.setdefault(line, []).append(sample)
        promised[line] = peak

    others = (harness.ROOF, *((SELECT, DOUBLE, REPEAT) if case.doubles else ()))
    fresh = {"test": (), "quick": (DEFAULT,)}.get(case.scope, (DEFAULT, *others))
    lines = [(backend, "first") for backend in fresh]
    lines += [(backend, "busy") for backend in (DEFAULT, SELECT) if case.busy and not GPU]
    spawn = get_context("spawn")
    for backend, phase in lines * repeats:
        say(f"{backend} {phase}")
        with harness.spinning() if phase == "busy" else nullcontext(), ProcessPoolExecutor(1, mp_context=spawn) as pool:  # fmt: skip
            keep((backend, phase), *pool.submit(first, name, backend).result())
    work: tuple[list[Job], list[Job]] = [], []
    for _ in range(repeats):
        model, optim = build(case)
        calls, work = baselines(case, model, optim)
        for backend, call in calls.items():
            say(f"{backend} cold")
            gc.collect()
            room = int(ROOM.get(backend, OTHER_ROOM) * case.memory)
            keep((backend, "cold"), harness.measured(call, room))
        del calls
        for backend in METHODS:
            say(f"{backend} cold")
            model, optim = build(case)
            gc.collect()
            room = int(OTHER_ROOM * case.memory)
            sample, report = grow(case, backend, model, optim, room)
            keep((backend, "cold"), sample, report.peak_bytes)
            for step, seconds in report.steps.items() if backend == DEFAULT else ():
                keep((f"{backend}{STEP}{step}", "cold"), (seconds, 0))
    read, written = moved([*work[0], *work[1]])
    return [
        harness.row(
            "model",
            name,
            case.dtype,
            *line,
            [seconds for seconds, _ in timings],
            moved={REPEAT: sum(moved(work[0]))}.get(
                line[0], 0 if STEP in line[0] else read + written
            ),
            peak=max(peak for _, peak in timings),
            tensor_bytes=written,
            promised=promised.get(line),
        )
        for line, timings in samples.items()
    ]


def main(name: str, path: str) -> int:
    """Run one case and write ``{"rows": [...], "red": "..."}``."""
    console = Console()
    quick = CASES[name].scope in ("quick", "test")
    result: dict[str, object] = {"rows": [], "red": ""}
    try:
        result["rows"] = run(name, 1 if quick else REPEATS, console.print)
    except AssertionError as error:
        result["red"] = str(error)
    Path(path).write_text(json.dumps(result))
    return 1 if result["red"] else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
