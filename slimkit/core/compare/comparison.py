"""The result of a comparison: figures, intervals, the protocol they were found by, as a table, JSON and HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimkit.core import files
from slimkit.core.compare.conditions import Condition
from slimkit.core.compare.figures import FIGURES, Figure
from slimkit.core.compare.page import render_page
from slimkit.core.errors import FileFormatError

FORMAT, VERSION = "slimkit-comparison", 1


@dataclass(frozen=True)
class ModelResult:
    """What was found of one model.

    Args:
        name: of the model; "dense" for the one that the others are compared with.
        figures: name of a figure -> value; None where it could not be found.
        intervals: name of a figure -> 95 % interval of its difference from the dense model, paired over documents.
    """

    name: str
    figures: dict[str, float | None]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Comparison:
    """A dense model and smaller ones on the same held-out data; prints as a table.

    Args:
        task: "language", "encoder" or "classifier".
        protocol: how the data was cut, in one line.
        data: what was judged on: documents, tokens and a digest.
        results: the dense model first.
        kl: "exact", or the number of the dense model's likeliest tokens that the KL divergence is taken over.
        seed: of the bootstrap.
    """

    task: str
    protocol: str
    data: dict[str, Any]
    results: tuple[ModelResult, ...]
    kl: str = "exact"
    seed: int = 0

    def __getitem__(self, name: str) -> ModelResult:
        """The result of one model by its name."""
        for result in self.results:
            if result.name == name:
                return result
        raise KeyError(name)

    @property
    def dense(self) -> ModelResult:
        """The result of the dense model."""
        return self.results[0]

    def broken(self, conditions: Iterable[str]) -> list[str]:
        """One sentence for each condition that a smaller model meets, such as ``perplexity > 1.05x``.

        Raises:
            ConfigError: a condition is malformed, or names a figure that is not there.
        """
        found = []
        for condition in [Condition.parse(text) for text in conditions]:
            for result in self.results[1:]:
                if condition.holds(result.figures, self.dense.figures):
                    value, base = result.figures[condition.metric], self.dense.figures.get(condition.metric)
                    was = "" if base is None else f" (dense {base:.6g})"
                    found.append(
                        f"{result.name}: {condition.metric} is {value:.6g}{was}, which fails '{condition.text}'"
                    )
        return found

    def rows(self) -> list[list[str]]:
        """The table: a head, then a row for each figure that some model has."""
        table = [["", *(r.name for r in self.results)]]
        names = dict.fromkeys(n for r in self.results for n, v in r.figures.items() if v is not None)
        for name in [*(n for n in FIGURES if n in names), *(n for n in names if n not in FIGURES)]:
            figure = FIGURES.get(name, Figure(name, ".6g"))
            table.append([figure.label, *(self._cell(r, name, figure) for r in self.results)])
        return table

    def _cell(self, result: ModelResult, name: str, figure: Figure) -> str:
        value = result.figures.get(name)
        if value is None:
            return "-"
        text = f"{value:{figure.form}}" if figure.form else f"{value:,.0f}"
        if result is self.dense:
            return text
        base = self.dense.figures.get(name)
        if not figure.form and base:
            text += f" ({value / base:.3f}x)"
        if name in result.intervals:
            low, high = result.intervals[name]
            unit = "x" if figure.difference == "ratio" else ""
            sign = "+" if figure.difference == "gap" else ""
            text += f" [{low:{sign}.4g}{unit}, {high:{sign}.4g}{unit}]"
        return text

    def __str__(self) -> str:
        table = self.rows()
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines = [
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths))) for r in table
        ]
        return "\n".join([*(line.rstrip() for line in lines), "", self.sentence()])

    __repr__ = __str__

    def headline(self, name: str) -> str:
        """What one model lost, in a sentence, by the figures of the task."""
        own, base = self[name], self.dense
        said = []
        for key, figure in FIGURES.items():
            value, was = own.figures.get(key), base.figures.get(key)
            if key not in own.intervals or value is None:
                continue
            low, high = own.intervals[key]
            unit = "x" if figure.difference == "ratio" else ""
            before = "" if was is None else f" (dense {was:{figure.form}})"
            said.append(f"{figure.label} {value:{figure.form}}{before} [{low:.4g}{unit}, {high:.4g}{unit}]")
        return f"{name}: {'; '.join(said)}" if said else f"{name}: no intervals from {self.data}"

    def sentence(self) -> str:
        """The data and the protocol in one line."""
        data = ", ".join(f"{v:,} {k}" for k, v in self.data.items() if isinstance(v, int))
        kl = (
            ""
            if self.task != "language"
            else f"; KL {'exact' if self.kl == 'exact' else 'over the dense top ' + self.kl}"
        )
        brackets = "; [95 % interval over documents: ratio or difference to dense]"
        return f"{data}; {self.protocol}{kl}{brackets}"

    def _repr_html_(self) -> str:
        head, *rows = self.rows()
        cells = "".join(f"<th>{html.escape(c)}</th>" for c in head)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        return (
            f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table><p>{html.escape(self.sentence())}</p>"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "task": self.task,
            "protocol": self.protocol,
            "data": self.data,
            "kl": self.kl,
            "seed": self.seed,
            "results": [
                {
                    "name": r.name,
                    "figures": {k: _plain(v) for k, v in r.figures.items()},
                    "intervals": {k: [_plain(end) for end in v] for k, v in r.intervals.items()},
                }
                for r in self.results
            ],
        }

    def save(self, path: files.PathLike) -> Path:
        """Write the comparison as JSON; the file appears whole."""
        target = files.as_path(path, "path")
        files.write_json(target, self.to_dict())
        return target

    def save_html(self, path: files.PathLike, title: str = "What the smaller models lost") -> Path:
        """Write the comparison as one HTML page with charts, which needs nothing else; the file appears whole."""
        target = files.as_path(path, "path")
        page = render_page(self, title)
        with files.atomic_file(target, "w") as handle:
            handle.write(page)
        return target

    @classmethod
    def load(cls, path: files.PathLike) -> Comparison:
        """Read what `save` wrote; FileFormatError when it is none of ours."""
        return cls.from_dict(files.read_json(files.as_path(path, "path")))

    @classmethod
    def from_dict(cls, value: Any) -> Comparison:
        """A comparison from its plain values."""
        if not isinstance(value, Mapping) or value.get("format") != FORMAT or value.get("version") != VERSION:
            raise FileFormatError(f"not a slimkit comparison of version {VERSION}")
        try:
            results = tuple(
                ModelResult(
                    r["name"],
                    {k: None if v is None else float(v) for k, v in r["figures"].items()},
                    {k: (float(v[0]), float(v[1])) for k, v in r["intervals"].items()},
                )
                for r in value["results"]
            )
            return cls(value["task"], value["protocol"], dict(value["data"]), results, value["kl"], value["seed"])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise FileFormatError(f"a comparison without what it must hold: {error}") from None


def _plain(value: float | None) -> float | str | None:
    """JSON has no infinity, which a destroyed model's perplexity may be: it is written as text."""
    return value if value is None or math.isfinite(value) else str(value)
