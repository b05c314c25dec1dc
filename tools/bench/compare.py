"""What judging costs over the bare forwards: CPU seconds of `compare_models` against a loop that only runs the models.

    python tools/bench/compare.py [--model FOLDER] [--windows 8] [--length 512]

Both go over the same windows with the same two models, in turn, three times; the medians are compared. Without a folder
a Llama of random weights is made with the shape of SmolLM2-135M, fewer blocks apart.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time

import numpy as np

import slimkit

import torch


def models(folder: str | None) -> tuple[torch.nn.Module, int]:
    """A language model and the size of its vocabulary."""
    import transformers

    if folder is not None:
        made = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return made.eval(), made.config.vocab_size
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval(), config.vocab_size


def cpu_seconds(call) -> float:
    """CPU seconds of a call, which another program's work touches little."""
    began = time.process_time()
    call()
    return time.process_time() - began


def main() -> None:
    """Print the medians and their ratio for each way to take the KL divergence."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    dense, vocabulary = models(asked.model)
    small = copy.deepcopy(dense)
    rng = np.random.default_rng(0)
    documents = rng.integers(0, vocabulary, (asked.windows, asked.length)).tolist()

    def bare() -> None:
        with torch.no_grad():
            for model in (dense, small):
                for ids in documents:
                    model(input_ids=torch.tensor([ids]), use_cache=False)

    def judged(top_k: int | None) -> None:
        slimkit.compare_models(dense, {"small": small}, documents, length=asked.length, speed=False, top_k=top_k)

    ways = {"bare forwards": bare, "exact": lambda: judged(None), "top 256": lambda: judged(256)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(asked.rounds):
        for name, call in ways.items():
            times[name].append(cpu_seconds(call))
    medians = {name: statistics.median(found) for name, found in times.items()}
    base = medians["bare forwards"]
    print(
        json.dumps({name: {"cpu_s": round(t, 2), "ratio": round(t / base, 3)} for name, t in medians.items()}, indent=1)
    )


if __name__ == "__main__":
    main()
