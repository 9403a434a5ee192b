"""Spoil plans, records and histories as a file could hold them: no error but a GrowthError, and what is taken grows as it says.

    python tests/plan_fuzz.py [count]

spoils ``count`` plans (default 10,000) and a tenth as many histories, and prints the outcomes, and time and
memory of the slowest and largest calls (memory on Linux only).
"""

import copy
import json
import os
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path
from random import Random

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import batch, logits, make, spec_of

import growkern
from growkern import depth, shrink, vocab, width
from growkern.errors import GrowthError
from growkern.model.describe import describe
from growkern.planning.check import check
from growkern.planning.growth_plan import GrowthPlan
from growkern.planning.growth_record import GrowthRecord
from growkern.support.memory import trim

PLANS = [
    ("llama", dict(to="2x")),
    ("llama", dict(to="1.5x", width=width.Lossless(noise=0), dynamics="exact", state="exact")),
    ("llama", dict(to={"hidden": 30, "layers": 3}, width=width.FPI(), depth=depth.Stack())),
    ("llama", dict(to={"kv_heads": 4}, width=width.Lossless(noise=0.5))),
    ("llama", dict(to={"head_dim": 12})),
    ("llama", dict(to={"layers": 4}, depth=depth.Interpose(halve_branches=True))),
    ("llama", dict(to="0.5x", shrink=shrink.FirstCopies())),
    ("llama", dict(to={"vocab": 80}, width=vocab.Zero())),
    ("gpt2", dict(to={"hidden": 30, "layers": 3})),
    ("gpt2", dict(to="2x", width=width.AKI(), depth=depth.Fresh())),
    ("bert", dict(to={"hidden": 48, "layers": 3}, width=width.Lemon())),
    ("mixtral", dict(to={"experts": 8, "top_k": 4, "ffn": 50})),
    ("qwen3", dict(to="2x", width=width.Sparkling())),
]
JUNK = [
    None, True, False, 0, 1, -1, 2, 7, 24, 48, 1 << 31, 1 << 62, 1 << 64, 10**18, 10**300, 10**4000, 0.5, 1.5, -0.0, 1e-300, 1e9, 1e308,
    float("inf"), float("-inf"), float("nan"), "", "x", "0", "9" * 5000, "a" * 100_000, "\ud800", "\x1b[2J", "__class__", "config", [], {},
    [[]], [1], [0, 1 << 40, 0], {"a": 1}, [[0, 1, 0]] * 2000, ["x"] * 2000,
]  # fmt: skip
KINDS = ["retype", "drop", "add", "scale", "swap", "repeat", "copy"]
MUTATIONS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 1 << 30), st.integers(0, 1 << 30), st.sampled_from(JUNK)),
    min_size=1, max_size=3,
)  # fmt: skip
FACTORS = (0, -1, 2, 0.5, 1 + 1e-6, 1e6, 1e30)


def places(data: object) -> list[tuple[object, object]]:
    """Return every container of nested JSON with each of its keys."""
    found, left = [], [data]
    while left:
        one = left.pop()
        if isinstance(one, dict | list):
            keys = [*one] if isinstance(one, dict) else [*range(len(one))]
            found += [(one, key) for key in keys]
            left += [one[key] for key in keys]
    return found


def kinds(data: object) -> list[list[tuple[object, object]]]:
    """Return the places of nested JSON in groups of a field each, so that the fields of many rows are not met more often than others."""
    groups: dict[object, list[tuple[object, object]]] = {}
    for container, key in places(data):
        shape = (
            tuple(sorted(map(str, container)))[:6]
            if isinstance(container, dict)
            else len(container)
        )
        groups.setdefault((shape, key if isinstance(key, str) and len(container) < 30 else None), []).append((container, key))  # fmt: skip
    return [*groups.values()]


def spoil(data: object, mutations: list[tuple[str, int, int, object]]) -> None:
    """Change nested JSON in place."""
    for kind, at, other, junk in mutations:
        at, other = (
            Random(at).randrange(1 << 30),
            Random(other).randrange(1 << 30),
        )  # hypothesis prefers small numbers
        groups = kinds(data)
        if not groups:
            return
        group = groups[at % len(groups)]
        container, key = group[other % len(group)]
        value = container[key]
        if kind == "retype":
            container[key] = copy.deepcopy(junk)
        elif kind == "drop":
            del container[key]
        elif kind == "add" and isinstance(container, dict):
            container[junk if isinstance(junk, str) else f"new {at}"] = copy.deepcopy(value)
        elif kind == "add":
            container.insert(key, copy.deepcopy(junk))
        elif kind == "scale" and isinstance(value, int | float):
            factor = FACTORS[at % len(FACTORS)]
            container[key] = value * factor if abs(value) < 1e300 else factor
        elif kind == "repeat" and isinstance(value, list):
            container[key] = value * (2 + at % 3)
        else:
            target, place = group[at % len(group)]
            container[key], old = target[place], value
            if kind == "swap":
                target[place] = old


