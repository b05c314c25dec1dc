"""What a check found, as plain values with an exit code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, TypeVar

from slimkit.core import check
from slimkit.core.ascend.padding import LayerWaste, totals
from slimkit.core.showing import Shown

FORMAT = "slimkit-ascend-check"
VERSION = 1
SEVERITIES = ("error", "warning", "info")
RULES = (
    "opset", "operator", "operator-opset", "operator-list", "function", "dtype", "input-dtype", "precision",
    "dynamic-shape", "zero-dimension", "external-data", "alignment", "row-bytes", "sparsity",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing that a person should know before running `atc`.

    Args:
        severity: "error" (the documents say it will not convert), "warning" (it may not, or wastes much), "info".
        rule: a short name to filter by, one of RULES.
        node: the node, weight or input it is about; empty for the whole file.
        message: what was found.
        remedy: what to do about it.
        source: the document that says so; empty where it follows from the file alone.
    """

    severity: str
    rule: str
    node: str
    message: str
    remedy: str = ""
    source: str = ""


class Check(Shown):
    """What a check found, errors first; the kinds say what of."""

    rules: ClassVar[tuple[str, ...]]  # what a finding can be of
    findings: tuple[Finding, ...]

    def of(self, severity: str) -> list[Finding]:
        """The findings of one severity."""
        check.choice(severity, SEVERITIES, "severity")
        return [f for f in self.findings if f.severity == severity]

    @property
    def exit_code(self) -> int:
        """0 without an error, 1 with one; what `slimkit check` ends with."""
        return 1 if self.of("error") else 0

    def counts(self) -> dict[str, int]:
        """Severity -> how many findings."""
        return {severity: len(self.of(severity)) for severity in SEVERITIES}


_Kind = TypeVar("_Kind", bound=Check)


@dataclass(frozen=True, repr=False)
class OnnxCheck(Check):
    """What `check_onnx` found.

    Args:
        file: the file.
        target: the target's name.
        cann: the CANN version asked about.
        opset: the opset of the default domain.
        soc_version: the chip in the command.
        precision: "fp16" or "origin".
        operators: operator -> how many nodes.
        findings: errors first.
        layers: the padding of each weight that the cube unit multiplies with.
        command: the `atc` line to run where CANN is installed.
        command_ready: whether the line can be run as it is: no axis is left open that it does not cover.
        sources: the documents behind the operator table.
    """

    rules = RULES

    file: str
    target: str
    cann: str
    opset: int
    soc_version: str
    precision: str
    operators: dict[str, int]
    findings: tuple[Finding, ...]
    layers: tuple[LayerWaste, ...]
    command: str
    command_ready: bool
    sources: tuple[dict[str, str], ...]

    @property
    def waste(self) -> dict[str, Any]:
        """Padding summed over the layers."""
        return totals(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with a format and a version."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "file": self.file,
            "target": self.target,
            "cann": self.cann,
            "opset": self.opset,
            "soc_version": self.soc_version,
            "precision": self.precision,
            "exit_code": self.exit_code,
            "counts": self.counts(),
            "operators": dict(self.operators),
            "findings": [asdict(f) for f in self.findings],
            "waste": self.waste,
            "layers": [layer.to_dict() for layer in self.layers],
            "command": self.command,
            "command_ready": self.command_ready,
            "sources": [dict(s) for s in self.sources],
        }


def in_order(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Errors first, then warnings, then infos; within one severity as they were found."""
    return tuple(sorted(findings, key=lambda f: SEVERITIES.index(f.severity)))


def without(found: _Kind, rules: Sequence[str]) -> _Kind:
    """The same check without the findings of some rules; ArgumentError offers the nearest rule."""
    for rule in rules:
        check.choice(rule, found.rules, "a rule to ignore")
    kept = tuple(f for f in found.findings if f.rule not in set(rules))
    return replace(found, findings=kept)  # type: ignore[type-var]  # the kinds are dataclasses
