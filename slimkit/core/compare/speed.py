"""Speed in turn: dense, small, dense, small, so that a machine that slows down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from slimkit.core.compare.framework import CompareFramework

ROUNDS = 3
DECODED = 16  # tokens
PROMPT = 32  # tokens before them


def measure_speed(
    framework: CompareFramework,
    sources: Mapping[str, Any],
    example: Any,
    positions: int,
    prompt: np.ndarray[Any, Any] | None,
) -> dict[str, dict[str, float | None]]:
    """Medians of what each model handles a second.

    Args:
        framework: of the models.
        sources: name -> model, or a function that makes it, which is then called once a round.
        example: input of one forward.
        positions: tokens or samples of the example.
        prompt: tokens to go on from; None where there is nothing to decode.

    Returns:
        name -> prefill_per_s and decode_per_s, the latter None where a model cannot decode with a cache.
    """
    prefill: dict[str, list[float]] = {name: [] for name in sources}
    decode: dict[str, list[float]] = {name: [] for name in sources}
    for number in range(ROUNDS + 1):
        for name, source in sources.items():
            model = framework.open(source, name)
            with framework.evaluating(model):
                began = time.perf_counter()
                framework.forward(model, example)
                middle = time.perf_counter()
                decoded = prompt is not None and framework.decode(model, prompt[:PROMPT], DECODED)
                ended = time.perf_counter()
            if number:  # the first round warms up
                prefill[name].append(positions / (middle - began))
                if decoded:
                    decode[name].append(DECODED / (ended - middle))
            del model
    return {
        name: {
            "prefill_per_s": statistics.median(prefill[name]),
            "decode_per_s": statistics.median(decode[name]) if decode[name] else None,
        }
        for name in sources
    }
