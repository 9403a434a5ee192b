"""Plans, records and histories may come from a file: whatever they hold, the answer is a PlanError or a plan that is right."""

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import FAMILIES, batch, logits, make, spec_of
from plan_fuzz import MUTATIONS, PLANS, outcome_of_history, outcome_of_plan

import growkern
from growkern import depth, width
from growkern.errors import PlanError
from growkern.model.describe import describe
from growkern.model.spec import KEY, QUERY
from growkern.planning.build import build
from growkern.planning.check import check
from growkern.planning.decisions import StreamScale, WidthDecision
from growkern.planning.growth_plan import GrowthPlan
from growkern.planning.growth_record import GrowthRecord, read
from growkern.planning.index_map import IndexMap
from growkern.planning.vector import Vector
from growkern.planning.width_of_plan import work

FUZZ = settings(
    max_examples=200, deadline=None, database=None, derandomize=True, suppress_health_check=[*HealthCheck]
)  # fmt: skip


@pytest.mark.slow
@FUZZ
@given(st.integers(0, len(PLANS) - 1), MUTATIONS)
def test_a_spoiled_plan_is_refused_or_grows_as_it_says(number, mutations):
    assert outcome_of_plan(number, mutations) in ("not read", "refused", "equal", "taken")


@pytest.mark.slow
@settings(FUZZ, max_examples=20)
@given(st.integers(0, len(PLANS) - 1), MUTATIONS, st.booleans())
def test_a_spoiled_history_is_refused_or_taken(number, mutations, inside):
    taken, _, grown = outcome_of_history(number, mutations, inside).partition(", ")

    assert {taken, grown} <= {"taken", "refused"}


def to(*path, value):
    """Return a function that sets one value in nested JSON."""

    def change(data):
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


def scaled(path, factor):
    def change(data):
        for vector in data["axes"][path].values():
            if isinstance(vector, dict) and "pieces" in vector:
                vector["pieces"] = [[value * factor, n] for value, n in vector["pieces"]]

    return change


READ = {  # refused when it is read
    "a seed that is a bool": to("seed", value=True),
    "a seed above 64 bits": to("seed", value=1 << 64),
    "a negative seed": to("seed", value=-1),
    "a constant that is a text": to("tensors", 0, "constant", value=""),
    "a next layer that is a number": to("tensors", 0, "next_layer_source", value=0),
    "a constant that is a bool": to("tensors", 0, "constant", value=False),
    "a factor that is no factor": to("tensors", 0, "factor", value=1e308),
    "a factor of more digits than a float": to("tensors", 0, "factor", value=10**400),
    "an infinite offset": to("tensors", 0, "offset", value=float("inf")),
    "axes in lists": to("tensors", 0, "axes", value=[["a"], ["b"]]),
    "axes that are a text": to("tensors", 0, "axes", value="ab"),
    "no branch": to("blocks", 0, "branch", value=float("nan")),
    "a block that is new by 1": to("blocks", 0, "new", value=1),
    "a target of no heads": to("target_sizes", "heads", value=None),
    "a target of 0": to("target_sizes", "heads", value=0),
    "a target beyond all models": to("target_sizes", "ffn", value=1 << 40),
    "a text of control characters": to("notes", value=["\x1b[2J"]),
    "a surrogate": to("depth", value="\ud800"),
    "notes that are a text": to("notes", value="abc"),
    "a version that is a bool": to("version", value=True),
    "config_eps that is empty": to("config_eps", value=[]),
    "noise below 0": to("axes", "writer vocab", "noise", value=-1.0),
    "centered by 1": to("axes", "writer vocab", "centred", value=1),
    "gradients_exact by 1": to("gradients_exact", value=1),
    "a run of floats": to("axes", "writer vocab", "index_map", "runs", value=[[0, 66.0, 0]]),
    "an axis of another field": to("axes", "writer vocab", "index_map", "colour", value=1),
}
CHECKED = {  # refused when it meets the model
    "another family": (to("family", value="mistral"), "the plan is for a mistral"),
    "a config field of another kind": (to("config", "hidden_act", value=3), "config fields are not"),
    "a config value": (to("config", "hidden_size", value=50), "config fields are not"),
    "a config list": (to("config_lists", value=["architectures"]), "config fields are not"),
    "a factor on a text": (to("config_eps", value=["model_type", 10**6]), "config_eps is not the field"),
    "a factor on eps": (to("config_eps", value=["rms_norm_eps", 1e6]), "config_eps is not the field"),
    "eps": (lambda p: p["eps"].update({k: 3.0 for k in p["eps"]}), "epsilon factors are not"),
    "modules": (to("rebuilt_modules", value=["model.rotary_emb"]), "it rebuilds modules"),
    "a row's factor": (to("tensors", 3, "factor", value=2.0), "factor should be 1.0"),
    "a row's gradient": (to("tensors", 3, "grad_factor", value=2.0), "grad_factor should be 1.0"),
    "a row that is drawn": (to("tensors", 3, "new", value=True), "new should be False"),
    "a row without a source": (to("tensors", 3, "constant", value=0.0), "constant should be None"),
    "a branch": (to("blocks", 0, "branch", value=2.0), "factor should be 2.0"),
    "more axes": (lambda p: p["axes"].update(more=p["axes"]["writer vocab"]), "axes are not the model's"),
    "a weight twice as large": (scaled("reader ffn.0", 2.0), "by the dual law"),
    "a residual twice as large": (scaled("writer residual", 2.0), "epsilon factors are not"),
    "noise on one axis": (to("axes", "reader ffn.0", "noise", value=0.5), "by the dual law"),
    "random pads": (to("axes", "writer residual", "pad", value="random_writer"), "norms of 'residual' see new"),
    "gradients": (to("gradients_exact", value=True), "gradients_exact should be False"),
    "a size that the model cannot have": (to("target_sizes", "head_dim", value=8), "does not fit"),
}  # fmt: skip


