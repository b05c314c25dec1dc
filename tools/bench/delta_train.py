"""Every way of tuning MiniLM on one real task (delta_task.py), beside full fine-tuning and Hugging Face PEFT's own.

    python tools/bench/delta_train.py [--task packages] [--steps 200] [--close-seeds 3] [--kinds full,lora_qv] [--tune]

Each way trains in a process of its own (so that its peak memory is its own) with the same data, head, order and
schedule; only what trains and the learning rate differ. The MindSpore twin is delta_train_ms.py.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import importlib
import json
import multiprocessing
import time
import traceback

import delta_task
import numpy as np
import peak

QV = ["*query", "*value"]
ALL = [*QV, "*key", "*dense"]
LORA = {"rank": 8, "alpha": 16}

# the rates that --tune tries for each way, as multiples of the one below
FACTORS = (0.4, 1.0, 2.5)

HEAD_RATE = 1e-2  # of the new head, where more than the head trains

# way -> learning rate of what it trains
RATES = {
    "full": 1e-4,
    "lora_all": 2e-3,
    "peft_lora_all": 2e-3,
    "lora_r64": 7e-4,
    "peft_lora_r64": 7e-4,
    "lora_r128": 6e-4,
    "peft_lora_r128": 6e-4,
    "lora_words": 7e-4,
    "prefix": 7.5e-2,
    "peft_prefix": 7.5e-2,
    "prompt": 3e-2,
    "peft_prompt": 3e-2,
    "adapter": 5e-3,
    "low_rank_adapter": 1e-2,
    "bitfit": 5e-3,
    "lora_qv": 5e-3,
    "peft_lora_qv": 5e-3,
    "dora": 5e-3,
    "peft_dora": 5e-3,
    "rslora": 3e-3,
    "peft_rslora": 3e-3,
    "lora_plus": 4e-4,
    "pissa": 2.5e-3,
    "peft_pissa": 2.5e-3,
    "rdrop": 2e-3,
    "head": 2.5e-2,
}

# where another task wants another rate: (task, way) -> rate
OTHER_RATES = {("libraries", "full"): 2e-4}

# what lies a point or two from full fine-tuning: one seed cannot tell, so --close-seeds says from how many it trains
CLOSE = (
    "full", "lora_all", "peft_lora_all", "lora_r64", "peft_lora_r64", "lora_r128", "peft_lora_r128", "lora_words",
    "lora_qv", "rslora",
)  # fmt: skip

# way -> kind, targets, options of apply_delta
OURS = {
    "lora_qv": ("lora", QV, LORA),
    "lora_all": ("lora", ALL, LORA),
    "lora_r64": ("lora", ALL, {"rank": 64, "alpha": 128}),
    "lora_r128": ("lora", ALL, {"rank": 128, "alpha": 256}),
    "lora_words": ("lora", [*ALL, "*word_embeddings"], {"rank": 64, "alpha": 128}),
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
    linear = ["query", "value", "key", "dense"]
    virtual = {"task_type": "FEATURE_EXTRACTION"}
    configs = {
        "peft_lora_qv": lambda: peft.LoraConfig(**lora),
        "peft_lora_all": lambda: peft.LoraConfig(**{**lora, "target_modules": linear}),
        "peft_lora_r64": lambda: peft.LoraConfig(r=64, lora_alpha=128, target_modules=linear),
        "peft_lora_r128": lambda: peft.LoraConfig(r=128, lora_alpha=256, target_modules=linear),
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
            self.head = torch.nn.Linear(self.body.config.hidden_size, delta_task.CLASSES)

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


def optimizer_of(way, model, rate):
    """AdamW over the head and what the way trains."""
    import slimkit

    import torch

    body = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("head")]
    groups = [{"params": list(model.head.parameters()), "lr": rate if way == "head" else HEAD_RATE}]
    if way == "lora_plus":
        groups += slimkit.lora_plus_groups(model.body, rate, 16.0)
    elif body:
        groups += [{"params": body, "lr": rate}]
    return torch.optim.AdamW(groups, weight_decay=0.0), body


def judge(model, part):
    """Which texts the model classifies rightly, as 0 and 1, and its mean cross-entropy."""
    import torch

    model.eval()
    with torch.no_grad():
        rows = [slice(i, i + 100) for i in range(0, len(part.labels), 100)]
        logits = torch.cat([model(part.ids[r], part.mask[r]) for r in rows])
    model.train()
    return (logits.argmax(-1) == part.labels).long(), torch.nn.functional.cross_entropy(logits, part.labels).item()


def fit(way, rate, steps, options, learn, seed):
    """One model trained; it, what of its body trains, the losses, and the names of the parameters that never moved."""
    import slimkit

    import torch

    torch.manual_seed(seed)
    model = build(way)
    optimizer, body = optimizer_of(way, model, rate)
    pace = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: delta_task.schedule(i, steps))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    rdrop = slimkit.RDropLoss()
    model.train()
    losses = []
    for rows in delta_task.batches(len(learn.labels), options.batch, steps, seed):
        ids, mask, labels = (part[rows] for part in learn)
        optimizer.zero_grad()
        if way == "rdrop":
            ids, mask, labels = slimkit.rdrop_repeat(ids, mask, labels)
            loss = rdrop(model(ids, mask), labels, alpha=1)
        else:
            loss = torch.nn.functional.cross_entropy(model(ids, mask), labels)
        loss.backward()
        optimizer.step()
        pace.step()
        losses.append(loss.item())
    return model, body, losses, [n for n, p in before.items() if torch.equal(p, dict(model.named_parameters())[n])]


def parts_of(options):
    """The task as tensors; what every way imports is imported here, once."""
    for name in ("peft", "slimkit", "transformers"):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    parts = delta_task.data(options.task, *sizes(options), options.length)
    return {name: delta_task.Part(*map(torch.from_numpy, part)) for name, part in parts.items()}


def tune(way, options, parts):
    """The rate of the least cross-entropy on the validation texts over the seeds, of three around the table's."""
    found = {}
    for factor in FACTORS:
        rate = rate_of(way, options) * factor
        judged = []
        for seed in range(options.seeds):
            model, _, _, _ = fit(way, rate, options.steps, options, parts["train"], seed)
            hits, loss = judge(model, parts["validation"])
            judged.append((loss, 100 * hits.float().mean().item()))
        loss, accuracy = np.mean(judged, axis=0)
        found[f"{rate:.1e}"] = (round(float(loss), 3), round(float(accuracy), 1))
    return {"way": way, "rate: (loss, accuracy) on validation": found, "best": min(found, key=lambda r: found[r][0])}


