"""`load`: what a folder of slimkit's is, and its model wherever the folder says enough to make one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimkit.core import files
from slimkit.core.checkpoint.maker import read_maker
from slimkit.core.errors import ConfigError, FileFormatError, UnsupportedError
from slimkit.core.jobs import folders, inspecting
from slimkit.core.jobs.framework import JobFramework
from slimkit.core.jobs.sources import ModelPlace
from slimkit.core.lazy import imported
from slimkit.core.showing import Shown

_GIVE = "load(folder, network) with a fresh network of the original make"
_TRUST = "load(folder, trust_factory=True) calls it"

# Reports of commands beside a model's weights -> what that model is.
_MADE_BY = {folders.SPARSE_REPORT: "sparse", "distill_report.json": "student"}

# What goes on from folders that hold no model's weights alone.
_READERS = {
    "trainer checkpoint": "Trainer.train(resume_from=...) goes on from it",
    "teacher cache": "TeacherCache.open reads it",
}


@dataclass(repr=False)
class Loaded(Shown):
    """What `load` found in a folder.

    Args:
        path: the folder.
        kind: "pruned", "sparse", "student", "model", "weights", "bundle" (a delta), "peft", "w16a16s", "w8a8s", "run",
            "desc", "onnx", "trainer checkpoint" or "teacher cache".
        model: the model, in eval mode; None where the folder does not say how to make it.
        next: one line: how the model was made, or what makes it.
        facts: what the files say: tensors, parameters, bytes, dtypes, plan, layers.
    """

    path: str
    kind: str
    model: Any = None
    next: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def needed(self, name: str) -> Any:
        """The model, or an error that says what makes it."""
        if self.model is None:
            raise ConfigError(f"{name}: {self.path} gives no model by itself ({self.next})")
        return self.model

    def _title(self) -> str:
        return f"{self.kind} in {self.path}"

    def _rows(self) -> Iterable[tuple[str, Any]]:
        yield "model", "not made" if self.model is None else type(self.model).__name__
        yield "next", self.next
        yield from self.facts.items()


def open_folder(
    face: JobFramework,
    folder: files.PathLike,
    network: Any,
    trust_factory: bool,
) -> Loaded:
    """What `load` of both packages does.

    Args:
        face: the framework.
        folder, network, trust_factory: as the user gave them.
    """
    path = files.as_path(folder, "folder")
    if isinstance(network, (str, Path)):
        network = open_folder(face, network, None, trust_factory).needed("network")
    elif network is not None:
        network = face.check_model(network)
    kind = inspecting.kind_of(path)
    if kind in _READERS:
        return Loaded(str(path), kind, None, _READERS[kind])
    if kind == "run":
        facts = _run_facts(path)
    else:
        facts = inspecting.look(path, lambda: imported("torch"), values=False).facts
    if path.is_dir() and kind in ("model", "weights"):
        kind = next((word for name, word in _MADE_BY.items() if (path / name).exists()), kind)
    found = Loaded(str(path), kind, facts=facts)
    if kind == "run":
        _run(face, path, network, trust_factory, found)
    elif kind in ("bundle", "peft"):
        _delta(face, path, network, found)
    elif kind == "w16a16s":
        _w16a16s(face, path, network, found)
    elif kind == "w8a8s":
        found.next = "vLLM-Ascend serves it on the 310P; emulate_w8a8s(model, folder) computes as the device does"
    elif kind == "desc":
        found.next = "Pruner(network).prune_by_desc(desc) makes this cut on a fresh network"
    elif kind == "onnx":
        found.next = "onnxruntime.InferenceSession runs it; slimkit inspect shows its operators"
    else:
        _weights(face, path, network, trust_factory, found)
    return found


def _weights(face: JobFramework, path: Path, network: Any, trust_factory: bool, found: Loaded) -> None:
    """Weights alone, a pruned folder, or a Hugging Face folder."""
    whole = path.is_dir()
    made = read_maker(path) if whole else None
    if network is None and made is not None and trust_factory:
        network = face.check_model(ModelPlace(None, made[0], made[1]).make())
        found.next = f"made by {made[0]}"
    if network is not None:
        if found.kind == "pruned":
            face.slim.load_pruned(path, network)
        else:
            face.slim.load_checkpoint(path, network, strict_load=True)
        if whole:
            face.record_zeros(network, folders.made_sparse(path))
        found.model = _evaluating(network)
        found.next = found.next or "the network given holds the weights"
        return
    described = whole and ((path / "config.json").exists() or (path / folders.BASE / "config.json").exists())
    if described:
        try:
            found.model = _evaluating(face.open(ModelPlace(path)).model)
            found.next = "made from config.json"
            return
        except UnsupportedError as error:
            found.next = f"{error}; {_GIVE}"
        except ConfigError as error:
            if made is None and face.slim.__name__ == "slimkit":
                raise
            found.next = f"{error}; {_GIVE}"
    if made is not None:
        found.next = f"{made[0]} makes its network: {_TRUST}, and so does {_GIVE}"
    elif not found.next:
        found.next = f"nothing here says which network these weights are of: {_GIVE}"


def _evaluating(model: Any) -> Any:
    switch = getattr(model, "set_train", None) or model.train
    switch(False)
    return model


def _delta(face: JobFramework, path: Path, network: Any, found: Loaded) -> None:
    """A delta goes on its base."""
    base = found.facts.get("base_model")
    if network is None and isinstance(base, str) and Path(base).is_dir():
        network = open_folder(face, base, None, False).model
    if network is None:
        found.next = "load(folder, base), a model or its folder, puts the delta on it"
        return
    face.slim.load_delta(network, path)
    found.model, found.next = _evaluating(network), "the delta is on its base; merge_delta folds it in"


def _w16a16s(face: JobFramework, path: Path, network: Any, found: Loaded) -> None:
    from slimkit.core.ascend.w16a16s import load_w16a16s

    read = load_w16a16s(path)
    if network is not None:
        face.slim.load_param_into_net(network, face.tensors(read.tensors), strict_load=True)
        found.model, found.next = _evaluating(network), "the network given holds the weights, rounded to float16"
        return
    if read.config.get("architectures"):
        try:
            found.model = face.from_config(path, read.tensors)
            found.next = "made from config.json, the weights as float16 holds them"
            return
        except UnsupportedError as error:
            found.next = f"{error}; {_GIVE}"
            return
    found.next = f"config.json names no class of transformers: {_GIVE}"


def _run_facts(path: Path) -> dict[str, Any]:
    """What run.json and the finished stages say."""
    told = files.read_json(path / "run.json", "run.json")
    if not isinstance(told, dict) or told.get("format") != "slimkit-run" or not isinstance(told.get("recipe"), dict):
        raise FileFormatError(f"{path / 'run.json'} is not the record of a slimkit run")
    return {"name": told["recipe"].get("name"), "stages": [stage.name for stage in _finished(path)]}


def _finished(path: Path) -> list[Path]:
    """Folders of the finished stages, in order."""
    return sorted(file.parent for file in (path / "stages").glob("[0-9]*/stage.json"))


def _run(face: JobFramework, path: Path, network: Any, trust_factory: bool, found: Loaded) -> None:
    """The model as it was after the last finished stage."""
    from slimkit.core.run.language import model_folder
    from slimkit.core.run.stages import Stages

    if network is not None:
        raise ConfigError("network: a run makes its own from its recipe; leave it out")
    told = files.read_json(path / "run.json", "run.json")
    recipe, folder = _recipe(path, told["recipe"]), Path(told.get("folder", ""))
    framework = {"slimkit": "torch", "slimkit_ms": "mindspore"}[face.slim.__name__]
    last = _finished(path)[-1] if _finished(path) else None
    if recipe.framework != framework:
        found.next = f"a run of {recipe.framework}: the other package's load makes its model"
    elif "folder" not in told:
        found.next = "an older slimkit wrote this run, and where its recipe stood is not known"
    elif last is None or not (last / "model.safetensors").exists():
        found.next = "no stage has changed the recipe's model yet"
    elif model_folder(recipe, folder) is None and not trust_factory:
        found.next = f"the recipe's factory {recipe.model} makes its network: {_TRUST}"
    else:
        stages = Stages(face)
        stages.seed(recipe.seed)
        model = stages.build(recipe, folder, files.read_json(last / "structure.json", "structure"), None)
        stages.load(model, last / "model.safetensors")
        if stages.digest(model) != files.read_json(last / "stage.json", "stage record")["digest"]:
            raise FileFormatError(f"{last / 'model.safetensors'} holds other weights than when the stage ended")
        found.model, found.next = _evaluating(model), f"as it was after {last.name}"


def _recipe(path: Path, told: dict[str, Any]) -> Any:
    """What makes the recipe's model. Its stages are done; written with all defaults, they are no recipe's text."""
    from pydantic import ValidationError

    from slimkit.core.run.recipe import Recipe

    wanted = ("version", "name", "framework", "seed", "model", "data")
    kept = {key: told[key] for key in wanted if told.get(key) is not None}
    try:
        return Recipe.model_validate({**kept, "stages": [{"export": {}}]})
    except ValidationError as error:
        raise FileFormatError(f"{path / 'run.json'} is damaged: {error.errors()[0]['msg']}") from None
