"""An adapter of MindFormers as MindSpore itself reads it, and as a MindSpore cell computes it."""

import numpy as np

import slimkit_ms
from slimkit.core import files
from tests.core.test_adapters_converted import BASE, LLAMA, adapter

import mindspore as ms


def test_mindspore_loads_the_checkpoint_and_a_cell_computes_the_adapter(tmp_path, rng):
    source = adapter(tmp_path / "peft", LLAMA[:7])
    slimkit_ms.convert_adapter(source, tmp_path / "ms", to="mindformers", config=BASE)
    held = ms.load_checkpoint(str(tmp_path / "ms" / "adapter_model.ckpt"))
    name = "model.layers.0.attention.w_qkv"
    assert held[f"{name}.mindpet_delta_lora_a"].shape == (6, 32)
    plain = files.read_tensors(source / "adapter_model.safetensors")[0]
    x = rng.standard_normal((3, 32)).astype(np.float32)
    layer = slimkit_ms.LoRADense(32, 64, lora_rank=6, lora_alpha=12, weight_init="zeros", compute_dtype=ms.float32)
    ms.load_param_into_net(
        layer, {n.removeprefix(f"{name}."): p for n, p in held.items() if n.startswith(f"{name}.")}, strict_load=False
    )
    got = layer(ms.Tensor(x)).asnumpy()
    wanted = []
    for part in "qkv":
        a, b = (plain[f"base_model.model.model.layers.0.self_attn.{part}_proj.lora_{h}.weight"] for h in "AB")
        wanted.append(2 * x @ a.T @ b.T)
    np.testing.assert_allclose(got, np.concatenate(wanted, 1), atol=1e-4)  # float32, sums of 32 terms
