"""The ways of tuning a language model that delta_starts.py compares: slimkit's, PEFT's own, and all of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import slimkit

import torch

LORA = {"rank": 8, "alpha": 16}
# What a prefix or prompt may begin as; its length is that of all of them.
TEXT = "Documentation of a function in a Python library for scientific computing: parameters, returns, notes, examples."
# way -> kind, options, learning rate; "len" stands for the text's number of tokens
WAYS: dict[str, tuple[str, dict[str, Any], float]] = {
    "lora": ("lora", LORA, 2e-3),
    "gradient": ("lora", {**LORA, "init": "gradient"}, 2e-3),
    "activations": ("lora", {**LORA, "init": "activations"}, 2e-3),
    "full": ("", {}, 1e-4),
    "pissa": ("lora", {**LORA, "init": "pissa"}, 1e-3),
    "miss": ("miss", {"rank": 16}, 3e-4),
    "shira": ("shira", {"rank": 8}, 5e-3),
    "peft lora": ("peft", {"init_lora_weights": True}, 2e-3),
    "peft gradient": ("peft", {"init_lora_weights": "lora_ga"}, 1e-3),
    "peft activations": ("peft", {"init_lora_weights": "eva"}, 2e-3),
    "peft pissa": ("peft", {"init_lora_weights": "pissa"}, 1e-3),
    "peft miss": ("peft", {"type": "miss"}, 3e-4),
    "peft shira": ("peft", {"type": "shira"}, 5e-3),
    "lora+": ("lora", LORA, 5e-4),
    "shira magnitude": ("shira", {"rank": 8, "support": "magnitude"}, 5e-3),
    "int8 base": ("lora", {**LORA, "base_dtype": "int8"}, 2e-3),
    "bfloat16 base": ("lora", {**LORA, "base_dtype": "bfloat16"}, 2e-3),
    "prefix random": ("prefix", {"prefix_token_num": "len", "init": "random"}, 3e-2),
    "prefix tokens": ("prefix", {"prefix_token_num": "len", "init": "vocabulary"}, 1e-2),
    "prefix text": ("prefix", {"text": TEXT}, 1e-2),
    "prompt random": ("prompt", {"num_virtual_tokens": "len", "init": "random"}, 1e-2),
    "prompt tokens": ("prompt", {"num_virtual_tokens": "len", "init": "vocabulary"}, 1e-2),
    "prompt text": ("prompt", {"text": TEXT}, 1e-2),
    "peft prefix": ("peft", {"type": "prefix"}, 3e-2),
    "peft prefix text": ("peft", {"type": "prefix", "text": TEXT}, 1e-2),
    "peft prompt": ("peft", {"type": "prompt"}, 1e-2),
    "peft prompt text": ("peft", {"type": "prompt", "text": TEXT}, 1e-2),
}
FRONTS = [way for way in WAYS if "prefix" in way or "prompt" in way]
Loss = Callable[[Any, torch.Tensor], torch.Tensor]


def tuned(way: str, model: Any, folder: str, batches: Sequence[torch.Tensor], loss: Loss, seed: int) -> Any:
    """The model with a way's parameters on it, and them alone training.

    Args:
        way: a key of WAYS.
        model: a language model of transformers; changed in place.
        folder: where its tokenizer lies.
        batches: token ids that a start is read from, (batch, tokens) each.
        loss: f(model, ids), of one batch.
        seed: of what is drawn.
    """
    kind, settings, _ = WAYS[way]
    if not kind:
        return model
    if kind == "peft":
        return _of_peft(model, dict(settings), folder, batches, loss)
    settings = {n: len(tokens(folder)) if v == "len" else v for n, v in settings.items()}
    if settings.get("init") in ("gradient", "activations"):
        settings["calibration"] = list(batches) if settings["init"] == "gradient" else _calls(batches)
        if settings["init"] == "gradient":
            settings["loss"] = loss
    if kind in ("prefix", "prompt"):
        settings |= {"seed": seed} | ({"tokenizer": folder} if "text" in settings else {})
    slimkit.apply_delta(model, kind, **settings)
    return model


def tokens(folder: str) -> list[int]:
    """The text as the model reads it."""
    from transformers import AutoTokenizer

    found: list[int] = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    return found


def groups(way: str, model: Any, rate: float) -> Any:
    """What AdamW is given."""
    if way == "lora+":
        return slimkit.lora_plus_groups(model, rate, 16.0)
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": rate}]


def _calls(batches: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in batches]


def _of_peft(model: Any, settings: dict[str, Any], folder: str, batches: Sequence[torch.Tensor], loss: Loss) -> Any:
    """The same ways by PEFT, with its own defaults where it has any."""
    import peft

    kind = settings.pop("type", "lora")
    task = {"task_type": "CAUSAL_LM"}
    if kind == "prefix":
        made = peft.get_peft_model(model, peft.PrefixTuningConfig(num_virtual_tokens=len(tokens(folder)), **task))
        if "text" in settings:
            from transformers import AutoTokenizer

            peft.initialize_kv_prefix_from_text(
                made, AutoTokenizer.from_pretrained(folder), text=TEXT, use_chat_template=False
            )
        return made
    if kind == "prompt":
        text = "text" in settings
        more = {"prompt_tuning_init_text": TEXT, "tokenizer_name_or_path": folder} if text else {}
        config = peft.PromptTuningConfig(
            num_virtual_tokens=len(tokens(folder)), prompt_tuning_init="TEXT" if text else "RANDOM", **more, **task
        )
        return peft.get_peft_model(model, config)
    if kind == "miss":
        return peft.get_peft_model(model, peft.MissConfig(r=16, target_modules="all-linear", **task))
    if kind == "shira":
        return peft.get_peft_model(model, peft.ShiraConfig(r=8, target_modules="all-linear", **task))
    start = settings["init_lora_weights"]
    if start == "lora_ga":
        settings["lora_ga_config"] = peft.LoraGAConfig()
    elif start == "eva":
        settings["eva_config"] = peft.EvaConfig()
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=_linear(model), **settings, **task)
    if start == "lora_ga":
        from peft.tuners.lora.loraga import preprocess_loraga

        def read() -> None:
            for ids in batches:
                loss(model, ids).backward()

        preprocess_loraga(model, config, read)
        model.zero_grad()
    made = peft.get_peft_model(model, config)
    if start == "eva":
        peft.initialize_lora_eva_weights(made, _calls(batches), show_progress_bar=False)
    return made


def _linear(model: Any) -> list[str]:
    """How the linear layers but the head are called: what "all-linear" means, in words that every start reads."""
    head = model.get_output_embeddings()
    found = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    return sorted(found)
