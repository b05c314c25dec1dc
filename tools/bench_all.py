"""Run every bench and keep what it prints: `python tools/bench_all.py [--out bench] [--only NAME ...] [--check]`.

One text file a bench, and index.json with the command, the seconds, the exit code and the machine. docs/numbers.md says
which bench gives which table. Benches against other packages need them on --peers, a folder made with pip install
--target; without it those comparisons are left out, and the index says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_RUN = ["-m", "slimkit", "run", "--restart"]
# name -> the script with its arguments; {peers} stands for the folder of other packages, and needs it.
BENCHES = {
    "demo_digits": [*_RUN, "tools/recipes/digits.yaml", "-o", "{out}/runs/digits"],
    "demo_minilm": [*_RUN, "tools/recipes/minilm.yaml", "-o", "{out}/runs/minilm"],
    "demo_digits_ms": [*_RUN, "tools/recipes/digits_ms.yaml", "-o", "{out}/runs/digits_ms"],
    "demo_minilm_ms": [*_RUN, "tools/recipes/minilm_ms.yaml", "-o", "{out}/runs/minilm_ms"],
    "prune": ["tools/bench/prune.py"],
    "prune_peer": ["tools/bench/prune.py", "--peer", "{peers}"],
    "prune_accuracy": ["tools/bench/prune_accuracy.py"],
    "prune_ms": ["tools/bench/prune_ms.py"],
    "weights": ["tools/bench/weights.py"],
    "sparse": ["tools/bench/sparse.py", "--widths", "1024", "2048"],
    "scale": ["-m", "tools.bench.scale", "walk", "--widths", "256", "512"],
    "distill": ["tools/bench/distill.py"],
    "delta": ["tools/bench/delta.py"],
    "delta_train": ["tools/bench/delta_train.py"],
    "delta_train_ms": ["tools/bench/delta_train_ms.py"],
    "compare": ["tools/bench/compare.py"],
    # Of the model and text that `make demo-llm` puts below runs/.
    "llm_sparse": ["-m", "tools.bench.llm", "sparse", "--out", "{out}/llm.jsonl"],
    "llm_calibration": ["-m", "tools.bench.llm", "calibration", "--out", "{out}/llm.jsonl"],
    "llm_prune": ["-m", "tools.bench.llm", "prune", "--out", "{out}/llm.jsonl"],
    "checkpoint": ["tools/bench/checkpoint.py"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder of the outputs")
    parser.add_argument("--only", nargs="*", choices=list(BENCHES), default=list(BENCHES), metavar="NAME")
    parser.add_argument("--peers", type=Path, help="folder that holds the packages compared with")
    parser.add_argument("--list", action="store_true", help="print the names and commands, and stop")
    parser.add_argument("--check", action="store_true", help="only see whether each bench starts: minutes, not hours")
    options = parser.parse_args()
    if options.list:
        for name, command in BENCHES.items():
            print(f"{name:16} python {' '.join(command)}")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    index: dict[str, object] = {
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()},
        "benches": (rows := {}),
    }
    failed = False
    for name in options.only:
        if "{peers}" in BENCHES[name] and options.peers is None:
            rows[name] = {"left_out": "needs --peers"}
            print(f"{name}: left out, needs --peers")
            continue
        command = [part.format(out=options.out, peers=options.peers) for part in BENCHES[name]]
        if options.check:
            # Imports and options are tried; a recipe is read and its factories are not called.
            command.append("--check" if command[:2] == _RUN[:2] else "--help")
        # MindSpore's convolutions are slow on some AVX-512 processors; torch's benches keep what the processor has.
        environment = {"DNNL_MAX_CPU_ISA": "AVX2"} if name.endswith("_ms") else {}
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False,
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", **environment},
        )  # fmt: skip
        seconds = round(time.perf_counter() - began, 1)
        if options.check:
            print(f"{name}: {'starts' if done.returncode == 0 else done.stderr.strip().splitlines()[-1:]}", flush=True)
            failed |= done.returncode != 0
            continue
        (options.out / f"{name}.txt").write_text(done.stdout)
        (options.out / f"{name}.log").write_text(done.stderr)
        rows[name] = {"command": ["python", *command], "seconds": seconds, "exit_code": done.returncode}
        failed |= done.returncode != 0
        print(f"{name}: {seconds} s, exit code {done.returncode}, {options.out / name}.txt", flush=True)
        (options.out / "index.json").write_text(json.dumps(index, indent=1) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
