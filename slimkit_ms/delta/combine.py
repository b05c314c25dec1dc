"""Combining the LoRAs of a MindSpore model into one more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slimkit.core.delta import combine as steps
from slimkit.core.delta.spec import DeltaReport
from slimkit_ms import bridge
from slimkit_ms.delta.storage import STORAGE

from mindspore import nn


def combine_delta(
    model: nn.Cell,
    names: Mapping[str, float] | Sequence[str],
    name: str = "combined",
    *,
    method: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    majority: str = "total",
    seed: int = 0,
) -> DeltaReport:
    """Make one more LoRA of several on the same base, in place; it alone acts then, and does not train.

    The names of the methods, and what they compute, are those of PEFT's `add_weighted_adapter`.

    Args:
        model: a model with LoRAs, not merged.
        names: {name: weight}, or names, each with weight 1; a layer that has some of them gets those.
        name: of the new one; `save_delta(model, folder, names=name)` saves it alone.
        method: "cat" (exact; the ranks add up), "svd" (the exact sum, cut to `rank`), "linear" (a to a and b to b: a
            rough guess, of one rank), "ties" (the largest entries, of the sign that wins, averaged), "dare_linear" and
            "dare_ties" (entries drawn at random and made larger for it), "magnitude_prune". The last four work on the
            factors; with "_svd" at the end on their products, cut to `rank`.
        rank: of the result, for methods that end in "svd"; None means the largest of the ranks. A layer's
            smaller side is the most.
        density: the share of entries that stays, in (0, 1]; ties, dare and magnitude_prune ask for it.
        majority: which sign wins: that of the sum ("total"), or the more frequent one ("frequency").
        seed: of what "dare" draws; the same in both frameworks.

    Returns:
        The layers, and what stopped acting.

    Raises:
        ArgumentTypeError, ArgumentError: an argument is of the wrong type or value, a name is unknown or taken, ranks
            differ where they must not, or the deltas are merged.
        UnsupportedError: a delta that is no LoRA, DoRA, one with a head or a bias of its own, or on a module that
            reads its weights itself.
        In every case the model is as it was.

    Source:
        Yadav et al. 2023, "TIES-Merging"; Yu et al. 2024, "Language Models are Super Mario" (DARE).

    Example:
        >>> from slimkit_ms.delta import apply_delta
        >>> net = nn.SequentialCell(nn.Dense(4, 4))
        >>> for one in ("formal", "brief"):
        ...     report = apply_delta(net, "lora", ["0"], rank=2, name=one)
        >>> print(combine_delta(net, {"formal": 0.7, "brief": 0.3}, "both"))
        lora 'both' on 1 layers
          made by cat of 0.7 formal, 0.3 brief; it does not train
          'formal', 'brief' no longer act; set_delta chooses again
    """
    bridge.check_model(model)
    return steps.combine(
        STORAGE,
        model,
        names,
        name,
        method=method,
        rank=rank,
        density=density,
        majority=majority,
        seed=seed,
    )
