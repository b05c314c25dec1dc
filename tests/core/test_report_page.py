"""The report's page: what was asked against what was reached, latency in turn, how to load it, themes and widths."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import textwrap

import pytest

from slimkit.core import files
from slimkit.core.jobs import measurement
from slimkit.core.jobs.framework import JobResult
from slimkit.core.jobs.measurement import fastest_ms, goal, summary_rows
from slimkit.core.run import report
from slimkit.core.run.compare import compare_rows, render_comparison
from slimkit.core.run.pipeline import run_recipe
from tests.core.test_pipeline import TASK, NumpyWing, recipe

BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
STAGES = [
    {"train": {"epochs": 1}}, {"prune": {"reserved_ratio": 0.25}}, {"sparsify": {"sparse_ratio": 0.5}}, {"export": {}},
]  # fmt: skip


class Telling(NumpyWing):
    """Its pruning misses what was asked for, its sparsity knows the error of a layer."""

    def __init__(self):
        super().__init__()
        self.timed = []

    def run(self, kind, options, model, context):
        if kind == "prune":
            done = {k: v[:4] for k, v in model.items()}
            facts = {"goal": goal("parameters kept", options.reserved_ratio, 0.5, missed=True)}
            return JobResult(done, edit={"rows": 4}, facts=facts)
        done = super().run(kind, options, model, context)
        if kind == "sparsify":
            facts = {"goal": goal("weights set to zero", 0.5, 0.5, missed=False)}
            done.facts = {**facts, "report": {"layers": {"w": {"output_error": 0.1234}}}}
        return done

    def measure(self, model, example, dense=None):
        self.timed.append(dense is not None)
        return super().measure(model, example, dense)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    (folder / "task.py").write_text(textwrap.dedent(TASK))
    wing = Telling()
    told = recipe(stages=STAGES)
    found = run_recipe(told, folder, wing, folder / "run", command="slimkit run tiny.yaml --set seed=3")
    return found, (folder / "run" / "report.html").read_text(), wing


def shown(page):
    """The text that a reader sees, pictures left out."""
    text = re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def test_the_first_row_says_what_was_asked_for_and_what_was_reached(made):
    page = made[1]
    first = shown(page.split('<div class="cards"')[1])
    assert "parameters kept ( 02-prune ) 0.500 0.25 asked for: not reached" in first
    assert "weights set to zero ( 03-sparsify ) 0.500 0.5 asked for" in first
    assert page.count('goal missed"') == 1


def test_dense_and_final_are_timed_in_turn_and_a_look_is_no_new_measurement(made):
    found, page, wing = made
    assert wing.timed == [False, False, True, True], "from the first stage that shrinks; the export looks only"
    # The dense stage said 0.1 ms when nothing else ran; in turn it is 0.4, and that is what the ratio is of.
    latency = next(row for row in summary_rows(found) if row[0].startswith("Latency"))
    assert latency == ("Latency, eager", "0.40 ms", "0.10 ms", "0.250x")
    assert "0.40 ms dense · 0.250x" in shown(page)
    assert dict(compare_rows([found]))["Latency, eager"] == ["0.10 ms (0.250x)"]


def test_calls_are_timed_in_turn():
    order = []
    fastest_ms([lambda: order.append("dense"), lambda: order.append("final")], 1e-9)
    assert order == ["dense", "final", "final", "dense", "dense", "final"]


def test_what_else_runs_on_the_machine_is_in_no_figure(monkeypatch):
    clock, waits = [0.0], iter([0, 0, 20, 0, 20, 0] * 100)

    def call(seconds):
        clock[0] += seconds + next(waits)

    monkeypatch.setattr(measurement.time, "perf_counter", lambda: clock[0])
    assert fastest_ms([lambda: call(0.002), lambda: call(0.001)], 50) == pytest.approx([2, 1])


def test_a_report_of_an_earlier_version_shows_what_it_has(made):
    old = json.loads(json.dumps(made[0]))
    for stage in old["stages"]:
        del stage["measurement"]["dense_ms"]
        stage["facts"].pop("goal", None)
    assert "1.000x" in next(row for row in summary_rows(old) if row[0].startswith("Latency"))
    assert 'class="card goal' not in report.render(old)


def test_the_page_says_how_to_load_the_result_and_which_command_made_it(made):
    found, page, _ = made
    text = shown(page)
    assert f'slimkit.load("{found["output"]}", trust_factory=True)' in text
    assert "stages/04-export/model.safetensors" in text
    assert (files.as_path(found["output"], "o") / "stages/04-export/model.safetensors").exists()
    assert "Made with: slimkit run tiny.yaml --set seed=3" in text


def test_output_errors_stand_beside_their_layers(made):
    text = shown(made[1])
    assert "Sparsity Output error w Dense 8 4" in text
    assert "50.0 % 0.1234" in text
    assert 'aria-label="output error of each layer"' in made[1]


@pytest.mark.parametrize("both", [False, True], ids=["one run", "side by side"])
def test_pictures_take_their_colours_from_the_theme_and_their_size_from_the_page(made, both):
    page = render_comparison([made[0]] * 2, ["a", "b"]) if both else made[1]
    style = page.split("<style>")[1].split("</style>")[0]
    light, dark = style.split("prefers-color-scheme: dark", 1)
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    named = set(re.findall(r"var\(--(\w+)\)", "".join(pictures)))
    assert named, "colours are the theme's"
    for name in named:
        assert f"--{name}:" in light
        assert f"--{name}:" in dark
    for svg in pictures:
        assert not re.search(r"#[0-9a-fA-F]{6}\b(?!\))", re.sub(r"(url\(|href=\")#\w+", "", svg)), "a fixed colour"
        assert not re.search(r"<text(?![^>]*fill: var)", svg), "text in black on a dark page"
        assert 'width="100%"' in svg
        assert "viewBox" in svg
    assert page.count('<div class="wide"') == page.count('<div class="narrow"') == len(pictures) / 2
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert both or len(ids) == len(set(ids)), "a picture must not borrow another's clip"
    for table in page.split("<table>")[:-1]:
        assert table.rstrip().endswith('<div class="scroll">'), "a table scrolls in its own box"


MEASURED = """<script>
const visible = [...document.querySelectorAll("svg")].filter(s => s.getBoundingClientRect().width);
const letters = visible.flatMap(s => [...s.querySelectorAll("text")].map(t => t.getBoundingClientRect()));
const boxes = c => [...c.children].map(k => k.getBoundingClientRect());
const cards = [...document.querySelectorAll(".cards")].map(c => [c, boxes(c)]);
document.title = JSON.stringify({
  page: document.documentElement.scrollWidth, view: innerWidth, pictures: visible.length,
  outside: letters.filter(r => r.left < -1 || r.right > innerWidth + 1).length,
  smallest: Math.min(...letters.map(r => Math.min(r.width, r.height)).filter(v => v)),
  unfilled: cards.filter(([c, k]) => k.some(r => r.right < c.getBoundingClientRect().right - 1
    && !k.some(o => Math.abs(o.top - r.top) < 1 && o.left > r.left))).length,
  paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
  text: getComputedStyle(visible[0].querySelector("text")).fill });
