"""SmolLM2 on prose that pip and Python bring: text to train on, a small task, its judge, and what the model says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import docstring_text
import numpy as np
import smollm_text

import torch
from torch import nn
from transformers import AutoTokenizer

PROMPTS = (
    "What does a garbage collector do?",
    "Write one sentence that begins with: The library",
    "How do I read a file in Python?",
)
IGNORED = -100  # where a label says nothing, as transformers' own loss knows it


def data(folder: str, text: str, length: int = 128, train: int = 256, task: int = 256) -> dict[str, Any]:
    """Windows to distil on, and a small task for the delta; calibration and held-out text stand in the recipe.

    Args:
        folder: where the tokenizer lies, seen from this file.
        text: what `smollm_text.py FOLDER` made, seen from this file.
        length: tokens a window; documents are never joined.
        train: how many windows.
        task: how many examples of the task to train on.
    """
    here = Path(__file__).parent
    tokenizer = AutoTokenizer.from_pretrained(here / folder)
    windows = _windows(tokenizer, here / text / "training.jsonl", train, length)
    learned, held = _summaries(tokenizer, task)
    return {
        "train": batched([{"input_ids": ids} for ids in windows], 4),
        "adapt": batched(learned, 8),
        "example": {"input_ids": windows[0][None]},
        "task": batched(held, 8),
        "tokenizer": tokenizer,
    }


def _windows(tokenizer: Any, file: Path, count: int, length: int) -> list[torch.Tensor]:
    """Windows of many documents: two of each at most."""
    found: list[torch.Tensor] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        ids = tokenizer(json.loads(line)["text"][: 16 * length])["input_ids"]
        found += [torch.tensor(ids[at : at + length]) for at in (0, length) if len(ids) >= at + length]
        if len(found) >= count:
            return found[:count]
    raise ValueError(f"{file} holds {len(found)} windows of {length} tokens, not {count}")


def batched(rows: list[dict[str, torch.Tensor]], size: int) -> list[dict[str, torch.Tensor]]:
    """Rows of one length as ready batches."""
    parts = [rows[at : at + size] for at in range(0, len(rows), size)]
    return [{key: torch.stack([row[key] for row in part]) for key in part[0]} for part in parts]


def _summaries(tokenizer: Any, count: int) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """The task: the one-line summary of a docstring's body; as many examples as asked for, and a quarter held out."""
    parts: dict[str, list[dict[str, torch.Tensor]]] = {"training": [], "held_out": []}
    wanted = {"training": count, "held_out": max(count // 4, 1)}
    files = docstring_text.modules()
    for at in np.random.default_rng(0).permutation(len(files)):
        module, file = files[at]
        part = smollm_text.Document(f"python:{module}", "manual", "").part
        if part not in parts or len(parts[part]) >= wanted[part]:
            continue
        # A few of each module, so that they come from many.
        for summary, body in docstring_text.docstrings_of(file)[:4]:
            first = tokenizer(f"{body}\nIn one line:")["input_ids"][-96:]
            then = [*tokenizer(f" {summary}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id][:32]
            labels = [IGNORED] * len(first) + then
            row = {"input_ids": torch.tensor(first + then), "labels": torch.tensor(labels)}
            padding = 128 - len(labels)
            row["attention_mask"] = nn.functional.pad(torch.ones(len(labels), dtype=torch.long), (0, padding))
            row["input_ids"] = nn.functional.pad(row["input_ids"], (0, padding), value=tokenizer.eos_token_id)
            row["labels"] = nn.functional.pad(row["labels"], (0, padding), value=IGNORED)
            parts[part].append(row)
    return parts["training"][:count], parts["held_out"][: wanted["held_out"]]


def summary_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean loss over the tokens of the summaries."""
    return model(**batch).loss


def judged(model: nn.Module, data: dict[str, Any], dense: nn.Module) -> dict[str, float]:
    """How well it writes held-out summaries, beside what the recipe measures on held-out text."""
    was = model.training
    model.eval()
    with torch.no_grad():
        counts = [int((batch["labels"] != IGNORED).sum()) for batch in data["task"]]
        losses = [float(summary_loss(model, batch)) for batch in data["task"]]
    model.train(was)
    return {"perplexity of summaries": float(np.exp(np.average(losses, weights=counts)))}


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
