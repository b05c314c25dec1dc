"""Text for models with an encoder and a decoder: the encoder reads a window's first half, the decoder goes on."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def has_encoder(owner: Any) -> bool:
    """Whether a model has an encoder and a decoder, by transformers' configuration: its own, or one itself."""
    return bool(getattr(getattr(owner, "config", owner), "is_encoder_decoder", False))


def decoder_start(config: Any) -> int:
    """The token that a decoder begins with; where the configuration has none, padding, as in T5."""
    found = getattr(config, "decoder_start_token_id", None)
    return int((getattr(config, "pad_token_id", None) or 0) if found is None else found)


def halves(ids: Array, mask: Array, start: int) -> dict[str, Array]:
    """What an encoder and a decoder get of windows.

    Args:
        ids, mask: (batch, length).
        start: the token that a decoder begins with.

    Returns:
        input_ids and attention_mask (batch, length // 2), decoder_input_ids and decoder_attention_mask (batch, rest):
        row i of the decoder's logits predicts token length // 2 + i.

    Example:
        >>> found = halves(np.array([[5, 6, 7, 8, 9]]), np.ones((1, 5), int), 0)
        >>> found["input_ids"].tolist(), found["decoder_input_ids"].tolist()
        ([[5, 6]], [[0, 7, 8]])
    """
    middle = ids.shape[1] // 2
    begin = np.full((len(ids), 1), start, ids.dtype)
    return {
        "input_ids": ids[:, :middle],
        "attention_mask": mask[:, :middle],
        "decoder_input_ids": np.concatenate([begin, ids[:, middle:-1]], 1),
        "decoder_attention_mask": mask[:, middle:],
    }
