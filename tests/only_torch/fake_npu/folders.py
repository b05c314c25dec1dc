"""Folders that are worked on block by block on the device called npu, with its memory counted."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import torch

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 64,
}

# Matrices of the widest layer: its second moments, what is inverted, and while that is done a factor, the inverse and
# a copy (of a part, where they are wide); with the dense model also the correlations and another inverse.
HESSIANS = {"hessian": 5, "par": 7}


def tensors(folder):
    from safetensors.torch import load_file

    return {k: v for file in Path(folder).glob("*.safetensors") for k, v in load_file(file).items()}


def sparsified_block_by_block_in_little_memory(device):
    """The device holds 1.3 blocks, the sums of a layer and a batch at most, and finds what the CPU finds."""
    from slimkit import SparseConfig, sparsify_checkpoint

    import transformers as hf

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES))
    block = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    widest = SIZES["intermediate_size"]
    generator = torch.Generator().manual_seed(1)
    data = [torch.randint(0, 512, (4, 16), generator=generator) for _ in range(4)]
    batch = 4 * data[0].numel() * (3 * SIZES["hidden_size"] + 4 * widest)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/src", max_shard_size="200KB")
        for method, n_hessians in HESSIANS.items():
            config = SparseConfig(method=method)
            sparsify_checkpoint(f"{folder}/src", f"{folder}/cpu-{method}", config, data)
            before = device.used()
            device.forget_most()
            steps = []

            def stop(step, steps=steps):
                steps.append(step.layer)
                if len(steps) == 10:
                    raise KeyboardInterrupt

            out = f"{folder}/npu-{method}"
            with contextlib.suppress(KeyboardInterrupt):
                sparsify_checkpoint(f"{folder}/src", out, config, data, device="npu", on_progress=stop)
            assert len(steps) == 10
            sparsify_checkpoint(f"{folder}/src", out, config, data, device="npu", offload="cpu")
            most = device.most() - before
            bound = 1.3 * block + n_hessians * 4 * widest**2 + batch
            assert most <= bound, (method, most, bound, most / block)
            assert device.used() - before < 0.1 * block, device.used() - before
            sparsify_checkpoint(f"{folder}/src", f"{folder}/whole-{method}", config, data, device="npu")
            here, there, cpu = (tensors(f"{folder}/{name}-{method}") for name in ("npu", "whole", "cpu"))
            for name, value in here.items():
                assert torch.equal(value, there[name]), name  # stopped and gone on, or not
                assert float(((value == 0) != (cpu[name] == 0)).float().mean()) < 0.02, name
                torch.testing.assert_close(value, cpu[name], atol=2e-2, rtol=0)
