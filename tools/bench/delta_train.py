"""Every way of tuning MiniLM on one real task (delta_task.py), beside full fine-tuning and Hugging Face PEFT's own.

    python tools/bench/delta_train.py [--steps 200] [--train 800] [--test 1000] [--length 24] [--kinds full,lora_qv]

Each way trains in a process of its own (so that its peak memory is its own) with the same data, head, order and
schedule; only what trains and the learning rate differ. The MindSpore twin is delta_train_ms.py.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
import resource
import subprocess
import sys
import time

import delta_task
import numpy as np

QV = ["*query", "*value"]
ALL = [*QV, "*key", "*dense"]
LORA = {"rank": 8, "alpha": 16}

# way -> learning rate of what it trains; the head learns at 1e-3 everywhere
RATES = {
    "full": 1e-4,
    "lora_all": 2e-3,
    "peft_lora_all": 2e-3,
    "prefix": 3e-2,
    "peft_prefix": 3e-2,
    "prompt": 3e-2,
    "peft_prompt": 3e-2,
    "adapter": 2e-3,
    "low_rank_adapter": 1e-2,
    "bitfit": 5e-3,
    "lora_qv": 5e-3,
    "peft_lora_qv": 5e-3,
    "dora": 5e-3,
    "peft_dora": 5e-3,
    "rslora": 3e-3,
    "peft_rslora": 3e-3,
    "lora_plus": 1e-3,
    "pissa": 1e-3,
    "peft_pissa": 1e-3,
    "rdrop": 2e-3,
    "head": 1e-3,
}

# way -> kind, targets, options of apply_delta
OURS = {
    "lora_qv": ("lora", QV, LORA),
    "lora_all": ("lora", ALL, LORA),
    "rdrop": ("lora", ALL, LORA),
    "lora_plus": ("lora", QV, LORA),
    "rslora": ("lora", QV, {**LORA, "rslora": True}),
    "dora": ("lora", QV, {**LORA, "dora": True}),
    "pissa": ("lora", QV, {"rank": 8, "alpha": 8, "init": "pissa"}),
    "adapter": ("adapter", ["*output.dense"], {"bottleneck_size": 64}),
    "low_rank_adapter": ("low_rank_adapter", ["*output.dense"], {"reduction_factor": 32}),
    "prefix": ("prefix", None, {"prefix_token_num": 10}),
    "prompt": ("prompt", None, {"num_virtual_tokens": 20}),
}


def peft_config(way):
    """The same way in PEFT's words."""
    import peft

    lora = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}
    virtual = {"task_type": "FEATURE_EXTRACTION"}
    configs = {
        "peft_lora_qv": lambda: peft.LoraConfig(**lora),
        "peft_lora_all": lambda: peft.LoraConfig(**{**lora, "target_modules": ["query", "value", "key", "dense"]}),
        "peft_rslora": lambda: peft.LoraConfig(**lora, use_rslora=True),
        "peft_dora": lambda: peft.LoraConfig(**lora, use_dora=True),
        "peft_pissa": lambda: peft.LoraConfig(**{**lora, "lora_alpha": 8}, init_lora_weights="pissa"),
        "peft_prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=10, **virtual),
        "peft_prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=20, **virtual),
    }
    return configs[way]()


def build(way):
    import slimkit

    import torch
    from transformers import AutoModel

    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = AutoModel.from_pretrained(delta_task.model_folder(), add_pooling_layer=False)
            self.head = torch.nn.Linear(self.body.config.hidden_size, len(delta_task.PACKAGES))

        def forward(self, ids, mask):
            hidden = self.body(input_ids=ids, attention_mask=mask).last_hidden_state
            if hidden.shape[1] > mask.shape[1]:  # a prompt stands in front
                mask = torch.cat((mask.new_ones(mask.shape[0], hidden.shape[1] - mask.shape[1]), mask), 1)
            mask = mask.unsqueeze(-1).to(hidden.dtype)
            return self.head((hidden * mask).sum(1) / mask.sum(1))

    model = Classifier()
    if way == "head":
        slimkit.freeze_modules(model, include=["body"])
    elif way == "bitfit":
        slimkit.freeze_delta(model, "bitfit", exclude=["head"])
    elif way.startswith("peft"):
        import peft

        model.body = peft.get_peft_model(model.body, peft_config(way))
    elif way != "full":
        kind, targets, more = OURS[way]
        slimkit.apply_delta(model.body, kind, targets, **more)
    return model


def optimizer_of(way, model):
    """AdamW over the head and what the way trains."""
    import slimkit

    import torch

    body = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("head")]
    groups = [{"params": list(model.head.parameters()), "lr": 1e-3}]
    if way == "lora_plus":
        groups += slimkit.lora_plus_groups(model.body, RATES[way], 16.0)
    elif body:
        groups += [{"params": body, "lr": RATES[way]}]
    return torch.optim.AdamW(groups, weight_decay=0.0), body


def accuracy(model, check):
    import torch

    model.eval()
    with torch.no_grad():
        rows = [slice(i, i + 100) for i in range(0, len(check[2]), 100)]
        hits = [(model(check[0][r], check[1][r]).argmax(-1) == check[2][r]).float() for r in rows]
    return 100 * torch.cat(hits).mean().item()


def train(way, options):
    import slimkit

    import torch

    torch.set_num_threads(1)
    parts = delta_task.data(options.train, options.test, options.length)
    learn, check = (tuple(map(torch.from_numpy, part)) for part in parts)
    torch.manual_seed(options.seed)
    model = build(way)
    everything = sum(p.numel() for p in model.parameters())
    optimizer, body = optimizer_of(way, model)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: delta_task.schedule(i, options.steps))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    rdrop = slimkit.RDropLoss()
    model.train()
    began, losses = time.process_time(), []
    for rows in delta_task.batches(options.train, options.batch, options.steps, options.seed):
        ids, mask, labels = (part[rows] for part in learn)
        optimizer.zero_grad()
        if way == "rdrop":
            ids, mask, labels = slimkit.rdrop_repeat(ids, mask, labels)
            loss = rdrop(model(ids, mask), labels, alpha=1)
        else:
            loss = torch.nn.functional.cross_entropy(model(ids, mask), labels)
        loss.backward()
        optimizer.step()
        rate.step()
        losses.append(loss.item())
    seconds = (time.process_time() - began) / options.steps
    tenth = max(options.steps // 10, 1)
    found = accuracy(model, check)
    return {
        "way": way,
        "trained, % of all": round(100 * sum(p.numel() for p in body) / everything, 3),
        "accuracy, %": round(found, 1),
        "loss first -> last tenth": f"{np.mean(losses[:tenth]):.2f} -> {np.mean(losses[-tenth:]):.2f}",
        "CPU s a step": round(seconds, 3),
        "peak MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "parameters that never moved": [
            n for n, p in model.named_parameters() if p.requires_grad and torch.equal(before[n], p)
        ],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, default=800)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(RATES))
    parser.add_argument("--rate", type=float, help="another learning rate, to look for a better one")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        if options.rate:
            RATES[options.child] = options.rate
        print(json.dumps(train(options.child, options)))
        return
    same = [f"--{k}={v}" for k, v in vars(options).items() if k not in ("kinds", "child") and v is not None]
    for way in options.kinds.split(","):
        out = subprocess.run(
            [sys.executable, __file__, "--child", way, *same], check=False, capture_output=True, text=True
        )
        print(
            out.stdout.strip().splitlines()[-1] if out.returncode == 0 else f"{way}: {out.stderr[-2000:]}", flush=True
        )


if __name__ == "__main__":
    main()
