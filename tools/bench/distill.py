"""What distillation costs and gains: step overhead, teacher cache, digits over seeds, MiniLM 6 to 3 layers.

    python tools/bench/distill.py [overhead] [cache] [digits] [minilm]

CPU seconds of this process, paired and alternating, medians; accuracy over seeds as mean and spread.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from slimkit import KnowledgeDistillConfig, TeacherCache, Trainer, get_distill_model, linear_schedule, make_student

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss


def paired(a: Callable[[], object], b: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """Median CPU seconds of both, and the median of their ratios, alternating so that load hits both alike."""
    times: list[tuple[float, float]] = []
    for i in range(rounds + 2):
        row = [0.0, 0.0]
        for place, run in ((0, a), (1, b)) if i % 2 else ((1, b), (0, a)):
            start = time.process_time()
            run()
            row[place] = time.process_time() - start
        if i >= 2:  # the first two warm up
            times.append((row[0], row[1]))
    return (
        statistics.median(t[0] for t in times),
        statistics.median(t[1] for t in times),
        statistics.median(t[0] / t[1] for t in times),
    )


def bert(layers: int) -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(layers)
    shape = {"hidden_size": 384, "num_hidden_layers": layers, "num_attention_heads": 12, "intermediate_size": 1536}
    return BertModel(BertConfig(vocab_size=3000, **shape), add_pooling_layer=False)


def batch_of(n: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 3000, (n, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def hidden_config(
    pairs: dict[int, int], loss: str = "HiddenMse", weight: float = 1, **more: str
) -> KnowledgeDistillConfig:
    config = KnowledgeDistillConfig()
    for s, t in pairs.items():
        config.add_inter_soft_label(
            {
                "t_module": f"encoder.layer.{t}",
                "s_module": f"encoder.layer.{s}",
                "t_output_idx": 0,
                "s_output_idx": 0,
                "loss_func": [{"func_name": loss, "func_weight": weight}],
                **more,
            }
        )
    return config


def overhead(rounds: int = 12) -> dict[str, float]:
    """A distillation step against a hand-written one with the same three hidden losses."""
    teacher, student = bert(6).eval(), bert(3).eval()
    other = copy.deepcopy(student)
    model = get_distill_model(teacher, student, hidden_config({0: 1, 1: 3, 2: 5}))
    batch = batch_of(8, 64)
    first = torch.optim.AdamW(model.parameters(), lr=1e-5)
    second = torch.optim.AdamW(other.parameters(), lr=1e-5)

    def ours() -> None:
        model(**batch)[0].backward()
        first.step()
        first.zero_grad()

    bare = bert(6).eval()

    def by_hand() -> None:
        with torch.no_grad():
            t = bare(**batch, output_hidden_states=True).hidden_states
        s = other(**batch, output_hidden_states=True).hidden_states
        loss = mse_loss(s[1], t[2]) + mse_loss(s[2], t[4]) + mse_loss(s[3], t[6])
        loss.backward()
        second.step()
        second.zero_grad()

    mine, hand, ratio = paired(ours, by_hand, rounds)
    return {"slimkit_s": mine, "by_hand_s": hand, "ratio": ratio}


def cache(rounds: int = 8) -> dict[str, float]:
    """A step from the cache against the online step, and against the student's plain step."""

    class Head(nn.Module):
        def __init__(self, layers: int) -> None:
            super().__init__()
            self.body, self.head = bert(layers), nn.Linear(384, 3000)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state)

    teacher, student, batch = Head(6).eval(), Head(3).eval(), batch_of(8, 64)
    term = {"func_name": "KDCrossEntropy", "func_weight": 1}
    config = KnowledgeDistillConfig().add_output_soft_label({"t_output_idx": 0, "s_output_idx": 0, "loss_func": [term]})
    with tempfile.TemporaryDirectory() as folder:
        kept = TeacherCache.build(teacher, [batch], config, folder)
        size = sum(os.path.getsize(os.path.join(folder, f)) for f in os.listdir(folder))
        online = get_distill_model(teacher, student, config)
        offline = get_distill_model(kept, copy.deepcopy(student), config)
        plain = copy.deepcopy(student)

        def step(model: nn.Module) -> None:
            model.zero_grad()
            model(**batch)[0].backward()

        def alone() -> None:
            plain.zero_grad()
            plain(**batch).logsumexp(-1).mean().backward()

        def teach() -> None:
            with torch.no_grad():
                teacher(**batch)

        cached, direct, ratio = paired(lambda: step(offline), lambda: step(online), rounds)
        forward, _, _ = paired(teach, teach, rounds)
        bare, _, _ = paired(alone, alone, rounds)
        both = [float(m(**batch)[0].detach()) for m in (online, offline)]
    return {
        "cached_s": cached,
        "online_s": direct,
        "ratio": ratio,
        "saved_s": direct - cached,
        "teacher_forward_s": forward,
        "plain_student_s": bare,
        "megabytes": size / 1e6,
        "loss_online": both[0],
        "loss_top64": both[1],
    }


