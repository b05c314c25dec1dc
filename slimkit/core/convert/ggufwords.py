"""What a GGUF file's words say of a model: its Hugging Face configuration, and where each of its tensors belongs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimkit.core.checkpoint.weightfile import Array
from slimkit.core.errors import FileFormatError, UnsupportedError


@dataclass(frozen=True)
class Architecture:
    """One architecture that is read: a decoder of root-mean-square norms, rotary positions and a gated FFN.

    Args:
        model_type, model_class: what config.json says.
        interleaved: whether llama.cpp keeps the rows of queries and keys pair by pair, and not in halves.
        head_norms: whether queries and keys have a norm of their own.
        biases: of queries, keys and values: always (True), never (False), or where the file has them (None; then the
            output projection has one too).
    """

    model_type: str
    model_class: str
    interleaved: bool = False
    head_norms: bool = False
    biases: bool | None = None


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", interleaved=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", biases=True),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", head_norms=True),
}

# A key that is in none of these may change what the model computes, so it is refused.
_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
_OTHERS = {
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count", "vocab_size",
    "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor",
}  # fmt: skip
_SPECIAL = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}

# Tensor of a file -> (name in transformers, its axes as config words).
_TABLES = {
    "token_embd": ("model.embed_tokens", ("vocab_size", "hidden_size")),
    "output_norm": ("model.norm", ("hidden_size",)),
    "output": ("lm_head", ("vocab_size", "hidden_size")),
}
_BLOCK = {
    "attn_norm": ("input_layernorm", ("hidden_size",)),
    "attn_q": ("self_attn.q_proj", ("queries", "hidden_size")),
    "attn_k": ("self_attn.k_proj", ("keys", "hidden_size")),
    "attn_v": ("self_attn.v_proj", ("keys", "hidden_size")),
    "attn_output": ("self_attn.o_proj", ("hidden_size", "queries")),
    "attn_q_norm": ("self_attn.q_norm", ("head_dim",)),
    "attn_k_norm": ("self_attn.k_norm", ("head_dim",)),
    "ffn_norm": ("post_attention_layernorm", ("hidden_size",)),
    "ffn_gate": ("mlp.gate_proj", ("intermediate_size", "hidden_size")),
    "ffn_up": ("mlp.up_proj", ("intermediate_size", "hidden_size")),
    "ffn_down": ("mlp.down_proj", ("hidden_size", "intermediate_size")),
}
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor of the file belongs.

    Args:
        name: its name in transformers.
        shape: its shape there.
        heads: for queries and keys kept pair by pair, the heads whose rows are put back into halves; else None.
    """

    name: str
    shape: tuple[int, ...]
    heads: int | None = None


class Words:
    """The key-value pairs of one architecture, each read once, with errors that name the file and the key."""

    def __init__(self, path: Any, fields: Mapping[str, Any]) -> None:
        self.path, self.fields = path, fields
        name = fields.get("general.architecture")
        if name not in ARCHITECTURES:
            raise UnsupportedError(
                f"{path} is of the architecture {name!r}; slimkit reads {', '.join(ARCHITECTURES)} from GGUF files."
            )
        self.prefix, self.architecture = str(name), ARCHITECTURES[name]
        known = {*_SIZES, *_OTHERS}
        strange = sorted(k for k in fields if k.startswith(f"{name}.") and k.partition(".")[2] not in known)
        if strange:
            raise UnsupportedError(
                f"{path} says {strange[0]} = {fields[strange[0]]!r:.80}, which slimkit does not know."
            )

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's; a required one has no default."""
        value = self.fields.get(f"{self.prefix}.{key}", default)
        if value is None:
            raise FileFormatError(f"{self.path} does not say {self.prefix}.{key}.")
        if isinstance(value, list):
            raise UnsupportedError(
                f"{self.path} gives {self.prefix}.{key} layer by layer; slimkit reads one value for all."
            )
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 32:
            raise FileFormatError(f"{self.path}: {self.prefix}.{key} must be a positive integer, not {value!r:.40}.")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive float32, as the shortest decimal that is it: 1e-05 and not 9.999999747378752e-06."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise FileFormatError(f"{self.path}: {self.prefix}.{key} must be a positive number, not {value!r:.40}.")
        return float(str(np.float32(value)))


