"""Pruning without an example: it is found where the model says what it takes, in one order, and said."""

from __future__ import annotations

import enum
import functools
import json
import logging
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from slimkit.cli import app
from slimkit.core.examples import FirstLayer, described, find_example


def _images(kit, n_in=3, first=None):
    """A small net of images; `first` stands in front of it."""
    layers = [kit.conv(n_in, 16, 3), kit.relu(), kit.conv(16, 16, 3)]
    return kit.fill(kit.sequential(*([first] if first is not None else []), *layers))


def _fixed(kit, side):
    """A net that takes images of one size only."""
    flat = kit.torch.nn.Flatten() if kit.name == "torch" else kit.ms.nn.Flatten()
    return kit.fill(kit.sequential(kit.conv(1, 4, side), flat, kit.linear(4, 32), kit.relu(), kit.linear(32, 4)))


def _timm(kit):
    net = _images(kit)
    net.default_cfg = {"input_size": (3, 40, 48)}
    net.example_input_array = kit.tensor(np.zeros((1, 3, 20, 20), np.float32))
    return net


def _lightning(kit):
    net = _images(kit)
    net.example_input_array = kit.tensor(np.zeros((1, 3, 20, 20), np.float32))
    return net


def _broken_hint(kit):
    """A size that does not run is passed over for what follows."""
    net = _images(kit)
    net.default_cfg = {"input_size": (5, 40, 40)}
    return net


