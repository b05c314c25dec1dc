"""From one vocabulary to another: a teacher reads a student's tokens, and its classes become the student's."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from slimkit.core import check
from slimkit.core.errors import ConfigError
from slimkit.core.showing import Shown

Array = np.ndarray[Any, Any]
Text = tuple[str, bytes]  # ("text", its bytes), ("role", "eos") or ("special", its spelling)

# So far below a row's largest logit lies a class that the teacher does not know: a probability of zero in float32.
BELOW = 1e4
# A token of several roles stands for the first: what ends texts is foretold, what begins them is only read.
ROLES = ("eos", "bos", "pad", "unk", "sep", "cls", "mask")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_of() -> dict[str, int]:
    """The letters in which byte-level vocabularies write bytes (Radford et al. 2019, GPT-2's encoder)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(rest)}


def texts_of(tokenizer: Any) -> dict[int, Text]:
    """What each token of a vocabulary stands for, in bytes of text, however its family spells spaces and parts.

    Byte-level vocabularies ("Ġcat"), SentencePiece ("▁cat", "<0x0A>"), WordPiece ("cat", "##s") and plain words are
    told apart by their marks. Special tokens stand for their role ("eos"), or for their own spelling.

    Args:
        tokenizer: with `get_vocab()` and, where it has them, `bos_token_id`, ..., `all_special_ids`; or a mapping of
            spellings to ids, of which none is special.

    Raises:
        ArgumentTypeError: neither of the two.

    Example:
        >>> texts_of({"▁cat": 0, "s": 1, "<0x0A>": 2})
        {0: ('text', b' cat'), 1: ('text', b's'), 2: ('text', b'\\n')}
    """
    if isinstance(tokenizer, Mapping):
        vocabulary: Mapping[str, int] = tokenizer
    elif hasattr(tokenizer, "get_vocab"):
        vocabulary = tokenizer.get_vocab()
    else:
        check.wrong_type("tokenizer", "a tokenizer with get_vocab(), or a mapping of tokens to ids", tokenizer)
    roles: dict[int, str] = {}
    for role in ROLES:
        roles.setdefault(_token_of(tokenizer, role), role)
    special = set(getattr(tokenizer, "all_special_ids", ())) | set(getattr(tokenizer, "added_tokens_decoder", ()))
    plain = [token for token, number in vocabulary.items() if number not in special]
    read = _reader(plain)
    found: dict[int, Text] = {}
    for token, number in sorted(vocabulary.items(), key=lambda item: item[1]):
        if number in roles:
            found[number] = "role", roles[number].encode()
        elif number in special:
            found[number] = "special", token.encode()
        else:
            found[number] = "text", read(token)
    return found


def _token_of(tokenizer: Any, role: str) -> int:
    """The token that has a role; -1 for none."""
    number = getattr(tokenizer, f"{role}_token_id", None)
    return number if isinstance(number, int) else -1


def _with_roles(numbers: dict[Text, int], tokenizer: Any) -> dict[Text, int]:
    """Text -> token, where a token that begins and ends texts stands for both."""
    for role in ("bos", "eos"):
        number = _token_of(tokenizer, role)
        if number >= 0:
            numbers.setdefault(("role", role.encode()), number)
    return numbers


def _reader(tokens: Sequence[str]) -> Callable[[str], bytes]:
    """How a family of vocabularies spells text, by the marks in its tokens."""
    # The more frequent mark: a large vocabulary has the other one, too, as a letter (Maltese) or a sign.
    bytewise, pieces = sum(token.startswith("Ġ") for token in tokens), sum("▁" in token for token in tokens)
    if bytewise > pieces:
        of = _byte_of()
        return lambda token: bytes(of[c] for c in token) if all(c in of for c in token) else token.encode()
    if pieces:
        return _sentence_piece
    if any(token.startswith("##") for token in tokens):
        return lambda token: token[2:].encode() if token.startswith("##") else b" " + token.encode()
    return lambda token: b" " + token.encode()


def _sentence_piece(token: str) -> bytes:
    found = _BYTE.fullmatch(token)
    return bytes([int(found[1], 16)]) if found else token.replace("▁", " ").encode()


class VocabularyMap(Shown):
    """How a teacher of another vocabulary, or of another size of its output table, teaches a student.

    The student's tokens are read to the teacher as tokens of the same text, or spelled by several; each position of the
    student then is the teacher's position after the same text. A class of the teacher is the student's class of the
    same text; the others have none, and the teacher's distribution is the one over those that have.

    Args:
        teacher: the teacher's tokenizer, or its mapping of tokens to ids; see `texts_of`.
        student: the student's.
        student_classes: rows of the student's output table, where it has more than tokens (padding).

    Raises:
        ArgumentTypeError, ArgumentError: no vocabularies, or fewer classes than tokens.

    Example:
        >>> found = VocabularyMap({"cat": 0, "dog": 1, "cow": 2}, {"dog": 0, "cat": 1}, student_classes=3)
        >>> found.logits(np.array([[1.0, 2.0, 3.0, 0.5]])).tolist()
        [[2.0, 1.0, -9998.0]]
        >>> found.inputs(np.array([[0, 0, 1]]))[0].tolist()
        [[1, 1, 0]]
    """

    def __init__(self, teacher: Any, student: Any, *, student_classes: int | None = None) -> None:
        theirs, mine = texts_of(teacher), texts_of(student)
        if not theirs or not mine:
            check.wrong_value("tokenizer", "a vocabulary with tokens", teacher if not theirs else student)
        least = max(mine) + 1
        self.student_classes = least if student_classes is None else check.positive(student_classes, "student_classes")
        if self.student_classes < least:
            check.wrong_value("student_classes", f"at least the student's {least} tokens", student_classes)
        place = _with_roles({text: number for number, text in reversed(mine.items())}, student)
        # Of several tokens of one text each is itself, where the other vocabulary has it there too.
        self._classes = {n: n if mine.get(n) == t else place[t] for n, t in theirs.items() if t in place}
        self._least = max(theirs) + 1
        first = _with_roles({text: number for number, text in reversed(theirs.items())}, teacher)
        # The empty tuple: nothing of the teacher's stands for this token.
        self._spelled = {n: (n,) if theirs.get(n) == t else _spelling(t, first) for n, t in mine.items()}
        self._unknown = next((n for n, text in theirs.items() if text == ("role", b"unk")), None)
        self._texts = mine
        self.same_inputs = all(self._spelled[number] == (number,) for number in mine)
        self._begin = () if self.same_inputs else _begins(teacher)
        self._pad = next((n for n, text in theirs.items() if text == ("role", b"pad")), 0)
        self.mapped_classes = len(self._classes)
        self.teacher_tokens, self.student_tokens = len(theirs), len(mine)

    def _rows(self) -> Iterable[tuple[str, Any]]:
        yield "teacher's tokens", f"{self.teacher_tokens:,}, of which {self.mapped_classes:,} are the student's too"
        yield "student's tokens", f"{self.student_tokens:,}"
        yield "student's classes", f"{self.student_classes:,}"

    @property
    def digest(self) -> str:
        """A digest of all that the map says."""
        said = [self.student_classes, sorted(self._classes.items()), sorted(self._spelled.items()), self._begin]
        return hashlib.sha256(repr(said).encode()).hexdigest()

    def logits(self, logits: Array) -> Array:
        """A teacher's logits (..., its classes) as logits (..., the student's classes).

        Where several of its classes are one of the student's, their probabilities are added up. A class of the
        student's that the teacher lacks lies `BELOW` under the largest.

        Raises:
            ConfigError: the teacher has fewer classes than tokens, or none that the student has.
        """
        theirs, mine, starts = self._sorted(logits.shape[-1])
        taken = logits[..., theirs]
        if len(starts) < len(theirs):
            taken = np.logaddexp.reduceat(taken, starts, axis=-1)
        if len(starts) == self.student_classes:
            return np.ascontiguousarray(taken)  # in the order of the student's classes already
        floor = taken.max(-1, keepdims=True) - BELOW
        full = np.repeat(floor, self.student_classes, -1).astype(logits.dtype)
        full[..., mine[starts]] = taken
        return full

    def mass(self, logits: Array) -> Array:
        """The share of a teacher's probability (...) that lies on classes which the student has.

        Example:
            >>> VocabularyMap({"a": 0, "b": 1}, {"b": 0}).mass(np.log([[0.25, 0.75]])).round(6).tolist()
            [0.75]
        """
        theirs, _, _ = self._sorted(logits.shape[-1])
        x = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
        return np.asarray(x[..., theirs].sum(-1) / x.sum(-1))

    @property
    def whole(self) -> bool:
        """Whether the teacher has a class for each of the student's."""
        return len(set(self._classes.values())) == self.student_classes

    def _sorted(self, width: int) -> tuple[Array, Array, Array]:
        """The teacher's classes that are the student's in the order of these, which they are, where each begins."""
        if width < self._least:
            raise ConfigError(f"the teacher has {width} classes, and its vocabulary {self._least} tokens")
        if not self._classes:
            raise ConfigError("the teacher's and the student's vocabularies have no token of the same text")
        pairs = sorted((mine, theirs) for theirs, mine in self._classes.items())
        mine, theirs = (np.array(x, np.int64) for x in zip(*pairs))
        return theirs, mine, np.flatnonzero(np.diff(mine, prepend=-1))

    def inputs(self, ids: Array, mask: Array | None = None) -> tuple[Array, Array, Array, list[int]]:
        """What the teacher reads where the student reads these tokens.

        Args:
            ids: (rows, length).
            mask: (rows, length), 1 where a token counts; None: all do.

        Returns:
            The teacher's tokens (rows, its length) and their mask, padded at the end; for each of the student's
            positions (rows, length) the teacher's after the same text; and how many tokens are one of the teacher's,
            how many it has nothing for (its unknown token stands there), and how many there are.

        Raises:
            ConfigError: a token that the teacher has nothing for, not even an unknown token.
        """
        counts = np.ones(ids.shape, bool) if mask is None else np.asarray(mask) != 0
        rows: list[list[int]] = []
        places, own, unknown = np.zeros(ids.shape, np.int64), 0, 0
        for row in range(len(ids)):
            said: list[int] = []
            for at in np.flatnonzero(counts[row]):
                number = int(ids[row, at])
                spelled = self._spelled.get(number, ())
                own, unknown = own + (len(spelled) == 1), unknown + (not spelled)
                if not spelled:
                    if self._unknown is None:
                        text = self._texts.get(number, ("no token", b""))[1]
                        raise ConfigError(
                            f"the teacher's vocabulary cannot spell the student's token {number}, {text!r}"
                        )
                    spelled = (self._unknown,)
                if not said and spelled[: len(self._begin)] != self._begin:
                    said += self._begin
                said += spelled
                places[row, at] = len(said) - 1
            rows.append(said)
        length = max(1, *map(len, rows))
        told, valid = np.full((len(rows), length), self._pad, ids.dtype), np.zeros((len(rows), length), ids.dtype)
        for row, said in enumerate(rows):
            told[row, : len(said)], valid[row, : len(said)] = said, 1
        return told, valid, places, [own, unknown, int(counts.sum())]


def _begins(tokenizer: Any) -> tuple[int, ...]:
    """What a tokenizer puts before a text by itself."""
    if not callable(tokenizer):
        return ()
    first = list(tokenizer("a")["input_ids"])[:1]
    return tuple(n for n in first if n in (_token_of(tokenizer, "bos"), _token_of(tokenizer, "cls")))


def _spelling(text: Text, first: Mapping[Text, int]) -> tuple[int, ...]:
    """Tokens that together are a token's text: it itself, or the longest ones from the left; else nothing."""
    if text in first:
        return (first[text],)
    kind, left = text
    found: list[int] = []
    while kind == "text" and left:
        size = next((n for n in range(len(left), 0, -1) if ("text", left[:n]) in first), 0)
        if not size:
            return ()
        found.append(first["text", left[:size]])
        left = left[size:]
    return tuple(found)


def at_places(array: Array, places: Array) -> Array:
    """What a teacher says at its positions (rows, student's length) of (rows, its length, ...); else the array.

    Example:
        >>> at_places(np.array([[[1], [2], [3]]]), np.array([[2, 0]])).tolist()
        [[[3], [1]]]
    """
    if array.ndim < 3:
        return array
    return np.ascontiguousarray(array[np.arange(len(array))[:, None], places])
