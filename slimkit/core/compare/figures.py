"""The figures that a comparison may hold, how they are shown, and what their intervals are of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One figure that a comparison may hold.

    Args:
        label: as people read it.
        form: of a number, for `format`; "" for counts.
        difference: what an interval is of: "ratio" (small / dense), "gap" (small - dense) or "own" (the figure itself).
        better: "low" or "high".
    """

    label: str
    form: str
    difference: str = "gap"
    better: str = "low"


FIGURES: dict[str, Figure] = {
    "perplexity": Figure("perplexity", ".3f", "ratio"),
    "bits_per_byte": Figure("bits per byte", ".4f"),
    "kl": Figure("KL(dense || model), nats", ".4f", "own"),
    "kl_p99": Figure("KL, 99th percentile", ".3f", "own"),
    "agreement": Figure("top-1 agreement with dense", ".4f", "own", "high"),
    "accuracy": Figure("accuracy", ".4f", "gap", "high"),
    "calibration_error": Figure("expected calibration error", ".4f"),
    "cosine": Figure("cosine to dense", ".4f", "own", "high"),
    "spearman": Figure("Spearman of similarities", ".4f", "own", "high"),
    "parameters": Figure("parameters", ""),
    "nonzero": Figure("non-zero parameters", ""),
    "bytes": Figure("bytes", ""),
    "macs": Figure("MACs a token or sample", ""),
    "prefill_per_s": Figure("prefill tokens or samples/s", ".1f", "gap", "high"),
    "decode_per_s": Figure("decode tokens/s", ".1f", "gap", "high"),
    "peak_bytes": Figure("peak memory of the process", ""),
}
