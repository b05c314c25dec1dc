"""Which experts to drop: a small mixture of experts, trained here on characters, without a quarter and half of them.

    python -m tools.bench.experts --text FOLDER --state moe.pt

FOLDER is what `tools/recipes/smollm_text.py FOLDER` wrote; the model (Qwen3-MoE's make, 3 layers of 16 experts of which
each token takes 2) is trained on `training.jsonl` where the file of --state is not there yet, a few minutes of CPU.
Experts are chosen on windows of `calibration.jsonl`, the loss is that of `held_out.jsonl`. Nothing is trained after.

    frequency   those that the fewest tokens are given to
    norm        least mean norm of what they say to their tokens
    weights     least norm of their weights
    saliency    REAP: least mean of share times norm over their tokens (Lasby et al. 2025, sec. 4)
    slimkit     what PruneTorch with calibration drops
    merged      the same, each merged into the kept expert whose row of the router is nearest, by numbers of tokens
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from slimkit import PruneTorch
from slimkit.expert_calls import expert_call

import torch

LENGTH, EXPERTS, WAYS = 128, 16, ("frequency", "norm", "weights", "saliency", "slimkit", "merged")


def read(folder: Path, part: str) -> str:
    return "\n".join(json.loads(line)["text"] for line in (folder / f"{part}.jsonl").open(encoding="utf-8"))


def windows(text: str, look: dict[str, int], number: int, seed: int) -> torch.Tensor:
    starts = np.random.default_rng(seed).integers(0, len(text) - LENGTH, number)
    return torch.tensor([[look.get(c, 0) for c in text[k : k + LENGTH]] for k in starts])


def trained(folder: Path, state: Path, steps: int) -> tuple[Any, dict[str, int]]:
    import transformers

    text = read(folder, "training")
    characters = sorted(c for c, number in Counter(text).items() if number > 200)
    look = {c: k + 1 for k, c in enumerate(characters)}
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=len(characters) + 1, hidden_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, intermediate_size=96, moe_intermediate_size=64, num_experts=EXPERTS,
        num_experts_per_tok=2, norm_topk_prob=True, output_router_logits=True, router_aux_loss_coef=0.01,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config)
    if state.exists():
        model.load_state_dict(torch.load(state, weights_only=True))
        return model.eval(), look
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for step in range(steps):
        ids = windows(text, look, 16, step)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    torch.save(model.state_dict(), state)
    return model.eval(), look


@torch.no_grad()
def loss_of(model: Any, ids: torch.Tensor) -> float:
    total = 0.0
    for rows in ids.split(32):
        logits = model(input_ids=rows, output_router_logits=False).logits[:, :-1]
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())) * len(rows)
    return total / len(ids)


def stats(model: Any, ids: torch.Tensor) -> dict[str, list[np.ndarray]]:
    """What each rule goes by, (experts,) of each layer."""
    found: dict[str, list[np.ndarray]] = {"frequency": [], "norm": [], "saliency": [], "weights": []}

    def seen(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        call = expert_call(module, args, kwargs, output)
        assert call is not None
        plain = replace(call, shares=torch.ones_like(call.shares))
        for rule, of in (("norm", plain), ("saliency", call)):
            said = [of.said_by(expert, call.chosen) for expert in range(EXPERTS)]
            found[rule].append(np.array([0.0 if y is None else float(y.norm(dim=1).mean()) for y in said]))
        found["frequency"].append(np.array([float((call.chosen == expert).sum()) for expert in range(EXPERTS)]))
        squares = [p.detach().square().sum((1, 2)) for p in (module.gate_up_proj, module.down_proj)]
        found["weights"].append((squares[0] + squares[1]).numpy())

    hooks = [b.mlp.experts.register_forward_hook(seen, with_kwargs=True) for b in model.model.layers]
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def merge(model: Any, kept: list[list[int]], tokens: list[np.ndarray]) -> None:
    for block, stay, number in zip(model.model.layers, kept, tokens):
        rows = torch.nn.functional.normalize(block.mlp.gate.weight, dim=1)
        share = torch.from_numpy(np.maximum(number, 1)).float()
        into = {e: e if e in stay else stay[int((rows[stay] @ rows[e]).argmax())] for e in range(EXPERTS)}
        for weight in (block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj):
            old = weight.data.clone()
            for e in stay:
                some = [k for k, v in into.items() if v == e]
                weight.data[e] = (old[some] * share[some, None, None]).sum(0) / share[some].sum()


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--text", type=Path, required=True)
    reader.add_argument("--state", type=Path, default=Path("moe.pt"))
    reader.add_argument("--steps", type=int, default=1000)
    reader.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    reader.add_argument("--windows", type=int, default=256, help="of text to judge by")
    asked = reader.parse_args()
    model, look = trained(asked.text, asked.state, asked.steps)
    calib = windows(read(asked.text, "calibration"), look, 64, 0)
    held = windows(read(asked.text, "held_out"), look, asked.windows, 0)
    batches = [{"input_ids": rows} for rows in calib.split(16)]
    known = stats(copy.deepcopy(model), calib)
    dense = loss_of(model, held)
    print(f"dense {dense:.4f} nats a character, perplexity {math.exp(dense):.3f}", flush=True)
    total, each = sum(p.numel() for p in model.parameters()), EXPERTS * len(known["norm"])
    one = 3 * 96 * 64 + 96
    for share in (0.25, 0.5):
        stay = round(EXPERTS * (1 - share))
        keep_ratio = 1 - share * each * one / total
        for way in asked.ways:
            small = copy.deepcopy(model)
            job = PruneTorch(small, {"input_ids": calib[:1, :32]}).set_compensation(None)
            job.set_importance_evaluation_function("auto", calibration=batches)
            _, desc = job.analysis(keep_ratio, ["*.self_attn.*"])
            kept = [variable["keep"] for variable in desc["variables"].values()]
            if way in known:
                kept = [sorted(map(int, np.argsort(-score, kind="stable")[:stay])) for score in known[way]]
            elif way == "merged":
                merge(small, kept, known["frequency"])
            for variable, some in zip(desc["variables"].values(), kept, strict=True):
                variable["keep"] = some
            job.prune_by_desc(desc)
            found = loss_of(small, held)
            left = f"{share:.0%} gone, {small.config.num_experts} left"
            print(f"{left}  {way:10}  {found:.4f}  perplexity {math.exp(found):.3f}", flush=True)


if __name__ == "__main__":
    main()
