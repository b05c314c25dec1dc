"""Folders from folders: peak memory and time of merging, pruning and cutting one, against copying its bytes.

    python -m tools.bench.folders --shape 3b --place DIR     a random bfloat16 Llama of that shape, written by this tool

Every job runs in a process of its own. Memory is VmHWM, all of it: interpreter, libraries and work. DIR needs room for
three such folders at once; they are taken away again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from slimkit.core import files
from slimkit.core.checkpoint import stepwise
from slimkit.core.checkpoint.weightfile import Entry, stream_safetensors
from tools.bench.peak import memory_mb

# hidden, inner, blocks, heads, key and value heads, vocabulary
SHAPES = {
    "tiny": (256, 512, 2, 4, 2, 1000),
    "1b": (2048, 8192, 16, 32, 8, 32000),
    "3b": (3072, 8192, 28, 24, 8, 128256),
    "7b": (4096, 11008, 32, 32, 32, 32000),
}
RATIO, RANK = 0.8, 16
JOBS = ("copy", "merge", "prune", "cut", "copy-again")


def fields(shape: str) -> dict[str, object]:
    hidden, inner, blocks, heads, keys, words = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": blocks, "num_attention_heads": heads,
        "num_key_value_heads": keys, "head_dim": hidden // heads, "vocab_size": words, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "max_position_embeddings": 2048,
    }  # fmt: skip


def write_model(shape: str, folder: Path, limit: int) -> int:
    """Write the folder shard by shard; its bytes."""
    hidden, inner, blocks, heads, keys, words = SHAPES[shape]
    kv = hidden // heads * keys
    entries: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, hidden)}
    for k in range(blocks):
        path = f"model.layers.{k}."
        entries |= {path + f"self_attn.{n}_proj.weight": (kv if n in "kv" else hidden, hidden) for n in "qkvo"}
        entries |= {path + f"mlp.{n}_proj.weight": (inner, hidden) for n in ("gate", "up")}
        entries[path + "mlp.down_proj.weight"] = (hidden, inner)
        entries |= {path + f"{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    entries |= {"model.norm.weight": (hidden,), "lm_head.weight": (words, hidden)}
    draw = np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32) * 0.02
    bits = (draw.view(np.uint32) >> 16).astype(np.uint16)  # one stretch of numbers, each tensor begins elsewhere in it
    shards = stepwise.shared_out({n: Entry("BF16", s) for n, s in entries.items()}, limit)
    number = 0
    for shard in shards:

        def tensors(shard=shard):
            nonlocal number
            for name, entry in shard.entries.items():
                number += 1
                if len(entry.shape) == 1:
                    yield name, np.full(entry.shape, 0x3F80, np.uint16)
                    continue
                values = np.resize(np.roll(bits, 7919 * number), entry.size)
                yield name, values.reshape(entry.shape)

        stream_safetensors(folder / shard.name, shard.entries, tensors(), {"format": "pt"})
    stepwise.write_index(folder, shards)
    files.write_json(folder / "config.json", fields(shape))
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def write_delta(shape: str, folder: Path) -> None:
    """A LoRA as PEFT writes it, on queries and values of every block."""
    hidden, _, blocks, heads, keys, _ = SHAPES[shape]
    rng, tensors = np.random.default_rng(1), {}
    for k in range(blocks):
        for name, out in (("q_proj", hidden), ("v_proj", hidden // heads * keys)):
            path = f"base_model.model.model.layers.{k}.self_attn.{name}.lora_"
            tensors[path + "A.weight"] = rng.standard_normal((RANK, hidden), dtype=np.float32)
            tensors[path + "B.weight"] = rng.standard_normal((out, RANK), dtype=np.float32) * 0.01
    folder.mkdir(parents=True, exist_ok=True)
    files.write_tensors(folder / "adapter_model.safetensors", tensors)
    about = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj", "v_proj"]}
    files.write_json(folder / "adapter_config.json", {**about, "task_type": "CAUSAL_LM"})


def job(name: str, shape: str, place: Path) -> None:
    """One job in this process; prints what it took."""
    base, out = place / "base", place / "out"
    began, worked = time.perf_counter(), time.process_time()
    if name.startswith("copy"):
        for file in sorted(base.iterdir()):
            with open(file, "rb") as old, files.atomic_file(out / file.name) as new:
                shutil.copyfileobj(old, new, 4 << 20)
    else:
        import slimkit

        if name == "merge":
            slimkit.merge_checkpoint(base, place / "delta", out)
        elif name == "prune":
            slimkit.prune_checkpoint(base, out, RATIO, importance="l1")
        else:
            kept = [k for k in range(SHAPES[shape][2]) if k % 5 != 4]
            config = slimkit.PruneConfig().set_steps(["prune_blocks"])
            config = config.add_blocks_params(r"layers\.(\d+)\.", dict(enumerate(kept)))
            slimkit.cut_checkpoint(base, out, {"num_hidden_layers": len(kept)}, config)
    took = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - worked}
    print(json.dumps({**took, "peak_mb": memory_mb("VmHWM")}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--place", type=Path, required=True)
    parser.add_argument("--jobs", nargs="*", choices=JOBS, default=JOBS)
    parser.add_argument("--limit", type=int, default=5_000_000_000, help="bytes of one shard")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        job(given.job, given.shape, given.place)
        return
    home = given.place / f"scale-{given.shape}"
    n_bytes = write_model(given.shape, home / "base", given.limit)
    write_delta(given.shape, home / "delta")
    print(f"{given.shape}: {n_bytes / 1e9:.2f} GB, written with a peak of {memory_mb('VmHWM'):.0f} MB")
    copies = []
    try:
        for name in given.jobs:
            shutil.rmtree(home / "out", ignore_errors=True)
            words = [sys.executable, "-m", "tools.bench.folders", "--job", name, "--shape", given.shape]
            done = subprocess.run([*words, "--place", str(home)], capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            took = json.loads(done.stdout.splitlines()[-1])
            copies += [took["seconds"]] if name.startswith("copy") else []
            written = sum(f.stat().st_size for f in (home / "out").glob("*.safetensors")) / 1e9
            times = took["seconds"] * len(copies) / sum(copies) if copies else float("nan")
            print(
                f"{name:>10}: {took['seconds']:7.1f} s, {took['cpu_seconds']:6.1f} CPU s, "
                f"peak {took['peak_mb']:6.0f} MB, {written:.2f} GB written, {times:.2f} times a copy",
                flush=True,
            )
    finally:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
