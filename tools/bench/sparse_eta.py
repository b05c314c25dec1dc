"""The time left that a sparsification tells after each layer, against what it then still needed: MiniLM, 48 docstrings.

    python tools/bench/sparse_eta.py                 slimkit sparsify
    python tools/bench/sparse_eta.py --in-memory     Compressor
    python tools/bench/sparse_eta.py --wall          by the clock on the wall: for an idle machine

Seconds are CPU seconds of one thread, the estimator's own clock too, unless asked otherwise: what others do on the
machine would change the speed while it is being learned.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

Told = list[tuple[float, Any]]


def texts() -> list[str]:
    """Docstrings of the standard library, spread over its modules."""
    from docstring_text import docstrings

    found = [text for *_, text in docstrings() if len(text) > 200]
    return found[:: max(1, len(found) // 48)][:48]


def saved(folder: Path) -> Path:
    """MiniLM as a Hugging Face directory."""
    from docstring_text import model_folder

    from transformers import AutoModel, AutoTokenizer

    AutoModel.from_pretrained(model_folder()).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(folder)
    return folder


def by_command(model: Path, method: str, folder: Path) -> tuple[Told, float]:
    """What `slimkit sparsify` tells, and when it ended."""
    from slimkit.cli import app
    from slimkit.core.jobs import bar

    calib, told = folder / "text.jsonl", []
    calib.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    shown = bar.LayerBar.__call__

    def noted(self: Any, step: Any) -> None:
        told.append((time.perf_counter(), step))
        shown(self, step)

    bar.LayerBar.__call__ = noted  # type: ignore[method-assign]
    words = ["sparsify", "--model", str(model), "--method", method, "--sparsity", "0.5", "--max-length", "128"]
    with contextlib.suppress(SystemExit):
        app([*words, "--calib", str(calib), "--out", str(folder / method)])
    bar.LayerBar.__call__ = shown  # type: ignore[method-assign]
    return told, time.perf_counter()


def by_compressor(model: Path, method: str) -> tuple[Told, float]:
    """What `Compressor` tells, and when it ended."""
    from slimkit import Compressor, SparseConfig

    from transformers import AutoModel, AutoTokenizer

    tokenizer, told, lines = AutoTokenizer.from_pretrained(model), [], texts()
    batches = [
        dict(tokenizer(lines[i : i + 4], padding=True, truncation=True, max_length=128, return_tensors="pt"))
        for i in range(0, len(lines), 4)
    ]
    config = SparseConfig(method=method, ignore=["pooler*"])
    compressor = Compressor(AutoModel.from_pretrained(model).eval(), config)
    compressor.compress(batches, on_progress=lambda step: told.append((time.perf_counter(), step)))
    return told, time.perf_counter()


def show(method: str, told: Told, end: float) -> None:
    """Every layer of the first block, and the last layer of the others."""
    print(f"{method}: layer, seconds told, seconds needed, told / needed")
    for i, (now, step) in enumerate(told):
        if i < 6 or i % 6 == 5:
            needed = end - now
            print(f"  {step.layer:44s} {step.seconds_left:7.2f} {needed:7.2f} {step.seconds_left / needed:6.2f}")


def main() -> None:
    """Run the methods one after another, each in a process that has solved nothing before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["wanda", "hessian", "par", "par_v2"])
    parser.add_argument("--in-memory", action="store_true", help="Compressor instead of slimkit sparsify")
    parser.add_argument("--wall", action="store_true", help="the clock on the wall, and all threads")
    args = parser.parse_args()
    if len(args.methods) > 1:
        for method in args.methods:
            options = [option for option in ("--in-memory", "--wall") if option in sys.argv]
            os.spawnl(os.P_WAIT, sys.executable, sys.executable, __file__, "--methods", method, *options)
        return
    if not args.wall:
        os.environ["OMP_NUM_THREADS"] = "1"
        time.perf_counter = time.process_time  # before slimkit binds it
    with tempfile.TemporaryDirectory() as name:
        model = saved(Path(name) / "minilm")
        method = args.methods[0]
        show(method, *(by_compressor(model, method) if args.in_memory else by_command(model, method, Path(name))))


if __name__ == "__main__":
    main()