@cache
def plan_json(number: int) -> str:
    family, growth = PLANS[number]
    model = made(family)
    return growkern.plan(model, spec=spec_of(model), **growth).to_json()


@cache
def made(family: str) -> torch.nn.Module:
    return make(family, tied=True).double().eval()


@cache
def spec(family: str) -> object:
    return describe(made(family), spec_of(made(family)))


def outcome_of_plan(number: int, mutations: list[tuple[str, int, int, object]]) -> str:
    """Read and check a spoiled plan, and run it if it is taken; raise anything but a GrowthError."""
    data = json.loads(plan_json(number))
    spoil(data, mutations)
    text, family = json.dumps(data), PLANS[number][0]
    try:
        plan = timed(GrowthPlan.from_json, text)
    except GrowthError:
        return "not read"
    str(plan)  # a plan that was read can be printed
    try:
        timed(check, plan, spec(family))
    except GrowthError:
        return "refused"
    if plan == GrowthPlan.from_json(plan_json(number)):
        return "equal"
    grows_as_it_says(plan, family)
    return "taken"


def grows_as_it_says(plan: GrowthPlan, family: str) -> None:
    """Run a plan, and compare the function of source and target if the plan claims to preserve it."""
    model, ids = copy.deepcopy(made(family)), batch()
    before = logits(model, ids)
    run = growkern.shrink_inplace if plan.shrinks else growkern.expand_inplace
    report = run(model, plan=plan)
    after = logits(model, ids)
    if report.function_preserving:
        noise = 1 + max(max(axis.noise, axis.drawn) for axis in plan.axes.values())
        assert (after - before).abs().max() < 1e-4 * noise, (
            plan
        )  # norms of transformers compute in float32


def outcome_of_history(
    number: int, mutations: list[tuple[str, int, int, object]], inside: bool
) -> str:
    """Replay a spoiled history, and grow a model whose config holds it."""
    family = PLANS[number][0]
    plan = GrowthPlan.from_json(plan_json(number))
    entries = [GrowthRecord.of(plan).to_json(), plan.to_json()]
    data = [json.loads(entry) for entry in entries[number % 2 :]]
    if inside:
        spoil(data, mutations)
        history = [json.dumps(entry) for entry in data]
    else:
        history = {"growkern_history": entries[:1]}
        spoil(history, mutations)
        history = history.get("growkern_history")
    results = []
    for call in (_resumed, _grown):
        try:
            timed(call, copy.deepcopy(made(family)), history)
            results.append("taken")
        except GrowthError:
            results.append("refused")
    return ", ".join(results)


def _resumed(model: torch.nn.Module, history: object) -> None:
    growkern.resume(model, None, history)


def _grown(model: torch.nn.Module, history: object) -> None:
    model.config.growkern_history = history
    growkern.expand_inplace(model, to={"layers": 3}, seed=1)


SLOWEST: Counter[str] = Counter()  # microseconds of processor time
LARGEST: Counter[str] = Counter()  # KiB of memory above the start of the call


def memory(what: str) -> int:
    """Return ``VmRSS`` or its peak ``VmHWM`` of this process, KiB; 0 where the system does not say."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return 0
    if what == "VmRSS":
        trim()  # or a call would use free memory of the heap, which counts already
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def timed(call: object, *arguments: object) -> object:
    before, start = memory("VmRSS"), time.process_time()
    try:
        return call(*arguments)
    finally:
        n = int((time.process_time() - start) * 1e6)
        SLOWEST[call.__name__] = max(SLOWEST[call.__name__], n)
        LARGEST[call.__name__] = max(LARGEST[call.__name__], memory("VmHWM") - before)


def main(count: int) -> None:
    """Spoil ``count`` plans and a tenth as many histories."""
    torch.set_num_threads(1)
    many = settings(deadline=None, database=None, suppress_health_check=[*HealthCheck])
    outcomes: Counter[str] = Counter()
    for number in range(len(PLANS)):
        plan_json(number), spec(PLANS[number][0])

    @settings(many, max_examples=count)
    @given(st.integers(0, len(PLANS) - 1), MUTATIONS)
    def plans(number, mutations):
        outcomes["plan " + outcome_of_plan(number, mutations)] += 1

    @settings(many, max_examples=count // 10)
    @given(st.integers(0, len(PLANS) - 1), MUTATIONS, st.booleans())
    def histories(number, mutations, inside):
        outcomes["history " + outcome_of_history(number, mutations, inside)] += 1

    for fuzz in (plans, histories):
        fuzz()
        largest = {name: f"{n / 1024:.0f} MB" for name, n in LARGEST.items()}
        slowest = {name: f"{n / 1e6:.3f} s" for name, n in SLOWEST.items()}
        print(
            f"{dict(outcomes)}\n  slowest calls {slowest}, largest {largest}",
            flush=True,
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
