"""An example of what a model takes, found where the model itself says so."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from slimkit.core.errors import ArgumentError
from slimkit.core.log import logger

T = TypeVar("T")
Array = np.ndarray[Any, Any]

SIZES = (224, 64, 32, 28)  # sides of images, in the order they are tried
# A length that is no usual width: two axes that are equal by chance would look like one.
_TOKENS, _MORE_TOKENS, _FRAMES, _SAMPLES = 11, 64, 16, 16_000


class NoExampleError(ArgumentError):
    """No example was found; `reason` says why, in no door's words.

    Args:
        reason: why.
        tried: what was tried -> why it did not run.
    """

    def __init__(self, reason: str, tried: Mapping[str, str] | None = None) -> None:
        listed = "; ".join(f"{words} ({why})" for words, why in (tried or {}).items())
        more = f". Tried: {listed}" if listed else ""
        what = "inputs must be an example of what the model takes (a tensor, tuple, list or dict)"
        super().__init__(f"{what}: {reason}. Received: None{more}")
        self.reason = reason + more


class FirstLayer(NamedTuple):
    """The first layer that a model defines and that says what it takes.

    Args:
        path: its name.
        word: "conv", "linear", "embedding" or "recurrent".
        width: channels or features that it takes; of an embedding, how many ids there are.
        space: axes of space that a convolution runs over.
    """

    path: str
    word: str
    width: int
    space: int = 0


class Candidate(NamedTuple):
    """What may run.

    Args:
        source: where it is from, in words.
        inputs: makes it: NumPy arrays, or what the model holds itself.
    """

    source: str
    inputs: Callable[[], Any]


class Example(NamedTuple):
    """What ran.

    Args:
        inputs: a tensor, a tuple of arguments, or a dict of keyword arguments.
        note: one line that says what was taken, and from where.
    """

    inputs: Any
    note: str


def find_example(
    model: Any,
    takes: Collection[str],
    first: FirstLayer | None,
    tensor: Callable[[Array], Any],
    attempts: Sequence[Callable[[Any], T]],
) -> tuple[Example, T]:
    """The first example on which a model runs, and what the run gave.

    Sought in this order: what a Hugging Face configuration and `dummy_inputs` describe, timm's `pretrained_cfg` or
    `default_cfg`, Lightning's `example_input_array`, the transforms of torchvision's weights, the first layer.

    Args:
        model: the model.
        takes: names of its arguments.
        first: its first layer, if there is one that says what it takes.
        tensor: makes the framework's tensor of a NumPy array, floats in the model's own type.
        attempts: ways to run the model on an example, cheapest first; each raises where it does not run.

    Returns:
        (the example, what the attempt returned).

    Raises:
        NoExampleError: the model ran on none; the message lists what was tried.
    """
    tried: dict[str, str] = {}
    for group in _groups(model, takes, first):
        made: list[tuple[str, Any]] = []
        for source, make in group:
            try:
                inputs = _tensors(make(), tensor)
            except Exception as error:  # noqa: BLE001  (a property of the model's own may raise anything)
                tried[source] = _reason(error)
            else:
                made.append((source if inputs is None else f"{source}: {shown(inputs)}", inputs))
        for attempt in attempts:
            for words, inputs in made:
                try:
                    result = attempt(inputs)
                except Exception as error:  # noqa: BLE001  (whatever the model's code raises is a finding)
                    tried[words] = _reason(error)
                    continue
                note = f"no inputs were given; the model was run on {words}"
                logger.info("%s", note)
                return Example(inputs, note), result
    if not tried:
        raise NoExampleError(
            "nothing in this model says what that is (a configuration, example_input_array, a first Conv, Linear or "
            "Embedding)"
        )
    raise NoExampleError("the model ran on nothing that was tried", tried)


def _tensors(value: Any, tensor: Callable[[Array], Any]) -> Any:
    """The same with tensors for its arrays; what the model held itself is left as it is."""
    if isinstance(value, Mapping):
        return {name: _tensors(inner, tensor) for name, inner in value.items()}
    return tensor(value) if isinstance(value, np.ndarray) else value


def shown(inputs: Any) -> str:
    """An example as names and shapes.

    Example:
        >>> shown({"ids": np.zeros((1, 4))}), shown(np.zeros(3))
        ('ids (1, 4)', '(3,)')
    """
    if isinstance(inputs, Mapping):
        return ", ".join(f"{name} {shown(value)}" for name, value in inputs.items())
    if isinstance(inputs, (tuple, list)):
        return ", ".join(shown(value) for value in inputs)
    return str(tuple(inputs.shape)) if hasattr(inputs, "shape") else type(inputs).__name__


def _reason(error: Exception) -> str:
    text = " ".join(str(error).rpartition("example given: ")[2].split())
    return (text if len(text) <= 120 else text[:117] + "...") or type(error).__name__


def _groups(model: Any, takes: Collection[str], first: FirstLayer | None) -> Iterator[list[Candidate]]:
    yield _huggingface(model, takes)
    yield _timm(model)
    if _held(model, "example_input_array") is not None:
        yield [Candidate("example_input_array", lambda: model.example_input_array)]
    yield _torchvision(model, first)
    yield [] if first is None else list(_of_layer(first))


def _held(model: Any, name: str) -> Any:
    """An attribute, or what stands for one that raises: asking again raises it where it is listed."""
    try:
        return getattr(model, name, None)
    except Exception:  # noqa: BLE001  (a property of the model's own may raise anything)
        return True


# Hugging Face ----------------------------------------------------------------------------------


def _huggingface(model: Any, takes: Collection[str]) -> list[Candidate]:
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", "input_ids")
    own = [Candidate("dummy_inputs", lambda: model.dummy_inputs)] if _held(model, "dummy_inputs") is not None else []
    if not hasattr(config, "to_dict"):
        return own
    told = Candidate("the model's configuration", lambda: described(config, main, takes))
    # What a text model carries says it best; of other models it is the text of the base class, which says nothing.
    return [*own, told] if main == "input_ids" and not towers(config) else [told, *own]


def towers(config: Any) -> list[str]:
    """Which configurations of their own, beside a text's, a configuration of Hugging Face holds: "vision", "audio"."""
    return [word for word in ("vision", "audio") if getattr(config, f"{word}_config", None) is not None]


