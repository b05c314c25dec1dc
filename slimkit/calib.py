"""Calibration sets of torch tensors, and text that a torch language model writes itself."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimkit import bridge
from slimkit.core.calibration.own import OwnText, OwnTextOptions, start_token, write_own_text
from slimkit.core.calibration.sets import CalibrationSet, calibration_set

import torch
from torch import nn

__all__ = ["CalibrationSet", "calibration", "own_text"]


def calibration(
    texts: Any,
    tokenizer: Any,
    n: int = 128,
    length: int = 512,
    seed: int = 0,
    *,
    weights: Sequence[float] | None = None,
    pack: bool | str = "auto",
    batch_size: int = 4,
    masks: bool = True,
    held_out: Any = None,
    text_key: str = "text",
) -> CalibrationSet:
    """Draw windows of tokens from texts, for `Compressor`, `Pruner` and whatever else reads typical inputs.

    Windows come from all over the texts and not from their head: documents in random order, from a long one a piece at
    a random place. Short documents are packed whole, an end-of-text token behind each, or padded with masks; the log
    says which. Windows begin with the beginning-of-sequence token where the tokenizer begins texts with it.

    Args:
        texts: a file (.jsonl, .txt, .parquet), texts, rows with a text or with "messages" (written with the chat
            template), rows of token numbers, or a data set of Hugging Face's `datasets`; with `weights` a list of such.
        tokenizer: of transformers or alike; None for rows of token numbers.
        n: windows; fewer come, with a warning, where the texts hold no more.
        length: tokens a window.
        seed: of the order and the places.
        weights: of the sources in `texts`: windows are shared out by them.
        pack: whether short documents are packed; "auto": unless the tokenizer has a [CLS] token, as encoders' have.
        batch_size: windows in a batch.
        masks: give batches a mask; False gives the tokens alone, for models that take nothing else.
        held_out: texts that judge the result later, refused where windows were drawn from them.
        text_key: key or column of the text.

    Returns:
        Batches ``{"input_ids": (batch, length), "attention_mask": (batch, length)}`` of int64 tensors, with `record`.

    Raises:
        ArgumentTypeError, ArgumentError: no documents, or calibration and held-out text are mixed.

    Example:
        >>> found = calibration([[1, 2, 3, 4, 5], [6, 7, 8, 9]], None, n=2, length=4, seed=0)
        >>> len(found), tuple(found[0]["input_ids"].shape), found.record["windows"]
        (1, (2, 4), 2)
    """
    return calibration_set(
        texts, tokenizer, n, length, seed, torch.from_numpy, weights=weights, pack=pack, batch_size=batch_size,
        masks=masks, held_out=held_out, text_key=text_key,
    )  # fmt: skip


def own_text(
    model: nn.Module, n: int, length: int, seed: int = 0, *, start: int | None = None, file: Any = None
) -> OwnText:
    """Rows of tokens that a language model writes itself, sampled from its own start, to calibrate on without data.

    Args:
        model: gives logits (batch, length, vocabulary); one of transformers is asked with its cache.
        n: rows.
        length: tokens a row, the start token apart.
        seed: of the sampling; a row depends on the seed and its number.
        start: the token that a text begins with; None: the beginning-of-sequence token of the model's configuration, or
            its end-of-text token.
        file: keep the rows in this .jsonl file: what it holds already is not written again. None: in memory alone.

    Returns:
        The rows, a sequence for `calibration(rows, None, ...)`, with `record`.

    Raises:
        ArgumentError: no start token is known, or the file holds rows of another model, seed or length.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
        >>> rows = own_text(model, 2, 5, start=0)
        >>> len(rows), len(rows[0])
        (2, 5)
    """
    bridge.check_whole(model, "model")
    options = OwnTextOptions(n, length, seed, start_token(model) if start is None else start)
    with bridge.evaluating(model), torch.no_grad():
        return write_own_text(_Writer(model), options, _states(model), None if file is None else Path(file))


def _states(model: nn.Module) -> dict[str, np.ndarray[Any, Any]]:
    return {
        name: tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        for name, tensor in model.state_dict().items()
    }


class _Writer:
    """One token of every row at a time, with the cache that models of transformers have."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        takes = inspect.signature(type(model).forward).parameters
        self._caches = {"input_ids", "past_key_values", "use_cache"} <= set(takes)

    def __call__(self, ids: np.ndarray[Any, Any], state: Any) -> tuple[np.ndarray[Any, Any], Any]:
        """Logits (rows, vocabulary) of what follows the rows' tokens (rows, so far)."""
        device = bridge.device_of(self._model)
        if not self._caches:
            found = bridge.run(self._model, torch.from_numpy(ids).to(device))
            found = getattr(found, "logits", found)
            return found[:, -1].float().cpu().numpy(), None
        last = torch.from_numpy(ids if state is None else ids[:, -1:]).to(device)
        made = self._model(input_ids=last, past_key_values=state, use_cache=True)
        return made.logits[:, -1].float().cpu().numpy(), made.past_key_values
