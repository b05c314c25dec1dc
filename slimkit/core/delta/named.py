"""The deltas on one layer: which exist, which are active with which weight, and whether they are merged."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

from slimkit.core.delta.face import DeltaFace
from slimkit.core.delta.rest import PARTS
from slimkit.core.delta.spec import DEFAULT_NAME, LoraSpec, key
from slimkit.core.errors import ArgumentError, UnsupportedError


def part_names(spec: LoraSpec) -> tuple[str, ...]:
    """The tensors that a LoRA consists of: a and b, DoRA's magnitude, what PiSSA started from, and a rest.

    Example:
        >>> part_names(LoraSpec(dora=True))
        ('a', 'b', 'magnitude')
    """
    rare = {"magnitude": spec.dora, "bias": spec.bias, "a0": spec.init == "pissa", "b0": spec.init == "pissa"}
    return ("a", "b", *(part for part, there in rare.items() if there), *PARTS[spec.rest])


class Part(NamedTuple):
    """One active delta, as the forward pass reads it: attribute names, and the scale with its weight in it."""

    name: str
    a: str
    b: str
    scale: float
    dropout: float


class MergingFace(DeltaFace):
    """A layer whose deltas can be merged into its weight; the wings add the tensors.

    While they are, it keeps the weight as it was and the tensors that it is made of.
    """

    unmerged: Any
    unmerged_sources: dict[str, Any]
    merged_samples: dict[str, list[float]]

    def start_merging(self) -> None:
        """Begin without anything merged."""
        self.unmerged, self.unmerged_sources, self.merged_samples = None, {}, {}

    @abstractmethod
    def refresh(self) -> None:
        """Work out once what a run would otherwise ask on every call; it differs while merged."""

    @property
    def delta_is_merged(self) -> bool:
        """Whether its deltas are in the weight now."""
        return self.unmerged is not None

    @abstractmethod
    def merged_weight(self) -> Any:
        """The weight with every active delta in it, in the weight's dtype; computed in float32 or wider."""

    @abstractmethod
    def copy_weight(self) -> Any:
        """A copy of the weight that shares nothing with it."""

    @abstractmethod
    def sources(self) -> dict[str, Any]:
        """Name -> parameter, of what the weight is made of: itself, or what it is computed from."""

    @abstractmethod
    def copy_of(self, tensor: Any) -> Any:
        """A copy of a tensor that shares nothing with it."""

    @abstractmethod
    def sample_of(self, tensor: Any) -> list[float]:
        """A few of a tensor's values, the same ones whenever it is asked."""

    @abstractmethod
    def write(self, tensor: Any, value: Any) -> None:
        """Overwrite a tensor's values, in place."""

    @abstractmethod
    def write_weight(self, value: Any) -> None:
        """Give the weight these values, in place, through what it is made of.

        Raises:
            UnsupportedError: it is computed from tensors that cannot be made to give them.
        """

    def refuse_merging_deltas(self) -> None:
        """Nothing stands in the way; see `write_weight` for what may stop it."""

    def merge_deltas(self) -> None:
        """Add the active deltas to the weight, in place; a copy of the weight is kept for `unmerge_deltas`."""
        if self.delta_is_merged:
            raise ArgumentError("the deltas of this layer are merged already")
        merged = self.merged_weight()
        sources = {n: self.copy_of(t) for n, t in self.sources().items()}
        before = sources["weight"] if "weight" in sources else self.copy_weight()
        try:
            self.write_weight(merged)
        except Exception:
            self._write_sources(sources)
            raise
        self.unmerged, self.unmerged_sources = before, sources
        self.merged_samples = self._samples()
        self.refresh()

    def refuse_unmerging_deltas(self) -> None:
        """Refuse to put an old weight back over one that came after merging."""
        if self._samples() != self.merged_samples:
            raise ArgumentError(
                "the weight was replaced, loaded or trained since the deltas were merged into it; putting back the old "
                "one would throw that away. merge_delta(model, unload=True) keeps the weight as it is now"
            )

    def unmerge_deltas(self) -> None:
        """Put back the weight as it was, bit for bit, in place."""
        if not self.delta_is_merged:
            raise ArgumentError("the deltas of this layer are not merged")
        self._write_sources(self.unmerged_sources)
        self.keep_merged_deltas()

    def keep_merged_deltas(self) -> None:
        """Let the weight be what it is now, in place: the deltas are not merged."""
        self.unmerged, self.unmerged_sources = None, {}
        self.refresh()

    def _samples(self) -> dict[str, list[float]]:
        """A few values of what the weight is made of, to see that it is still what merging left."""
        return {name: self.sample_of(tensor) for name, tensor in self.sources().items()}

    def _write_sources(self, values: dict[str, Any]) -> None:
        here = self.sources()
        for name, value in values.items():
            self.write(here[name], value)


