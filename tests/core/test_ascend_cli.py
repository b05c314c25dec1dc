"""`slimkit check` as CI uses it: exit codes, JSON, rules left out, several files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from slimkit.cli import app
from slimkit.core.ascend import findings, targets
from slimkit.core.ascend.folder import KINDS
from slimkit.core.errors import ArgumentError, ConfigError, FileFormatError
from tests.core.test_ascend_check import activation, dense

ROOT = Path(__file__).parents[2]


def slimkit(*arguments):
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


@pytest.fixture
def good(tmp_path):
    return dense(tmp_path / "good.onnx", 256, 512)


@pytest.fixture
def bad(tmp_path):
    return activation(tmp_path / "bad.onnx", "Mish", 18)


def test_exit_codes(good, bad, tmp_path):
    assert slimkit(good, "--target", "A2").exit_code == 0
    assert slimkit(bad, "-t", "a2").exit_code == 1
    assert slimkit(good, bad).exit_code == 1
    for arguments in ((tmp_path / "none.onnx",), (good, "--target", "910"), (good, "--cann", "x")):
        done = subprocess.run(
            [sys.executable, "-m", "slimkit", "check", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1
        assert "Traceback" not in done.stderr


def test_fail_on_and_ignore(tmp_path):
    odd = dense(tmp_path / "odd.onnx", 20, 24)
    assert slimkit(odd).exit_code == 0
    assert slimkit(odd, "--fail-on", "warning").exit_code == 1
    assert slimkit(odd, "--fail-on", "warning", "--ignore", "alignment").exit_code == 0
    assert slimkit(odd, "--fail-on", "info", "--ignore", "alignment").exit_code == 1
    assert isinstance(slimkit(odd, "--ignore", "aligment").exception, ArgumentError)
    assert "Did you mean 'alignment'" in str(slimkit(odd, "--ignore", "aligment").exception)
    assert isinstance(slimkit(odd, "--fail-on", "fatal").exception, ArgumentError)


def test_json_is_the_whole_result(good, bad):
    one = json.loads(slimkit(bad, "--json").stdout)
    assert one["exit_code"] == 1
    assert one["findings"][0]["rule"] == "operator"
    both = json.loads(slimkit(good, bad, "--json").stdout)
    assert [r["exit_code"] for r in both] == [0, 1]


def test_the_text_names_the_findings_and_the_command(good, bad):
    text = slimkit(bad).stdout
    assert "[operator] " in text
    assert "softplus" in text
    assert "atc --model=" in slimkit(good).stdout
    assert "atc --model=" not in slimkit(good, "--quiet").stdout


def test_shapes_close_open_axes(tmp_path):
    file = dense(tmp_path / "b.onnx", 16, 16, batch="n")
    assert "--dynamic_batch_size" in slimkit(file).stdout
    assert "--input_shape=x:8,16" in slimkit(file, "--shape", "x:8,16").stdout
    for text in ("x", "x:", ":1", "x:a,b"):
        assert isinstance(slimkit(file, "--shape", text).exception, ConfigError)


def test_a_damaged_file_is_one_error(tmp_path):
    (tmp_path / "m.onnx").write_bytes(np.random.default_rng(0).bytes(100))
    assert isinstance(slimkit(tmp_path / "m.onnx").exception, FileFormatError)


def test_it_runs_without_any_framework(good):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['mindspore'] = None; "
        "sys.argv = ['slimkit', 'check', sys.argv[1]]; "
        "from slimkit.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(good)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "atc --model=" in done.stdout


def test_the_page_names_every_document_that_a_fact_rests_on():
    page = (Path(__file__).parents[2] / "docs" / "ascend.md").read_text(encoding="utf-8")
    table = json.loads((Path(targets.__file__).with_name("operators.json")).read_text(encoding="utf-8"))
    urls = {source.url for target in targets.TARGETS.values() for source in target.sources.values()}
    urls |= {source["url"] for source in table["sources"].values()}
    urls |= {source["source"] for source in table["float_inputs"].values()}
    assert len(urls) >= 15
    assert [url for url in sorted(urls) if url not in page] == []


def test_the_page_says_what_the_tables_say():
    page = (Path(__file__).parents[2] / "docs" / "ascend.md").read_text(encoding="utf-8")
    for rule in findings.RULES:
        assert f"`{rule}`" in page, rule
    served = page.split("## Who serves which file")[1].split("## ")[0]
    for kind in KINDS:
        assert f"| {kind}, `save_{kind.lower()}` |" in served
    assert "Read on" in served
    for severity in findings.SEVERITIES:
        assert f"| {severity} |" in page
    for target in targets.TARGETS.values():
        assert target.soc_version in page
        for dtype in ("float16", "int8", "float32"):
            rows, columns = target.block(dtype)
            assert f"{rows} x {columns}" in page
    made = findings.OnnxCheck("m", "A2", "8.0", 13, "c", "fp16", {}, (), (), "atc", True, ())
    for key in made.to_dict():
        assert f"`{key}`" in page, key
    table = json.loads((Path(targets.__file__).with_name("operators.json")).read_text(encoding="utf-8"))
    assert f"holds {len(table['operators'])} operators" in page