def train(way, options, parts):
    hits, tenth, rate = [], max(options.steps // 10, 1), rate_of(way, options)
    seconds, firsts, lasts, still = [], [], [], set()
    for seed in range(options.close_seeds if way in CLOSE else options.seeds):
        began = time.process_time()
        model, body, losses, unmoved = fit(way, rate, options.steps, options, parts["train"], seed)
        seconds.append((time.process_time() - began) / options.steps)
        hits.append(judge(model, parts["test"])[0].tolist())
        firsts.append(np.mean(losses[:tenth]))
        lasts.append(np.mean(losses[-tenth:]))
        still.update(unmoved)
    return {
        "way": way,
        "rate": rate,
        "trained, % of all": round(100 * sum(p.numel() for p in body) / sum(p.numel() for p in model.parameters()), 3),
        "loss first -> last tenth": f"{np.mean(firsts):.2f} -> {np.mean(lasts):.2f}",
        "CPU s a step": round(min(seconds), 3),
        "peak MB": round(peak.memory_mb("VmHWM")),
        "parameters that never moved": sorted(still),
        "hits": hits,
    }


def error(points):
    """Mean and standard error of points (seeds, texts), as text.

    The error is that over texts (of texts' means over the seeds) and that over seeds' means, squared and summed. What
    texts and seeds do together is in both, so it is rather too large. From one seed it is that over texts alone.
    """
    over_texts = points.mean(0).std(ddof=1) / points.shape[1] ** 0.5
    over_seeds = points.mean(1).std(ddof=1) / len(points) ** 0.5 if len(points) > 1 else 0.0
    return f"{points.mean():.1f} ± {np.hypot(over_texts, over_seeds):.1f}"


def beside(hits, full):
    """Accuracy, and how far from full fine-tuning's, paired text by text and seed by seed, in points."""
    found = 100 * np.array(hits, float)
    row = {"accuracy, %": error(found), "by seed": found.mean(1).round(1).tolist()}
    if full is None:
        return row
    full = 100 * np.array(full, float)
    # other numbers of seeds cannot be paired: then beside full fine-tuning's mean over its seeds
    apart = found - (full if len(full) == len(found) else full.mean(0))
    return {**row, "minus full fine-tuning's": error(apart), "by seed, minus": apart.mean(1).round(1).tolist()}


def show(rows):
    """Print a row of each way, the accuracies beside those of `full` where it ran; says at the end which failed."""
    full, failed = None, []
    for way, row in rows:
        if isinstance(row, str):
            failed.append(way)
            print(f"{way}: {row[-4000:]}", flush=True)
            continue
        if "hits" in row:
            hits = row.pop("hits")
            row |= beside(hits, full)
            full = hits if way == "full" else full
        print(json.dumps(row, ensure_ascii=False), flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def forked(job, ways, *arguments):
    """What `job` gives for each way, every one in a process of its own, which shares imports and data."""
    context = multiprocessing.get_context("fork")

    def run(pipe, way):
        try:
            pipe.send(job(way, *arguments))
        except Exception:  # noqa: BLE001  (the parent prints it)
            pipe.send(traceback.format_exc())

    for way in ways:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=run, args=(there, way))
        process.start()
        there.close()
        try:
            yield way, here.recv()
        except EOFError:
            yield way, "the process ended without an answer"
        process.join()


def rate_of(way, options):
    """The learning rate of a way on the task."""
    return options.factor * OTHER_RATES.get((options.task, way), RATES[way])


def sizes(options):
    """How many texts to learn from, to choose rates with and to measure with."""
    asked = (options.train, options.validation, options.test)
    return [given or usual for given, usual in zip(asked, delta_task.SIZES[options.task])]


def arguments(description, ways, steps):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--task", choices=delta_task.SIZES, default="packages")
    for part in ("train", "validation", "test"):
        parser.add_argument(f"--{part}", type=int, default=0, help="texts; 0: the task's own number")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=24)
    parser.add_argument("--kinds", default=",".join(ways))
    parser.add_argument("--factor", type=float, default=1.0, help="of every rate but the head's")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of each way")
    return parser


def main():
    parser = arguments(__doc__, RATES, 200)
    parser.add_argument("--close-seeds", type=int, default=3, help=f"of {', '.join(CLOSE)}")
    parser.add_argument("--tune", action="store_true", help="look for each way's rate on the validation texts instead")
    options = parser.parse_args()
    show(forked(tune if options.tune else train, options.kinds.split(","), options, parts_of(options)))


if __name__ == "__main__":
    main()
