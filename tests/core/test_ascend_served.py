"""W16A16S and W8A8S folders against what servers say that they take."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from slimkit.cli import app
from slimkit.core.ascend import check_served
from slimkit.core.ascend.folder import DESCRIPTION, settings_of, write
from slimkit.core.ascend.int8 import PARTS, int8_layer
from slimkit.core.ascend.w8a8s import KIND, WEIGHTS
from slimkit.core.ascend.w16a16s import save_arrays
from slimkit.core.errors import ArgumentError, FileFormatError

BLOCK = "model.layers.0.self_attn"
CONFIG = {"model_type": "qwen3", "torch_dtype": "bfloat16", "num_hidden_layers": 64, "tie_word_embeddings": True}


def w8a8s(folder, floats=(), steps=(1.0, 1.0, 1.0), config=None, tied=True):
    tensors, kinds = {"model.embed_tokens.weight": np.ones((4, 4), np.float16)}, {}
    for name, top in zip("qkv", steps, strict=True):
        layer = int8_layer(name, np.eye(4) * 127, None, -top, top)
        own = {"weight": np.eye(4, dtype=np.float16)} if name in floats else {p: getattr(layer, p) for p in PARTS}
        tensors |= {f"{BLOCK}.{name}_proj.{part}": value for part, value in own.items()}
        kinds |= {f"{BLOCK}.{name}_proj.{part}": "FLOAT" if name in floats else KIND for part in own}
    settings, _ = settings_of(CONFIG, KIND)
    once = {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}
    kinds["model.embed_tokens.weight"] = "FLOAT"
    write(folder, WEIGHTS, tensors, {**settings, **(config or {})}, [], KIND, kinds, once)
    return folder


def w16a16s(folder):
    save_arrays(folder, {"model.fc.weight": np.eye(4)}, {k: v for k, v in CONFIG.items() if k != "tie_word_embeddings"})
    return folder


def rules(folder, target):
    return [(one.severity, one.rule) for one in check_served(folder, target).findings]


def test_what_slimkit_writes_is_taken_by_those_that_the_page_names(tmp_path):
    int8, floats = w8a8s(tmp_path / "a"), w16a16s(tmp_path / "b")
    assert rules(int8, "vllm-ascend") == rules(int8, "mindie-300i-duo") == [("info", "kind")]
    assert rules(floats, "mindie-300i-duo") == [("info", "kind")]
    for folder, target in ((floats, "vllm-ascend"), (int8, "mindie-a2"), (floats, "mindie-a2")):
        assert rules(folder, target) == [("error", "kind")]
    for target in ("vllm-ascend", "mindie-300i-duo", "mindie-a2"):
        for one in check_served(int8, target).findings:
            assert one.source.startswith("https://")


@pytest.mark.parametrize(
    ("more", "target", "found"),
    [
        ({"config": {"quantize": None}}, "mindie-300i-duo", ("error", "quantize")),
        ({"config": {"quantize": "w8a8"}}, "mindie-300i-duo", ("error", "quantize")),
        ({"config": {"quantize": None}}, "vllm-ascend", None),
        ({"config": {"torch_dtype": "bfloat16"}}, "vllm-ascend", ("error", "dtype")),
        ({"config": {"model_type": "llama"}}, "mindie-300i-duo", ("warning", "model")),
        ({"config": {"model_type": "llama"}}, "vllm-ascend", None),
        ({"floats": ("k",)}, "vllm-ascend", ("error", "joined")),
        ({"steps": (1.0, 1.0, 2.0)}, "mindie-300i-duo", ("error", "joined")),
        ({"tied": False}, "vllm-ascend", ("warning", "word")),
        ({"tied": False, "config": {"tie_word_embeddings": False}}, "vllm-ascend", None),
    ],
)
def test_each_rule_is_found_and_nothing_else(more, target, found, tmp_path):
    assert rules(w8a8s(tmp_path, **more), target) == [*([found] if found else []), ("info", "kind")]


def test_a_word_without_a_tensor_is_for_tied_tables_alone(tmp_path):
    folder = w8a8s(tmp_path)
    for name, config in ((f"{BLOCK}.o_proj.weight", {}), ("lm_head.weight", {"tie_word_embeddings": False})):
        words = json.loads((folder / DESCRIPTION).read_text())
        (folder / DESCRIPTION).write_text(json.dumps({**words, name: "FLOAT"}))
        (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
        with pytest.raises(FileFormatError, match="described but not there"):
            check_served(folder)
        (folder / DESCRIPTION).write_text(json.dumps(words))


def test_the_command_says_the_same(tmp_path):
    def run(*words):
        return CliRunner().invoke(app, ["check", *map(str, words)])

    folder = w8a8s(tmp_path / "a", floats=("k",))
    found = run(folder, "--target", "vllm-ascend", "--json")
    assert found.exit_code == 1
    plain = json.loads(found.stdout)
    assert (plain["format"], plain["kind"], plain["counts"]) == (
        "slimkit-served-check", "W8A8S", {"error": 1, "warning": 0, "info": 1}
    )  # fmt: skip
    assert run(folder, "--target", "vllm-ascend", "--ignore", "joined").exit_code == 0
    assert "W8A8S, mindie-a2, 2 errors" in run(folder, "--target", "mindie-a2").stdout
    assert isinstance(run(folder, "--target", "A2").exception, ArgumentError)  # 2, outside this runner
    with pytest.raises(ArgumentError, match="target"):
        check_served(folder, "310P")
    (folder / WEIGHTS).write_bytes(b"damaged")
    assert isinstance(run(folder, "--target", "vllm-ascend").exception, FileFormatError)
