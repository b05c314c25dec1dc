"""Pages for people: one style, light and dark, pictures as inline SVG for every width, nothing fetched, no script."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

# What plots draw with; a page shows each by the style sheet's variable of that name, which the theme sets.
INK, SOFT, EDGE = "#1d2430", "#5b6675", "#8893a4"
GREY, PALE = "#aab4c3", "#dfe4ec"
BLUE, SKY, RED, GREEN, VIOLET, OCHRE = "#2f6fde", "#8db4f5", "#d9542b", "#2a9d6f", "#8a5bd0", "#c58a00"
_VARIABLES = {
    INK: "ink", SOFT: "soft", EDGE: "edge", GREY: "grey", PALE: "pale", BLUE: "blue", SKY: "sky", RED: "red",
    GREEN: "green", VIOLET: "violet", OCHRE: "ochre",
}  # fmt: skip
# Inches of a picture in a page's column and on a phone: the text of both is about as large as the page's own.
_WIDE, _NARROW = 8.4, 3.7


def style() -> str:
    """The style sheet of every page."""
    from importlib.resources import files

    return files("slimkit.core").joinpath("page.css").read_text(encoding="utf-8")


def rendered(room: str, template: str, **values: Any) -> str:
    """A page from a template of a room.

    Args:
        room: dotted name of the package that holds the template, such as "slimkit.core.run".
        template: name of the file.
        values: what the template shows.
    """
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined

    text = files(room).joinpath(template).read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(text).render(style=style(), **values)


def picture(draw: Callable[[Any, bool], None], label: str, height: float, narrow_height: float | None = None) -> str:
    """A plot drawn twice, for a page's column and for a phone's; the style sheet shows the one that fits.

    Args:
        draw: draws on a figure; told whether it is the narrow one.
        label: what the picture shows, for readers who do not see it.
        height: inches.
        narrow_height: of the narrow one; as `height` where not given.
    """
    wide = _svg(_WIDE, height, lambda figure: draw(figure, False), label)
    narrow = _svg(_NARROW, narrow_height or height, lambda figure: draw(figure, True), label)
    return f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'


def _svg(width: float, height: float, draw: Callable[[Any], None], label: str) -> str:
    """Draw on one figure and return its SVG, without XML head, dates or random identifiers."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"slimkit {label} {width}",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": EDGE,
        "axes.labelcolor": SOFT,
        "xtick.color": EDGE,
        "ytick.color": EDGE,
        "xtick.labelcolor": SOFT,
        "ytick.labelcolor": SOFT,
        "axes.titlesize": 10,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], count=1, flags=re.DOTALL)
    # Numbered names repeat from picture to picture, and nothing refers to them.
    text = re.sub(r' id="[\w.]+_\d+"', "", text)
    for colour, name in _VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    # The page scales the picture to its column; the viewBox keeps the proportions.
    text = re.sub(r'<svg ([^>]*?)height="[^"]*" ?', r"<svg \1", text, count=1)
    return re.sub(r'width="[\d.]+pt"', f'role="img" aria-label="{label}" width="100%"', text, count=1)
