"""The deltas on one layer: which exist, which are active with which weight, and whether they are merged."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

from slimkit.core.delta.spec import DEFAULT_NAME, LoraSpec, key
from slimkit.core.errors import ArgumentError

PARTS = ("a", "b", "magnitude", "a0", "b0")


class Part(NamedTuple):
    """One active delta, as the forward pass reads it: attribute names, and the scale with its weight in it."""

    name: str
    a: str
    b: str
    scale: float
    dropout: float


class NamedLoras:
    """Named LoRAs on one layer; the wings add the tensors."""

    delta_kind = "lora"
    weight: Any

    def start(self) -> None:
        """Begin without any delta."""
        self.specs: dict[str, LoraSpec] = {}
        self.active: dict[str, float] = {}
        self.unmerged: Any = None
        self.refresh()

    @abstractmethod
    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a and b."""

    @abstractmethod
    def product(self, a: Any, b: Any) -> Any:
        """b @ a in the layout of the weight."""

    @abstractmethod
    def merged_weight(self) -> Any:
        """The weight with every active delta in it, in the weight's dtype; computed in float32 or wider."""

    @abstractmethod
    def copy_weight(self) -> Any:
        """A copy of the weight that shares nothing with it."""

    @abstractmethod
    def write_weight(self, value: Any) -> None:
        """Overwrite the weight's values, in place."""

    def take(self, name: str, spec: LoraSpec) -> None:
        """Note a delta whose tensors are in place, and make it active."""
        self.specs[name] = spec
        self.active[name] = 1.0
        self.refresh()

    def drop(self, name: str) -> None:
        """Take a delta away, in place."""
        for part in self.parts(name):
            delattr(self, part)
        del self.specs[name]
        self.active.pop(name, None)
        self.refresh()

    def parts(self, name: str, spelled: str | None = None) -> dict[str, Any]:
        """Attribute -> tensor of everything one delta consists of, the attributes as for a delta named `spelled`."""
        parts = [p for p in PARTS if hasattr(self, key("lora", p, name))]
        return {key("lora", p, spelled or name): getattr(self, key("lora", p, name)) for p in parts}

    def describe(self, name: str) -> dict[str, Any]:
        """One delta's options as plain values."""
        return self.specs[name].to_dict()

    def set_active(self, weights: dict[str, float]) -> None:
        """Make these deltas active, each times its weight, and no other, in place."""
        self.active = {n: w for n, w in weights.items() if n in self.specs}
        self.refresh()

    def merge(self) -> None:
        """Add the active deltas to the weight, in place; a copy of the weight is kept for `unmerge`."""
        if self.unmerged is not None:
            raise ArgumentError("the deltas of this layer are merged already")
        merged = self.merged_weight()
        self.unmerged = self.copy_weight()
        self.write_weight(merged)
        self.refresh()

    def unmerge(self) -> None:
        """Put back the weight as it was, bit for bit, in place."""
        if self.unmerged is None:
            raise ArgumentError("the deltas of this layer are not merged")
        self.write_weight(self.unmerged)
        self.unmerged = None
        self.refresh()

    def active_parts(self) -> tuple[Part, ...]:
        """The deltas that count, merged or not."""
        return tuple(
            Part(n, key("lora", "a", n), key("lora", "b", n), self.specs[n].scaling * w, self.specs[n].dropout)
            for n, w in self.active.items()
            if w != 0
        )

    def refresh(self) -> None:
        """Work out once what the forward pass would otherwise ask on every call."""
        running = self.active_parts() if self.unmerged is None else ()
        specs = [self.specs[part.name] for part in running]
        plain = all(not (s.dora or s.keep_zeros or s.init == "pissa") for s in specs)
        self._running = running
        self._only = running[0] if len(running) == 1 and plain else None

    def words(self) -> str:
        """The deltas, for a printed model."""
        deltas = ", ".join(f"{n}: rank {s.rank}" for n, s in self.specs.items())
        return f"lora=({deltas})" + (", merged" if self.unmerged is not None else "")


class OneAdapter:
    """The book-keeping of a layer that ends in one adapter."""

    def begin(self, options: dict[str, Any], name: str = DEFAULT_NAME) -> None:
        """Note the adapter's name and options."""
        self.specs: dict[str, dict[str, Any]] = {name: options}

    def describe(self, name: str) -> dict[str, Any]:
        """The adapter's options as plain values."""
        return dict(self.specs[name])
