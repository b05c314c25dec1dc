"""What a person meets who gives something unexpected: it works, or one line says what is wrong; never a traceback."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from slimkit.cli import app
from slimkit.core.errors import SlimkitError
from slimkit.core.jobs import early
from tests.chain import tiny_models
from tests.conftest import INSTALLED

TORCH = pytest.mark.skipif("torch" not in INSTALLED, reason="PyTorch's side")
MINDSPORE = pytest.mark.skipif("mindspore" not in INSTALLED, reason="MindSpore's side")

ON_TORCH, ON_MINDSPORE = ("--factory", "one.py:net"), ("-f", "mindspore", "--factory", "two.py:net")
SPARSE = ("sparsify", "--method", "wanda")


def call(arguments, place):
    return CliRunner().invoke(app, [str(a) for a in (*arguments, "-o", place)])


def refused(arguments, place):
    done = call(arguments, place)
    assert isinstance(done.exception, SlimkitError), (arguments, done.exception)
    assert "\n" not in str(done.exception)
    assert not place.exists()
    return str(done.exception)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("prun", "--model", "bert"), "Did you mean 'prune'"),
        (("prune", "bert", "--keep-ratio", "0.5"), "A model is given by --model"),
        (("prune", "--modle", "bert", "--keep-ratio", "0.5"), "--model"),
        (("prune", "--model", "brt", "--keep-ratio", "0.5"), "Received: 'brt'. Did you mean 'bert'?"),
        (("sparsify", "--model", "bert", "--method", "hesian"), "Did you mean 'hessian'?"),
        (("inspect", "other/brt"), "Received: 'other/brt'"),
        (("inspect", "brt"), "Did you mean 'bert'?"),
        (("convert", "brt", "new"), "Did you mean 'bert'?"),
        (("run", "recipe.yml"), "Did you mean 'recipe.yaml'?"),
        (("schema", "--out", "recipe.yaml"), "--force replaces it"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, tuple) else "",
)
def test_what_is_mistyped_is_answered_by_what_was_meant(given, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "bert").mkdir()
    (tmp_path / "recipe.yaml").write_text("version: 1\n")
    out = ("--out", "x") if given[0] in ("prune", "prun", "sparsify") else ()
    done = CliRunner().invoke(app, [*given, *out])
    assert done.exit_code != 0
    assert said in " ".join(f"{done.exception} {done.output}".replace("│", " ").split())
    assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, 6)).astype(np.float32)
    y = x[:, :3].argmax(1)
    (folder / "one.py").write_text(
        tiny_models.TORCH_PLAIN
        + tiny_models.TORCH_NET.replace("def net", "def images").replace("def batches", "def all_ones")
    )
    (folder / "two.py").write_text(tiny_models.MS_PLAIN)
    arrays = {
        "one": {"picture": x}, "labelled": {"x": x, "labels": y}, "double": {"x": x.astype(np.float64)},
        "narrow": {"x": x[:, :5]}, "bytes": {"x": rng.integers(0, 255, (8, 3, 8, 8)).astype(np.uint8)},
        "both": {"x": x.astype(np.float64), "labels": y}, "ids": {"input_ids": rng.integers(4, 20, (8, 8))},
        "pixels": {"pixel_values": rng.standard_normal((4, 3, 16, 16)).astype(np.float32)},
    }  # fmt: skip
    for name, columns in arrays.items():
        np.savez(folder / f"{name}.npz", **columns)
    tiny_models.text(folder / "text.jsonl", labels=False)
    if "torch" in INSTALLED:
        for family in ("bert", "t5", "whisper", "clip", "vit"):
            tiny_models.hugging_face(folder, family)
    return folder


@pytest.fixture(autouse=True)
def _inside(here, monkeypatch):
    monkeypatch.chdir(here)


CALIBRATION = [
    ("one.npz", ""),
    ("labelled.npz", "labels: left out"),
    ("double.npz", "64-bit floats become 32-bit ones"),
    ("one.py:batches", "the second of each pair is left out"),
]


@TORCH
@pytest.mark.parametrize(("data", "said"), CALIBRATION)
def test_calibration_arrays_work_in_any_form_and_what_is_changed_is_said(tmp_path, caplog, data, said):
    done = call((*SPARSE, *ON_TORCH, "--calib", data), tmp_path / "out")
    assert done.exit_code == 0, done.exception
    assert said in caplog.text
    assert ("left out" in caplog.text or "32-bit" in caplog.text) == bool(said)


@MINDSPORE
def test_calibration_arrays_work_on_cells_too(tmp_path, caplog):
    done = call((*SPARSE, *ON_MINDSPORE, "--calib", "both.npz"), tmp_path / "out")
    assert done.exit_code == 0, done.exception
    assert "labels: left out" in caplog.text
    assert "64-bit floats" in caplog.text


@TORCH
def test_bytes_of_images_and_64_bit_training_data_are_cast_and_said(tmp_path, caplog):
    images = ("--factory", "one.py:images", "--arg", "width=8")
    assert call((*SPARSE, *images, "--calib", "bytes.npz"), tmp_path / "a").exit_code == 0
    assert "bytes become 32-bit floats from 0 to 255" in caplog.text
    train = ("adapt", *ON_TORCH, "--data", "both.npz", "--rank", 2, "--max-steps", 1)
    done = call(train, tmp_path / "b")
    assert done.exit_code == 0, done.exception
    assert caplog.text.count("64-bit floats") == 1


FAMILIES = [
    (("sparsify", "-m", "t5", "--method", "wanda", "--calib", "text.jsonl", "--samples", 4), ""),
    (("sparsify", "-m", "t5", "--method", "wanda", "--calib", "ids.npz"), "cannot be called with the data"),
    (("sparsify", "-m", "vit", "--method", "wanda", "--calib", "pixels.npz"), ""),
    (("sparsify", "-m", "vit", "--method", "magnitude"), ""),
    (("sparsify", "-m", "vit", "--method", "wanda", "--calib", "ids.npz"), "cannot be called with the data"),
    (("sparsify", "-m", "clip", "--method", "magnitude"), ""),
    (("sparsify", "-m", "clip", "--method", "wanda", "--calib", "pixels.npz"), "cannot be called with the data"),
    (("sparsify", "-m", "whisper", "--method", "magnitude"), ""),
    (("sparsify", "-m", "whisper", "--method", "wanda", "--calib", "text.jsonl"), "cannot be called with the data"),
    (("distill", "-m", "t5", "--data", "text.jsonl", "--layers", 1), "cannot be called with the data"),
    (("sparsify", "-m", "bert", "--method", "wanda", "--calib", "one.npz"), "cannot be called with the data"),
]


@TORCH
@pytest.mark.parametrize(
    ("arguments", "words"), FAMILIES, ids=lambda v: f"{v[2]}-{v[-1]}" if isinstance(v, tuple) else ""
)
def test_other_families_work_or_say_in_one_line_why_not(tmp_path, arguments, words):
    if words:
        assert words in refused(arguments, tmp_path / "out")
        return
    done = call(arguments, tmp_path / "out")
    assert done.exit_code == 0, done.exception
    assert (tmp_path / "out" / "config.json").exists()


@TORCH
def test_an_export_of_whisper_works_or_says_why_not(tmp_path):
    done = call(("export", "-m", "whisper", "--length", 8), tmp_path / "w.onnx")
    assert done.exit_code == 0 or isinstance(done.exception, SlimkitError), done.exception


EARLY = [
    (("prune", "-m", "bert", "--importance", "l1x"), "Did you mean 'l1'"),
    (("prune", "-m", "bert", "--importance", "one.py:nett"), "Did you mean 'net'"),
    (("prune", "-m", "bert", "--importance", "taylor"), "--calib DATA is needed"),
    (("prune", "-m", "bert", "--importance", "l1", "--compensate"), "--calib DATA is needed"),
    (("sparsify", "-m", "bert"), "--calib DATA"),
    (("sparsify", "-m", "bert", "--pattern", "x", "--method", "magnitude"), 'such as "2:4"'),
    (("sparsify", "-m", "bert", "--pattern", "4:2", "--sparsity", 0.7), "--sparsity must be 0.5"),
    (("sparsify", *ON_TORCH, "--method", "wanda"), "--calib DATA"),
    (("export", "-m", "bert", "--length", 500), "the model knows 32 positions"),
    (("export", *ON_TORCH, "--format", "w16a16s"), "needs a --model folder with a config.json"),
]


@TORCH
@pytest.mark.parametrize(("arguments", "words"), EARLY, ids=lambda v: v[-1] if isinstance(v, tuple) else "")
def test_what_needs_no_model_is_refused_before_one_is_loaded(tmp_path, monkeypatch, arguments, words):
    from slimkit.jobs import models

    monkeypatch.setattr(models, "open_model", lambda *_args, **_more: pytest.fail("a model was loaded"))
    assert words in refused(arguments, tmp_path / "out")


def test_positions_are_found_wherever_a_configuration_says_them(tmp_path):
    from slimkit.core import files
    from slimkit.core.jobs.sources import ModelPlace

    place = ModelPlace(tmp_path)
    assert early.text_length(place, 500) == 500
    for config in ({"n_positions": 8}, {"text_config": {"max_position_embeddings": 8}}):
        files.write_json(tmp_path / "config.json", config)
        assert (early.text_length(place, 8), early.text_length(place, None)) == (8, 8)
        with pytest.raises(SlimkitError, match="--length 9: the model knows 8 positions"):
            early.text_length(place, 9)


# former names -------------------------------------------------------------------------------------------------------

FORMER = [
    (("sparsify", *ON_TORCH, "--method", "magnitude", "--dry-run"), "--ratio", "--sparsity", 0.25),
    (("sparsify", *ON_TORCH, "--method", "magnitude", "--dry-run"), "-r", "--sparsity", 0.25),
    (
        ("prune", *ON_TORCH, "--example", "2,6", "--dry-run", "--align", 1, "--un-prune", 1),
        "--ratio",
        "--keep-ratio",
        0.9,
    ),
    (("prune", *ON_TORCH, "--example", "2,6", "--dry-run"), "--align", "--alignment", 8),
    (("prune", *ON_TORCH, "--example", "2,6", "--dry-run"), "--keep", "--un-prune", 1),
    (("adapt", *ON_TORCH, "--data", "labelled.npz", "--rank", 2, "--dry-run"), "--lr", "--learning-rate", 0.1),
]


@TORCH
@pytest.mark.parametrize(
    ("arguments", "old", "new", "value"), FORMER, ids=lambda v: str(v) if isinstance(v, str) else ""
)
def test_former_names_still_work_and_say_so(tmp_path, caplog, arguments, old, new, value):
    outputs = []
    for name in (old, new):
        done = call((*arguments, name, value, "--json"), tmp_path / name)
        assert done.exit_code in (0, 1), done.exception
        told = json.loads(done.stdout.replace(str(tmp_path / name), ""))
        told.get("report", {}).pop("seconds", None)  # how long each stage took
        outputs.append(told)
    assert outputs[0] == outputs[1]
    assert f"{old} is the old name of {new}" in caplog.text
    assert "old name" in refused((*arguments, old, value, new, 0.3 if value < 1 else 2), tmp_path / "both")
    assert f"{old} " not in CliRunner().invoke(app, [arguments[0], "--help"]).stdout.replace(f"{old}-", "")


@TORCH
def test_a_former_switch_still_works_and_says_so(tmp_path, caplog):
    given = ("sparsify", *ON_TORCH, "--method", "magnitude", "--dry-run", "--calib", "labelled.npz", "--json")
    outputs = []
    for name in (("--measured-ratios",), ("--uniform", "measured")):
        done = call((*given, *name), tmp_path / name[0])
        assert done.exit_code == 0, done.exception
        outputs.append(done.stdout.replace(str(tmp_path / name[0]), ""))
    assert outputs[0] == outputs[1]
    assert json.loads(outputs[0])["config"]["uniform"] == "measured"
    assert "--measured-ratios is the old name of --uniform measured" in caplog.text
    assert "old name" in refused((*given, "--measured-ratios", "--uniform", "dlp"), tmp_path / "both")
    assert "must be one of 'measured', 'dlp', true or false" in refused((*given, "--uniform", "dpl"), tmp_path / "word")


def test_the_command_that_goes_on_is_one_that_can_be_given():
    from slimkit.core.jobs.cards import command_line
    from slimkit.core.jobs.options import SparsifyOptions
    from slimkit.core.jobs.sources import ModelPlace

    place = ModelPlace(factory="a:b")
    said = command_line("sparsify", place, SparsifyOptions(progressive=True, uniform=False, sparse_ratio=0.7))
    assert said == "slimkit sparsify --factory a:b --sparsity 0.7 --uniform false --progressive"


def test_a_full_disk_is_told_in_one_line_whichever_library_met_it(capsys):
    from safetensors import SafetensorError

    from slimkit.cli.exits import exiting

    def full():
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def broken():
        raise SafetensorError("Error while deserializing header: invalid header")

    for command, code in ((full, 2), (broken, 70)):
        with pytest.raises(SystemExit) as stopped:
            exiting(command)
        assert stopped.value.code == code
        said = capsys.readouterr().err
        assert ("Traceback" in said) == (code == 70)
    assert "this is a bug" in said


def test_a_bundle_where_pefts_files_are_wanted_is_called_by_its_name(tmp_path):
    from slimkit.core.ascend.adapters import check_adapter
    from slimkit.core.convert.adapters.converting import convert_adapter
    from slimkit.core.errors import UnsupportedError

    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "delta.safetensors").touch()
    for job in (
        lambda: check_adapter(tmp_path / "lora"),
        lambda: convert_adapter(tmp_path / "lora", tmp_path, to="peft"),
    ):
        with pytest.raises(UnsupportedError, match=r"is a bundle of slimkit's.*save_delta"):
            job()


def test_a_word_where_a_list_is_wanted_is_shown_as_one():
    from pydantic import ValidationError

    from slimkit.core.jobs.fields import explained
    from slimkit.core.jobs.options import ExportOptions

    with pytest.raises(ValidationError) as found:
        ExportOptions(dynamic="0:batch,1:sequence")
    (mistake,) = explained(found.value)
    assert mistake[2] == "must be a list, such as ['0:batch,1:sequence']. Received: '0:batch,1:sequence'"


def test_missing_calibration_text_names_its_option_and_the_nearest_file(tmp_path, monkeypatch):
    from slimkit.core.errors import ConfigError
    from slimkit.core.jobs.calibrating import weighted

    monkeypatch.chdir(tmp_path)
    (tmp_path / "calibration.jsonl").touch()
    with pytest.raises(ConfigError, match=r"^--calib must name .* Did you mean 'calibration.jsonl'\?"):
        weighted(["calibratoin.jsonl"], "text", 8, 8, 8, 0)


def test_a_recipe_takes_the_words_of_the_command_line():
    from slimkit.core.jobs.options import PruneOptions, SparsifyOptions, TrainOptions

    assert PruneOptions(keep_ratio=0.5, un_prune=[0]) == PruneOptions(reserved_ratio=0.5, un_prune_list=[0])
    assert SparsifyOptions(sparsity=0.7).sparse_ratio == 0.7
    assert TrainOptions(learning_rate=0.1).learning_rate == 0.1
    with pytest.raises(ValueError, match="are one option"):
        PruneOptions(keep_ratio=0.5, reserved_ratio=0.5)
    with pytest.raises(ValueError, match="unknown key"):
        SparsifyOptions(measured_ratios=True)  # the switch says the opposite of the key


@TORCH
def test_un_prune_none_leaves_no_layer_whole(tmp_path):
    wide = ("prune", *ON_TORCH, "--example", "2,6", "--keep-ratio", 0.5, "--alignment", 1)
    done = call((*wide, "--un-prune", "none"), tmp_path / "out")
    assert done.exit_code == 0, done.exception


def test_another_librarys_words_are_understood():
    from slimkit.core import check
    from slimkit.core.jobs.options import AdaptOptions

    for word, ours in (("target_modules", "targets"), ("lr", "learning_rate"), ("modules_to_save", "also_train")):
        assert check.near(word, list(AdaptOptions.model_fields)) == f". Did you mean {ours!r}?"
    assert check.nears(["a", "b"], ["c"]) == "'a', 'b'"
    if "torch" in INSTALLED:
        from slimkit import apply_delta

        from torch import nn

        for word, ours in (("r", "rank"), ("lora_alpha", "alpha"), ("target_modules", "targets")):
            with pytest.raises(SlimkitError, match=f"Did you mean '{ours}'"):
                apply_delta(nn.Sequential(nn.Linear(4, 4)), "lora", targets=["0"], **{word: 1})
