"""The shape of a student: which of the teacher's layers it keeps, and what its configuration is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slimkit.core import check
from slimkit.core.errors import ConfigError, UnsupportedError
from slimkit.core.log import logger
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


def keep_layers(
    count: int,
    layers: int | None,
    given: Mapping[int, int] | Sequence[int] | None,
    measure: Callable[[int], Mapping[int, int]] | None,
) -> dict[int, int] | None:
    """Student layer -> teacher layer: those that were given, else those that count most on data, else spread evenly.

    Args:
        count: the teacher's layers.
        layers: how many the student has; None: as many as are given, or all.
        given: the teacher's layers that stay, in order, or student layer -> teacher layer.
        measure: f(how many) -> the map that data suggests; None: there is no data, which is warned of.

    Returns:
        The map; None where the student keeps all layers.

    Raises:
        ConfigError: the given layers are not the teacher's, or not as many as `layers` says.

    Example:
        >>> keep_layers(6, None, [0, 1, 5], None)
        {0: 0, 1: 1, 2: 5}
    """
    if given is not None:
        kept = dict(given) if isinstance(given, Mapping) else dict(enumerate(given))
        for old in kept.values():
            check.integer(old, "layer_map", minimum=0, maximum=count - 1)
        if not kept or sorted(kept) != list(range(len(kept))) or layers not in (None, len(kept)):
            most = "one or more" if layers is None else str(layers)
            raise ConfigError(f"layer_map must name {most} of the teacher's layers, for 0, 1, ... Received: {given}")
        return {new: kept[new] for new in sorted(kept)}
    if layers is None:
        return None
    check.integer(layers, "layers", minimum=1, maximum=count)
    if layers == count:
        return {i: i for i in range(count)}
    if measure is not None:
        return dict(measure(layers))
    logger.warning(
        "%d of %d layers are kept without a look at data, evenly spread: one that much depends on may be among those "
        "dropped (a language model can lose everything with one); give calibration data, or layer_map",
        layers,
        count,
    )
    return spread_layers(count, layers)


def warn_unmeasured(sizes: Mapping[str, int | None], selection: str, measured: bool) -> None:
    """Say that rows and columns are chosen by the weights alone, where they are."""
    cut = [what for what in ("ffn", "heads", "hidden") if sizes.get(what) is not None]
    if cut and selection == "importance" and not measured:
        logger.warning(
            "%s: chosen by the weights alone, which know little of what runs through them; give calibration data, or "
            "activations as measure_activations finds them",
            ", ".join(cut),
        )


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


def cut_config(
    kept: dict[int, int] | None,
    pattern: str | None,
    sizes: Mapping[str, int | None],
    selection: str,
    activations: Mapping[str, Any] | None,
    measure: Callable[[], Mapping[str, Any]] | None,
) -> PruneConfig:
    """The weight pruning that makes the student: which blocks, and whether anything within them gets smaller.

    Args:
        kept: block of the student -> the teacher's; None keeps all.
        pattern: finds a block's number in a parameter's name.
        sizes: what is asked for; None leaves a size alone.
        selection: "importance" or "first".
        activations: what `measure_activations` found.
        measure: finds the activations where there is something to measure on; asked only where they are wanted.
    """
    cuts_within = any(sizes.get(what) is not None for what in ("ffn", "heads", "hidden"))
    if cuts_within and selection == "importance" and activations is None and measure is not None:
        activations = measure()
    warn_unmeasured(sizes, selection, activations is not None)
    steps: Sequence[str] = [
        *(["prune_blocks"] if kept is not None else []),
        *(["prune_bert_intra_block"] if cuts_within else []),
    ]
    config = PruneConfig().set_steps(list(steps)).set_selection(selection, activations)
    if kept is not None and pattern is not None:
        config.add_blocks_params(pattern, kept)
    return config
