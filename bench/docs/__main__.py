"""Build the site: ``python -m bench.docs [OUT]`` writes OUT/html (default: site/html).

The sources are README, the guides, CONTRIBUTING, SECURITY, CHANGELOG and the docstrings; pictures of maps and runs, and the notebook of the
demo, are made anew at every build. The build fails on any warning of Sphinx.
"""

import shutil
import sys
from pathlib import Path

from bench.docs import pages

ROOT = Path(__file__).parents[2]
COPIED = "README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"
INDEX = """```{{include}} README.md
```

```{{toctree}}
:hidden:
:caption: Guides

{guides}
```

```{{toctree}}
:hidden:
:caption: Methods and procedures

methods/index
procedures/index
demo
```

```{{toctree}}
:hidden:
:caption: Reference

{api}
```

```{{toctree}}
:hidden:
:caption: Project

CONTRIBUTING
SECURITY
CHANGELOG
```
"""
GUIDES = (
    "loops", "sharded", "own-model", "zoo", "models", "methods", "procedures", "checkpoints", "after", "savings", "advice", "inheritance",
    "learned", "algebra", "speed",
)  # fmt: skip


def write(source: Path) -> None:
    """Write the sources of the site to a folder. No folder there is called growkern: the notebook would import it."""
    for name in COPIED:
        text = (ROOT / name).read_text("utf-8")
        (source / name).write_text(text.replace("growkern/guides/", "guides/"), "utf-8")
    (source / "guides").mkdir()
    for page in (ROOT / "growkern" / "guides").glob("*.md"):
        text = page.read_text("utf-8").replace("../../bench/", "../bench/")
        (source / "guides" / page.name).write_text(text, "utf-8")
    (source / "bench" / "results").mkdir(parents=True)
    for picture in (ROOT / "bench" / "results").glob("*.png"):
        shutil.copy(picture, source / "bench" / "results")
    shutil.copy(Path(__file__).with_name("demo.md"), source / "demo.md")
    for name in ("api", "methods", "procedures"):
        (source / name).mkdir()
    api = [*pages.names()]
    made = [*pages.method_pages(source), *pages.procedure_pages(source)]
    for path, text in [*api, *made]:
        (source / path).write_text(text, "utf-8")
    for name, title in (("methods", "A page per method"), ("procedures", "A page per procedure")):
        found = [Path(path).stem for path, _ in made if path.startswith(name)]
        (source / name / "index.md").write_text(
            "\n".join([f"# {title}", "", "```{toctree}", *found, "```", ""]), "utf-8"
        )
    guides = "\n".join(f"guides/{name}" for name in GUIDES)
    names = "\n".join(path.removesuffix(".md") for path, _ in api)
    (source / "index.md").write_text(INDEX.format(guides=guides, api=names), "utf-8")


def build(out: Path) -> int:
    """Build the site below a folder; return 0, or Sphinx's exit code."""
    from sphinx.cmd.build import main

    shutil.rmtree(out / "source", ignore_errors=True)
    (source := out / "source").mkdir(parents=True)
    write(source)
    strict = ["-b", "html", "-W", "--keep-going", "-q"]
    places = ["-c", Path(__file__).parent, "-d", out / "doctrees", source, out / "html"]
    return main([*strict, *map(str, places)])


if __name__ == "__main__":
    place = Path(sys.argv[1] if len(sys.argv) > 1 else "site")
    failed = build(place)
    print(f"{place / 'html' / 'index.html'}" if not failed else "the site was not built")
    sys.exit(failed)
