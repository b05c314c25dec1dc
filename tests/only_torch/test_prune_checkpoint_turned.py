"""Folders whose hidden width is turned before it is cut: equal to the whole model's, resumed to the same bytes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from slimkit.core.errors import ArgumentError, UnsupportedError
from slimkit.core.locks import SHARDS
from tests.kills import killed_at
from tests.only_torch.test_merge_checkpoint import digests
from tests.only_torch.test_prune_checkpoint import folder, texts

import torch

pytestmark = pytest.mark.usefixtures("one_thread")

INNER = ["*.q_proj", "*.k_proj", "*.v_proj", "*.gate_proj"]  # what stays, so that the hidden width must go


@pytest.mark.parametrize("family", ["llama", "llama-bf16-tied"])
def test_a_hidden_width_is_turned_to_the_bits_of_the_whole_model(family, tmp_path):
    from slimkit import PruneTorch, prune_checkpoint

    kind = folder(family, tmp_path / "base")
    options = {"calibration": texts(), "alignment": 4, "rotation": True}
    report = prune_checkpoint(tmp_path / "base", tmp_path / "out", 0.85, INNER, **options)
    wanted = kind.from_pretrained(tmp_path / "base", dtype="auto")
    pruner = PruneTorch(wanted).set_alignment(4).set_rotation(True)
    desc = pruner.set_importance_evaluation_function("auto", calibration=texts()).prune(0.85, INNER)
    assert wanted.config.hidden_size < 32
    assert json.loads((tmp_path / "out" / "plan.json").read_text()) == json.loads(json.dumps(desc))
    assert report["report"]["compensation"] == pruner.report()["compensation"]
    assert report["report"]["rotated"] == pruner.report()["rotated"]
    got, told = kind.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert got.config.tie_word_embeddings is False
    here, there = wanted.state_dict(), got.state_dict()
    assert here.keys() == there.keys()
    for name, value in here.items():
        assert torch.equal(there[name], value), name


def test_the_command_turns_in_memory_and_on_disk_alike(tmp_path):
    from typer.testing import CliRunner

    from slimkit.cli import app

    folder("llama-bf16-tied", tmp_path / "base", "60KB")
    text = Path(__file__).with_name("test_prune_checkpoint.py")
    words = ["prune", "-m", str(tmp_path / "base"), "--keep-ratio", "0.85", "--alignment", "4", "--rotation"]
    words += [word for name in INNER for word in ("--un-prune", name)]
    for place, more in (("whole", []), ("small", ["--stream"])):
        done = CliRunner().invoke(app, [*words, "--calib", f"{text}:texts", "-o", str(tmp_path / place), *more])
        assert done.exit_code in (0, 1), done.exception  # 1: widths lie too far apart to keep the share
        assert (tmp_path / place).exists(), done.exception
        assert "--rotation" in (tmp_path / place / "README.md").read_text()
    plans = [json.loads((tmp_path / place / "plan.json").read_text()) for place in ("whole", "small")]
    assert plans[0] == plans[1]
    assert plans[0]["made"]["rotated"]
    with pytest.raises(ArgumentError, match="needs the importance"):
        CliRunner().invoke(
            app,
            [*words, "--importance", "l1", "-o", str(tmp_path / "no")],
            standalone_mode=False,
            catch_exceptions=False,
        )


def test_a_killed_turning_goes_on_to_the_same_bytes(tmp_path):
    from slimkit import prune_checkpoint

    folder("llama-bf16-tied", tmp_path / "base", "10GB")

    def work(place):
        options = {"calibration": texts(1), "alignment": 4, "compensation": None, "rotation": True}
        prune_checkpoint(tmp_path / "base", place, 0.85, INNER, **options)

    work(tmp_path / "whole")
    wanted = digests(tmp_path / "whole")
    turned = 0
    for turn in (5, 14, 25):  # before the plan, while turned copies are written, after them
        part = tmp_path / f"k{turn}"
        assert killed_at(turn, partial(work, part))
        if turn == 14:  # begun by a version that knew no rotation: it counts as its default, which is another job
            job = json.loads((part / SHARDS / "job.json").read_text())
            del job["settings"]["rotation"]
            (part / SHARDS / "job.json").write_text(json.dumps(job))
            with pytest.raises(UnsupportedError, match="another settings"):
                work(part)
            job["settings"]["rotation"] = True
            (part / SHARDS / "job.json").write_text(json.dumps(job))
        turned += 0 < len(list((part / SHARDS / "turned").glob("*.safetensors"))) < 21
        work(part)
        assert digests(part) == wanted
        assert not (part / SHARDS / "turned").exists()
    assert turned
