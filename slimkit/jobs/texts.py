"""Text and arrays as batches for a torch model: tokenised by the model's own tokenizer, padded, cut to length."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import numpy as np

from slimkit import bridge  # noqa: F401 - says in one line that torch is missing
from slimkit.core.calibration.halves import decoder_start, halves, has_encoder
from slimkit.core.calibration.reading import TextReader
from slimkit.core.distill.masks import IGNORED
from slimkit.core.errors import ConfigError
from slimkit.core.jobs.documents import Sample, answered, is_chat, packed
from slimkit.core.lazy import library
from slimkit.core.log import logger

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
        max_length: tokens a sample, where neither the tokenizer nor the model allows fewer.

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
        """One mapping of token numbers a text, cut to length and not padded; how many were cut is said."""
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_length)
        whole = self.tokenizer(texts, verbose=False)["input_ids"]
        cut = sum(len(long) > len(kept) for long, kept in zip(whole, encoded["input_ids"]))
        if cut:
            logger.warning("%d of %d texts are longer than %d tokens and were cut", cut, len(texts), self.max_length)
        return self._samples(encoded)

    def pieces(self, texts: list[str]) -> list[dict[str, list[int]]]:
        """All of every text, the long ones in several samples; texts are never joined."""
        if not self.tokenizer.is_fast:
            return self.encode(texts)
        return self._samples(
            self.tokenizer(texts, truncation=True, max_length=self.max_length, return_overflowing_tokens=True)
        )

    def windows(self, rows: list[dict[str, Any]]) -> list[Sample]:
        """What a language model learns from: whole documents in windows, and conversations one by one."""
        texts = [row["text"] for row in rows if not is_chat(row)]
        documents = self.tokenizer(texts, verbose=False)["input_ids"] if texts else []
        found = packed(documents, self.max_length, self.tokenizer.eos_token_id)
        chats = [
            answered(row, self.tokenizer, f"sample {n + 1} of the data") for n, row in enumerate(rows) if is_chat(row)
        ]
        long = [sample for sample in chats if len(sample.ids) > self.max_length]
        if long:
            logger.warning(
                "%d of %d conversations are longer than %d tokens and were cut", len(long), len(chats), self.max_length
            )
        for sample in chats:
            kept = Sample(sample.ids[: self.max_length], sample.learned[: self.max_length])
            if any(kept.learned[1:]):
                found.append(kept)
        if not found:
            raise ConfigError(f"the data holds nothing to learn from within {self.max_length} tokens")
        return found

    def pad(self, samples: list[dict[str, Any]], length: int | None = None) -> dict[str, Any]:
        """A batch of tensors, padded to the longest sample, or to `length`."""
        how: dict[str, Any] = {"padding": True} if length is None else {"padding": "max_length", "max_length": length}
        padded = self.tokenizer.pad(samples, return_tensors="pt", **how)
        return {k: v for k, v in padded.items() if k in self.taken}

    def labelled(self, samples: list[Sample], length: int | None = None) -> tuple[dict[str, Any], torch.Tensor]:
        """A batch of tensors and its labels: -100 on padding, on what is not learned and on each first token."""
        rows = [{"input_ids": s.ids, "attention_mask": [1] * len(s.ids)} for s in samples]
        how: dict[str, Any] = {"padding": True} if length is None else {"padding": "max_length", "max_length": length}
        padded = self.tokenizer.pad(rows, return_tensors="pt", **how)
        # The mask, not the token, says what is padding: a padding token may well be the end-of-text token.
        labels = torch.full_like(padded["input_ids"], IGNORED)
        labels[padded["attention_mask"] == 1] = torch.tensor([label for s in samples for label in s.labels])
        return {k: v for k, v in padded.items() if k in self.taken}, labels

    def batches(self, texts: list[str], batch_size: int) -> list[dict[str, Any]]:
        """All texts in order, as padded batches."""
        samples = self.encode(texts)
        return [self.pad(samples[i : i + batch_size]) for i in range(0, len(samples), batch_size)]

    def _samples(self, encoded: Any) -> list[dict[str, list[int]]]:
        keys = [k for k in encoded if k in self.taken]
        return [{k: encoded[k][i] for k in keys} for i in range(len(encoded["input_ids"]))]


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
    both = has_encoder(config)
    causal = kind.__name__.endswith(("ForCausalLM", "LMHeadModel")) and not both

    def make(ids: np.ndarray[Any, Any], mask: np.ndarray[Any, Any]) -> dict[str, torch.Tensor]:
        found = {"input_ids": ids, "attention_mask": mask}
        if both:
            found = halves(ids, mask, decoder_start(config))
        return {k: torch.from_numpy(np.ascontiguousarray(v)).to(device) for k, v in found.items() if k in read.taken}

    return TextReader(read.tokenizer, read.max_length, causal, make)
