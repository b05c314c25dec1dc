"""LoRA+: optimizer groups in which b learns faster than a."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slimkit.core import check
from slimkit.core.delta.spec import PREFIX
from slimkit.core.errors import ArgumentError


def plus_groups(
    named: Sequence[tuple[str, Any]], lr: Any, ratio: Any = 16.0, weight_decay: Any = 0.0
) -> list[dict[str, Any]]:
    """Optimizer groups in which LoRA's b learns faster than a; see `lora_plus_groups` of the wings."""
    check.number(lr, "lr", minimum=0)
    check.number(ratio, "ratio", minimum=0)
    check.number(weight_decay, "weight_decay", minimum=0)
    fast = [p for n, p in named if f"{PREFIX}lora_b" in n]
    slow = [p for n, p in named if f"{PREFIX}lora_b" not in n]
    if not fast:
        raise ArgumentError("no lora_b trains in this model; call apply_delta(model, 'lora', ...) first.")
    groups = [{"params": fast, "lr": lr * ratio, "weight_decay": weight_decay}]
    return groups + ([{"params": slow, "lr": lr, "weight_decay": weight_decay}] if slow else [])
