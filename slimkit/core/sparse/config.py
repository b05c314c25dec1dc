"""The configuration of sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from slimkit.core import check
from slimkit.core.errors import ArgumentTypeError, ConfigError
from slimkit.core.showing import Shown
from slimkit.core.sparse.methods import METHODS, STARTS, SparseMethod

if TYPE_CHECKING:
    from slimkit.core.sparse.maths.pattern import NM

DEFAULT_RATIO = 0.5

# What `uniform` may name: rules that give layers ratios of their own.
RULES = ("measured", "dlp")


@dataclass(frozen=True)
class SparseConfig(Shown):
    """What to make zero, how much of it and how.

    Args:
        mode: "sparse", the only one; kept because existing scripts pass it.
        method: "magnitude" (smallest absolute weights, needs no data), "wanda" (weights times input norms), "hessian"
            (SparseGPT's second-order sweep), "par" (alternating support search and refit), "par_v2" (the same, longer,
            with swaps) or "block" (par, then each block is trained to give the dense one's outputs).
        sparse_ratio: share of each layer's weights that become zero, 0 < ratio < 1.
        progressive: reach the ratio in `progressive_steps` steps, each refitting what is left.
        uniform: every layer gets the same ratio; False or "measured" measures each layer's sensitivity and spreads the
            same total, "dlp" gives each block a ratio by the median of its weights times input norms, almost for
            nothing.
        pattern: None, or "n:m": of every m consecutive input channels n stay ("2:4", "4:8"); Ascend writes 2:4 as
            "4:2", and both are read. The pattern fixes the ratio.
        targets: globs (or "re:...") over layer names; None takes every Linear, Conv1D of Hugging Face and Conv2d.
        ignore: globs (or "re:...") of layers to leave alone.
        damping: what is added to the Hessian's diagonal, as a share of its mean (SparseGPT's default).
        block_size: columns whose mask the hessian sweep chooses at once (SparseGPT's default).
        sequential: calibrate each layer on the inputs that the already sparsified layers before it produce.
        asymmetric: fit those inputs to the *dense* model's outputs and correct the bias; None does so for par, par_v2
            and block. Needs `sequential`.
        residual: let layers whose output joins the residual stream also make up for what the stream has lost before
            them. Models that are a chain of blocks only; needs the dense outputs (`asymmetric`).
        min_tokens: a layer that saw fewer calibration rows falls back to magnitude, and the report says so.
        swaps: after the method, exchange a kept and a dropped weight of a row up to so many times where that lowers the
            row's error; 0 does not. Needs a method that reads data.
        mantissa_bits: what stays is rounded to floats with so many bits of mantissa, 1 to 10, for codecs that store
            fewer bytes then; the others of a row make up for each rounding. None does not round.
        outliers: share of the weights that stay which keep any value: those whose rounding would cost most. With
            `mantissa_bits`.
        weight_bits: what stays is rounded to whole numbers of so many bits, 2 to 8, times one step for each output
            channel, the others of a row making up for each rounding; `save_w8a8s` writes 8. None does not round.
        progressive_steps: how many steps `progressive` takes.
        strict: raise when a pattern matches no layer, or an n:m pattern does not fit a layer; False lists it in
            the report instead.
        options: what "block" or a method of your own takes (see `register_sparse_method`); the others have none.

    Raises:
        ArgumentTypeError: a field has the wrong type.
        ArgumentError: a field has a value that is not allowed.
        ConfigError: two fields contradict each other.

    Example:
        >>> SparseConfig(method="hessian", sparse_ratio=0.6).sparse_ratio
        0.6
        >>> SparseConfig(method="par", pattern="4:2").nm
        NM(keep=2, group=4)
    """

    mode: str = "sparse"
    method: str = "magnitude"
    sparse_ratio: float = DEFAULT_RATIO
    progressive: bool = False
    uniform: bool | str = True
    _: KW_ONLY
    pattern: str | None = None
    targets: Sequence[str] | None = None
    ignore: Sequence[str] = ()
    damping: float = 0.01
    block_size: int = 128
    sequential: bool = True
    asymmetric: bool | None = None
    residual: bool = False
    min_tokens: int = 16
    swaps: int = 0
    mantissa_bits: int | None = None
    outliers: float = 0.0
    weight_bits: int | None = None
    progressive_steps: int = 4
    strict: bool = True
    options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check.choice(self.mode, ("sparse",), "SparseConfig.mode")
        check.choice(self.method, list(METHODS), "SparseConfig.method")
        check.ratio(self.sparse_ratio, "SparseConfig.sparse_ratio")
        for name in ("progressive", "sequential", "residual", "strict"):
            check.boolean(getattr(self, name), f"SparseConfig.{name}")
        if isinstance(self.uniform, str):
            check.choice(self.uniform, RULES, "SparseConfig.uniform")
        else:
            check.boolean(self.uniform, "SparseConfig.uniform")
        if self.asymmetric is not None:
            check.boolean(self.asymmetric, "SparseConfig.asymmetric")
        check.number(self.damping, "SparseConfig.damping", minimum=0.0)
        check.positive(self.block_size, "SparseConfig.block_size")
        check.integer(self.min_tokens, "SparseConfig.min_tokens", minimum=0)
        check.integer(self.swaps, "SparseConfig.swaps", minimum=0)
        if self.mantissa_bits is not None:
            check.integer(self.mantissa_bits, "SparseConfig.mantissa_bits", minimum=1, maximum=10)
        if self.weight_bits is not None:
            check.integer(self.weight_bits, "SparseConfig.weight_bits", minimum=2, maximum=8)
        check.ratio(self.outliers, "SparseConfig.outliers", zero=True)
        check.integer(self.progressive_steps, "SparseConfig.progressive_steps", minimum=2)
        if self.targets is not None:
            object.__setattr__(self, "targets", tuple(check.strings(self.targets, "SparseConfig.targets")))
        if not isinstance(self.ignore, (list, tuple)):
            check.wrong_type("SparseConfig.ignore", "a list of str", self.ignore)
        object.__setattr__(
            self, "ignore", tuple(check.strings(self.ignore, "SparseConfig.ignore")) if self.ignore else ()
        )
        if self.options is not None:
            check.instance(self.options, Mapping, "SparseConfig.options", "a dict of the method's own options")
            for key in self.options:
                if not self.row.options:
                    raise ConfigError(f"SparseConfig.options must be left out: {self.method!r} has none of its own.")
                check.choice(key, list(self.row.options), "a key of SparseConfig.options")
            object.__setattr__(self, "options", dict(self.options))
        self._check_training()
        self._check_together()

    def _check_training(self) -> None:
        """What a block's training takes."""
        if not self.row.reconstructs:
            return
        given = self.settings
        for key in ("passes", "patience"):
            check.positive(given.get(key, 1), f"SparseConfig.options[{key!r}]")
        check.number(given.get("rate", 0.0), "SparseConfig.options['rate']", minimum=0.0)
        check.ratio(given.get("inherited", 1.0), "SparseConfig.options['inherited']", zero=True, one=True)
        if "start" in given:
            check.choice(given["start"], STARTS, "SparseConfig.options['start']")

    def _check_together(self) -> None:
        nm = self.nm
        if nm is not None:
            if self.sparse_ratio not in (nm.ratio, DEFAULT_RATIO):
                raise ConfigError(
                    f"SparseConfig.sparse_ratio must be {nm.ratio} (or left at its default) with pattern "
                    f"{self.pattern!r}, which fixes it. Received: {self.sparse_ratio}"
                )
            object.__setattr__(self, "sparse_ratio", nm.ratio)
            if self.allocation:
                raise ConfigError("SparseConfig.uniform must be True with a pattern, which fixes every layer's ratio.")
            if self.progressive:
                raise ConfigError("SparseConfig.progressive must be False with a pattern, which fixes the ratio.")
        if self.asymmetric and not self.sequential:
            raise ConfigError("SparseConfig.asymmetric needs sequential=True: both inputs must come from one pass.")
        if self.asymmetric and not self.row.refits:
            raise ConfigError(f"SparseConfig.asymmetric needs a method that refits weights. Received: {self.method!r}")

        if self.swaps and not self.row.needs_data:
            raise ConfigError(f"SparseConfig.swaps needs a method that reads data. Received: {self.method!r}")
        if self.row.reconstructs and not self.paired:
            raise ConfigError(
                f"SparseConfig.method {self.method!r} needs the dense outputs, so sequential=True and asymmetric=None."
            )
        if self.row.reconstructs and self.residual:
            raise ConfigError(
                f"SparseConfig.residual must be False with method {self.method!r}: whole blocks make up for the stream."
            )
        for name in ("mantissa_bits", "weight_bits"):
            if self.row.reconstructs and getattr(self, name) is not None:
                raise ConfigError(
                    f"SparseConfig.{name} must be None with method {self.method!r}, whose training leaves any grid."
                )
        if self.mantissa_bits is not None and self.weight_bits is not None:
            raise ConfigError("SparseConfig.mantissa_bits and weight_bits are two grids: set one of them.")
        if self.outliers and self.mantissa_bits is None:
            raise ConfigError("SparseConfig.outliers needs mantissa_bits: without it every weight keeps its value.")
        if self.residual and not self.paired:
            raise ConfigError("SparseConfig.residual needs the dense outputs: par, par_v2, or asymmetric=True.")

    @property
    def rounds(self) -> bool:
        """Whether what stays goes to a grid."""
        return self.mantissa_bits is not None or self.weight_bits is not None

    @property
    def row(self) -> SparseMethod:
        """The method's row of the table."""
        return METHODS[self.method]

    @property
    def settings(self) -> dict[str, Any]:
        """The method's own options, with the defaults of its row."""
        return {**self.row.options, **(self.options or {})}

    @property
    def nm(self) -> NM | None:
        """The n:m pattern, or None."""
        from slimkit.core.sparse.maths.pattern import parse

        return None if self.pattern is None else parse(self.pattern, "SparseConfig.pattern")

    @property
    def paired(self) -> bool:
        """Whether layers are fitted to the dense model's outputs."""
        return self.sequential and (self.row.paired if self.asymmetric is None else self.asymmetric)

    @property
    def needs_data(self) -> bool:
        """Whether calibration data is read."""
        return self.row.needs_data or self.allocation is not None

    @property
    def allocation(self) -> str | None:
        """The rule that gives layers their ratios; None where all have the same."""
        return self.uniform if isinstance(self.uniform, str) else None if self.uniform else "measured"

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparseConfig:
        """The configuration that `to_dict` described; an unknown key is refused with the nearest known one.

        Example:
            >>> SparseConfig.from_dict({"method": "wanda"}).method
            'wanda'
        """
        if not isinstance(values, Mapping):
            raise ArgumentTypeError(f"SparseConfig.from_dict needs a mapping. Received: {type(values).__name__}")
        known = [f.name for f in fields(cls)]
        for key in values:
            check.choice(key, known, "a key of SparseConfig")
        return cls(**values)
