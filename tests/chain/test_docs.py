"""Every Python block of the README and the documentation runs, page by page, offline."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.chain.imported import Imported
from tests.conftest import INSTALLED

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").glob("**/*.md")])
BLOCK = re.compile(r"^```python([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TITLE = re.compile(r'title="([^"]*)"')
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


def titled(page: Path) -> list[tuple[str, str]]:
    """Title and code of every block: a title that ends in .py is a file, "another process..." begins one."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [("".join(TITLE.findall(head)), textwrap.dedent(code)) for head, code in found]


def blocks(page: Path) -> list[str]:
    return [code for _, code in titled(page)]


def needs(code: str) -> set[str]:
    """Frameworks that a block needs, by what it imports."""
    found = set()
    if re.search(r"\bslimkit_ms\b|\bmindspore\b", code):
        found.add("mindspore")
    if re.search(r"\bimport torch\b|\bfrom torch\b|\bslimkit\b(?!_ms|\.core)", code):
        found.add("torch")
    return found


@pytest.fixture(scope="module")
def imported():
    process = Imported()
    yield process
    process.close()


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_code_blocks_run(page, tmp_path, imported):
    # Each block stands at its own line of the page, so that a traceback points into the documentation.
    scripts: list[list[str]] = [[]]
    for number, (title, block) in enumerate(titled(page), 1):
        if not needs(block) <= set(INSTALLED):
            continue
        if title.endswith(".py"):
            (tmp_path / title).write_text(block, encoding="utf-8")
            continue
        if title.startswith("another process"):
            scripts.append([])
        scripts[-1].append(f"exec(compile({block!r}, '{page.name} block {number}', 'exec'), globals())")
    begin = "import sys, warnings\nsys.path.insert(0, '')\nwarnings.simplefilter('ignore')\n"
    for number, parts in enumerate(scripts):
        script = tmp_path / f"page-{number}.py"
        script.write_text(begin + "\n".join(parts) + "\n", encoding="utf-8")
        code, said = imported.run(script, tmp_path)
        assert code == 0, said[-3000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"


def test_readme_keeps_its_promise_of_a_short_example():
    first = blocks(ROOT / "README.md")[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= 12


def test_the_site_builds_without_a_warning(tmp_path):
    # Without --quiet, which hides warnings from --strict too.
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        capture_output=True, text=True, timeout=300, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "index.html").exists()


def test_every_page_is_in_the_navigation():
    import yaml

    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("**/*.md"):
        assert str(page.relative_to(ROOT / "docs")) in config, f"{page.name} is in no menu"
    assert yaml.safe_load(config.replace("!!python/name:", ""))["strict"] is True


def test_the_recipe_that_run_md_shows_is_the_one_that_it_names():
    page, shipped = (
        (ROOT / place).read_text(encoding="utf-8") for place in ("docs/run.md", "tools/recipes/digits.yaml")
    )
    assert f"```yaml\n{shipped.strip()}\n```" in page