def described(
    config: Any, main: str, takes: Collection[str], *, length: int | None = None, seed: int = 0
) -> dict[str, Array]:
    """One example of what a Hugging Face model takes, by modality: text, image, video, audio, two towers, and a
    decoder's own text.

    Args:
        config: the configuration.
        main: the model's `main_input_name`.
        takes: names of its arguments.
        length: tokens of text; None takes few.
        seed: of the values.

    Returns:
        argument -> array; one sample.

    Raises:
        ArgumentError: the configuration describes none of the arguments.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, Array] = {}
    beside = towers(config)
    sees = getattr(config, "vision_config", None) or getattr(config, "encoder", None) or config
    if "pixel_values" in takes and (main == "pixel_values" or "vision" in beside):
        found["pixel_values"] = rng.standard_normal(_image_shape(sees))
    for name in ("input_features", "input_values"):
        if name in takes and (main == name or "audio" in beside):
            audio = getattr(config, "audio_config", None) or config
            found[name] = rng.standard_normal(_audio_shape(audio, name))
    text = getattr(config, "text_config", None)
    if "input_ids" in takes and (main == "input_ids" or (text is not None and found)):
        found["input_ids"] = _with_places(config, sees, _ids(text or config, length, rng))
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        found["decoder_input_ids"] = _ids(getattr(config, "decoder", None) or text or config, length, rng)
    if not found:
        raise ArgumentError(f"the configuration does not describe {main!r}")
    return {name: a if a.dtype == np.int64 else a.astype(np.float32) for name, a in found.items()}


def _number(config: Any, *names: str, default: int = 0) -> int:
    return next((n for name in names if isinstance(n := getattr(config, name, None), int) and n > 0), default)


def _image_shape(config: Any) -> tuple[int, ...]:
    size = getattr(config, "image_size", None)
    if isinstance(size, Mapping):
        size = size.get("height", SIZES[0]), size.get("width", SIZES[0])
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size or SIZES[0],) * 2
    image = (_number(config, "num_channels", "in_channels", "in_chans", default=3), *sides)
    frames = _number(config, "num_frames")
    return (1, frames, *image) if frames else (1, *image)


def _audio_shape(config: Any, name: str) -> tuple[int, ...]:
    bins = _number(config, "num_mel_bins", "input_feat_per_channel", "feature_size", default=80)
    positions = _number(config, "max_source_positions")
    if name == "input_values":  # samples, or the spectrogram of AST
        length = _number(config, "max_length")
        return (1, length, bins) if hasattr(config, "num_mel_bins") and length else (1, _SAMPLES)
    square = _number(config, "spec_size")
    if square:  # CLAP: a spectrogram that is folded into a square image
        return (1, 1, square * max(1, square // bins), bins)
    if positions and not hasattr(config, "input_feat_per_channel"):
        return (1, bins, 2 * positions)  # Whisper takes windows of one length; two frames make a position
    return (1, 8 * _FRAMES, bins)


def _ids(config: Any, length: int | None, rng: np.random.Generator) -> Array:
    words = _number(config, "vocab_size", default=2)
    if length is None:
        most = _number(config, "max_position_embeddings", "n_positions", "max_sequence_length", default=_TOKENS)
        length = min(_TOKENS, most)
    ids = rng.integers(0, words, (1, length))
    end = getattr(config, "eos_token_id", None)
    end = end[0] if isinstance(end, list) and end else end
    if isinstance(end, int) and 0 <= end < words:
        ids[ids == end] = (end + 1) % words
        ids[0, -1] = end  # pooled by CLIP and BART's classifiers
    return ids.astype(np.int64)


def _with_places(config: Any, sees: Any, ids: Array) -> Array:
    """Ids with one place for each patch of an image in front, where a language model puts images into its text."""
    word = next(
        (n for k in ("image_token_index", "image_token_id") if isinstance(n := getattr(config, k, None), int)), -1
    )
    patch = _number(sees, "patch_size")
    if word < 0 or not patch:
        return ids
    *_, height, width = _image_shape(sees)
    ids[ids == word] = word - 1 if word else 1
    return np.concatenate([np.full((1, height // patch * (width // patch)), word, ids.dtype), ids], axis=1)


# What other libraries leave on a model ----------------------------------------------------------------------


def _timm(model: Any) -> list[Candidate]:
    found = []
    for name in ("pretrained_cfg", "default_cfg"):
        config = _held(model, name)
        size = config.get("input_size") if isinstance(config, Mapping) else getattr(config, "input_size", None)
        if isinstance(size, (tuple, list)) and size:
            found.append(Candidate(f"{name}['input_size']", _floats(1, *size)))
    return found


def _torchvision(model: Any, first: FirstLayer | None) -> list[Candidate]:
    """Crops that the weights enumerated beside the model's class were trained on."""
    module = sys.modules.get(type(model).__module__)
    channels = first.width if first is not None and first.word == "conv" else 3
    clip = (_FRAMES,) if first is not None and first.space == 3 else ()
    found: dict[tuple[int, ...], str] = {}
    for name, kind in list(vars(module).items()) if module is not None else []:
        if isinstance(kind, type) and name.endswith("_Weights"):
            for weights in getattr(kind, "__members__", {}).values():
                transforms = getattr(getattr(weights, "value", weights), "transforms", None)
                told = getattr(transforms, "keywords", None) or {}
                crop = told.get("crop_size", told.get("resize_size"))
                sides = tuple(crop) if isinstance(crop, (tuple, list)) else (crop, crop)
                if len(sides) in (1, 2) and all(isinstance(side, int) for side in sides):
                    found.setdefault((*clip, *(sides * 2)[:2]), name)
    return [Candidate(f"the transforms of {name}", _floats(1, channels, *sides)) for sides, name in found.items()]


# The first layer ----------------------------------------------------------------------------------


def _of_layer(first: FirstLayer) -> Iterator[Candidate]:
    source = f"the first layer ({first.word} {first.path})" if first.path else f"the first layer ({first.word})"
    n = first.width
    if first.word == "conv":
        for size in SIZES:
            space = (size,) * first.space if first.space < 3 else (_FRAMES, size, size)
            yield Candidate(source, _floats(1, n, *space))
    elif first.word == "embedding":
        for length in (_TOKENS, _MORE_TOKENS):
            yield Candidate(source, _numbers(n, length))
    else:
        if first.word == "linear":
            yield Candidate(source, _floats(1, n))
        yield Candidate(source, _floats(1, _TOKENS, n))


def _floats(*shape: int) -> Callable[[], Array]:
    return lambda: np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _numbers(below: int, length: int) -> Callable[[], Array]:
    return lambda: np.random.default_rng(0).integers(0, below, (1, length))
