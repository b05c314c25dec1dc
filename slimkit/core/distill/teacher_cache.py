"""A teacher's answers on disk: written once, verified, and looked up by the content of each sample."""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from slimkit.core import check, files, traffic
from slimkit.core.batch import as_call
from slimkit.core.batch import dataset as check_dataset
from slimkit.core.distill.cache_facts import VERSION, read_facts
from slimkit.core.distill.config import LOSSES, DistillSpec, KnowledgeDistillConfig, SoftLabel
from slimkit.core.distill.foreign import AT_LEAST, ForeignTeacher
from slimkit.core.distill.sampling import draw, temperatures, undrawn
from slimkit.core.distill.squeezing import spread_logits, squeeze_logits
from slimkit.core.distill.vocabulary import VocabularyMap
from slimkit.core.errors import ConfigError, FileFormatError
from slimkit.core.locks import locked
from slimkit.core.log import progress
from slimkit.core.showing import Shown

Array = np.ndarray[Any, Any]
Cache = TypeVar("Cache", bound="TeacherFiles")


def sample_keys(args: Sequence[Any], kwargs: Mapping[str, Any], to_numpy: Callable[[Any], Array | None]) -> list[bytes]:
    """A 16-byte digest of each sample of a batch, over all its input arrays.

    Args:
        args, kwargs: one call of the model.
        to_numpy: makes an array of a tensor, None of anything else.

    Returns:
        One digest a row; equal for equal rows, whatever batch they come in (padding included).
    """
    values = [*args, *(kwargs[name] for name in sorted(kwargs))]
    arrays = [a for a in map(to_numpy, values) if a is not None and a.ndim]
    if not arrays:
        raise ConfigError("a teacher cache needs a tensor with a batch axis among the inputs")
    found = []
    for row in range(len(arrays[0])):
        digest = hashlib.blake2b(digest_size=16)
        for array in arrays:
            part = np.ascontiguousarray(array[row])
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            digest.update(part.tobytes())
        found.append(digest.digest())
    return found


def targets(spec: DistillSpec) -> list[dict[str, Any]]:
    """What a specification asks of the teacher, label by label, as plain JSON."""
    found = []
    for label in spec.soft_labels:
        only_logits = all(LOSSES.get(t.func_name, ("",))[0] == "logits" for t in label.losses)
        index = list(label.t_output_idx) if isinstance(label.t_output_idx, tuple) else label.t_output_idx
        found.append({"module": label.t_module, "index": index, "side": label.t_side, "logits": only_logits})
    return found


