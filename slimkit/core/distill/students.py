"""The shape of a student: which of the teacher's layers it keeps, and what its configuration is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slimkit.core import check
from slimkit.core.errors import ConfigError, UnsupportedError
from slimkit.core.weights.blocks import PruneConfig

# what is made smaller -> the names that model configurations give it
SIZES: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim", "encoder_ffn_dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
}


def spread_layers(n_teacher: int, n_student: int) -> dict[int, int]:
    """Student layer -> teacher layer, evenly spread with the first and the last among them.

    Example:
        >>> spread_layers(6, 3)
        {0: 0, 1: 2, 2: 5}
    """
    check.integer(n_student, "layers", minimum=1, maximum=n_teacher)
    if n_student == 1:
        return {0: n_teacher - 1}
    # Halves go down: the lower layer of two is the one that the next kept layer follows.
    return {i: (2 * i * (n_teacher - 1) + n_student - 2) // (2 * (n_student - 1)) for i in range(n_student)}


def size_names(config: Any, wanted: dict[str, int | None]) -> dict[str, str]:
    """The configuration's own name of each size that is asked for.

    Raises:
        UnsupportedError: the configuration has no such size.
        ConfigError: the size is not smaller, or heads would change their width.
    """
    found = {}
    for what, value in wanted.items():
        if value is None:
            continue
        name = next((n for n in SIZES[what] if isinstance(getattr(config, n, None), int)), None)
        if name is None:
            raise UnsupportedError(f"{what}: the model's configuration has none of {', '.join(SIZES[what])}")
        check.integer(value, what, minimum=1, maximum=getattr(config, name))
        found[what] = name
    if not found:
        raise ConfigError("make_student needs a size to make smaller: layers, ffn, heads or hidden")
    if "heads" in found or "hidden" in found:
        _check_heads(config, wanted)
    return found


def _check_heads(config: Any, wanted: dict[str, int | None]) -> None:
    if isinstance(getattr(config, "head_dim", None), int):
        return
    heads = next((getattr(config, n) for n in SIZES["heads"] if isinstance(getattr(config, n, None), int)), None)
    hidden = next((getattr(config, n) for n in SIZES["hidden"] if isinstance(getattr(config, n, None), int)), None)
    if not heads or not hidden:
        return
    now_heads, now_hidden = wanted.get("heads") or heads, wanted.get("hidden") or hidden
    if now_hidden * heads != hidden * now_heads:
        size, fewer = hidden // heads, max(1, heads // 2)
        raise ConfigError(
            f"a head of this model is hidden / heads = {size} wide and cannot be cut within: give heads and hidden "
            f"together, for example heads={fewer}, hidden={size * fewer}"
        )


def cut_config(kept: dict[int, int] | None, pattern: str | None, cuts_within: bool, selection: str) -> PruneConfig:
    """The weight pruning that makes the student: which blocks, and whether anything within them gets smaller."""
    steps: Sequence[str] = [
        *(["prune_blocks"] if kept is not None else []),
        *(["prune_bert_intra_block"] if cuts_within else []),
    ]
    config = PruneConfig().set_steps(list(steps)).set_selection(selection)
    if kept is not None and pattern is not None:
        config.add_blocks_params(pattern, kept)
    return config
