"""Work on folders measured: CPU seconds and memory of streaming against the model in memory, and several processes.

    python -m tools.bench.scale walk --widths 512 1024 2048      a folder, fp32 and bf16, and the model in memory
    python -m tools.bench.scale processes --widths 1024 4096     one process and two, and whether bytes agree

Models are random Llamas of --blocks blocks (inner width 2.75 times the width), data random tokens. `walk` takes the
three in turn in processes of their own and gives CPU seconds without imports and the making of the model. `processes`
times whole commands by the clock: it means something only on a machine with idle cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BATCHES, ROWS, LENGTH = 8, 2, 128


def shape(width: int, blocks: int) -> dict[str, int]:
    """Of a Llama."""
    inner = width * 11 // 4
    return {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": blocks, "num_attention_heads": 8,
            "num_key_value_heads": 4, "vocab_size": 1000, "max_position_embeddings": LENGTH}  # fmt: skip


def make(folder: str, width: int, blocks: int) -> None:
    """Write a random model twice: FOLDER/fp32 and FOLDER/bf16."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**shape(width, blocks)))
    model.save_pretrained(f"{folder}/fp32", max_shard_size="200MB")
    model.to(torch.bfloat16).save_pretrained(f"{folder}/bf16", max_shard_size="200MB")


def batches() -> list[dict[str, object]]:
    """Random tokens."""
    import torch

    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 1000, (ROWS, LENGTH), generator=generator)} for _ in range(BATCHES)]


def one(folder: str, how: str, method: str) -> dict[str, float]:
    """CPU seconds and peak memory above the start: of "memory", "fp32" or "bf16", in this process."""
    from slimkit import Compressor, SparseConfig, sparsify_checkpoint
    from tools.bench.peak import begin_anew, memory_mb

    import torch
    import transformers as hf

    torch.set_num_threads(1)
    config, data = SparseConfig(method=method), batches()
    small = hf.LlamaForCausalLM(hf.LlamaConfig(**shape(32, 2)))  # imports and first calls do not count
    Compressor(small, config).compress(data[:1])
    with tempfile.TemporaryDirectory() as scratch:
        small.save_pretrained(f"{scratch}/in")
        sparsify_checkpoint(f"{scratch}/in", f"{scratch}/out", config, data[:1])
    before, start = begin_anew(), time.process_time()
    if how == "memory":
        model = hf.LlamaForCausalLM.from_pretrained(f"{folder}/fp32").eval()
        Compressor(model, SparseConfig(method=method, ignore=["lm_head"])).compress(data)
        model.save_pretrained(f"{folder}/saved")
    else:
        sparsify_checkpoint(f"{folder}/{how}", f"{folder}/out-{how}-{method}", config, data)
    return {"cpu_s": time.process_time() - start, "peak_mb": memory_mb("VmHWM") - before}


def walk(widths: list[int], blocks: int, method: str, rounds: int) -> None:
    """The model in memory, its fp32 folder and its bf16 folder, in turn."""
    for width in widths:
        found: dict[str, list[dict[str, float]]] = {"memory": [], "fp32": [], "bf16": []}
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                run("make", folder, str(width), str(blocks))
                for how in found:
                    found[how].append(json.loads(run("one", folder, how, method)))
        best = {how: min(rows, key=lambda row: row["cpu_s"]) for how, rows in found.items()}
        cells = [f"{how} {row['cpu_s']:.1f} s, {row['peak_mb']:.0f} MB" for how, row in best.items()]
        ratios = [best[how]["cpu_s"] / best["memory"]["cpu_s"] for how in ("fp32", "bf16")]
        text = f"{width} wide, {blocks} blocks, {method}: {'; '.join(cells)}"
        print(f"{text}; folder / memory {ratios[0]:.2f} (fp32), {ratios[1]:.2f} (bf16)", flush=True)


def share(folder: str, out: str, method: str) -> None:
    """The folder, by this process or by those that torchrun began."""
    from slimkit import SparseConfig, sparsify_checkpoint

    import torch

    torch.set_num_threads(1)
    sparsify_checkpoint(f"{folder}/fp32", out, SparseConfig(method=method), batches())


def processes(widths: list[int], blocks: int, method: str) -> None:
    """One process, and two, by the clock."""
    for width in widths:
        with tempfile.TemporaryDirectory() as folder:
            run("make", folder, str(width), str(blocks))
            took, made = {}, {}
            for n in (1, 2):
                out = f"{folder}/out{n}"
                begin = [
                    sys.executable,
                    "-m",
                    *(["torch.distributed.run", "--nproc-per-node=2", "-m"] if n > 1 else []),
                ]
                start = time.perf_counter()
                subprocess.run([*begin, "tools.bench.scale", "share", folder, out, method], check=True, env=quiet())
                took[n] = time.perf_counter() - start
                made[n] = {
                    f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in Path(out).glob("*.*") if f.is_file()
                }
        same = "the same bytes" if made[1] == made[2] else "OTHER BYTES"
        print(f"{width} wide, {blocks} blocks, {method}: {took[1]:.1f} s by one, {took[2]:.1f} s by two: "
              f"{took[1] / took[2]:.2f} times as fast; {same}", flush=True)  # fmt: skip


def run(*arguments: str) -> str:
    """This program in a process of its own; its last line."""
    command = [sys.executable, "-m", "tools.bench.scale", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=quiet())
    return (done.stdout.splitlines() or [""])[-1]


def quiet() -> dict[str, str]:
    """One thread a process."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def main() -> None:
    """Run what is asked for."""
    if len(sys.argv) > 1 and sys.argv[1] in ("make", "one", "share"):
        job, *rest = sys.argv[1:]
        if job == "make":
            make(rest[0], int(rest[1]), int(rest[2]))
        elif job == "one":
            print(json.dumps(one(*rest)))
        else:
            share(*rest)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("walk", "processes"))
    parser.add_argument("--widths", type=int, nargs="+", default=[1024])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--method", default="hessian")
    parser.add_argument("--rounds", type=int, default=1)
    asked = parser.parse_args()
    if asked.job == "walk":
        walk(asked.widths, asked.blocks, asked.method, asked.rounds)
    else:
        processes(asked.widths, asked.blocks, asked.method)


if __name__ == "__main__":
    main()
