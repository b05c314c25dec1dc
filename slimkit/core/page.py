"""Pages for people: one style, pictures as inline SVG, nothing fetched and no script."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

GREY, BLUE, RED, GREEN = "#aab4c3", "#2f6fde", "#d9542b", "#2a9d6f"


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


def svg(width: float, height: float, draw: Callable[[Any], None], label: str) -> str:
    """Draw on one figure and return its SVG, without XML head, dates or random identifiers."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"slimkit {label}",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#8893a4",
        "axes.labelcolor": "#445",
        "xtick.color": "#556",
        "ytick.color": "#556",
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
    # The page scales the picture to its column; the viewBox keeps the proportions.
    text = re.sub(r'<svg ([^>]*?)height="[^"]*" ?', r"<svg \1", text, count=1)
    return re.sub(r'width="[\d.]+pt"', f'role="img" aria-label="{label}" width="100%"', text, count=1)