# What a layer of each sort keeps in its books, taken off with its last delta.
MERGING_BOOK = ("unmerged", "unmerged_sources", "merged_samples")
LORA_BOOK = ("delta_specs", "active_deltas", *MERGING_BOOK, "_running", "_only", "strategies")


class NamedLoras(MergingFace):
    """Named LoRAs on one layer; the wings add the tensors."""

    delta_kind = "lora"
    weight: Any
    delta_specs: dict[str, LoraSpec]
    # Those that act, and where a single plain one does, that one.
    _running: tuple[Part, ...]
    _only: Part | None

    def start(self) -> None:
        """Begin without any delta."""
        self.delta_specs = {}
        self.active_deltas = {}
        self.start_merging()
        self.refresh()

    @abstractmethod
    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a and b."""

    @abstractmethod
    def product(self, a: Any, b: Any) -> Any:
        """b @ a in the layout of the weight."""

    def take(self, name: str, spec: LoraSpec) -> None:
        """Note a delta whose tensors are in place, and make it active."""
        self.delta_specs[name] = spec
        self.active_deltas[name] = 1.0
        self.refresh()

    def drop_delta(self, name: str) -> None:
        """Take a delta away, in place."""
        for part in self.delta_tensors(name):
            delattr(self, part)
        del self.delta_specs[name]
        self.active_deltas.pop(name, None)
        self.refresh()

    def delta_tensors(self, name: str, spelled: str | None = None) -> dict[str, Any]:
        """Attribute -> tensor of everything one delta consists of, the attributes as for a delta named `spelled`."""
        parts = part_names(self.delta_specs[name])
        return {key("lora", p, spelled or name): getattr(self, key("lora", p, name)) for p in parts}

    def delta_options(self, name: str) -> dict[str, Any]:
        """One delta's options as plain values."""
        return self.delta_specs[name].to_dict()

    def set_active_deltas(self, weights: dict[str, float]) -> None:
        """Make these deltas active, each times its weight, and no other, in place."""
        self.active_deltas = {n: w for n, w in weights.items() if n in self.delta_specs}
        self.refresh()

    def refuse_merging_deltas(self) -> None:
        """Refuse a LoRA whose b has a bias, which no weight can hold; see `write_weight` for what else may stop it."""
        if any(spec.bias for spec in self.delta_specs.values()):
            raise UnsupportedError("a LoRA with a bias of its own cannot be added to the weight")

    def active_parts(self) -> tuple[Part, ...]:
        """The deltas that count, merged or not."""
        return tuple(
            Part(
                n,
                key("lora", "a", n),
                key("lora", "b", n),
                self.delta_specs[n].scaling * w,
                self.delta_specs[n].dropout,
            )
            for n, w in self.active_deltas.items()
            if w != 0
        )

    def refresh(self) -> None:
        """Work out once what the forward pass would otherwise ask on every call."""
        running = () if self.delta_is_merged else self.active_parts()
        specs = [self.delta_specs[part.name] for part in running]
        plain = all(not (s.dora or s.keep_zeros or s.bias or s.rest or s.init == "pissa") for s in specs)
        self._running = running
        self._only = running[0] if len(running) == 1 and plain else None

    def words(self) -> str:
        """The deltas, for a printed model."""
        deltas = ", ".join(f"{n}: rank {s.rank}" for n, s in self.delta_specs.items())
        return f"lora=({deltas})" + (", merged" if self.delta_is_merged else "")


class OneAdapter(DeltaFace):
    """The book-keeping of a layer with one delta that either acts or does not."""

    delta_acts: bool

    def carry_delta(self, options: dict[str, Any], name: str = DEFAULT_NAME) -> None:
        """Note the delta's name and options; it acts."""
        self.delta_specs, self.active_deltas, self.delta_acts = {name: options}, {name: 1.0}, True

    def delta_options(self, name: str) -> dict[str, Any]:
        """The delta's options as plain values."""
        return dict(self.delta_specs[name])

    def set_active_deltas(self, weights: dict[str, float]) -> None:
        """Let the delta act if it is among these, in place."""
        self.active_deltas = {n: w for n, w in weights.items() if n in self.delta_specs}
        self.delta_acts = any(self.active_deltas.values())

    def drop_delta(self, name: str) -> None:
        """Take the delta off, in place."""
        self.take_off_deltas()


class OneMerging(OneAdapter, MergingFace):
    """The book-keeping of a layer with one delta that can be merged into its weight."""

    def carry_delta(self, options: dict[str, Any], name: str = DEFAULT_NAME) -> None:
        """Note the delta's name and options; it acts."""
        super().carry_delta(options, name)
        self.start_merging()

    def refresh(self) -> None:
        """Act, unless the delta is in the weight."""
        self.delta_acts = not self.delta_is_merged and any(self.active_deltas.values())

    def set_active_deltas(self, weights: dict[str, float]) -> None:
        """Let the delta act if it is among these, in place."""
        super().set_active_deltas(weights)
        self.refresh()
