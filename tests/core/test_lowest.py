"""What the package promises of versions: read from setup.cfg by the tool that installs the lowest ones."""

from __future__ import annotations

import configparser
import importlib.util
import re
from pathlib import Path

import pytest

from slimkit.core import lazy
from slimkit.core.errors import MissingFrameworkError

ROOT = Path(__file__).parents[2]


def lowest():
    spec = importlib.util.spec_from_file_location("lowest", ROOT / "tools" / "lowest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_requirement_of_a_user_has_a_lowest_version(tmp_path):
    told = configparser.ConfigParser()
    told.read(ROOT / "setup.cfg")
    names = re.findall(r"^([\w-]+)", told["options"]["install_requires"].strip(), re.MULTILINE)
    pins = lowest().pins(["torch", "onnx", "hf", "mindspore"])
    assert {pin.partition("==")[0] for pin in pins} >= {*names, "torch", "accelerate", "onnx", "transformers"}
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+( ; .+)?", pin) for pin in pins)
    small = tmp_path / "setup.cfg"
    small.write_text("[options]\ninstall_requires =\n    a>=1.2\n    b<3\n    c>=1; python_version < '3.13'\n")
    assert lowest().pins([], small) == ["a==1.2", "c==1 ; python_version < '3.13'"]


def test_only_mindspore_bounds_python_and_numpy():
    told = configparser.ConfigParser()
    told.read(ROOT / "setup.cfg")
    assert told["options"]["python_requires"] == ">=3.10"
    for extra, wanted in told["options.extras_require"].items():
        bounded = [line for line in wanted.strip().splitlines() if "<" in line.partition(";")[0]]
        assert not bounded or extra in ("mindspore", "all"), extra
        assert all('python_version < "3.13"' in line for line in bounded)


def test_a_python_without_mindspores_wheels_is_named(monkeypatch):
    monkeypatch.delitem(lazy.sys.modules, "mindspore", raising=False)
    monkeypatch.setattr(lazy.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(lazy.sys, "version_info", (3, 14, 0))
    with pytest.raises(MissingFrameworkError, match=r"Python 3\.10 to 3\.12"):
        lazy.require("mindspore")
