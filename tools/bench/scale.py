"""Work on folders measured: CPU seconds and memory of streaming against the model in memory, and several processes.

    python -m tools.bench.scale walk --widths 512 1024 2048      a folder, fp32 and bf16, and the model in memory
    python -m tools.bench.scale processes --widths 1024 4096     one process and two, and whether bytes agree

Models are random Llamas of --blocks blocks (inner width 2.75 times the width), data --windows windows of --length
random tokens (`walk`: 16 of 128, `processes`: 32 of 512), two in a batch. `walk` takes the three in turn in processes
of their own and gives CPU seconds without imports and the making of the model. `processes` gives, of one process of one
thread and of two such, the walk's time by the clock without imports, the whole command's, and the walk's CPU seconds,
of two those of the one that needs more: times by the clock mean something only on a machine with idle cores, CPU
seconds leave out waiting. `--bound` also runs two commands of one process at once: what two cores give at best.
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

ROWS = 2  # windows in a batch
USUAL = {"walk": (16, 128), "processes": (32, 512)}  # windows, and tokens of each


def shape(width: int, blocks: int) -> dict[str, int]:
    """Of a Llama."""
    inner = width * 11 // 4
    return {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": blocks, "num_attention_heads": 8,
            "num_key_value_heads": 4, "vocab_size": 1000, "max_position_embeddings": 4096}  # fmt: skip


def make(folder: str, width: int, blocks: int) -> None:
    """Write a random model twice: FOLDER/fp32 and FOLDER/bf16."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**shape(width, blocks)))
    model.save_pretrained(f"{folder}/fp32", max_shard_size="200MB")
    model.to(torch.bfloat16).save_pretrained(f"{folder}/bf16", max_shard_size="200MB")


def batches(windows: int, length: int) -> list[dict[str, object]]:
    """Random tokens."""
    import torch

    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(0, 1000, (min(ROWS, windows - at), length), generator=generator)}
        for at in range(0, windows, ROWS)
    ]


def one(folder: str, how: str, method: str, windows: str, length: str) -> dict[str, float]:
    """CPU seconds and peak memory above the start: of "memory", "fp32" or "bf16", in this process."""
    from slimkit import Compressor, SparseConfig, sparsify_checkpoint
    from tools.bench.peak import begin_anew, memory_mb

    import torch
    import transformers as hf

    torch.set_num_threads(1)
    config, data = SparseConfig(method=method), batches(int(windows), int(length))
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


def walk(widths: list[int], blocks: int, method: str, rounds: int, data: list[str]) -> None:
    """The model in memory, its fp32 folder and its bf16 folder, in turn."""
    for width in widths:
        found: dict[str, list[dict[str, float]]] = {"memory": [], "fp32": [], "bf16": []}
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                run("make", folder, str(width), str(blocks))
                for how in found:
                    found[how].append(json.loads(run("one", folder, how, method, *data)))
        best = {how: min(rows, key=lambda row: row["cpu_s"]) for how, rows in found.items()}
        cells = [f"{how} {row['cpu_s']:.1f} s, {row['peak_mb']:.0f} MB" for how, row in best.items()]
        ratios = [best[how]["cpu_s"] / best["memory"]["cpu_s"] for how in ("fp32", "bf16")]
        text = f"{width} wide, {blocks} blocks, {method}: {'; '.join(cells)}"
        print(f"{text}; folder / memory {ratios[0]:.2f} (fp32), {ratios[1]:.2f} (bf16)", flush=True)


def share(folder: str, out: str, method: str, windows: str, length: str) -> None:
    """The folder, by this process or by those that torchrun began; OUT.RANK.json says how long the walk took."""
    from slimkit import SparseConfig, sparsify_checkpoint, together

    import torch
    import torch.distributed as dist
    import transformers  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    torch.set_num_threads(1)
    data = batches(int(windows), int(length))
    together.join(torch.device("cpu"))
    if dist.is_initialized():
        dist.barrier()  # all have begun, and imported
    start, cpu = time.perf_counter(), time.process_time()
    sparsify_checkpoint(f"{folder}/fp32", out, SparseConfig(method=method), data)
    took = {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
    Path(f"{out}.{together.rank()}.json").write_text(json.dumps(took))


def begun(n: int, folder: str, out: str, *rest: str) -> subprocess.Popen[bytes]:
    """The command of n processes."""
    torchrun = ["torch.distributed.run", f"--nproc-per-node={n}", "-m"] if n > 1 else []
    command = [sys.executable, "-m", *torchrun, "tools.bench.scale", "share", folder, out, *rest]
    return subprocess.Popen(command, env=quiet())


def timed(folder: str, *commands: tuple[int, str], rest: tuple[str, ...]) -> dict[str, float]:
    """Commands of so many processes run at once: seconds of the whole by the clock, and the most that a walk took."""
    start = time.perf_counter()
    running = [begun(n, folder, out, *rest) for n, out in commands]
    codes = [one.wait() for one in running]
    if any(codes):
        raise SystemExit("a command failed")
    took = {"command_s": time.perf_counter() - start}
    told = [json.loads(Path(f"{out}.{rank}.json").read_text()) for n, out in commands for rank in range(n)]
    return took | {key: max(row[key] for row in told) for key in ("wall_s", "cpu_s")}


def digests(out: str) -> dict[str, str]:
    """File of a result -> digest."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in Path(out).glob("*.*") if f.is_file()}


def processes(widths: list[int], blocks: int, method: str, data: list[str], bound: bool) -> None:
    """One process, and two, by the clock and in CPU seconds."""
    for width in widths:
        with tempfile.TemporaryDirectory() as folder:
            run("make", folder, str(width), str(blocks))
            rest = (method, *data)
            one, two = (timed(folder, (n, f"{folder}/out{n}"), rest=rest) for n in (1, 2))
            same = digests(f"{folder}/out1") == digests(f"{folder}/out2")
            text = f"{width} wide, {blocks} blocks, {method}, {data[0]} windows of {data[1]}, by one and by two:"
            for key, what in (("wall_s", "walk"), ("command_s", "whole command"), ("cpu_s", "CPU of the walk")):
                text += f" {what} {one[key]:.1f} and {two[key]:.1f} s ({one[key] / two[key]:.2f} times as fast);"
            print(f"{text} {'the same bytes' if same else 'OTHER BYTES'}", flush=True)
            if bound:
                both = timed(folder, (1, f"{folder}/a"), (1, f"{folder}/b"), rest=rest)
                print(f"  two commands of one process at once: walk {both['wall_s']:.1f} s: two cores give at most "
                      f"{2 * one['wall_s'] / both['wall_s']:.2f} times", flush=True)  # fmt: skip


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
    parser.add_argument("--windows", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--bound", action="store_true")
    asked = parser.parse_args()
    data = [str(given or usual) for given, usual in zip((asked.windows, asked.length), USUAL[asked.job])]
    if asked.job == "walk":
        walk(asked.widths, asked.blocks, asked.method, asked.rounds, data)
    else:
        processes(asked.widths, asked.blocks, asked.method, data, asked.bound)


if __name__ == "__main__":
    main()