</script>"""


def browse(folder, page, width, *more):
    """What a browser makes of a page."""
    file = folder / "page.html"
    file.write_text(page.replace("</body>", MEASURED + "</body>"))
    call = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},1400", *more]
    done = subprocess.run([*call, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(html.unescape(re.search(r"<title>(\{.*?\})</title>", done.stdout)[1]))


@pytest.mark.skipif(BROWSER is None, reason="no headless Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_shows_the_report_whole_at_every_width_and_in_both_themes(made, tmp_path, width, theme):
    dark = ["--blink-settings=preferredColorScheme=0"] if theme == "dark" else []
    seen = browse(tmp_path, made[1], width, *dark)
    assert seen["page"] <= seen["view"] == width, "the page itself never scrolls sideways"
    assert seen["pictures"] == made[1].count("<svg") / 2, "each picture once, the one that fits"
    assert seen["outside"] == 0
    assert seen["smallest"] >= 6, "letters that can be read"
    assert seen["unfilled"] == 0, "cards fill their rows"
    brightness = {key: sum(map(int, re.findall(r"\d+", seen[key])[:3])) / 3 for key in ("paper", "ink", "text")}
    lighter = {"light": "paper", "dark": "ink"}[theme]
    assert brightness[lighter] > 200
    assert abs(brightness["paper"] - brightness["text"]) > 100
    shot = tmp_path / f"report-{width}-{theme}.png"
    call = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},1400", *dark]
    subprocess.run([*call, f"--screenshot={shot}", (tmp_path / "page.html").as_uri()], check=True, capture_output=True)
    assert shot.stat().st_size > 10_000


@pytest.mark.skipif(BROWSER is None, reason="no headless Chromium on this machine")
def test_runs_side_by_side_fit_a_phone(made, tmp_path):
    seen = browse(tmp_path, render_comparison([made[0]] * 2, ["runs/a", "runs/b"]), 390)
    assert seen["page"] <= seen["view"] == 390
    assert seen["outside"] == 0
