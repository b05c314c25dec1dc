"""What the jobs ask of a framework, and what passes between a job and whoever wants it done."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from slimkit.core.errors import ConfigError, UnsupportedError
from slimkit.core.jobs.crew import CrewFramework
from slimkit.core.jobs.measurement import Measurement
from slimkit.core.jobs.sources import DataPlace, ModelPlace, StudentPlace

if TYPE_CHECKING:
    from slimkit.core.calibration.reading import TextReader
    from slimkit.core.compare.framework import CompareFramework
    from slimkit.core.distill.config import KnowledgeDistillConfig
    from slimkit.core.jobs.options import DistillOptions, FitOptions
    from slimkit.core.prune.onnx_times import OnnxTimes
    from slimkit.core.sparse import SparseConfig

Array = np.ndarray[Any, Any]
ComputeLoss = Callable[[Any, Any], Any]  # f(model, batch) -> scalar


@dataclass
class Opened:
    """A model and where it came from.

    Args:
        model: in eval mode.
        place: what the user named.
        directory: the folder with its configuration and tokenizer, where it has one.
        desc: the plan that pruned it, where its folder says so.
        fresh: parameters that the files lack and that were drawn at random, as the command allowed.
        shared: what puts the model together where processes hold parts of it.
    """

    model: Any
    place: ModelPlace
    directory: Path | None = None
    desc: dict[str, Any] | None = None
    fresh: tuple[str, ...] = ()
    shared: Any = None

    @property
    def is_hf(self) -> bool:
        """Whether transformers made the model."""
        return self.place.factory is None


@dataclass
class JobResult:
    """What a job gives back.

    Args:
        model: the model afterwards, the same object or a new one.
        edit: how its structure changed, as plain JSON that a run can replay; None if it did not.
        facts: what to say about it, as plain JSON; "headline" is its one sentence.
        curves: name -> values over the updates or epochs, for plots.
    """

    model: Any
    edit: dict[str, Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class FitRun:
    """How a training command keeps its state.

    Args:
        seed: of the order, of fresh weights and of dropout.
        save_every: updates between two checkpoints.
        restart: throw an unfinished run away.
    """

    seed: int = 0
    save_every: int = 100
    restart: bool = False


@dataclass(frozen=True)
class Supervised:
    """What a network learns from.

    Args:
        samples: indices of rows, which `collate` turns into a batch; or ready batches as a function made them.
        collate: list of indices -> (inputs, labels) or, without labels, inputs; None for ready batches.
        count: samples, or ready batches.
        identity: what a resumed run must agree in.
        labelled: whether a batch is (inputs, labels).
        integers: whether the labels are integers, that is classes.
        tokens: batch -> over how many tokens its loss is a mean; None: over its samples.
        even: whether a sample is the same row of numbers in every batch, so that a teacher's answer can be kept.
        facts: what to say about the data, as plain values.
    """

    samples: Any
    collate: Callable[[list[int]], Any] | None
    count: int
    identity: dict[str, Any]
    labelled: bool
    integers: bool = False
    tokens: Callable[[Any], float] | None = None
    even: bool = True
    facts: Mapping[str, Any] = field(default_factory=dict)

    def spread(self, size: int, batch_size: int) -> list[Any]:
        """At most `size` samples from all over the data, as batches."""
        count = min(size, self.count)
        at = [i * self.count // count for i in range(count)]
        if self.collate is None:
            return [self.samples[i] for i in at]
        return [self.collate(at[i : i + batch_size]) for i in range(0, count, batch_size)]

    def first(self, size: int) -> Any:
        """The first batch."""
        return self.samples[0] if self.collate is None else self.collate(list(range(min(size, self.count))))

    def batches(self, size: int) -> list[Any]:
        """All batches in order."""
        if self.collate is None:
            return list(self.samples)
        return [self.collate(list(range(at, min(at + size, self.count)))) for at in range(0, self.count, size)]


@dataclass
class Lesson:
    """What a `distill` command works on.

    Args:
        teacher: the model that knows.
        student: the model that learns, whose folder is written.
        read: the data.
        config: what is compared; None where the options say it.
        layers: layer of the student -> layer of the teacher that it is compared with, or came from.
    """

    teacher: Opened
    student: Opened
    read: Supervised
    config: KnowledgeDistillConfig | None
    layers: Mapping[str, Any]


@dataclass
class Task:
    """What an `adapt` command works on.

    Args:
        opened: the base.
        read: the data.
        held: held-out data of the same form, or None.
        name: of the task, or of the loss.
        loss: the loss.
        options: the job's, with what the task adds to them.
        labels: label -> class, where the data has words for classes.
        classes: whether the labels are classes, so that accuracy can be reported.
    """

    opened: Opened
    read: Supervised
    held: Supervised | None
    name: str
    loss: ComputeLoss
    options: FitOptions
    labels: dict[str, int]
    classes: bool


class JobFramework(CrewFramework, Protocol):
    """A framework's side of the jobs: what it alone knows."""

    # The package whose public names do the work.
    slim: Any
    # What `export` can write.
    formats: tuple[str, ...]
    # The type that the framework's cross entropy wants classes in.
    class_dtype: str
    # "cross_entropy" and "mse" -> f(answer, target) -> scalar
    losses: ClassVar[Mapping[str, Callable[[Any, Any], Any]]]

    # Random numbers and versions.

    @abstractmethod
    def seed_framework(self, seed: int) -> None:
        """Seed the framework's own random numbers."""

    @abstractmethod
    def seeded(self, seed: int) -> contextlib.AbstractContextManager[None]:
        """Draw the same values whenever the same command is given."""

    @abstractmethod
    def framework_versions(self) -> dict[str, str]:
        """The framework's name and version."""

    # A model in memory.

    @abstractmethod
    def check_model(self, model: Any) -> Any:
        """Refuse anything but a model of this framework."""

    @abstractmethod
    def measure(self, model: Any, inputs: Any, dense: Any = None) -> Measurement:
        """Parameters, zeros, MACs and latency on one input; `dense` is timed in turn with it."""

    @abstractmethod
    def latency_times(self, model: Any, inputs: Any) -> OnnxTimes:
        """What times networks of these inputs on this machine."""

    @abstractmethod
    def states(self, model: Any) -> Iterator[tuple[str, str, Array]]:
        """Every parameter and buffer as (name, dtype and shape, raw values)."""

    @abstractmethod
    def sizes(self, model: Any) -> list[tuple[int, bool]]:
        """Every parameter once as (number of entries, whether it trains)."""

    @abstractmethod
    def snapshot(self, model: Any) -> Callable[[Any], Any]:
        """Keep all weights; returns what puts them into a model of the same structure."""

    @abstractmethod
    def call(self, model: Any, inputs: Any) -> Any:
        """Run a model on one batch of inputs."""

    @abstractmethod
    def outputs(self, model: Any, inputs: Any) -> list[Array]:
        """The arrays that a model answers with in eval mode."""

    @abstractmethod
    def inside(self, model: Any, inputs: Any, paths: Sequence[str]) -> dict[str, Any]:
        """What these layers answer inside a model in eval mode, and under "" the model itself."""

    @abstractmethod
    def arrays(self, inputs: Any) -> list[Array]:
        """The arrays of one batch, in the order of the inputs of the ONNX files that the package writes."""

    @abstractmethod
    def evaluating(self, model: Any) -> contextlib.AbstractContextManager[None]:
        """Eval mode without gradients, for a while."""

    @abstractmethod
    def sparse_layers(self, model: Any) -> tuple[Mapping[str, Any], dict[str, str]]:
        """The layers that can be sparse, and those that cannot with the reason."""

    # Training.

    @abstractmethod
    def train(
        self, model: Any, samples: Any, options: FitOptions, loss: ComputeLoss, callbacks: list[Any],
        how: Mapping[str, Any], tokens: Callable[[Any], float] | None = None,
    ) -> Any:  # fmt: skip
        """Train what wants a gradient, in place; returns the trainer.

        `how` is what `Trainer.train` takes; `tokens` says over how many tokens a batch's loss is a mean.
        """

    @abstractmethod
    def record_zeros(self, model: Any, names: Iterable[str]) -> None:
        """Note on these layers, in place, that their zeros were made: a delta keeps them. Unknown names pass."""

    @abstractmethod
    def made_zeros(self, model: Any) -> bool:
        """Whether a layer's zeros were made, here or by what its folder says."""

    @abstractmethod
    def statistics_held(self, model: Any) -> contextlib.AbstractContextManager[None]:
        """Training mode, but for norms with running statistics: a delta does not carry what they learn."""

    @abstractmethod
    def soft_loss(self, dual: Any, inputs: Any) -> Any:
        """The distillation loss of the two models on one batch of inputs."""

    # What a command line names, and what it writes.

    @abstractmethod
    def open(self, place: ModelPlace, delta: Path | None = None) -> Opened:
        """Open the model, in eval mode, with a saved delta on it where one is given.

        Raises:
            ConfigError, FileFormatError: it cannot be opened, or the delta belongs to another one.
        """

    def from_config(self, folder: Path, arrays: Mapping[str, Any]) -> Any:
        """The model that a folder's config.json describes, in eval mode, with these values by name.

        Raises:
            UnsupportedError: the framework cannot make it.
            FileFormatError: the model holds other tensors.
        """
        raise UnsupportedError(
            f"MindSpore cannot build the model of transformers that {folder / 'config.json'} describes"
        )

    @abstractmethod
    def tensors(self, arrays: Any) -> Any:
        """NumPy arrays, alone or in a dict, as the framework's tensors."""

    @abstractmethod
    def own_example(self, opened: Opened, length: int, seed: int) -> Any:
        """An input that the model itself describes, or on which it runs; NoExampleError where there is none."""

    @abstractmethod
    def text(self, opened: Opened, place: DataPlace) -> list[Any]:
        """A text file as batches; ConfigError where the model has no tokenizer."""

    @abstractmethod
    def input_shapes(self, inputs: Any) -> dict[str, list[int]]:
        """The shapes of an example's tensors, by the names an exported file gives them."""

    @abstractmethod
    def write_model(self, opened: Opened, folder: Path) -> str:
        """Write a model into an empty folder; "transformers", "slimkit" or "weights" says what reads it."""

    @abstractmethod
    def export(
        self, opened: Opened, inputs: Any, out: Path, format: str, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Write one file or folder of a format, proven where the format can be run; for w8a8s `inputs` are batches."""

    @abstractmethod
    def judging(self) -> CompareFramework:
        """The framework as `core/compare` sees it."""

    # What a framework may do in its own way.

    def keeps_answers(self) -> bool:
        """Whether a teacher's answers can be read from files while a student trains."""
        return True

    def reloaded(self, opened: Opened, folder: Path, inputs: Any) -> float | None:
        """Where transformers reads a written folder: by how much its model's outputs differ from the opened one's.

        Raises:
            UnsupportedError: by more than rounding can explain.
        """
        return None

    def tokenizer(self, opened: Opened) -> Any:
        """The tokenizer that came with a model; ConfigError where it has none."""
        raise ConfigError("--text needs the tokenizer of a Hugging Face directory; give --data with token numbers")

    def reader(self, opened: Opened) -> TextReader:
        """How a model reads text; ConfigError where it has no tokenizer."""
        raise ConfigError("--calib: text needs the tokenizer of a Hugging Face directory; give arrays or a function")

    def learns_text(self, place: ModelPlace, data: DataPlace) -> bool:
        """Whether the model has a tokenizer and learns from this text."""
        return False

    def lesson(
        self, place: ModelPlace, data: DataPlace, options: DistillOptions, student: StudentPlace, seed: int
    ) -> Lesson:
        """Where `learns_text`: a student cut out of the teacher, and the text."""
        raise UnsupportedError("students are cut out of Hugging Face directories in PyTorch alone")

    def task(
        self,
        place: ModelPlace,
        data: DataPlace,
        held: DataPlace | None,
        asked: str,
        options: FitOptions,
        seed: int,
    ) -> Task:
        """Where `learns_text`: the model with the head that the text's task needs, and the text."""
        raise UnsupportedError("text is learned by Hugging Face directories in PyTorch alone")

    def folder_pruner(self, place: ModelPlace, out: Path, calib: DataPlace | None) -> tuple[Any, Any]:
        """A pruner of a folder that is never in memory whole, and the batches; own text goes beside `out`."""
        raise UnsupportedError("--stream reads folders of transformers, which are PyTorch's: leave --framework out")

    def sparsify_blocks(
        self,
        place: ModelPlace,
        out: Path,
        cfg: SparseConfig,
        calib: DataPlace | None,
        command: str,
        *,
        restart: bool,
        plan: bool,
    ) -> dict[str, Any] | None:
        """Sparsify a folder block by block, or `plan` it, `command` on its card; None where it is in memory whole."""
        self.join()
        return None
