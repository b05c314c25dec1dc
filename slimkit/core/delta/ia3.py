"""IA3: one trained factor for each output of a layer, or for each input of those that are feed-forward.

    y = l * (W x + b)        outputs: the factor of a row of W, and of its bias
    y = W (l * x) + b        inputs (`feedforward`): the factor of a column of W

Both are linear in W, so that they merge: l * W and l * b, or W * l. All factors start at one.

Source: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", 3.3.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from slimkit.core import check
from slimkit.core.delta.spec import Site
from slimkit.core.errors import FileFormatError, PatternError
from slimkit.core.match import match

PART = "mindpet_delta_ia3.mindpet_delta_ia3_l"  # below a layer


@dataclass(frozen=True)
class Ia3Spec:
    """One IA3 on one layer.

    Args:
        feedforward: whether it is the inputs that have factors.
    """

    feedforward: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


def by_layer(sites: Mapping[str, Site], paths: Iterable[str], feedforward: Any = None) -> dict[str, Ia3Spec]:
    """Path -> IA3, of each chosen layer.

    Args:
        sites: every module path of the model.
        paths: the chosen layers.
        feedforward: globs over them: those whose inputs have the factors; None for none.

    Raises:
        PatternError: a glob matches no chosen layer.

    Example:
        >>> by_layer({}, ["q", "down"], ["down"])
        {'q': Ia3Spec(feedforward=False), 'down': Ia3Spec(feedforward=True)}
    """
    paths = list(paths)
    given = [feedforward] if isinstance(feedforward, str) else feedforward
    found = match(paths, check.strings(given, "feedforward"), whole_modules=True) if given else None
    if found is not None and found.unmatched:
        raise PatternError(f"feedforward must match chosen layers. Matched none: {', '.join(found.unmatched)}")
    inner = set() if found is None else set(found.names)
    return {p: Ia3Spec(p in inner) for p in paths}


def along(axis: int, ndim: int) -> tuple[int, ...]:
    """The shape in which factors multiply one axis of a tensor.

    Example:
        >>> along(1, 4)
        (1, -1, 1, 1)
    """
    return tuple(-1 if i == axis else 1 for i in range(ndim))


def weight_axis(feedforward: bool, transposed: bool) -> int:
    """The axis of a weight that the factors multiply: outputs come first, unless it is stored transposed."""
    return int(feedforward != transposed)


def spec_of_file(config: Mapping[str, Any], path: str, shape: tuple[int, ...]) -> Ia3Spec:
    """The IA3 on a layer by PEFT's configuration (feedforward_modules: endings, or one regular expression).

    Raises:
        FileFormatError: the factors' shape is that of the other kind.
    """
    said = config.get("feedforward_modules") or ()
    inner = re.fullmatch(said, path) is not None if isinstance(said, str) else any(path.endswith(str(e)) for e in said)
    # Linear layers: (1, inputs) or (outputs, 1); convolutions: (1, channels, 1, 1) for both.
    if len(shape) not in (2, 4) or (len(shape) == 2 and shape[0 if inner else 1] != 1):
        raise FileFormatError(f"{path}: ia3_l has shape {shape}, which feedforward_modules={said!r} does not fit.")
    return Ia3Spec(inner)


def shape_in_file(kind: str, spec: Ia3Spec) -> tuple[int, ...]:
    """The shape of the factors in PEFT's file, by the kind of layer."""
    return (1, -1, 1, 1) if kind == "conv2d" else (1, -1) if spec.feedforward else (-1, 1)