@pytest.fixture(scope="module")
def llama():
    model = make("llama", tied=True)
    return model, describe(model), growkern.plan(model, to="2x").to_json()


@pytest.mark.parametrize("change", READ.values(), ids=READ)
def test_fields_of_another_type_or_range_are_not_read(llama, change):
    data = json.loads(llama[2])
    change(data)

    with pytest.raises(PlanError, match="cannot read the plan"):
        GrowthPlan.from_json(json.dumps(data))


@pytest.mark.parametrize(("change", "match"), CHECKED.values(), ids=CHECKED)
def test_what_a_plan_says_is_derived_again(llama, change, match):
    _, spec, text = llama
    check(GrowthPlan.from_json(text), spec)
    data = json.loads(text)
    change(data)

    with pytest.raises(PlanError, match=match):
        check(GrowthPlan.from_json(json.dumps(data)), spec)


OWN = [
    dict(to="2x"), dict(to="1.5x"), dict(to={"hidden": 48, "layers": 4}, width=width.FPI(), depth=depth.Interpose(True)),
    dict(to="2x", width=width.Lemon()), dict(to={"heads": 8}, width=width.Sparkling("copy", "random")), dict(to={"head_dim": 12}),
    dict(to={"kv_heads": 4}), dict(to="2x", width=width.AKI(), depth=depth.Fresh()), dict(to="0.5x", shrink=growkern.shrink.FirstCopies()),
    dict(to={"vocab": 80}, width=growkern.vocab.MeanCov()), dict(to={"experts": 8, "top_k": 4}), dict(to="1.5x", width=width.Lossless(0.3)),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_plan_of_growkern_passes(family):
    model = make(family, tied=True)
    spec, n = describe(model, spec_of(model)), 0

    for growth in OWN:
        try:
            plan = growkern.plan(model, spec=spec_of(model), **growth)
        except PlanError:  # not every family can grow in every way
            continue
        check(GrowthPlan.from_json(plan.to_json()), spec)
        n += 1

    assert n >= 4


PYTHON = {
    **{"rows": dict(tensors=(1,)), "a list of rows": dict(tensors=[]), "axes": dict(axes={"a": 1})},
    **{"sizes": dict(source_sizes=None), "a dynamics": dict(dynamics=[0])},
    **{"a block": dict(blocks=(1,)), "a text": dict(notes="abc")},
}


@pytest.mark.parametrize("fields", PYTHON.values(), ids=PYTHON)
def test_a_plan_that_python_made_of_other_types_is_refused(llama, fields):
    _, spec, text = llama

    with pytest.raises(PlanError, match="this is no plan of growkern"):
        check(replace(GrowthPlan.from_json(text), **fields), spec)


CLAIMS = {
    "copied blocks": (dict(to={"layers": 4}, depth=depth.Stack()), "new blocks are no identity"),
    "scaled branches": (dict(to={"layers": 4}, depth=depth.Interpose(True)), "branches are scaled"),
    "rows of the next layer": (dict(to="2x", width=width.AKI(maps="cyclic")), "rows come from the next layer"),
    "unequal copies under norms": (dict(to="1.5x", width=width.FPI(maps="cyclic")), "see unequal copies"),
    "norms that are kept": (dict(to="2x", width=width.CopyAndPad()), "norms see coordinates"),
    "readers of other coordinates": (dict(to="2x", width=width.Sparkling("random", "copy")), "readers copy other"),
    "shares that are not one": (dict(to="1.5x", width=width.Sparkling()), "do not sum to 1"),
    "dropped blocks": (dict(to={"layers": 1}, shrink=growkern.shrink.FirstCopies()), "blocks are dropped"),
    "dropped coordinates": (dict(to="0.5x", shrink=growkern.shrink.FirstCopies()), "do not sum to 1"),
    "new tokens": (dict(to={"vocab": 80}, width=growkern.vocab.Zero()), "the vocabulary changes"),
}  # fmt: skip


@pytest.mark.parametrize(("growth", "match"), CLAIMS.values(), ids=CLAIMS)
def test_a_claim_to_preserve_the_function_is_not_believed(llama, growth, match):
    model, spec, _ = llama
    data = json.loads(growkern.plan(model, **growth).to_json())
    check(GrowthPlan.from_json(json.dumps(data)), spec)
    data["reasons"] = []

    with pytest.raises(PlanError, match=f"claims to preserve the function, but .*{match}"):
        check(GrowthPlan.from_json(json.dumps(data)), spec)


@dataclass(frozen=True)
class Wrong:
    """A width method that says that it preserves the function, and does not."""

    change: Callable[[WidthDecision], WidthDecision]
    more: tuple[tuple[str, int], ...] = ()
    promised: bool = False

    def widen(self, spec, sizes):
        wide = width.Lossless(noise=0).widen(spec, {**sizes, **dict(self.more)})
        return replace(self.change(wide), promised=self.promised)


def stream(name, w=1.0, u=1.0, **options):
    """Return a change of a decision: the scales of a stream, multiplied by numbers, or by one number for each half."""

    def halves(vector, factor):
        factors = factor if isinstance(factor, tuple) else (factor, factor)
        n = len(vector) // 2
        return vector.zip(Vector(((factors[0], n), (factors[1], len(vector) - n))), lambda x, y: x * y)  # fmt: skip

    def change(wide):
        own = wide.stream_scales[name]
        own = replace(own, activation=halves(own.activation, w), readout=halves(own.readout, u), **options)  # fmt: skip
        return replace(wide, stream_scales={**wide.stream_scales, name: own})

    return change


def turned(wide):
    """Give head_dim the cyclic map, whose pairs RoPE turns by other angles."""
    maps = {**wide.maps, "head_dim": IndexMap.cyclic(6, 12)}
    first, ones = Vector(((1.0, 6), (0.0, 6))), Vector.full(1.0, 12)
    scales = {QUERY: StreamScale(first, first), KEY: StreamScale(ones, first)}
    return replace(wide, maps=maps, stream_scales={**wide.stream_scales, **scales})


def seen(wide):
    """Give ffn drawn pads with drawn readers."""
    ones = Vector.full(1.0, 60)
    drawn = StreamScale(ones, ones, "random_writer", reads="random_reader")
    return replace(
        wide,
        maps={**wide.maps, "ffn.0": IndexMap.tail(40, 60)},
        stream_scales={**wide.stream_scales, "ffn.0": drawn},
    )


def noisy(wide):
    return replace(stream("residual:normed", 1.0, (1.5, 0.5))(wide), noise=1.0)


WRONG = {
    "a scale before an activation function": ("llama", {"ffn": 80}, Wrong(stream("ffn.0", 2.0, 0.5)), "nonlinear"),
    "readers that are twice as large": ("llama", {"ffn": 80}, Wrong(stream("ffn.0", 1.0, 2.0)), "do not sum to 1"),
    "pads that are read": ("llama", {"ffn": 60}, Wrong(seen), "readers see new coordinates of 'ffn'"),
    "noise on copies of unequal shares": ("llama", "2x", Wrong(noisy), "noise is on copies of unequal shares"),
    "a tied head of another scale": ("llama", "2x", Wrong(stream("residual:final", 2.0, 0.5)), "tied tensors"),
    "larger keys": ("llama", {"head_dim": 12}, Wrong(stream(KEY, 2.0, 0.5)), "queries and keys change"),
    "pairs of RoPE": ("llama", {"head_dim": 12}, Wrong(turned), "RoPE turns"),
    "too few experts": ("mixtral", {"experts": 8, "top_k": 2}, Wrong(lambda w: w, (("top_k", 4),)), "router"),
    "another mean": ("gpt2", "2x", Wrong(stream("residual", (1.0, 2.0), (1.0, 0.5))), "mean"),
    "a larger embedding": ("gemma2", "2x", Wrong(stream("residual:embedded", 2.0, 0.5)), "another scale|tied"),
}  # fmt: skip


@pytest.mark.parametrize(("family", "to", "method", "match"), WRONG.values(), ids=WRONG)
def test_what_a_method_says_of_its_own_growth_is_not_believed(family, to, method, match):
    model = make(family, tied=family != "gemma2").double().eval()
    before = logits(model, batch())
    plan = growkern.plan(model, to=to, width=method)

    with pytest.raises(PlanError, match=f"claims to preserve the function, but .*({match})"):
        check(replace(plan, reasons=()), describe(model))
    with pytest.raises(PlanError, match=f"exactly by Wrong.*({match})"):
        growkern.plan(model, to=to, width=replace(method, promised=True))

    assert not growkern.expand_inplace(model, to=to, width=method).function_preserving
    assert (logits(model, batch()) - before).abs().max() > 1e-3


RECORDS = {
    "a digest": ({"digest": "0" * 31}, "not of 32 hexadecimal digits"),
    "a digest of letters": ({"digest": "Z" * 32}, "not of 32 hexadecimal digits"),
    "a seed": ({"seed": 1.5}, "seed is 1.5"),
    "a large seed": ({"seed": 1 << 64}, "seed is 18446744073709551616"),
    "a state": ({"state": "maybe"}, "its state 'maybe'"),
    "a source of nothing": ({"source_sizes": {"hidden": 0}, "to": {}}, "the source 0 is no size"),
    "a bool": ({"to": {"hidden": True}}, "sizes are not those of a model"),
    "a version": ({"version": True}, "recorded in version True"),
    "a method of megabytes": ({"width": "a" * 10**6}, "no text"),
    "5000 digits": ({"to": {"ffn": 10**4000}}, "of more than 100 digits is not from 1"),
}


@pytest.mark.parametrize(("change", "match"), RECORDS.values(), ids=RECORDS)
def test_a_record_of_other_fields_is_not_read_and_no_model_grows_on(change, match):
    model = make("llama", tied=True)
    record = json.loads(GrowthRecord.of(growkern.plan(model, to="2x")).to_json())
    model.config.growkern_history = [json.dumps(record | change)]

    for call in (lambda: read(json.dumps(record | change)), lambda: growkern.expand_inplace(model, seed=1)):  # fmt: skip
        with pytest.raises(PlanError, match=match):
            call()
    assert model.config.hidden_size == 24


METHODS = [
    *("HyperClone(noise_db=-1e9)", "Lemon(alpha=1e-300)", "Lossless(noise=1e300)"),
    *(f"FPI(seed={'9' * 4000})", "-" * 60000 + "1", "[" * 60000),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m[:20])
def test_numbers_of_a_recorded_method_are_an_error_of_growkern(method):
    model = make("llama", tied=True)
    record = json.loads(GrowthRecord.of(growkern.plan(model, to="2x")).to_json())

    with pytest.raises(PlanError, match="growth 1 of 1 does not fit"):
        growkern.resume(model, None, [json.dumps(record | {"width": method})])


SIZES = {
    "digits": {"hidden": 10**5000},
    "negative": {"hidden": -(10**5000)},
    "a factor": "9" * 5000 + "x",
    "a factor of a size": {"ffn": "9" * 5000 + "x"},
    "a small factor": "1." + "0" * 5000 + "1x",
    "a text": {"hidden": "9" * 5000},
    "a name": {"a" * 5000: 48},
    "a long axis": {"heads": 1 << 18, "kv_heads": 1 << 17},
    "a long head": {"head_dim": 6 * 1024},
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("shrinks", [False, True])
def test_sizes_of_any_number_of_digits_are_refused_in_a_few_words(llama, sizes, shrinks):
    options = dict(shrink=growkern.shrink.WeightSelection()) if shrinks else {}

    with pytest.raises(PlanError) as raised:
        growkern.plan(llama[0], to=sizes, **options)

    assert len(str(raised.value)) < 3000


def test_a_short_text_of_a_huge_target_takes_no_memory(llama):
    """A pad of any length is one run, so that a plan of a few kilobytes can have a target that fills the host."""
    _, spec, _ = llama
    sizes = {**spec.sizes, "ffn": 10**8}
    text = build(spec, sizes, width=width.Lossless(), depth=depth.IdentityBlocks()).to_json()
    tracemalloc.start()

    with pytest.raises(PlanError, match="ffn: the target 100,000,000 is not from 1 to 262,144"):
        check(GrowthPlan.from_json(text), spec)

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 * len(text)


def test_axes_of_more_coordinates_than_a_check_can_visit_are_refused(llama, monkeypatch):
    _, spec, text = llama
    plan = GrowthPlan.from_json(text)
    n = work(plan, spec)[0]
    check(plan, spec)

    monkeypatch.setattr("growkern.planning.check.work", lambda *_: (n, n - 1))

    with pytest.raises(PlanError, match=f"too few runs for their {n:,} coordinates"):
        check(plan, spec)
