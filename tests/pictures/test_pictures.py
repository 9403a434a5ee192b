"""Pictures draw what plans, reports, comparisons and schedules hold: the drawn data are read back, and no text covers another."""

import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations

import matplotlib.figure
import numpy as np
import pytest
import torch
import transformers
import zoo
from models import make

import growkern
from growkern import At, GrowthSchedule, WhenPlateau, depth, width
from growkern.errors import PlanError
from growkern.pictures import figure as colors
from growkern.planning.growth_plan import GrowthPlan


def llama(n_layers: int = 2, **sizes: int) -> transformers.LlamaForCausalLM:
    config = dict(hidden_size=24, num_attention_heads=4, num_key_value_heads=2, intermediate_size=40, vocab_size=66)  # fmt: skip
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**config | sizes, num_hidden_layers=n_layers)
        )


RANDOM = growkern.plan(llama(), to={"hidden": "2x", "layers": 4}, width=width.FPI(), depth=depth.Stack())  # fmt: skip


def axes_of(figure: matplotlib.figure.Figure, title: str) -> matplotlib.axes.Axes:
    (found,) = [a for a in figure.axes if a.get_title(loc="left").partition("\n")[0] == title]
    return found


def texts(axes: matplotlib.axes.Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def covered(figure: matplotlib.figure.Figure) -> list[str]:
    """Return the texts that leave the figure, and the pairs of texts that cover each other."""
    figure.draw_without_rendering()
    sides = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    ticks = {t for axis in sides for i in (0, 1) for t in axis.get_ticklabels(minor=i)}
    ticks -= {tick.label1 for axis in sides for tick in axis._update_ticks()}  # inside the limits
    own = {*figure.findobj(matplotlib.text.Text)} - ticks
    boxes = {t: t.get_window_extent() for t in own if t.get_text().strip() and t.get_visible()}
    x, y = figure.bbox.max
    outside = [t.get_text() for t, b in boxes.items() if b.x0 < -1 or b.y0 < -1 or b.x1 > x + 1 or b.y1 > y + 1]  # fmt: skip
    return outside + [
        f"{s.get_text()} | {t.get_text()}"
        for (s, a), (t, b) in combinations(boxes.items(), 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
    ]


def segments(axes: matplotlib.axes.Axes, kind: str) -> list[tuple[int, int, int]]:
    """Return first target, length and first source of every drawn line of a kind."""
    lines = [line for line in axes.get_lines() if line.get_label() == kind]
    points = [(*map(float, p),) for line in lines for p in line.get_xydata()]
    return [
        (int(x0), int(x1 - x0), int(y0))
        for (x0, y0), (x1, _) in zip(points[::3], points[1::3], strict=True)
    ]


def test_a_plan_draws_the_index_map_of_a_space():
    axes = axes_of(RANDOM.plot(), "residual")

    first, further = segments(axes, "first"), segments(axes, "further")

    index_map = RANDOM.axes["writer residual"].index_map
    drawn = [-1] * index_map.n_target
    for start, n, source in first + further:
        drawn[start : start + n] = range(source, source + n)
    assert drawn == [run.source + i for run in index_map.runs for i in range(run.length)]
    assert sorted(s + i for _, n, s in first for i in range(n)) == [*range(index_map.n_source)]
    assert axes.get_xlim() == (0, 48) and axes.get_ylim() == (0, 24)


def test_a_plan_draws_sizes_blocks_and_scales():
    figure = RANDOM.plot()

    sizes, blocks = axes_of(figure, "sizes"), axes_of(figure, "model.layers")
    weight, gradient = axes_of(figure, "weight scale"), axes_of(figure, "gradient scale")
    names = texts(weight)

    assert texts(sizes)[0] == "hidden  24 → 48 (x 2)" and texts(sizes)[-1] == "vocab  66"
    drawn = {line.get_label(): line.get_xdata().tolist() for line in sizes.get_lines()}
    assert drawn["source"] == [*RANDOM.source_sizes.values()]
    assert drawn["target"] == [*RANDOM.target_sizes.values()]
    assert segments(blocks, "first") == [(0, 1, 0), (1, 1, 1)]
    assert segments(blocks, "new") == [(2, 1, 0), (3, 1, 1)]
    down = names.index("model.layers.*.mlp.down_proj  24x40 → 48x80")
    (row,) = [t for t in RANDOM.tensors if t.name == "model.layers.0.mlp.down_proj.weight"]
    for axes, scale in ((weight, "weight_scale"), (gradient, "grad_scale")):
        values = [max(getattr(a, scale).expanded()) for a in RANDOM.axis_maps(row)]
        least = [min(getattr(a, scale).expanded()) for a in RANDOM.axis_maps(row)]
        (line,) = [t for t in axes.get_lines() if t.get_ydata()[0] == down]
        assert line.get_xdata() == pytest.approx((least[0] * least[1], values[0] * values[1]))


def test_a_plan_draws_pads_and_constants():
    plan = growkern.plan(llama(), to={"hidden": 36, "layers": 3})

    figure = plan.plot()

    (pad,) = axes_of(figure, "residual").patches
    assert (pad.get_x(), pad.get_width()) == (24, 12)
    assert "all 0" in [t.get_text() for t in axes_of(figure, "weight scale").texts]


PLANS = {
    "32 layers": lambda: growkern.plan(
        llama(32), to={"hidden": 36, "layers": 48}, width=width.AKI(), depth=depth.Stack()
    ),
    "64 layers": lambda: growkern.plan(llama(32), to={"hidden": "2x", "layers": 64}),
    "t5": lambda: growkern.plan(make("t5", tied=True)),
    "mixtral": lambda: growkern.plan(make("mixtral", tied=True), width=width.FPI()),
    "gpt2": lambda: growkern.plan(make("gpt2", tied=True)),
    "phi3": lambda: growkern.plan(zoo.make("phi3")),
    "depth only": lambda: growkern.plan(llama(), to={"layers": 3}),
    "shrinks": lambda: growkern.plan(
        llama(4), to={"hidden": 12, "layers": 2}, shrink=growkern.shrink.WeightSelection()
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_stays_readable(name):
    figure = PLANS[name]().plot()

    assert covered(figure) == [] and figure.get_figheight() < 14


def grown() -> growkern.GrowthReport:
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters())
    model(torch.arange(12)[None]).logits.square().sum().backward()
    optim.step()
    return growkern.expand_inplace(model, optim, to={"hidden": "2x", "layers": 3})


def test_a_report_draws_what_it_holds():
    report = grown()

    figure = report.plot()

    def bars(axes: matplotlib.axes.Axes) -> dict[str, float]:
        return dict(zip(texts(axes), (p.get_width() for p in axes.patches), strict=True))

    sizes, time, memory, factors = figure.axes
    assert texts(sizes)[-1].startswith(f"parameters  {report.n_params_source:,} → ")
    assert bars(time) == report.steps
    read, written, received, peak = bars(memory).values()
    assert (read, written) == (report.n_bytes_read, report.n_bytes_written)
    assert (received, peak) == (report.n_bytes_received, report.peak_bytes)
    assert sum(bars(factors).values()) == sum(report.lr_factors.values())
    assert bars(factors)["x 0.7071"] == sum(n for f, n in report.lr_factors.items() if f and round(f, 4) == 0.7071)  # fmt: skip
    assert f"x {report.grad_norm_factor:.3g} by the law" in figure.get_supxlabel()
    assert covered(figure) == []


def test_a_schedule_draws_the_sizes_that_its_growths_make():
    model = make("llama", tied=True)
    schedule = GrowthSchedule([At(step=10, to={"hidden": "2x"}), At(tokens=20 * 32, to={"layers": 3})])  # fmt: skip
    n = [sum(p.numel() for p in model.parameters())]

    figure = schedule.plot(model, total_steps=40, tokens_per_step=32)

    for event in schedule.events:
        growkern.expand_inplace(model, to=event.to)
        n.append(sum(p.numel() for p in model.parameters()))
    for axes, factor in zip(figure.axes, (1, 6 * 32), strict=True):
        (run,) = [line for line in axes.get_lines() if line.get_gid() == "run"]
        marks = [line.get_xdata()[0] for line in axes.get_lines() if line.get_gid() == "growth"]
        assert run.get_xdata().tolist() == [0, 10, 10, 20, 20, 40] and marks == [10, 20]
        assert run.get_ydata()[::2] == pytest.approx([factor * m for m in n])
    assert [t.get_text() for t in figure.axes[0].texts] == ["hidden=2x: step 10", "layers=3: step 20"]  # fmt: skip
    assert figure.axes[1].get_title(loc="left") == "FLOPs per step" and covered(figure) == []


def test_a_growth_that_no_step_decides_about_is_a_window():
    events = [
        WhenPlateau(patience=5, to={"layers": 3}), At(step=100, to={"layers": 4}), At(tokens=1e9, to={"layers": 5}),
        WhenPlateau(patience=5, to={"layers": 6}),
    ]  # fmt: skip

    figure = GrowthSchedule(events).plot(make("llama", tied=True), total_steps=300)

    upper, lower = figure.axes
    windows = sorted((p.get_x(), p.get_x() + p.get_width()) for p in upper.patches)
    assert windows == [(0, 100), (100, 300), (100, 300)]
    (run,) = [line for line in upper.get_lines() if line.get_gid() == "run"]
    assert len(upper.collections) == 3 and not (run.get_ydata() > 0).any()
    assert lower.get_title(loc="left") == "FLOPs per token" and covered(figure) == []


def test_an_attached_schedule_draws_the_rest_of_the_run():
    model = make("llama", tied=True)
    optim = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = GrowthSchedule([At(step=1, to={"layers": 3}), At(step=9, to={"layers": 4})])
    schedule.attach(model, optim)
    model(torch.arange(12)[None]).logits.square().sum().backward()
    optim.step()
    schedule.observe(tokens=64)

    figure = schedule.plot()

    n = sum(p.numel() for p in model.parameters())
    (run,) = [line for line in figure.axes[1].get_lines() if line.get_gid() == "run"]
    assert run.get_xdata().tolist() == pytest.approx([1, 9, 9, 9 * 1.15])
    assert run.get_ydata()[0] == pytest.approx(6 * 64 * n) and len(schedule.fired) == 1


PLATEAU = GrowthSchedule([At(step=10, to={"layers": 3}), WhenPlateau(to={"layers": 4})])
REFUSED = {
    "no model": (PLATEAU, {}, "pass the model, or attach the schedule first"),
    "no end": (PLATEAU, {"model": llama()}, r"growth to layers=4 \(loss \(min\) not better for 10\); pass total_steps="),
    "end": (PLATEAU, {"model": llama(), "total_steps": 10}, "an event at step 10, and total_steps=10"),
    "tokens": (PLATEAU, {"model": llama(), "tokens_per_step": -1.0}, "tokens_per_step=-1.0; pass a finite number above 0"),
    "size": (GrowthSchedule([At(step=1, to={"hidden": 20})]), {"model": llama()}, "hidden.*20"),
}  # fmt: skip


@pytest.mark.parametrize(("schedule", "arguments", "match"), REFUSED.values(), ids=REFUSED)
def test_a_schedule_that_cannot_be_drawn_is_refused(schedule, arguments, match):
    with pytest.raises(PlanError, match=match):
        schedule.plot(**arguments)


def test_a_procedure_draws_its_stages():
    procedure = growkern.procedures.stack_bert(
        make("llama", tied=True), layers=(2, 4, 8), steps=(100, 50), total_steps=300, tokens_per_step=32
    )  # fmt: skip

    figure = procedure.plot()

    (run,) = [line for line in figure.axes[1].get_lines() if line.get_gid() == "run"]
    assert run.get_xdata().tolist() == [0, 100, 100, 150, 150, 300]
    assert run.get_ydata()[::2] == pytest.approx([s.flops_per_step for s in procedure.stages])
    area = np.trapezoid(run.get_ydata(), run.get_xdata())
    assert area == pytest.approx(procedure.flops) and covered(figure) == []


COMPARISON = growkern.Comparison(
    (
        growkern.Outcome("(none)", loss=2.5, loss_after=2.25), growkern.Outcome("<b>Lossless()", loss=2.5, loss_after=2.0),
        growkern.Outcome("Stack()", refused="2 layers & <i>no more</i>"),
    ),
    7,
)  # fmt: skip


def test_a_comparison_draws_both_losses_of_every_method_that_ran():
    figure = COMPARISON.plot()

    (axes,) = figure.axes
    drawn = {line.get_label(): [*line.get_xdata()] for line in axes.get_lines()}
    assert drawn["after the growth"] == [2.5, 2.5] and drawn["after 7 steps"] == [2.25, 2.0]
    assert "<b>Lossless()" in texts(axes)[1] and "Stack(): 2 layers" in figure.get_supxlabel()
    assert covered(figure) == []


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117", "#1e1e1e", "#111111"])
def test_the_colors_are_seen_on_light_and_dark_pages(page):
    """The contrast of WCAG 2.1, which asks for 3 in graphics and large text."""
    for color in (colors.INK, colors.SOURCE, colors.TARGET, colors.NEW, colors.PAD):
        high, low = sorted((luminance(color), luminance(page)), reverse=True)
        assert (high + 0.05) / (low + 0.05) > 3.7, color


def test_a_picture_is_transparent_and_shows_itself_in_a_notebook():
    figure = RANDOM.plot()

    assert isinstance(figure, matplotlib.figure.Figure) and figure.get_facecolor()[3] == 0
    assert all(axes.get_facecolor()[3] == 0 for axes in figure.axes)
    assert figure._repr_png_().startswith(b"\x89PNG")


@pytest.mark.slow
def test_growkern_imports_no_matplotlib_and_pictures_no_pyplot():
    code = """import sys, growkern
assert not [name for name in sys.modules if name.startswith("matplotlib")]
plan = growkern.GrowthPlan("x", {}, {}, "w", "d", 0, "exact", {}, ()); plan.plot().savefig("/dev/null", format="png")
assert "matplotlib.figure" in sys.modules and "matplotlib.pyplot" not in sys.modules"""

    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("draw", [RANDOM.plot, COMPARISON.plot, PLATEAU.plot])
def test_without_matplotlib_the_error_names_the_extra(draw, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("growkern.pictures")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = {"model": llama(), "total_steps": 99} if draw == PLATEAU.plot else {}

    with pytest.raises(ModuleNotFoundError, match=r'matplotlib is missing: pip install "growkern'):
        draw(**arguments)


class Page(HTMLParser):
    """Reads a page: the texts of cells, and the tags, each of which must be closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.tags, self.texts = list[str](), set[str](), list[str]()
        self.feed(page)
        assert not self.open and "color" not in page

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


EVIL = '<script>alert("x")</script>&amp;'
TAGS = {"div", "p", "b", "table", "tr", "th", "td", "details", "summary"}


def schedule_of(text: str) -> GrowthSchedule:
    return GrowthSchedule([WhenPlateau(metric=text, to={text: "2x"})])


SHOWN = {
    "plan": lambda: replace(RANDOM, family=EVIL, notes=(EVIL,), reasons=(EVIL,), source_sizes={EVIL: 1}, target_sizes={EVIL: 2}),
    "report": lambda: replace(grown(), family=EVIL, notes=(EVIL,), source_sizes={EVIL: 1}, target_sizes={EVIL: 2}, memory=EVIL),
    "comparison": lambda: growkern.Comparison((growkern.Outcome(EVIL), growkern.Outcome("b", refused=EVIL)), 3),
    "schedule": lambda: schedule_of(EVIL),
}  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_html_escapes_every_text_and_has_tables_only(name):
    page = Page(SHOWN[name]()._repr_html_())

    assert page.tags <= TAGS and "table" in page.tags
    assert EVIL in "".join(page.texts)


def test_html_shows_the_numbers_of_the_text():
    report = grown()
    procedure = growkern.procedures.stack_bert(
        make("llama", tied=True), layers=(2, 4), steps=(10,), total_steps=30, tokens_per_step=32
    )

    for shown in (RANDOM, report, COMPARISON, PLATEAU, procedure):
        page = " ".join(Page(shown._repr_html_()).texts)
        words = [word for word in str(shown).split() if word.strip("-")]
        assert [word for word in words if word not in page] == []


def test_a_plan_from_json_is_drawn_alike():
    again = GrowthPlan.from_json(RANDOM.to_json())

    assert texts(axes_of(again.plot(), "weight scale")) == texts(axes_of(RANDOM.plot(), "weight scale"))  # fmt: skip
