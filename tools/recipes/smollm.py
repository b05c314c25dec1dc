"""SmolLM2 on prose that pip and Python bring: the network, its text, a small task, its judge, and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import docstring_text
import numpy as np
import smollm_text

from slimkit import compare_models

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

PROMPTS = (
    "What does a garbage collector do?",
    "Write one sentence that begins with: The library",
    "How do I read a file in Python?",
)
IGNORED = -100  # where a label says nothing, as transformers' own loss knows it


def build(folder: str, ffn: int | None = None, blocks: int | None = None) -> nn.Module:
    """The model of a Hugging Face folder; a smaller one has that shape and random weights.

    Args:
        folder: what `slimkit convert model.gguf FOLDER` made.
        ffn: width of each gated FFN.
        blocks: how many blocks.
    """
    if ffn is None and blocks is None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = AutoConfig.from_pretrained(folder, dtype=torch.float32)
    config.intermediate_size = ffn or config.intermediate_size
    config.num_hidden_layers = blocks or config.num_hidden_layers
    return AutoModelForCausalLM.from_config(config)


def data(
    folder: str,
    text: str,
    length: int = 512,
    train: int = 256,
    calibration: int = 8,
    held_out: int = 16,
    task: int = 256,
) -> dict[str, Any]:
    """Windows to distil on, windows to calibrate on, windows to judge by, and a small task for the delta.

    Args:
        folder: where the tokenizer lies.
        text: what `smollm_text.py FOLDER` made.
        length: tokens a window; documents are never joined.
        train, calibration, held_out: how many windows of each part.
        task: how many examples of the task to train on.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def windows(part: str, count: int, length: int) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for line in Path(text, f"{part}.jsonl").read_text(encoding="utf-8").splitlines():
            ids = tokenizer(json.loads(line)["text"][: 16 * length])["input_ids"]
            # Two windows of a document at most, so that the windows come from many.
            found += [torch.tensor(ids[at : at + length]) for at in (0, length) if len(ids) >= at + length]
            if len(found) >= count:
                return found[:count]
        raise ValueError(f"{text}/{part}.jsonl holds {len(found)} windows of {length} tokens, not {count}")

    short = min(length, 128)  # a step of training costs by the token
    learned, held = _summaries(tokenizer, task)
    return {
        "train": batched([{"input_ids": ids} for ids in windows("training", train, short)], 4),
        "adapt": batched(learned, 8),
        "example": {"input_ids": windows("calibration", 1, short)[0][None]},
        "calibration": [{"input_ids": ids[None]} for ids in windows("calibration", calibration, length)],
        "held_out": [ids.tolist() for ids in windows("held_out", held_out, length)],
        "task": batched(held, 8),
        "tokenizer": tokenizer,
    }


def batched(rows: list[dict[str, torch.Tensor]], size: int) -> list[dict[str, torch.Tensor]]:
    """Rows of one length as ready batches."""
    parts = [rows[at : at + size] for at in range(0, len(rows), size)]
    return [{key: torch.stack([row[key] for row in part]) for key in part[0]} for part in parts]


def _summaries(tokenizer: Any, count: int) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """The task: the one-line summary of a docstring's body; as many examples as asked for, and a quarter held out."""
    parts: dict[str, list[dict[str, torch.Tensor]]] = {"training": [], "held_out": []}
    rng = np.random.default_rng(0)
    found = docstring_text.docstrings()
    for at in rng.permutation(len(found)):
        module, summary, body = found[at]
        part = smollm_text.Document(f"python:{module}", "manual", "").part
        if part in parts:
            first = tokenizer(f"{body}\nIn one line:")["input_ids"][-96:]
            then = [*tokenizer(f" {summary}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id][:32]
            labels = [IGNORED] * len(first) + then
            row = {"input_ids": torch.tensor(first + then), "labels": torch.tensor(labels)}
            padding = 128 - len(labels)
            row["attention_mask"] = nn.functional.pad(torch.ones(len(labels), dtype=torch.long), (0, padding))
            row["input_ids"] = nn.functional.pad(row["input_ids"], (0, padding), value=tokenizer.eos_token_id)
            row["labels"] = nn.functional.pad(row["labels"], (0, padding), value=IGNORED)
            parts[part].append(row)
    return parts["training"][:count], parts["held_out"][: max(count // 4, 1)]


def summary_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean loss over the tokens of the summaries."""
    return model(**batch).loss


def judged(model: nn.Module, data: dict[str, Any], dense: nn.Module) -> dict[str, float]:
    """What the model lost on held-out text against the dense one, and how well it writes held-out summaries."""
    found = compare_models(dense, {"now": model}, data["held_out"], length=len(data["held_out"][0]), speed=False)["now"]
    names = {"perplexity": "perplexity", "KL to dense": "kl", "agreement with dense": "agreement"}
    was = model.training
    model.eval()
    with torch.no_grad():
        counts = [int((batch["labels"] != IGNORED).sum()) for batch in data["task"]]
        losses = [float(summary_loss(model, batch)) for batch in data["task"]]
    model.train(was)
    task = float(np.exp(np.average(losses, weights=counts)))
    return {**{name: float(found.figures[key]) for name, key in names.items()}, "perplexity of summaries": task}


def answers(model: nn.Module, data: dict[str, Any]) -> dict[str, str]:
    """What the model says to three prompts, the likeliest token each time."""
    tokenizer, was = data["tokenizer"], model.training
    model.eval()
    found = {}
    for prompt in PROMPTS:
        asked = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            made = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        found[prompt] = tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    model.train(was)
    return found
