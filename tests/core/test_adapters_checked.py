"""What servers on Ascend say of an adapter, and the two commands that speak of adapters."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from slimkit.cli import app
from slimkit.core.ascend import AdapterCheck, check_adapter
from slimkit.core.ascend.adapters import RULES, SOURCES
from slimkit.core.errors import ArgumentError, FileFormatError
from tests.core.test_adapters_converted import BASE, LLAMA, adapter


def rules(folder, target="vllm-ascend", **options):
    return {(f.severity, f.rule) for f in check_adapter(folder, target, **options).findings}


def test_an_adapter_that_fits_has_no_errors(tmp_path):
    folder = adapter(tmp_path / "a", LLAMA, rank=4, dtype=np.float16)
    for target in RULES:
        found = check_adapter(folder, target, config={**BASE, "torch_dtype": "float16"}, tensor_parallel=2)
        assert found.exit_code == 0
        assert found.rank == 4
    assert check_adapter(folder).max_lora_rank == 8
    assert "--max-lora-rank 8" in check_adapter(folder).findings[0].message
    json.dumps(check_adapter(folder).to_dict())


@pytest.mark.parametrize(
    ("made", "options", "wanted"),
    [
        ({"rank": 65}, {}, ("error", "rank")),
        ({"use_dora": True}, {}, ("error", "feature")),
        ({"modules_to_save": ["lm_head"]}, {}, ("error", "feature")),
        ({"bias": "all"}, {}, ("error", "feature")),
        ({"alpha_pattern": {"q_proj": 8}}, {}, ("error", "scale")),
        ({}, {"config": BASE, "tensor_parallel": 3}, ("error", "tensor-parallel")),
        ({"dtype": np.float32}, {}, ("info", "dtype")),
        ({}, {"target": "mindie-a2", "config": {"model_type": "opt"}}, ("warning", "model")),
        ({}, {"target": "mindie-300i-duo", "config": {"torch_dtype": "bfloat16"}}, ("error", "dtype")),
        ({}, {"target": "mindie-a2", "config": {"quantize": "w8a8"}}, ("error", "quantised")),
    ],
)
def test_each_rule_finds_what_it_is_for(tmp_path, made, options, wanted):
    folder = adapter(tmp_path / "a", LLAMA, **{"rank": 4, "dtype": np.float16, **made})
    assert wanted in rules(folder, **options)
    assert {rule for _, rule in rules(folder, **options)} <= set(AdapterCheck.rules)
    assert wanted not in rules(
        adapter(tmp_path / "b", LLAMA, rank=4, dtype=np.float16), options.get("target", "vllm-ascend")
    )


def test_more_devices_than_key_value_heads_hold_them_several_times(tmp_path):
    folder = adapter(tmp_path / "a", LLAMA)
    assert ("error", "tensor-parallel") not in rules(folder, config=BASE, tensor_parallel=8)


def test_every_finding_names_its_source_and_unknown_words_are_refused(tmp_path):
    folder = adapter(tmp_path / "a", [*LLAMA, "model.layers.0.mlp.experts.0.w1"], rank=80, use_dora=True, bias="all")
    found = check_adapter(folder, config=BASE, tensor_parallel=3)
    assert len(found.findings) >= 6
    assert {f.source for f in found.findings} <= set(SOURCES.values())
    with pytest.raises(ArgumentError, match="vllm-ascend"):
        check_adapter(folder, "vllm")
    (folder / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(FileFormatError):
        check_adapter(folder)


def test_the_commands(tmp_path):
    folder = adapter(tmp_path / "a", LLAMA)
    files = tmp_path / "config.json"
    files.write_text(json.dumps(BASE))
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF")
    run = lambda *words: CliRunner().invoke(app, [str(w) for w in words])
    done = run("convert", folder, tmp_path / "ms", "--to", "mindformers", "--config", files)
    assert done.exit_code == 0, done.exception
    assert "lora_rank=6, lora_alpha=12" in done.stdout
    assert run("convert", tmp_path / "ms", tmp_path / "back", "--to", "peft", "--dry-run").exit_code == 0
    assert not (tmp_path / "back").exists()
    assert run("convert", tmp_path / "ms", tmp_path / "back", "--to", "peft").exit_code == 0
    assert (tmp_path / "back/adapter_model.safetensors").exists()
    assert "--to must be peft" in str(run("convert", folder, tmp_path / "x").exception)
    assert "goes with an adapter" in str(run("convert", files, tmp_path / "x.ckpt", "--alpha", "2").exception)
    assert "does not go with an adapter" in str(
        run("convert", folder, tmp_path / "x", "--to", "peft", "--dtype", "float16").exception
    )
    checked = run("check", folder, "--target", "vllm-ascend", "--config", files, "--tensor-parallel", 3, "--json")
    assert checked.exit_code == 1
    assert json.loads(checked.stdout)["counts"]["error"] == 2
    assert "must be one of 'vllm-ascend'" in str(run("check", folder, "--target", "310P").exception)
    assert run("check", folder, "-t", "mindie-a2").exit_code == 0
    words = ("check", folder, "-t", "vllm-ascend", "--config", files, "--tensor-parallel", 3, "--ignore")
    assert run(*words, "tensor-parallel").exit_code == 0
    assert "did you mean 'tensor-parallel'" in str(run(*words, "tensor-paralel").exception).lower()
    assert "--shape go with an ONNX file" in str(run("check", folder, "--shape", "x:1").exception)
    assert "go with an adapter's folder" in str(run("check", "m.onnx", "--config", files).exception)
    assert "--config does not go with a .gguf" in str(run("convert", gguf, tmp_path / "x", "--config", files).exception)
