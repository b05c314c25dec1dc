"""The hidden width of a language model cut by principal axes of its stream, and by channels picked, without any refit.

    python -m tools.bench.rotation --model DIR --text FOLDER --widths 512 448

DIR is a Llama-shaped model's folder, FOLDER what `tools/recipes/smollm_text.py FOLDER` wrote. Calibrated on the first
window of each of 8 documents, judged by 4 of others. What is cut is projected away, which says the same as the cut; the
output layer has a table of its own, and the norms' scales make up for what their mean square loses.

    axes      eigenvectors of the second moments of what the normalised stream holds, all places together
    weighed   the same, each place weighed by what its readers make of it
    channels  those of least loss, one by one
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core.prune.elimination import LayerSignal
from slimkit.signals import layer_signals
from tools.bench.llm_prune import perplexity

import torch
from torch import nn


def windows(tokenizer: Any, file: Path, number: int, length: int = 512) -> torch.Tensor:
    texts = (json.loads(line)["text"] for line in file.open(encoding="utf-8"))
    long = (ids[:length] for text in texts if len(ids := tokenizer(text)["input_ids"]) >= length)
    return torch.tensor([ids for ids, _ in zip(long, range(number))])


def places(model: Any) -> list[tuple[Any, list[Any]]]:
    """Each norm of the stream, and what reads it."""
    out = []
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        out.append((block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]))
        out.append((block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]))
    return [*out, (model.model.norm, [model.lm_head])]


@torch.no_grad()
def project(model: Any, kept: np.ndarray, flows: list[np.ndarray]) -> None:
    onto = torch.from_numpy(kept @ kept.T).float()
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ onto)
    for block in model.model.layers:
        for writer in (block.self_attn.o_proj, block.mlp.down_proj):
            writer.weight.copy_(onto @ writer.weight)
    for (norm, readers), flow in zip(places(model), flows):
        norm.weight.fill_(float(np.sqrt(np.trace(kept.T @ flow @ kept) / len(flow))))
        for reader in readers:
            reader.weight.copy_(reader.weight @ onto)


def main() -> None:
    import transformers

    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--model", required=True)
    reader.add_argument("--text", type=Path, required=True)
    reader.add_argument("--widths", type=int, nargs="+", default=[512, 448])
    asked = reader.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(asked.model)
    calib = windows(tokenizer, asked.text / "calibration.jsonl", 8)
    held = windows(tokenizer, asked.text / "held_out.jsonl", 4)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.requires_grad_(False)
    for norm, readers in places(model):
        for layer in readers:
            layer.weight.mul_(norm.weight)
        norm.weight.fill_(1)
    print(f"dense {perplexity(model, held):.2f}", flush=True)
    names = {module: name for name, module in model.named_modules()}
    wanted = [names[layer] for _, readers in places(model) for layer in readers]
    told = layer_signals(model, [{"input_ids": rows[None]} for rows in calib], wanted, None, 0)
    flows, uses = [], []
    for _, readers in places(model):
        signals = [(layer.weight.double().numpy(), told[names[layer]]) for layer in readers]
        flows.append(next(s.gram for _, s in signals if isinstance(s, LayerSignal)))
        uses.append(sum(w.T @ (s.slope[:, None] * w) for w, s in signals))
    alone = sum(0.5 * np.diag(use) * np.diag(flow) for use, flow in zip(uses, flows))
    bases = {
        "axes": np.linalg.eigh(np.sum(flows, axis=0))[1][:, ::-1],
        "weighed": np.linalg.eigh(np.sum([np.trace(u) * f for u, f in zip(uses, flows)], axis=0))[1][:, ::-1],
        "channels": np.eye(len(alone))[:, np.argsort(-alone)],
    }
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for width in asked.widths:
        for name, basis in bases.items():
            model.load_state_dict(state)
            project(model, np.ascontiguousarray(basis[:, :width]), flows)
            print(f"{width}  {name:8}  perplexity {perplexity(model, held):.2f}", flush=True)


if __name__ == "__main__":
    main()
