"""What every layer that carries a delta can be asked, in both frameworks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from slimkit.core.delta.spec import MERGING
from slimkit.core.errors import UnsupportedError


class DeltaFace:
    """A layer that carries one or several named deltas.

    A layer becomes one in place: the same object, under a subclass of its own class. So it holds no second copy of
    anything: parameters, hooks and settings are the layer's own, whoever changes them and whenever.
    """

    delta_kind: ClassVar[str] = ""
    # The class of the layer before a delta was put on it; None for a layer built by hand as a delta layer.
    plain_class: ClassVar[type | None] = None
    # name of each delta on the layer -> its options
    delta_specs: dict[str, Any]
    # name -> weight, of those that act
    active_deltas: dict[str, float]
    # of a prefix: how many heads its keys and values have
    prefix_heads: int

    @property
    def built_as_delta(self) -> bool:
        """Whether it was built by hand as a delta layer, so that there is no plain layer to go back to."""
        return self.plain_class is None

    @property
    def delta_is_merged(self) -> bool:
        """Whether its deltas are in the weight now."""
        return False

    def add(self, name: str, spec: Any, dtype: Any = None, *, fresh: bool = True, start: Any = None) -> None:
        """Add one more named delta that changes nothing yet, in place, and let it act; LoRA layers take several."""
        raise UnsupportedError(f"a layer takes one {self.delta_kind!r}")

    def sources(self) -> dict[str, Any]:
        """Name -> parameter, of what merging writes to: the weight, or what it is computed from."""
        return {}

    @abstractmethod
    def delta_options(self, name: str) -> dict[str, Any]:
        """One delta's options as plain values."""

    @abstractmethod
    def delta_tensors(self, name: str, spelled: str | None = None) -> dict[str, Any]:
        """Path below the layer -> tensor of everything one delta consists of, as for a delta named `spelled`."""

    def refuse_values(self, parts: Mapping[str, Any], where: str) -> None:
        """Raise FileFormatError where a file's values for `delta_tensors` mean nothing; their shapes are right."""
        return

    @abstractmethod
    def set_active_deltas(self, weights: dict[str, float]) -> None:
        """Let these deltas act, each times its weight, and no other, in place."""

    @abstractmethod
    def drop_delta(self, name: str) -> None:
        """Take one delta off, in place."""

    @abstractmethod
    def take_off_deltas(self) -> None:
        """Be the plain layer again, in place; all deltas are gone."""

    def refuse_merging_deltas(self) -> None:
        """Raise UnsupportedError where the deltas cannot be added to the weight."""
        raise UnsupportedError(f"only {', '.join(MERGING)} can be merged; this layer carries {self.delta_kind!r}")

    def merge_deltas(self) -> None:
        """Add the active deltas to the weight, in place."""
        self.refuse_merging_deltas()

    def refuse_unmerging_deltas(self) -> None:
        """Raise ArgumentError where an old weight would be put back over one that came after merging."""
        return

    def unmerge_deltas(self) -> None:
        """Put back the weight as it was before `merge`, bit for bit, in place."""
        self.refuse_merging_deltas()

    def keep_merged_deltas(self) -> None:
        """Let the merged weight be the weight from now on, in place."""
        self.refuse_merging_deltas()
