"""Text and arrays as batches for a torch model: tokenised by the model's own tokenizer, padded, cut to length."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import numpy as np

from slimkit import bridge  # noqa: F401 - says in one line that torch is missing
from slimkit.core.calibration.halves import decoder_start, halves
from slimkit.core.calibration.reading import TextReader
from slimkit.core.errors import ConfigError
from slimkit.core.lazy import library

import torch


def tokenizer(directory: Path) -> Any:
    """The tokenizer of a Hugging Face directory.

    Raises:
        ConfigError: the directory holds none that transformers can read.
    """
    transformers = library("transformers", "hf")
    try:
        return transformers.AutoTokenizer.from_pretrained(str(directory))
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{directory} holds no tokenizer that can read text ({reason}); give arrays (.npz) or a function"
        ) from None


class Reader:
    """A directory's tokenizer and what its model takes.

    Args:
        directory: a Hugging Face directory with tokenizer files.
        kind: the model's class, whose forward says which of the tokenizer's outputs it takes.
        config: the model's configuration.
        max_length: tokens a text is cut to, where neither the tokenizer nor the model allows fewer.

    Raises:
        ConfigError: the directory holds no tokenizer that transformers can read.
    """

    def __init__(self, directory: Path, kind: type, config: Any, max_length: int) -> None:
        self.tokenizer = tokenizer(directory)
        if self.tokenizer.pad_token is None:
            if self.tokenizer.eos_token is None:
                raise ConfigError(f"the tokenizer of {directory} has neither a padding nor an end token")
            self.tokenizer.pad_token = self.tokenizer.eos_token
        inner = config.get_text_config() if hasattr(config, "get_text_config") else config
        bounds = [max_length, self.tokenizer.model_max_length]
        bounds += [getattr(inner, n) for n in ("max_position_embeddings", "n_positions") if hasattr(inner, n)]
        self.max_length = int(min(bounds))
        self.taken = set(inspect.signature(kind.forward).parameters)  # type: ignore[attr-defined]

    def encode(self, texts: list[str]) -> list[dict[str, list[int]]]:
        """One mapping of token numbers a text, not padded."""
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_length)
        keys = [k for k in encoded if k in self.taken]
        return [{k: encoded[k][i] for k in keys} for i in range(len(texts))]

    def pad(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of tensors, padded to the longest sample."""
        padded = self.tokenizer.pad(samples, padding=True, return_tensors="pt")
        return {k: v for k, v in padded.items() if k in self.taken}

    def batches(self, texts: list[str], batch_size: int) -> list[dict[str, Any]]:
        """All texts in order, as padded batches."""
        samples = self.encode(texts)
        return [self.pad(samples[i : i + batch_size]) for i in range(0, len(samples), batch_size)]


def reader(directory: Path, kind: type, config: Any, device: torch.device) -> TextReader:
    """How the model of a Hugging Face directory reads calibration text; no weights are read.

    Args:
        directory: with a tokenizer.
        kind: the model's class.
        config: its configuration.
        device: where batches are wanted.

    Raises:
        ConfigError: the directory holds no tokenizer that transformers can read.
    """
    read = Reader(directory, kind, config, sys.maxsize)
    both = bool(getattr(config, "is_encoder_decoder", False))
    causal = kind.__name__.endswith(("ForCausalLM", "LMHeadModel")) and not both

    def make(ids: np.ndarray[Any, Any], mask: np.ndarray[Any, Any]) -> dict[str, torch.Tensor]:
        found = {"input_ids": ids, "attention_mask": mask}
        if both:
            found = halves(ids, mask, decoder_start(config))
        return {k: torch.from_numpy(np.ascontiguousarray(v)).to(device) for k, v in found.items() if k in read.taken}

    return TextReader(read.tokenizer, read.max_length, causal, make)
