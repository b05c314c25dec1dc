"""W16A16S folders: what is written, that it reads back, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from slimkit.core import files
from slimkit.core.ascend import load_w16a16s
from slimkit.core.ascend.w16a16s import CONFIG, DESCRIPTION, WEIGHTS, save_arrays
from slimkit.core.errors import ArgumentError, ArgumentTypeError, FileFormatError, PatternError


def weights(ratio=0.3, rng=None):
    rng = rng or np.random.default_rng(0)
    wide = rng.standard_normal((20, 50)).astype(np.float32)
    wide.reshape(-1)[: round(ratio * wide.size)] = 0
    return {
        "model.embed_tokens.weight": rng.standard_normal((30, 20)).astype(np.float32),
        "model.layers.0.q_proj.weight": wide,
        "model.layers.0.q_norm.weight": np.ones(20, np.float32),
        "model.layers.0.ids": np.arange(4),
    }


def test_the_folder_holds_what_the_document_shows(tmp_path):
    report = save_arrays(tmp_path / "out", weights(), {"model_type": "qwen3", "torch_dtype": "bfloat16"})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([CONFIG, DESCRIPTION, WEIGHTS])
    description = json.loads((tmp_path / "out" / DESCRIPTION).read_text())
    assert list(description)[:2] == ["model_quant_type", "version"]
    assert description == {
        "model_quant_type": "W16A16S",
        "version": "1.0.0",
        "model.embed_tokens.weight": "FLOAT",
        "model.layers.0.q_proj.weight": "W16A16S",
        "model.layers.0.q_norm.weight": "FLOAT",
        "model.layers.0.ids": "FLOAT",
    }
    # MindIE asks config.json which kind the folder is of, and reads no description without that word.
    assert json.loads((tmp_path / "out" / CONFIG).read_text()) == {
        "model_type": "qwen3", "torch_dtype": "float16", "quantize": "w16a16s"
    }  # fmt: skip
    assert report.sparse == {"model.layers.0.q_proj.weight": pytest.approx(0.3)}
    assert 0 < report.entropy_bits < 16
    assert report.zero_ratio == pytest.approx(0.3)
    assert report.advice == []
    assert json.loads(json.dumps(report.to_dict()))["underflowed"] == 0


def test_round_trip_is_float16_rounding_and_keeps_every_zero(tmp_path):
    given = weights()
    save_arrays(tmp_path, given, {"model_type": "x"})
    read = load_w16a16s(tmp_path)
    assert list(read.tensors) == list(given)
    for name, value in given.items():
        expected = value.astype(np.float16) if value.dtype.kind == "f" else value
        assert read.tensors[name].dtype == expected.dtype
        np.testing.assert_array_equal(read.tensors[name], expected)
    assert read.config["model_type"] == "x"


def test_a_second_save_replaces_the_first_and_leaves_other_files(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"t")
    save_arrays(tmp_path, weights(0.3), {})
    save_arrays(tmp_path, {"only.weight": weights()["model.layers.0.q_proj.weight"]}, {})
    assert list(load_w16a16s(tmp_path).kinds) == ["only.weight"]
    assert (tmp_path / "tokenizer.model").read_bytes() == b"t"


def test_a_save_that_fails_leaves_the_old_folder(tmp_path, monkeypatch):
    save_arrays(tmp_path, weights(0.3), {})
    old = load_w16a16s(tmp_path).tensors

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_tensors", full)
    with pytest.raises(OSError, match="No space"):
        save_arrays(tmp_path, weights(0.5), {})
    read = load_w16a16s(tmp_path).tensors
    assert all(np.array_equal(read[name], value) for name, value in old.items())


def test_config_and_tokenizer_come_from_a_folder(tmp_path):
    source = tmp_path / "hf"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "llama", "dtype": "float32"}')
    (source / "tokenizer.json").write_text("{}")
    (source / "model.safetensors").write_bytes(b"dense")
    report = save_arrays(tmp_path / "out", weights(), str(source))
    assert report.copied == ["tokenizer.json"]
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert load_w16a16s(tmp_path / "out").config == {
        "model_type": "llama", "dtype": "float16", "torch_dtype": "float16", "quantize": "w16a16s"
    }  # fmt: skip
    with pytest.raises(FileFormatError, match=r"config\.json"):
        save_arrays(tmp_path / "out2", weights(), str(tmp_path / "nowhere"))


def test_targets_choose_what_is_marked(tmp_path):
    report = save_arrays(tmp_path, weights(), {}, targets=["model.embed_tokens", "*.q_proj.weight"])
    assert set(report.sparse) == {"model.embed_tokens.weight", "model.layers.0.q_proj.weight"}
    assert "hardly a zero" in " ".join(report.advice)
    with pytest.raises(PatternError, match=r"\*\.k_proj"):
        save_arrays(tmp_path, weights(), {}, targets=["*.k_proj.*"])


@pytest.mark.parametrize(("ratio", "words"), [(0.1, "there is more to compress"), (0.6, "Check the accuracy")])
def test_ratio_advice(tmp_path, ratio, words):
    assert words in save_arrays(tmp_path, weights(ratio), {}).advice[0]


def test_values_that_vanish_are_counted(tmp_path):
    given = weights()
    given["model.layers.0.q_norm.weight"][:3] = 1e-9
    report = save_arrays(tmp_path, given, {})
    assert report.underflowed == 3
    assert "3 values became zero" in report.advice[-1]


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path):
    out = tmp_path / "out"
    for value in (70000.0, np.inf, np.nan):
        given = weights()
        given["model.layers.0.q_norm.weight"][0] = value
        with pytest.raises(ArgumentError, match="which float16 holds"):
            save_arrays(out, given, {})
    with pytest.raises(ArgumentError, match="Sparsify the model first"):
        save_arrays(out, {"a.weight": np.ones((4, 4))}, {})
    with pytest.raises(ArgumentError, match="at least one tensor"):
        save_arrays(out, {}, {})
    with pytest.raises(ArgumentTypeError, match="weights must be a dict"):
        save_arrays(out, [1], {})
    with pytest.raises(ArgumentTypeError, match=r"weights\['a'\]"):
        save_arrays(out, {"a": np.array(["x"])}, {})
    with pytest.raises(ArgumentError, match="other than model_quant_type"):
        save_arrays(out, {"version": np.eye(4)}, {})
    assert not out.exists()


def edit(folder, change):
    path = folder / DESCRIPTION
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / DESCRIPTION).unlink(), "existing file"),
        (lambda f: (f / WEIGHTS).unlink(), "existing file"),
        (lambda f: (f / CONFIG).unlink(), "existing file"),
        (lambda f: (f / DESCRIPTION).write_text("[]"), "does not describe a W16A16S model"),
        (lambda f: (f / DESCRIPTION).write_text("{"), "not a JSON file"),
        (lambda f: (f / CONFIG).write_text("[]"), "not a JSON object"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:50]), "safetensors"),
        (lambda f: edit(f, lambda d: d.update(model_quant_type="W8A8")), "does not describe"),
        (lambda f: edit(f, lambda d: d.update(version="2.0.0")), "of version '2.0.0'"),
        (lambda f: edit(f, lambda d: d.update(extra="FLOAT")), "described but not there: .'extra'"),
        (lambda f: edit(f, lambda d: d.pop("model.layers.0.ids")), "there but not described: .'model.layers.0.ids'"),
        (lambda f: edit(f, lambda d: d.update({"model.layers.0.ids": "INT8"})), "must be W16A16S or FLOAT"),
        (lambda f: files.write_tensors(f / WEIGHTS, weights()), "must be float16"),
    ],
)
def test_folders_that_do_not_agree_are_refused(tmp_path, damage, message):
    save_arrays(tmp_path, weights(), {})
    damage(tmp_path)
    with pytest.raises(FileFormatError, match=message):
        load_w16a16s(tmp_path)


def test_a_description_without_a_version_is_read(tmp_path):
    save_arrays(tmp_path, weights(), {})
    edit(tmp_path, lambda d: d.pop("version"))
    assert "model.layers.0.ids" in load_w16a16s(tmp_path).tensors