class TeacherFiles(Shown, ABC):
    """A cache of teacher answers, without a framework; `TeacherCache` is the wings' class.

    Args:
        directory: a folder that `build` finished.

    Attributes:
        bytes: of a teacher in a folder, what the build read and wrote once it knew the teacher by its digest: the
            "source"'s size, "read_source", "read_own" and "written"; empty elsewhere.

    Raises:
        FileFormatError: no cache, not finished, or damaged.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = files.as_path(directory, "directory")
        self.facts = read_facts(self.directory)
        if not self.facts["complete"]:
            raise FileFormatError(f"{self.directory} is not finished: call build again, it goes on where it stopped")
        self.bytes: dict[str, int] = {}
        self._place: dict[bytes, tuple[int, int, int]] = {}
        self._open: dict[int, Any] = {}
        for number, shard in enumerate(self.facts["shards"]):
            for batch, rows in enumerate(shard["keys"]):
                for row, key in enumerate(rows):
                    self._place.setdefault(bytes.fromhex(key), (number, batch, row))

    @classmethod
    def build(
        cls: type[Cache],
        teacher: Any,
        dataset: Iterable[Any],
        config: KnowledgeDistillConfig,
        directory: str | Path,
        *,
        top_k: int = 64,
        sampled: int | None = None,
        seed: int = 0,
        dtype: str = "float32",
        to_inputs: Callable[[Any], Any] | None = None,
        shard_mb: int = 256,
        vocabulary: VocabularyMap | None = None,
        mapped_at_least: float = AT_LEAST,
    ) -> Cache:
        """Run the teacher once over a data set and write what the configuration will compare.

        Args:
            teacher: the model; in eval mode meanwhile, then as before. In PyTorch also the folder of a Hugging Face
                model larger than memory (.safetensors), which is walked block by block for some batches at a time.
            dataset: re-iterable batches as the models take them, padded as they will be in training.
            config: the same as for `get_distill_model`.
            directory: where the cache goes; a build that was stopped goes on there.
            top_k: logits kept of each row, for labels with losses on logits alone; at least the number of classes
                keeps them exactly.
            sampled: classes kept of each row instead of `top_k`: half the likeliest, half drawn by probability, so
                that the mean loss is that of all classes (a cut to the likeliest is not). For KDCrossEntropy and
                KDKLDiv, whose value then is off by a number that no student changes; its gradient is not.
            seed: of what is drawn; a sample's draw is its own, whatever batch it comes in.
            dtype: "float32" or "float16" on disk.
            to_inputs: makes of a batch what the models take, for example `lambda batch: batch[0]`.
            shard_mb: size of a file.
            vocabulary: for a teacher of another tokenizer, or another size of its output table: the batches are the
                student's, and so are the classes that are kept. `facts["mapped"]` then says of which share of the
                teacher's probability, and of the tokens read, the other vocabulary has the same text.
            mapped_at_least: the least share of the probability, on average; below it the build is an error.

        Returns:
            The finished cache, to be given to `get_distill_model` in the teacher's place.

        Raises:
            ConfigError: the folder holds a cache of another teacher, configuration or top_k, or another build runs in
                it; too little of a foreign teacher's probability can be mapped.
        """
        check.positive(top_k, "top_k")
        check.choice(dtype, ("float32", "float16"), "dtype")
        check.positive(shard_mb, "shard_mb")
        if sampled is not None:
            check.integer(sampled, "sampled", minimum=2)
        check.integer(seed, "seed", minimum=0)
        dataset = check_dataset(dataset)
        folder = files.as_path(directory, "directory")
        spec = config.spec()
        if spec.teacher_trains:
            raise ConfigError("a teacher that trains cannot be cached")
        wanted = targets(spec)
        identity = {"teacher": cls._digest(teacher), "targets": wanted, "top_k": top_k, "dtype": dtype}
        identity |= cls._beside(teacher)
        if sampled is not None:
            heats = temperatures(spec, [target["logits"] for target in wanted])
            identity |= {"sampled": sampled, "seed": seed, "temperatures": heats}
        if vocabulary is not None:
            check.instance(vocabulary, VocabularyMap, "vocabulary")
            identity["vocabulary"] = vocabulary.digest
        facts: dict[str, Any] = {"version": VERSION, **identity, "complete": False, "widths": [], "shards": []}
        if (folder / "cache.json").exists():
            facts = read_facts(folder)
            for name in (*identity, "sampled", "vocabulary"):
                if name == "config" and name not in facts:  # of an earlier version
                    facts[name] = identity[name]
                if facts.get(name) != identity.get(name):
                    raise ConfigError(f"directory holds a cache of another {name}: {folder}")
        done = {key for shard in facts["shards"] for rows in shard["keys"] for key in rows}
        foreign = None
        if vocabulary is not None:
            foreign = ForeignTeacher(vocabulary, spec, facts, cls._numpy, cls._tensor, mapped_at_least)
        held: dict[str, Array] = {}
        keys: list[list[str]] = []

        def write() -> None:
            if keys:
                name = f"shard-{len(facts['shards']):05d}.safetensors"
                files.write_tensors(folder / name, held)
                entry = {"file": name, "digest": files.digest_file(folder / name), "keys": list(keys)}
                facts["shards"].append(entry)
                files.write_json(folder / "cache.json", facts)
                held.clear()
                keys.clear()

        with (
            locked(folder, "directory"),
            traffic.counted(cls._files(teacher)) as moved,
            cls._answering(teacher, spec.soft_labels) as answer,
        ):
            if (folder / "cache.json").exists() and read_facts(folder)["shards"] != facts["shards"]:
                raise ConfigError(f"directory: another build has just worked in {folder}; call this one again")

            def asked() -> Iterator[tuple[Any, Any, tuple[list[str], Any]]]:
                for batch in progress(dataset, "teacher batches"):
                    args, kwargs = as_call(to_inputs(batch) if to_inputs else batch)
                    found = [key.hex() for key in sample_keys(args, kwargs, cls._numpy)]
                    if not all(key in done for key in found):
                        seat = None
                        if foreign is not None:
                            args, kwargs, seat = foreign.call(args, kwargs)
                        yield args, kwargs, (found, seat)

            for (found, seat), answers in _answered(asked(), answer, cls._together(teacher)):
                if foreign is not None:
                    answers = foreign.answers(answers, seat)
                facts["widths"] = [int(a.shape[-1]) for a in answers]
                for place, (array, target) in enumerate(zip(answers, facts["targets"])):
                    if len(array) != len(found):
                        raise ConfigError(f"{spec.soft_labels[place].label}: the teacher's tensor has no batch axis")
                    # Minus infinity is what a model makes of classes that it never gives.
                    if not (np.isfinite(array) | (target["logits"] & np.isneginf(array))).all():
                        raise ConfigError(f"{spec.soft_labels[place].label}: the teacher answers with NaN or infinity")
                    kept = _kept(array, target["logits"], facts, place, found)
                    held.update({f"{len(keys)}.{place}.{part}": value for part, value in kept.items()})
                done.update(found)
                keys.append(found)
                if sum(a.nbytes for a in held.values()) >= shard_mb << 20:
                    write()
            if foreign is not None:
                foreign.judge()
            write()
            facts["complete"] = True
            files.write_json(folder / "cache.json", facts)
        made = cls(folder)
        if cls._files(teacher):
            made.bytes = moved.facts()
            traffic.say("the teacher", made.bytes)
        return made

    def check(self, spec: DistillSpec) -> None:
        """Refuse a specification that the cache was not built for."""
        if self.facts["targets"] != targets(spec):
            raise ConfigError(
                "config asks the teacher for other tensors than the cache holds: build it with this config"
            )
        if "sampled" in self.facts:
            heats = temperatures(spec, [target["logits"] for target in self.facts["targets"]])
            if heats != self.facts["temperatures"]:
                raise ConfigError(
                    f"config has the temperatures {heats}, the cache's draws {self.facts['temperatures']}"
                )

    def verify(self) -> None:
        """Read every file once and compare its digest; FileFormatError names a damaged one."""
        for shard in self.facts["shards"]:
            file = files.readable_file(files.inside(self.directory, shard["file"], "shard"), "shard")
            if files.digest_file(file) != shard["digest"]:
                raise FileFormatError(f"{file} was changed since it was written")

    def lookup(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[None, dict[int, Any]]:
        """The teacher's tensors for one batch, by the label's place.

        Raises:
            ConfigError: a sample that the teacher never saw.
        """
        rows = []
        for number, key in enumerate(sample_keys(args, kwargs, self._numpy)):
            if key not in self._place:
                raise ConfigError(
                    f"sample {number} of this batch is not in {self.directory}: that was built from other data, "
                    "or from the same with other padding"
                )
            rows.append(self._place[key])
        like = next(v for v in (*args, *kwargs.values()) if self._numpy(v) is not None)
        return None, {
            place: self._tensor(self._fetch(place, rows), like) for place in range(len(self.facts["targets"]))
        }

    def _fetch(self, place: int, rows: list[tuple[int, int, int]]) -> Array:
        parts: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for at, (shard, batch, row) in enumerate(rows):
            parts.setdefault((shard, batch), []).append((at, row))
        found: Array | None = None
        for (shard, batch), members in parts.items():
            kept = {
                part: self._read(shard, f"{batch}.{place}.{part}", [row for _, row in members])
                for part in self._parts(shard, f"{batch}.{place}.")
            }
            if not kept.keys() >= {"dense"} and set(kept) not in ({"values", "places", "tail"}, {"ids", "weights"}):
                raise FileFormatError(f"{self.directory}: shard {shard} lacks tensors of batch {batch}: call verify()")
            if "ids" in kept:
                values = undrawn(kept, self.facts["widths"][place], self.facts["temperatures"][place])
            else:
                values = spread_logits(kept, self.facts["widths"][place])
            if found is None:
                found = np.empty((len(rows), *values.shape[1:]), np.float32)
            if found.shape[1:] != values.shape[1:]:
                raise ConfigError("samples of one batch were cached with different lengths: pad them all alike")
            found[[at for at, _ in members]] = values
        assert found is not None
        return found

    def _handle(self, shard: int) -> Any:
        if shard not in self._open:
            from safetensors import SafetensorError, safe_open

            file = files.inside(self.directory, self.facts["shards"][shard]["file"], "shard")
            try:
                handle = safe_open(str(files.readable_file(file, "shard")), framework="np")
            except (SafetensorError, ValueError) as error:
                raise FileFormatError(f"{file} is not a readable safetensors file: {error}") from None
            self._open[shard] = (handle, set(handle.keys()))  # type: ignore[no-untyped-call]
        return self._open[shard]

    def _parts(self, shard: int, prefix: str) -> list[str]:
        return [
            p for p in ("dense", "values", "places", "tail", "ids", "weights") if prefix + p in self._handle(shard)[1]
        ]

    def _read(self, shard: int, name: str, rows: list[int]) -> Array:
        view = self._handle(shard)[0].get_slice(name)
        if max(rows) >= view.get_shape()[0]:
            raise FileFormatError(f"{self.directory}: {name} of shard {shard} has fewer rows than cache.json says")
        if rows == list(range(len(rows))):
            return np.asarray(view[: len(rows)])
        return np.concatenate([view[row : row + 1] for row in rows])

    @staticmethod
    @abstractmethod
    def _numpy(value: Any) -> Array | None:
        """A tensor as an array; None for anything else."""

    @staticmethod
    @abstractmethod
    def _tensor(array: Array, like: Any) -> Any:
        """An array as a tensor where `like` is."""

    @staticmethod
    @abstractmethod
    def _digest(teacher: Any) -> str:
        """A digest of the teacher's weights."""

    @staticmethod
    def _beside(teacher: Any) -> dict[str, Any]:
        """What else tells a teacher from others, by its name in the cache's facts."""
        return {}

    @staticmethod
    def _files(teacher: Any) -> list[Path]:
        """The files that a teacher's weights are read from; none where it is in memory."""
        return []

    @staticmethod
    def _together(teacher: Any) -> int:
        """How many batches the teacher is asked at once."""
        return 1

    @staticmethod
    @abstractmethod
    def _answering(teacher: Any, labels: tuple[SoftLabel, ...]) -> Any:
        """A context that gives f(calls) -> for each (args, kwargs) the labels' tensors, as float32 arrays."""


