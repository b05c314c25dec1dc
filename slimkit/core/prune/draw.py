"""A picture of what is pruned together: one row for each variable, its width before and after, and the layers it
ties."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

_COLOURS = {"heads": "#b5651d", "hidden": "#2f6f8f", "width": "#4a7c3a", "experts": "#7a4a8c"}
_BAR, _LEFT, _ROW = 260, 120, 22


def picture(report: Mapping[str, Any]) -> str:
    """Draw a pruner's report as SVG text.

    Args:
        report: what `report()` of a pruner returned.

    Returns:
        A complete SVG document; browsers show it as it is.

    Example:
        >>> group = {"size": 8, "keep": 4, "kind": "width", "layers": ["fc"], "axes": []}
        >>> "d0 4/8" in picture({"variables": {"d0": group}})
        True
    """
    variables = report["variables"]
    widest = max((v["size"] for v in variables.values()), default=1)
    rows = []
    for place, (name, entry) in enumerate(variables.items()):
        y = 60 + place * _ROW
        keep = entry.get("keep", entry["size"])
        full = max(2.0, _BAR * entry["size"] / widest)
        left = full * keep / entry["size"]
        colour = _COLOURS.get(entry["kind"], "#555")
        layers = ", ".join(entry["layers"]) or ", ".join(entry["axes"][:4])
        shown = layers if len(layers) <= 90 else layers[:87] + "..."
        tip = escape(f"{name} ({entry['kind']}): {keep} of {entry['size']}\n" + "\n".join(entry["axes"]))
        rows.append(
            f"<g><title>{tip}</title>"
            f'<text x="10" y="{y + 13}">{escape(name)} {keep}/{entry["size"]}</text>'
            f'<rect x="{_LEFT}" y="{y}" width="{full:.1f}" height="16" fill="{colour}" opacity="0.25"/>'
            f'<rect x="{_LEFT}" y="{y}" width="{left:.1f}" height="16" fill="{colour}"/>'
            f'<text x="{_LEFT + _BAR + 12}" y="{y + 13}">{escape(shown)}</text></g>'
        )
    kinds = "".join(
        f'<rect x="{_LEFT + 90 * k}" y="32" width="12" height="12" fill="{c}"/>'
        f'<text x="{_LEFT + 90 * k + 17}" y="42">{name}</text>'
        for k, (name, c) in enumerate(_COLOURS.items())
    )
    height = 80 + _ROW * len(rows)
    title = f"{len(rows)} groups of channels that are pruned together; the dark part stays"
    font = 'font-family="sans-serif" font-size="12"'
    box = f'<svg xmlns="http://www.w3.org/2000/svg" width="1100" height="{height}" {font}>'
    return f'{box}<text x="10" y="20" font-size="14">{title}</text>{kinds}{"".join(rows)}</svg>\n'
