"""Pruning of a language model: slimkit's default, and rules of papers written anew; `llm.py prune` runs them.

The peers zero what they would cut, which says the same as the cut, and count the parameters that would be left. They
are small re-implementations from the papers, for Llama-shaped models, without their fine-tuning:

    shortgpt    whole blocks of least influence, 1 - cosine of input and output (Men et al. 2024, sec. 2.2)
    flap        variance of each channel times its weights' squares, standardised by layer, one threshold for all; the
                mean of what goes becomes a bias (An et al. 2024, sec. 3)
    2ssp        neurons by the norm of what they say, as many everywhere, then whole attentions (Sandri et al. 2025)
    taylor      |w g| of coupled groups, equally many in all blocks but the outer ones (Ma et al. 2023, sec. 3.2)
    slicegpt    the residual stream between blocks on its principal axes, the least of them gone (Ashkboos et al. 2024,
                sec. 3); in its favour a tied table counts once, though its two ends are turned differently
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from slimkit import PruneTorch

import torch
from torch import nn


@torch.no_grad()
def perplexity(model: nn.Module, ids: torch.Tensor) -> float:
    total = 0.0
    for row in ids:
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1].float()
        total += nn.functional.cross_entropy(logits, row[1:], reduction="sum").item()
    return math.exp(total / (ids.numel() - len(ids)))


class Seen:
    """What one pass of the calibration windows shows of each block."""

    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        layers = model.model.layers
        self.influence = torch.zeros(len(layers))
        self.mean: dict[tuple[str, int], torch.Tensor] = {}
        self.square: dict[tuple[str, int], torch.Tensor] = {}
        handles = []
        for number, block in enumerate(layers):
            handles.append(block.register_forward_hook(self._block(number)))
            for kind, layer in (("heads", block.self_attn.o_proj), ("ffn", block.mlp.down_proj)):
                handles.append(layer.register_forward_pre_hook(self._layer(kind, number)))
        with torch.no_grad():
            for row in ids:
                model(input_ids=row[None], use_cache=False)
        for handle in handles:
            handle.remove()
        self.mean = {key: value / ids.numel() for key, value in self.mean.items()}
        self.square = {key: value / ids.numel() for key, value in self.square.items()}

    def _block(self, number: int) -> Callable[..., None]:
        def seen(_module: nn.Module, args: Any, output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            self.influence[number] += (1 - nn.functional.cosine_similarity(args[0], after, dim=-1)).sum()

        return seen

    def _layer(self, kind: str, number: int) -> Callable[..., None]:
        def seen(_module: nn.Module, args: Any) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            self.mean[kind, number] = self.mean.get((kind, number), 0) + x.sum(0)
            self.square[kind, number] = self.square.get((kind, number), 0) + x.square().sum(0)

        return seen


class Shape:
    """How many parameters each thing that can go holds, in a Llama."""

    def __init__(self, model: Any) -> None:
        self.config = config = model.config
        block = model.model.layers[0]
        self.total = sum(p.numel() for p in model.parameters())
        self.block = sum(p.numel() for p in block.parameters())
        self.attention = sum(p.numel() for p in block.self_attn.parameters())
        self.neuron = 3 * config.hidden_size
        self.groups = config.num_key_value_heads
        self.group = self.attention // self.groups
        self.columns = block.self_attn.o_proj.in_features // self.groups


def zero(
    model: Any, gone: dict[tuple[str, int], torch.Tensor], means: dict[tuple[str, int], torch.Tensor] | None
) -> None:
    """Zero columns of the readers; with means, what they said on average becomes a bias."""
    for (kind, number), columns in gone.items():
        block = model.model.layers[number]
        layer = block.self_attn.o_proj if kind == "heads" else block.mlp.down_proj
        if means is not None:
            layer.bias = nn.Parameter(layer.weight.data[:, columns] @ means[kind, number][columns])
        layer.weight.data[:, columns] = 0


def columns_of(shape: Shape, kind: str, indices: torch.Tensor) -> torch.Tensor:
    if kind == "ffn":
        return indices
    return (indices[:, None] * shape.columns + torch.arange(shape.columns)).reshape(-1)


def grouped(shape: Shape, kind: str, scores: torch.Tensor) -> torch.Tensor:
    return scores if kind == "ffn" else scores.reshape(shape.groups, -1).mean(1)


def shortgpt(model: Any, seen: Seen, shape: Shape, keep: float, ids: torch.Tensor) -> float:
    number = round((1 - keep) * shape.total / shape.block)
    for block in seen.influence.argsort()[:number].tolist():
        for layer in (model.model.layers[block].self_attn.o_proj, model.model.layers[block].mlp.down_proj):
            layer.weight.data.zero_()
    return 1 - number * shape.block / shape.total


def flap(model: Any, seen: Seen, shape: Shape, keep: float, ids: torch.Tensor) -> float:
    scores, prices = {}, {"ffn": shape.neuron, "heads": shape.group}
    for (kind, number), square in seen.square.items():
        block = model.model.layers[number]
        weight = (block.self_attn.o_proj if kind == "heads" else block.mlp.down_proj).weight.data
        score = grouped(shape, kind, (square - seen.mean[kind, number].square()) * weight.square().sum(0))
        scores[kind, number] = (score - score.mean()) / (score.std() + 1e-12)
    order = sorted((float(v), key, k) for key, s in scores.items() for k, v in enumerate(s))
    left, gone = shape.total, {}
    for _, key, index in order:
        taken = gone.setdefault(key, [])
        if left <= keep * shape.total:
            break
        if len(taken) + 1 < len(scores[key]):
            taken.append(index)
            left -= prices[key[0]]
    chosen = {key: columns_of(shape, key[0], torch.tensor(index)) for key, index in gone.items() if index}
    zero(model, chosen, seen.mean)
    return left / shape.total


def two_stages(model: Any, seen: Seen, shape: Shape, keep: float, ids: torch.Tensor) -> float:
    blocks = len(model.model.layers)
    wanted = (1 - keep) * shape.total
    attentions = round(wanted * (shape.attention / shape.block) / shape.attention)
    each = round((wanted - attentions * shape.attention) / (blocks * shape.neuron))
    zero(model, {("ffn", b): seen.square["ffn", b].argsort()[:each] for b in range(blocks)}, None)
    left = list(range(blocks))
    for _ in range(attentions):
        tried = {}
        for block in left:
            layer = model.model.layers[block].self_attn.o_proj
            saved = layer.weight.data.clone()
            layer.weight.data.zero_()
            tried[block] = perplexity(model, ids[:1, :128])
            layer.weight.data.copy_(saved)
        best = min(tried, key=tried.__getitem__)
        model.model.layers[best].self_attn.o_proj.weight.data.zero_()
        left.remove(best)
    return 1 - (attentions * shape.attention + blocks * each * shape.neuron) / shape.total


def taylor(model: Any, seen: Seen, shape: Shape, keep: float, ids: torch.Tensor) -> float:
    blocks = len(model.model.layers)
    inner = range(max(1, blocks // 8), blocks - max(1, blocks // 16))
    model.requires_grad_(True)
    for row in ids[:4]:
        model(input_ids=row[None], labels=row[None], use_cache=False).loss.backward()
    share = (1 - keep) * shape.total / (len(inner) * shape.block)
    gone, left = {}, shape.total
    for number in inner:
        block = model.model.layers[number]
        score = {name: (p.data * p.grad).abs() for name, p in block.named_parameters() if p.grad is not None}
        ffn = score["mlp.down_proj.weight"].sum(0) + sum(score[f"mlp.{n}_proj.weight"].sum(1) for n in ("gate", "up"))
        heads = grouped(shape, "heads", score["self_attn.o_proj.weight"].sum(0))
        heads += sum(grouped(shape, "heads", score[f"self_attn.{n}_proj.weight"].sum(1)) for n in "qkv")
        taken = min(round(share * shape.groups), shape.groups - 1)
        neurons = round((share * shape.block - taken * shape.group) / shape.neuron)
        for kind, scores, count in (("ffn", ffn, neurons), ("heads", heads, taken)):
            if count:
                gone[kind, number] = columns_of(shape, kind, scores.argsort()[:count])
        left -= taken * shape.group + neurons * shape.neuron
    model.requires_grad_(False)
    zero(model, gone, None)
    return left / shape.total


def slicegpt(model: Any, seen: Seen, shape: Shape, keep: float, ids: torch.Tensor) -> float:
    config, layers = model.config, model.model.layers
    width, each = config.hidden_size, shape.block / config.hidden_size
    # width x what one feature costs, and two shortcuts a block: the largest width within what is left.
    per = config.vocab_size + len(layers) * each
    new = int((-per + math.sqrt(per**2 + 8 * len(layers) * keep * shape.total)) / (4 * len(layers)))
    norms = [n for block in layers for n in (block.input_layernorm, block.post_attention_layernorm)]
    norms.append(model.model.norm)
    products = [torch.zeros(width, width, dtype=torch.float64) for _ in norms]

    def watching(number: int) -> Callable[..., None]:
        def seen_by(_module: nn.Module, args: Any) -> None:
            x = args[0].reshape(-1, width).double()
            x = x / x.square().mean(-1, keepdim=True).sqrt()
            products[number] += x.T @ x

        return seen_by

    handles = [norm.register_forward_pre_hook(watching(k)) for k, norm in enumerate(norms)]
    with torch.no_grad():
        for row in ids:
            model(input_ids=row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    axes = [torch.linalg.eigh(product)[1][:, -new:].float() for product in products]

    def sliced(block: Any, first: torch.Tensor, second: torch.Tensor) -> Callable[..., torch.Tensor]:
        def forward(x: torch.Tensor, **given: Any) -> torch.Tensor:
            x = x @ first @ first.T
            x = x + block.self_attn(hidden_states=block.input_layernorm(x), **given)[0]
            x = x @ second @ second.T
            return x + block.mlp(block.post_attention_layernorm(x))

        return forward

    for k, block in enumerate(layers):
        block.forward = sliced(block, axes[2 * k], axes[2 * k + 1])
    model.model.norm.register_forward_pre_hook(lambda _module, args: (args[0] @ axes[-1] @ axes[-1].T,))
    return (per * new + 2 * len(layers) * new**2) / shape.total


PEERS = {"shortgpt": shortgpt, "flap": flap, "2ssp": two_stages, "taylor": taylor, "slicegpt": slicegpt}


def ours(model: Any, calib: torch.Tensor, keep: float, form: str | None, rotated: bool = False) -> float:
    before = sum(p.numel() for p in model.parameters())
    batches = [{"input_ids": rows} for rows in calib.split(1)]  # few logits in memory at a time
    pruner = PruneTorch(model, {"input_ids": calib[:1, :16]})
    if form is not None:
        pruner.set_form(form)
    pruner.set_rotation(rotated)
    pruner.set_importance_evaluation_function("auto", calibration=batches).prune(keep, [])
    return sum(p.numel() for p in model.parameters()) / before
