"""A teacher of another vocabulary while its answers are written: what it reads, what is kept, and how much that is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import floor
from typing import Any, NamedTuple

import numpy as np

from slimkit.core import check
from slimkit.core.distill.config import LOSSES, DistillSpec
from slimkit.core.distill.sampling import READ_BY
from slimkit.core.distill.vocabulary import VocabularyMap, at_places
from slimkit.core.errors import ConfigError
from slimkit.core.log import logger

Array = np.ndarray[Any, Any]

# Of a teacher's probability, on average, the least that must lie on classes which the student has.
AT_LEAST = 0.9


class Seat(NamedTuple):
    """Where in a teacher's answers the student's positions are.

    Args:
        places: (rows, the student's length); None where they are the same.
        counts: (rows, the student's length), whether a position counts; None: all do.
        tokens: how many of the tokens read are the teacher's own, unknown to it, and how many there are.
    """

    places: Array | None
    counts: Array | None
    tokens: Sequence[int] = (0, 0, 0)


class ForeignTeacher:
    """What lies between a student's batches and a teacher of another vocabulary.

    Args:
        vocabulary: the map.
        spec: what is compared.
        facts: of the cache; what is counted goes into facts["mapped"].
        to_numpy, to_tensor: of the framework.
        at_least: the least share of the teacher's probability that must be mapped, on average.

    Raises:
        ConfigError: a loss that reads logits of classes which the teacher lacks.
    """

    def __init__(
        self,
        vocabulary: VocabularyMap,
        spec: DistillSpec,
        facts: dict[str, Any],
        to_numpy: Callable[[Any], Array | None],
        to_tensor: Callable[[Array, Any], Any],
        at_least: float,
    ) -> None:
        self.vocabulary, self._to_numpy, self._to_tensor = vocabulary, to_numpy, to_tensor
        self.at_least = check.number(at_least, "mapped_at_least", minimum=0)
        if at_least > 1:
            check.wrong_value("mapped_at_least", "a share of at most 1", at_least)
        self._logits = [
            all(LOSSES.get(term.func_name, ("",))[0] == "logits" for term in label.losses) for label in spec.soft_labels
        ]
        known = (*READ_BY, "HardKDCrossEntropy")
        for label, logits in zip(spec.soft_labels, self._logits):
            odd = sorted({term.func_name for term in label.losses} - set(known)) if logits else []
            if odd and not vocabulary.whole:
                raise ConfigError(
                    f"vocabulary: {label.label} has {', '.join(odd)}, and the teacher lacks classes of the student's; "
                    f"that is for {', '.join(known)}"
                )
        # [the sum, how many] of shares of probability; tokens that are the teacher's own, unknown to it, and all
        self.counted: dict[str, list[float]] = facts.setdefault(
            "mapped", {"probability": [0.0, 0], "tokens": [0, 0, 0]}
        )
        self._judged = bool(self.counted["probability"][1])

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any, Seat]:
        """What the teacher is called with where the student is called so, and where its answers then are."""
        named = "input_ids" in kwargs
        given = kwargs.get("input_ids") if named else args[0] if args else None
        ids = None if given is None else self._to_numpy(given)
        mask = self._to_numpy(kwargs["attention_mask"]) if "attention_mask" in kwargs else None
        counts = None if mask is None or mask.ndim != 2 else mask != 0
        if self.vocabulary.same_inputs:
            return args, kwargs, Seat(None, counts)
        odd = sorted(set(kwargs) - {"input_ids", "attention_mask"})
        if ids is None or ids.ndim != 2 or ids.dtype.kind not in "iu" or odd or len(args) > (0 if named else 1):
            more = f"; {', '.join(odd)} cannot be told of another vocabulary" if odd else ""
            raise ConfigError(
                f"vocabulary: a batch must be tokens (rows, length), alone or as input_ids with an attention_mask{more}"
            )
        told, valid, places, tokens = self.vocabulary.inputs(ids, mask)
        if not named:
            return (self._to_tensor(told, given),), kwargs, Seat(places, counts, tokens)
        found = {"input_ids": self._to_tensor(told, given)}
        if mask is not None or not valid.all():
            found["attention_mask"] = self._to_tensor(valid, given)
        return (), found, Seat(places, counts, tokens)

    def answers(self, arrays: Sequence[Array], seat: Seat) -> list[Array]:
        """The teacher's tensors at the student's positions, logits over the student's classes."""
        found = []
        # Counted with the answers and not with the calls, some of which a stopped build makes again.
        self.counted["tokens"] = [a + b for a, b in zip(self.counted["tokens"], seat.tokens)]
        for array, logits in zip(arrays, self._logits):
            if seat.places is not None:
                array = at_places(array, seat.places)
            if logits:
                rows = array if seat.counts is None or array.ndim < 3 else array[seat.counts]
                share = self.vocabulary.mass(rows)
                old = self.counted["probability"]
                self.counted["probability"] = [old[0] + float(share.sum()), old[1] + share.size]
                array = self.vocabulary.logits(array)
            found.append(array)
        if not self._judged:
            self.judge()  # hours may lie ahead
        self._judged = True
        return found

    def judge(self) -> None:
        """Say how much was mapped.

        Raises:
            ConfigError: too little.
        """
        (sum_of, count), (own, unknown, total) = self.counted["probability"], self.counted["tokens"]
        if not count:
            return
        share, v = sum_of / count, self.vocabulary
        said = f"{share:.1%} of the teacher's probability lies on tokens that the student has"
        if total:
            said += f"; {own / total:.1%} of the tokens it reads are its own, {unknown / total:.1%} unknown to it"
        if share < self.at_least:
            enough = floor(share * 100) / 100  # as it is said, it is to be accepted
            raise ConfigError(
                f"vocabulary: {said}. At least {self.at_least:.1%} must; mapped_at_least={enough:.2f} accepts it"
            )
        logger.info("%s (%d of its %d tokens)", said, v.mapped_classes, v.teacher_tokens)