def digits(seeds: int = 5) -> dict[str, object]:
    """A student of a quarter of the parameters on 8x8 digits, with and without its teacher."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    x = torch.tensor(found.images[order][:, None] / 16, dtype=torch.float32)
    y = torch.tensor(found.target[order])
    # Few labels: where a teacher has something to add. The teacher's answers need none.
    held = torch.utils.data.TensorDataset(x[1200:], y[1200:])
    train = torch.utils.data.TensorDataset(x[:200], y[:200])
    accuracy = {"accuracy": lambda o, t: (o.argmax(1) == t).float().mean()}

    def net(width: int) -> nn.Module:
        conv = [
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        ]
        return nn.Sequential(
            *conv, nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10)
        )

    def fit(model: nn.Module, data: object, seed: int, epochs: int) -> Trainer:
        trainer = Trainer(model, cross_entropy, lambda p: torch.optim.AdamW(p, lr=3e-3), metrics=accuracy)
        trainer.train(data, epochs, per_device_batch_size=32, seed=seed)
        return trainer

    full = torch.utils.data.TensorDataset(x[:1200], y[:1200])
    torch.manual_seed(100)
    teacher = net(32)
    top = fit(teacher, full, 100, 12).evaluate(held, 256)["accuracy"]
    label = {"t_output_idx": 0, "s_output_idx": 0}
    term = {"func_name": "KDCrossEntropy", "func_weight": 1, "temperature": 2, "t_squared": True}
    plain, taught, unlabelled = [], [], []
    for seed in range(seeds):
        torch.manual_seed(seed)
        student = net(15)
        twin, third = copy.deepcopy(student), copy.deepcopy(student)
        plain.append(fit(student, train, seed, 60).evaluate(held, 256)["accuracy"])
        config = KnowledgeDistillConfig().set_hard_label(0.3, 0).add_output_soft_label({**label, "loss_func": [term]})
        dual = get_distill_model(teacher, twin, config)
        fit(dual, train, seed, 60)
        taught.append(
            Trainer(dual.get_student_model(), cross_entropy, metrics=accuracy).evaluate(held, 256)["accuracy"]
        )
        # As many updates, on images whose labels nobody needs: the teacher answers for them.
        dual = get_distill_model(teacher, third, config)
        optimizer = lambda p: torch.optim.AdamW(p, lr=3e-3)
        trainer = Trainer(dual, optimizer=optimizer, compute_loss=lambda model, batch: model(batch[0])[0])
        trainer.train(full, 11, per_device_batch_size=32, seed=seed)
        reached = Trainer(dual.get_student_model(), cross_entropy, metrics=accuracy).evaluate(held, 256)["accuracy"]
        unlabelled.append(reached)

    def shown(values: list[float]) -> list[float]:
        return [round(statistics.mean(values), 4), round(statistics.stdev(values), 4)]

    return {
        "parameters": [sum(p.numel() for p in m.parameters()) for m in (teacher, net(15))],
        "teacher": top,
        "alone, 200 labels": shown(plain),
        "distilled, the same 200": shown(taught),
        "distilled, 1,200 images without labels": shown(unlabelled),
        "wins": [sum(a > b for a, b in zip(v, plain)) for v in (taught, unlabelled)],
    }


def minilm(steps: int = 120, seeds: int = 3) -> dict[str, object]:
    """MiniLM cut from 6 to 3 layers: agreement of sentence embeddings with the teacher, on held-out sentences."""
    sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "recipes"))
    import minilm as recipe
    from scipy.stats import spearmanr

    from transformers import AutoModel

    body = AutoModel.from_pretrained(recipe.model_folder()).eval()
    data = recipe.data(pairs=steps * 8, held_out=96, batch_size=8)
    batches = [{name: tokens[:, :64] for name, tokens in batch.items()} for batch in data["train"].dataset]

    def embed(model: nn.Module) -> np.ndarray:
        model.eval()
        found = []
        with torch.no_grad():
            for batch in data["sentences"]:
                mask = batch["attention_mask"][:, :, None].float()
                states = model(**batch).last_hidden_state
                found.append(nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1))
        return torch.cat(found).numpy()

    theirs = embed(body)
    above = np.triu_indices(len(theirs), 1)

    def agreement(model: nn.Module) -> list[float]:
        mine = embed(model)
        rank = spearmanr((mine @ mine.T)[above], (theirs @ theirs.T)[above]).statistic
        return [round(float((mine * theirs).sum(1).mean()), 4), round(float(rank), 4)]

    output = {"t_output_idx": "last_hidden_state", "s_output_idx": "last_hidden_state", "mask": "attention_mask"}
    outer = {**output, "pool": "mean", "loss_func": [{"func_name": "HiddenMse", "func_weight": 100}]}
    found: dict[str, object] = {"cut": agreement(make_student(body, layers=3)[0])}
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(batches))
        for name in ("embedding", "embedding + layers"):
            torch.manual_seed(seed)
            student, _ = make_student(body, layers=3)
            config = KnowledgeDistillConfig()
            if name != "embedding":
                config = hidden_config({0: 1, 1: 3, 2: 5}, "HiddenCosine", 10, mask="attention_mask")
            dual = get_distill_model(body, student, config.add_output_soft_label(outer))
            trainer = Trainer(dual, optimizer=lambda p: torch.optim.AdamW(p, lr=2e-4))
            trainer.train([batches[i] for i in order], 1, create_scheduler_fn=linear_schedule(n_warmup=10))
            found[f"{name}, seed {seed}"] = agreement(dual.get_student_model())
    return {"steps": len(batches), "cosine_and_spearman": found}


BENCHES = ["overhead", "cache", "digits", "minilm"]


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benches", nargs="*", metavar="BENCH", help=f"{', '.join(BENCHES)}; all of them by default")
    wanted = parser.parse_args().benches or BENCHES
    if unknown := set(wanted) - set(BENCHES):
        parser.error(f"no bench {', '.join(sorted(unknown))}; choose from {', '.join(BENCHES)}")
    print(
        f"# {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    for name in wanted:
        print(name, json.dumps(globals()[name](), indent=None), flush=True)


if __name__ == "__main__":
    main()
