"""The site builds without a warning; its links lead somewhere; every name, method and procedure has its place; a browser shows it well."""

import inspect
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from readme import ROOT

import growkern
from growkern import depth, procedures, shrink, vocab, width

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("docs")]

OUTSIDE = (  # addresses that the site may link to
    "https://arxiv.org/abs/",
    "https://docs.pytorch.org/",
    "https://github.com/apple/ml-hypercloning",
    "https://github.com/arcee-ai/mergekit",
    "https://huggingface.co/docs/",
    "https://keepachangelog.com/",
    "https://lightning.ai/docs/",
    "https://nlp.stanford.edu/~johnhew/",
    "https://semver.org/",
    "https://github.com/pradyunsg/furo",  # the theme's own line
    "https://pradyunsg.me",
    "https://www.sphinx-doc.org/",
)
WIDTHS, THEMES = (1280, 420), ("light", "dark")
LOOKED_AT = (
    "index",
    "guides/methods",
    "methods/width-Lossless",
    "procedures/mslt",
    "api/calls",
    "demo",
)
CONTRAST = 4.5  # WCAG 2.1, level AA, text of ordinary size


class Page(HTMLParser):
    """The ids, links and pictures of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids, self.links, self.sources = set[str](), list[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if name := found.get("id"):
            self.ids.add(name)
        if tag == "a" and (link := found.get("href")):
            self.links.append(link)
        if tag in ("img", "script") and (source := found.get("src")):
            self.sources.append(source)
        if tag == "link" and (source := found.get("href")) and found.get("rel") == "stylesheet":
            self.sources.append(source)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "bench.docs", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr  # warnings are errors
    return out / "html"


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    written = [path for path in site.rglob("*.html") if "_static" not in path.parts]
    return {path: Page(path.read_text("utf-8")) for path in written}


def test_every_link_and_picture_resolves_or_is_on_the_list(site, pages):
    broken = []
    for path, page in pages.items():
        for link in (*page.links, *page.sources):
            if link.startswith(("http://", "https://")):
                if not link.startswith(OUTSIDE):
                    broken.append((path.name, link))
                continue
            file, _, anchor = link.partition("#")
            target = (path.parent / file.partition("?")[0]).resolve() if file else path
            known = pages[target].ids if target in pages else None
            if not target.exists() or (anchor and known is not None and anchor not in known):
                broken.append((path.relative_to(site).as_posix(), link))

    assert len(pages) > 60 and not broken


def test_no_page_needs_another_host(pages):
    assert not [s for page in pages.values() for s in page.sources if "//" in s]


def test_every_public_name_has_an_entry(pages):
    ids = set().union(*(page.ids for page in pages.values()))
    named = [
        f"growkern.{n}" for n in growkern.__all__ if not inspect.ismodule(getattr(growkern, n))
    ]
    for module in (width, depth, shrink, vocab):
        named += [f"{module.__name__}.{n}" for n in module.__all__]

    assert not [n for n in named if n not in ids and callable(eval(n, {"growkern": growkern}))]


def test_every_method_and_procedure_has_a_page_with_a_picture(site):
    methods = [
        f"methods/{module.__name__.rpartition('.')[2]}-{n}"
        for module in (width, depth, shrink, vocab)
        for n in module.__all__
        if inspect.isclass(getattr(module, n))
    ]
    runs = [f"procedures/{n}" for n in procedures.__all__ if n.islower() and n != "g_stack_tokens"]

    for name in (*methods, *runs):
        text = (site / f"{name}.html").read_text("utf-8")
        assert name == "methods/vocab-CLPTransfer" or "<img" in text, name
    assert len(methods) >= 25 and len(runs) == 10


MEASURE = """
<iframe id=frame style="border:0;height:3000px"></iframe><pre id=found></pre>
<script>
const found = [], frame = document.getElementById("frame");
function channel(v) { v /= 255; return v <= 0.03928 ? v / 12.92 : Math.pow((v + 0.055) / 1.055, 2.4); }
function light(c) { return 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]); }
function color(text) { return (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number); }
function behind(node) {
  for (; node; node = node.parentElement) {
    const c = color(frame.contentWindow.getComputedStyle(node).backgroundColor);
    if (c.length < 4 || c[3] === 1) return c;
  }
  return [255, 255, 255];
}
function contrast(node) {
  const a = light(color(frame.contentWindow.getComputedStyle(node).color)), b = light(behind(node));
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}
async function look() {
  for (const page of PAGES) for (const width of WIDTHS) for (const theme of THEMES) {
    frame.style.width = width + "px";
    await new Promise(done => { frame.onload = done; frame.src = page; });
    const doc = frame.contentDocument;
    doc.body.dataset.theme = theme;
    await new Promise(done => setTimeout(done, 300));
    const nodes = [...doc.querySelectorAll("article p, article li, article td, article th, article pre, article a")];
    const pictures = [...doc.querySelectorAll("article img")];
    found.push({page, width, theme, wide: doc.documentElement.scrollWidth,
                contrast: Math.min(...nodes.filter(n => n.textContent.trim()).map(contrast)),
                empty: pictures.filter(p => p.complete && !p.naturalWidth).length});
  }
  document.getElementById("found").textContent = JSON.stringify(found);
}
look();
</script>
"""


def test_a_browser_shows_the_pages_at_two_widths_in_light_and_dark(site):
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if browser is None:
        pytest.skip("needs Chromium")
    values = {"PAGES": [f"{name}.html" for name in LOOKED_AT], "WIDTHS": WIDTHS, "THEMES": THEMES}
    script = MEASURE
    for name, value in values.items():
        script = script.replace(f"of {name})", f"of {json.dumps(value)})")
    (site / "look.html").write_text(f"<!doctype html>{script}", "utf-8")
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files")
    command = [
        browser,
        *options,
        "--virtual-time-budget=60000",
        "--dump-dom",
        f"file://{site}/look.html",
    ]

    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = json.loads(re.findall(r"<pre id=.found.>(.*?)</pre>", dom, re.DOTALL)[0])

    assert len(found) == len(LOOKED_AT) * len(WIDTHS) * len(THEMES)
    assert not [seen for seen in found if seen["wide"] > seen["width"]], "a page scrolls sideways"
    assert not [seen for seen in found if seen["contrast"] < CONTRAST], "text is hard to read"
    assert not [seen for seen in found if seen["empty"]], "a picture does not load"
