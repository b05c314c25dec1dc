"""Calibration sets of MindSpore tensors, and text that a MindSpore language model writes itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimkit.core.calibration.own import OwnText, OwnTextOptions, start_token, write_own_text
from slimkit.core.calibration.sets import CalibrationSet, calibration_set
from slimkit_ms import bridge

import mindspore as ms
from mindspore import nn

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
        Batches ``{"input_ids": (batch, length), "attention_mask": (batch, length)}`` of int32 tensors, with `record`.

    Raises:
        ArgumentTypeError, ArgumentError: no documents, or calibration and held-out text are mixed.

    Example:
        >>> found = calibration([[1, 2, 3, 4, 5], [6, 7, 8, 9]], None, n=2, length=4, seed=0)
        >>> len(found), tuple(found[0]["input_ids"].shape), found.record["windows"]
        (1, (2, 4), 2)
    """
    return calibration_set(
        texts, tokenizer, n, length, seed, _tensor, weights=weights, pack=pack, batch_size=batch_size,
        masks=masks, held_out=held_out, text_key=text_key,
    )  # fmt: skip


def own_text(
    model: nn.Cell, n: int, length: int, seed: int = 0, *, start: int | None = None, file: Any = None
) -> OwnText:
    """Rows of tokens that a language model writes itself, sampled from its own start, to calibrate on without data.

    Args:
        model: gives logits (batch, length, vocabulary); it is asked for whole rows, since cells have no common cache.
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
        >>> model = nn.SequentialCell(nn.Embedding(9, 4), nn.Dense(4, 9))
        >>> rows = own_text(model, 2, 5, start=0)
        >>> len(rows), len(rows[0])
        (2, 5)
    """
    bridge.check_model(model, "model")
    options = OwnTextOptions(n, length, seed, start_token(model) if start is None else start)
    with bridge.pynative(), bridge.evaluating(model):
        return write_own_text(_writer(model), options, _states(model), None if file is None else Path(file))


def _tensor(array: np.ndarray[Any, Any]) -> ms.Tensor:
    return ms.Tensor(array.astype(np.int32))


def _states(model: nn.Cell) -> dict[str, np.ndarray[Any, Any]]:
    return {paths[0]: bridge.as_numpy(p) for p, paths in bridge.parameter_paths(model)}


def _writer(model: nn.Cell) -> Any:
    def step(ids: np.ndarray[Any, Any], state: Any) -> tuple[np.ndarray[Any, Any], Any]:
        """Logits (rows, vocabulary) of what follows the rows' tokens (rows, so far)."""
        found = bridge.run(model, _tensor(ids))
        while isinstance(found, (tuple, list)):
            found = found[0]
        return bridge.as_numpy(found[:, -1]).astype(np.float32), None

    return step
