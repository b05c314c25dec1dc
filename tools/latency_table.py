"""Make a latency table of a network where it will run:

    python tools/latency_table.py --factory net.py:build --example 1,3,224,224 --out table.json
    python tools/latency_table.py ... --run "./time_model.sh {}" --device "Ascend 310P3"

Without `--run` the times are those of onnxruntime on this CPU, one thread. With it, the command is given the path of
one ONNX file after another (layers of one operator, then the network at seven cuts) in the place of {}, and prints
milliseconds as the last number of its output: on an Ascend device it converts the file with `atc` for the device's
soc_version and runs the result with the tool that times models there. A table that is there is added to: what it holds
is not timed again, so that one table serves many networks. Then, anywhere: `set_budget("latency", "table.json")`.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def made_by(factory: str) -> Any:
    """The network that a function of a file makes: "net.py:build"."""
    file, _, name = factory.rpartition(":")
    spec = importlib.util.spec_from_file_location("latency_network", file)
    if spec is None or spec.loader is None:
        sys.exit(f"--factory: no Python file {file!r}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)()


def command(text: str) -> Callable[[Path], float]:
    """A call that times one ONNX file by a command."""

    def run(path: Path) -> float:
        words = [word.replace("{}", str(path)) for word in shlex.split(text)]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        numbers = re.findall(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?", said)
        if not numbers:
            sys.exit(f"--run must print milliseconds as the last number. It printed: {said[-200:]!r}")
        return float(numbers[-1])

    return run


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factory", required=True, help="file.py:function that makes the network")
    parser.add_argument("--example", required=True, help="shape of its one input, batch first: 1,3,224,224")
    parser.add_argument("--out", required=True, help="the table; one that is there is added to")
    parser.add_argument("--run", help="command that times an ONNX file, {} in its place; unset: onnxruntime here")
    parser.add_argument("--device", default="", help="the device's name; needed with --run")
    parser.add_argument("--alignment", type=int, default=16, help="kept widths will be multiples of it")
    parser.add_argument("--framework", choices=["torch", "mindspore"], default="torch")
    given = parser.parse_args(arguments)
    if given.run and not given.device:
        parser.error("--run needs --device, which the table is then of")
    shape = [int(n) for n in given.example.split(",")]
    how = {"alignment": given.alignment, "device": given.device, "run": command(given.run) if given.run else None}
    if given.framework == "torch":
        import slimkit

        import torch

        table = slimkit.measure_latency(made_by(given.factory).eval(), torch.ones(shape), given.out, **how)
    else:
        import slimkit_ms

        import mindspore as ms

        table = slimkit_ms.measure_latency(made_by(given.factory), ms.ops.ones(shape), given.out, **how)
    for network in table.networks.values():
        worst = max(abs(n["foretold_ms"] / n["ms"] - 1) for n in network["fitted_to"])
        print(f"{network['model']}: {network['dense_ms']:.4g} ms; the fit misses by {100 * worst:.1f} % at most")


if __name__ == "__main__":
    main()