CASES = {
    "timm's configuration": (_timm, "default_cfg['input_size']: (1, 3, 40, 48)"),
    "Lightning's example": (_lightning, "example_input_array: (1, 3, 20, 20)"),
    "a hint that does not run": (_broken_hint, "(1, 3, 224, 224)"),
    "a convolution": (lambda kit: _images(kit, 5), "the first layer (conv 0): (1, 5, 224, 224)"),
    "a convolution of one size": (lambda kit: _fixed(kit, 28), "the first layer (conv 0): (1, 1, 28, 28)"),
    "a linear layer": (
        lambda kit: kit.fill(kit.sequential(kit.linear(7, 32), kit.relu(), kit.linear(32, 4))),
        "the first layer (linear 0): (1, 7)",
    ),
    "a table": (
        lambda kit: kit.fill(kit.sequential(kit.embedding(9, 32), kit.linear(32, 32), kit.relu(), kit.linear(32, 4))),
        "the first layer (embedding 0): (1, 11)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_example_is_found_and_said(kit, case, caplog):
    make, words = CASES[case]
    net = make(kit)
    with caplog.at_level(logging.INFO, "slimkit"):
        pruner = kit.slim.Pruner(net).set_alignment(1)
        notes = pruner.report()["notes"]
    assert [words in note for note in notes] == [True], notes
    assert notes[0] in caplog.messages


def test_pruning_needs_no_inputs(kit):
    net = kit.fill(kit.sequential(kit.linear(8, 64), kit.relu(), kit.linear(64, 64), kit.relu(), kit.linear(64, 4)))
    kit.slim.Pruner(net).prune(0.5)
    assert tuple(kit.params(net)["2.weight"].shape) == (32, 64)


def test_weights_enumerated_beside_the_class_say_their_crop(kit):
    weights = SimpleNamespace(transforms=functools.partial(object, crop_size=36))

    class Weights(enum.Enum):
        DEFAULT = weights

    net = _images(kit, 4)
    beside = sys.modules[type(net).__module__]
    beside.Small_Weights = Weights
    try:
        notes = kit.slim.Pruner(net).report()["notes"]
    finally:
        del beside.Small_Weights
    assert "the transforms of Small_Weights: (1, 4, 36, 36)" in notes[0]


def test_the_error_lists_what_was_tried(kit):
    net = kit.sequential(kit.linear(4, 8), kit.linear(5, 3))
    net.default_cfg = {"input_size": (3, 40)}
    with pytest.raises(ValueError, match="ran on nothing that was tried") as caught:
        kit.slim.Pruner(net).analysis(0.5)
    text = str(caught.value)
    tried = ["default_cfg['input_size']: (1, 3, 40) (", "(linear 0): (1, 4) (", "(linear 0): (1, 11, 4) ("]
    assert sorted(tried, key=text.index) == tried


def test_commands_find_an_example_too(kit, tmp_path, monkeypatch):
    (tmp_path / f"nets_{kit.name}.py").write_text(
        "from tests import kits\n"
        f"kit = kits.make({kit.name!r})\n"
        "def net(n_in=8):\n"
        "    layers = [kit.linear(8, 32), kit.relu(), kit.linear(n_in * 4, 4)]\n"
        "    return kit.sequential(*layers)\n"
    )
    monkeypatch.chdir(tmp_path)
    named = ["-f", kit.name, "--factory", f"nets_{kit.name}.py:net", "--json"]
    done = CliRunner().invoke(app, ["prune", *named, "--keep-ratio", "0.5", "--un-prune", "none", "--out", "small"])
    assert done.exit_code == 0, done.exception or done.stderr
    notes = json.loads(done.stdout)["report"]["notes"]
    assert (tmp_path / "small").is_dir()
    done = CliRunner().invoke(app, ["inspect", *named])
    assert json.loads(done.stdout)["facts"]["macs"] == 8 * 32 + 32 * 4, notes
    wrong = CliRunner().invoke(app, ["inspect", *named, "--arg", "n_in=5"], standalone_mode=False)
    text = str(wrong.exception)
    assert text.startswith("--example SHAPE (such as 1,3,224,224), a file or a function is needed: the model ran on")
    assert "the first layer (linear 0): (1, 8) (" in text


def test_a_model_that_says_nothing_asks_for_an_example(kit):
    with pytest.raises(ValueError, match="nothing in this model says what that is"):
        kit.slim.Pruner(kit.sequential(kit.relu())).analysis(0.5)


class _Config(SimpleNamespace):
    def to_dict(self):
        return vars(self)


TEXT = _Config(vocab_size=50, max_position_embeddings=8, eos_token_id=3)
IMAGE = _Config(image_size=(24, 32), num_channels=1)
SHAPES = [
    (TEXT, "input_ids", {"input_ids": (1, 8)}),
    (IMAGE, "pixel_values", {"pixel_values": (1, 1, 24, 32)}),
    (_Config(num_frames=2, image_size=8), "pixel_values", {"pixel_values": (1, 2, 3, 8, 8)}),
    (_Config(num_channels=3), "pixel_values", {"pixel_values": (1, 3, 224, 224)}),
    (_Config(), "input_values", {"input_values": (1, 16000)}),
    (_Config(max_length=64, num_mel_bins=32), "input_values", {"input_values": (1, 64, 32)}),
    (
        _Config(text_config=TEXT, vision_config=IMAGE),
        "input_ids",
        {"pixel_values": (1, 1, 24, 32), "input_ids": (1, 8)},
    ),
    (
        _Config(num_mel_bins=8, max_source_positions=20, vocab_size=9, is_encoder_decoder=True),
        "input_features",
        {"input_features": (1, 8, 40), "decoder_input_ids": (1, 11)},
    ),
]


@pytest.mark.parametrize(("config", "main", "shapes"), SHAPES, ids=range(len(SHAPES)))
def test_a_configuration_describes_what_its_model_takes(config, main, shapes):
    takes = ["input_ids", "pixel_values", "input_values", "input_features", "decoder_input_ids"]
    found = described(config, main, takes)
    assert {name: array.shape for name, array in found.items()} == shapes
    for name, array in found.items():
        assert array.dtype == (np.int64 if name.endswith("ids") else np.float32)
        vocabulary = getattr(getattr(config, "text_config", config), "vocab_size", 0)
        assert array.dtype != np.int64 or array.max() < vocabulary
    text = getattr(config, "text_config", config)
    if text is TEXT:
        assert found["input_ids"][0].tolist().index(3) == 7  # pooled where the text ends


def test_cheap_attempts_come_before_dear_ones_and_sources_before_later_ones():
    ran = []

    def attempt(name, good):
        def run(inputs):
            ran.append((name, inputs.shape))
            if inputs.shape not in good:
                raise RuntimeError("no")
            return name

        return run

    attempts = [attempt("cheap", []), attempt("dear", [(1, 2, 32, 32)])]
    found, how = find_example(SimpleNamespace(), [], FirstLayer("", "conv", 2, 2), lambda x: x, attempts)
    assert (found.inputs.shape, how) == ((1, 2, 32, 32), "dear")
    assert [name for name, _ in ran] == ["cheap"] * 4 + ["dear"] * 3