def _answered(
    asked: Iterator[tuple[Any, Any, tuple[list[str], Any]]],
    answer: Callable[[list[tuple[Any, Any]]], Iterable[list[Array]]],
    together: int,
) -> Iterator[tuple[tuple[list[str], Any], list[Array]]]:
    """What goes with each batch and the teacher's tensors, some batches at once."""
    while group := list(itertools.islice(asked, together)):
        yield from zip((keys for *_, keys in group), answer([(args, kwargs) for args, kwargs, _ in group]))


def _kept(array: Array, logits: bool, facts: Mapping[str, Any], place: int, keys: Sequence[str]) -> dict[str, Array]:
    """What of a teacher's tensor goes into the files."""
    if not logits or facts.get("sampled") is None or facts["sampled"] >= array.shape[-1]:
        return squeeze_logits(array, facts["top_k"] if logits else array.shape[-1], facts["dtype"])
    found = []
    for rows, key in zip(array, keys):
        rng = np.random.default_rng([facts["seed"], place, int(key, 16)])
        drawn = draw(rows.reshape(-1, rows.shape[-1]), facts["sampled"], facts["temperatures"][place], rng)
        found.append({part: value.reshape(*rows.shape[:-1], -1) for part, value in drawn.items()})
    return {part: np.stack([one[part] for one in found]) for part in ("ids", "weights")}