def config_of(words: Words, shapes: Mapping[str, tuple[int, ...]], rope_factors: Array | None = None) -> dict[str, Any]:
    """config.json of the model that a file holds.

    Args:
        words: the file's key-value pairs.
        shapes: name in the file -> shape, rows first.
        rope_factors: the tensor `rope_freqs.weight`, (head size / 2,), where the file has one.

    Raises:
        FileFormatError: a value is missing or none of its kind.
        UnsupportedError: something that transformers' class could not compute from this.
    """
    kind = words.architecture
    config: dict[str, Any] = {"architectures": [kind.model_class], "model_type": kind.model_type}
    config |= {word: words.size(key) for key, word in _SIZES.items()}
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = words.size("attention.head_count_kv", heads)
    rotated = words.size("rope.dimension_count", words.size("attention.key_length", config["hidden_size"] // heads))
    config["head_dim"] = words.size("attention.key_length", rotated)
    if not rotated == config["head_dim"] == words.size("attention.value_length", rotated):
        raise UnsupportedError(f"{words.path}: heads whose positions, keys and values differ in size are not read.")
    if kind.model_type == "qwen2" and config.pop("head_dim") * heads != config["hidden_size"]:
        raise UnsupportedError(
            f"{words.path}: Qwen2 has no heads of {rotated} numbers in a width of {config['hidden_size']}."
        )
    if "token_embd.weight" not in shapes:
        raise FileFormatError(f"{words.path} lacks the tensor token_embd.weight.")
    config |= {
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_act": "silu",
        "rms_norm_eps": words.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": words.number("rope.freq_base", 10_000.0),
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    if kind.biases is None:
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
    if kind.model_type == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    if (scaling := _scaling(words, config, rope_factors, rotated)) is not None:
        config["rope_scaling"] = scaling
    config |= special_tokens(words.fields)
    return config


def special_tokens(fields: Mapping[str, Any]) -> dict[str, int]:
    """The numbers of the first, last and padding token, for config.json and generation_config.json."""
    found = {word: fields.get(f"tokenizer.ggml.{key}") for key, word in _SPECIAL.items()}
    return {word: int(number) for word, number in found.items() if isinstance(number, int)}


def _scaling(words: Words, config: Mapping[str, Any], factors: Array | None, rotated: int) -> dict[str, Any] | None:
    """rope_scaling of config.json, or None where positions are not scaled."""
    kind = words.get("rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": words.number("rope.scaling.factor")}
    if kind != "none":
        raise UnsupportedError(
            f"{words.path} scales its rotary positions by {kind!r}; slimkit reads none and 'linear'."
        )
    if factors is None:
        return None
    # Llama 3's own: llama.cpp keeps what each frequency is divided by, transformers the four numbers it comes from.
    told = {"rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    told["original_max_position_embeddings"] = 8192
    expected = _llama3_factors(config["rope_theta"], rotated, told)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise UnsupportedError(f"{words.path} holds {ROPE_FACTORS} that are not Llama 3's.")
    return told


def _llama3_factors(theta: float, rotated: int, told: Mapping[str, Any]) -> Array:
    """What each of Llama 3's frequencies is divided by, (head size / 2,): 1 for short waves, `factor` for long ones."""
    waves = 2 * math.pi * theta ** (np.arange(0, rotated, 2) / rotated)
    low, high, span = told["low_freq_factor"], told["high_freq_factor"], told["original_max_position_embeddings"]
    blend = np.clip((span / waves - low) / (high - low), 0, 1)  # 0: a wave as long as the context, 1: a short one
    return np.asarray(1 / ((1 - blend) / told["factor"] + blend), np.float32)


def places_of(words: Words, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorPlace]:
    """Tensor of the file -> its place, for every tensor that the model has.

    Raises:
        UnsupportedError: the file holds a tensor that the model has no place for.
        FileFormatError: a tensor is missing or of another shape.
    """
    kind, heads, kv = words.architecture, config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim", config["hidden_size"] // heads)
    axes = {**config, "queries": heads * size, "keys": kv * size, "head_dim": size}
    blocks = range(config["num_hidden_layers"])
    stems = {stem: row for stem, row in _TABLES.items() if stem != "output" or not config["tie_word_embeddings"]}
    stems |= {
        f"blk.{n}.{stem}": (f"model.layers.{n}.{name}", row) for n in blocks for stem, (name, row) in _BLOCK.items()
    }
    found = {}
    for stem, (name, row) in stems.items():
        part = stem.rpartition(".")[2]
        if part.endswith(("q_norm", "k_norm")) and not kind.head_norms:
            continue
        turned = {"attn_q": heads, "attn_k": kv}.get(part) if kind.interleaved else None
        shape = tuple(axes[word] for word in row)
        found[f"{stem}.weight"] = TensorPlace(f"{name}.weight", shape, turned)
        attention = kind.biases or config.get("attention_bias", False)
        if (part in ("attn_q", "attn_k", "attn_v") and attention) or (
            part == "attn_output" and config.get("attention_bias")
        ) or (part in ("ffn_gate", "ffn_up", "ffn_down") and config.get("mlp_bias")):  # fmt: skip
            found[f"{stem}.bias"] = TensorPlace(f"{name}.bias", shape[:1], turned)
    if strange := [n for n in shapes if n not in found and n != ROPE_FACTORS]:
        raise UnsupportedError(
            f"{words.path} holds the tensor {strange[0]}, which a {kind.model_class} has no place for."
        )
    for name, place in found.items():
        if shapes.get(name) != place.shape:
            given = f"is of shape {shapes[name]}, not {place.shape}" if name in shapes else "is missing"
            raise FileFormatError(f"{words.path}: the tensor {name} {given}.")
    return found
