"""The recipe's schema: what is accepted, and the key's path in front of every complaint."""

from __future__ import annotations

import copy
import json
import textwrap
from pathlib import Path

import pytest

from slimkit.core.errors import ConfigError, FileFormatError
from slimkit.core.jobs import factory
from slimkit.core.jobs.options import JOBS
from slimkit.core.run import checking
from slimkit.core.run.recipe import Recipe, load_recipe, parse_recipe, paths_begin

GOOD = {
    "version": 1,
    "name": "x",
    "model": "m.py:f",
    "data": {"factory": "m.py:d", "arguments": {"n": 3}},
    "stages": [
        {"prune": {"reserved_ratio": 0.5}},
        {"distill": {"epochs": 1, "hidden": [{"teacher": "a", "student": "b", "loss": "HiddenMse"}]}},
        {"cut": {"arguments": {"layers": 3}, "pattern": r"layer\.(\d+)\.", "layers": {0: 0, 1: 2}}},
    ],
}


def test_a_good_recipe_is_read_in_order_and_is_immutable():
    recipe = parse_recipe(GOOD)
    assert [kind for kind, _ in recipe.steps()] == ["prune", "distill", "cut"]
    assert recipe.steps()[0][1].alignment == 16
    assert recipe.steps()[2][1].layers == {0: 0, 1: 2}
    with pytest.raises(Exception, match="frozen"):
        recipe.seed = 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(modle=1), "modle: unknown key. Did you mean 'model'"),
        (lambda c: c.pop("model"), "model: this key is required"),
        (lambda c: c.update(version=2), "version: "),
        (lambda c: c.update(name="../x"), "name: "),
        (lambda c: c.update(seed=-1), "seed: "),
        (lambda c: c.update(stages=[]), "stages: "),
        (lambda c: c.update(model=3), "model: "),
        (lambda c: c["data"].update(argumnets={}), "data.argumnets: unknown key. Did you mean 'arguments'"),
        (
            lambda c: c["stages"][0]["prune"].update(reserved_ratoi=1),
            "stages[0].prune.reserved_ratoi: unknown key. Did you mean 'reserved_ratio'",
        ),
        (lambda c: c["stages"][0]["prune"].update(reserved_ratio=1.5), "stages[0].prune.reserved_ratio: "),
        (lambda c: c["stages"][0]["prune"].update(reserved_ratio="0.5"), "stages[0].prune.reserved_ratio: "),
        (lambda c: c["stages"][0]["prune"].pop("reserved_ratio"), "stages[0].prune.reserved_ratio: this key is"),
        (lambda c: c["stages"].append({"purne": {}}), "stages[3]: a stage is one of train, finetune"),
        (lambda c: c["stages"].append({"prune": {}, "train": {}}), "stages[3]: a stage is one of"),
        (lambda c: c["stages"].append({"export": None}), "stages[3].export: "),
        (lambda c: c["stages"][1]["distill"]["hidden"][0].update(wieght=1), "stages[1].distill.hidden[0].wieght"),
    ],
)
def test_each_mistake_is_named_by_its_path(change, message):
    content = copy.deepcopy(GOOD)
    change(content)
    with pytest.raises(ConfigError) as caught:
        parse_recipe(content)
    assert message in str(caught.value)
    assert "\n  " not in str(caught.value), "one mistake, one line"


def write(folder, text):
    file = folder / "recipe.yaml"
    file.write_text(textwrap.dedent(text))
    return file


YAML = """
    version: 1
    name: x
    model: task.py:model
    data: task.py:data
    stages:
      - train: {epochs: 2}
"""


def test_a_file_is_read_with_overrides(tmp_path):
    file = write(tmp_path, YAML)
    recipe = load_recipe(file, {"seed": 7, "stages.0.train.epochs": 5})
    assert recipe.seed == 7
    assert recipe.steps()[0][1].epochs == 5
    for key in ("stages.5.train.epochs", "stages.x.train", "name.first"):
        with pytest.raises(ConfigError, match="there is no such place"):
            load_recipe(file, {key: 1})


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileFormatError, match="existing file"):
        load_recipe(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="the key 'name' is given twice"):
        load_recipe(write(tmp_path, YAML + "    name: y\n"))
    for text in ("a: [", "- 1", "", "!!python/object/apply:os.system ['true']"):
        with pytest.raises(ConfigError):
            load_recipe(write(tmp_path, text))


def test_factories_are_found_called_and_blamed(tmp_path):
    (tmp_path / "task.py").write_text(
        "def model(width=1):\n    return width\ndef broken():\n    raise RuntimeError('no luck')\nnumber = 3\n"
    )
    (tmp_path / "bad.py").write_text("import a_module_that_is_not_there\n")
    assert factory.make("task.py:model", tmp_path, "model") == 1
    assert factory.make(factory.Factory(factory="task.py:model", arguments={"width": 4}), tmp_path, "model") == 4
    assert factory.make("json:dumps", tmp_path, "model", [1]) == "[1]"
    for reference, message in [
        ("task.py:modle", "model: task.py has no function 'modle'. Did you mean 'model'"),
        ("task.py:number", "has no function 'number'"),
        ("task.py", "must be file.py:function"),
        ("missing.py:f", "model: factory file must be an existing file"),
        ("bad.py:f", "model: importing bad.py raised ModuleNotFoundError"),
        ("no_such_package.module:f", "model: importing no_such_package.module raised"),
        ("task.py:broken", "model: task.py:broken raised RuntimeError: no luck"),
    ]:
        with pytest.raises(ConfigError) as caught:
            factory.make(reference, tmp_path, "model")
        assert message in str(caught.value)


@pytest.mark.parametrize("name", ["reference", "folder", "key", "positional", "args"])
def test_a_factorys_argument_may_have_any_name(name, tmp_path):
    (tmp_path / "named.py").write_text(f"def f({name}):\n    return {name}\n")
    reference = factory.Factory(factory="named.py:f", arguments={name: 3})
    assert factory.make(reference, tmp_path, "model") == 3
    assert factory.make(reference, tmp_path, "model", **{name: 4}) == 4
    checking._calls(reference, tmp_path, "model", **{name: 4})


def test_the_schema_can_be_exported():
    schema = Recipe.model_json_schema()
    assert schema["additionalProperties"] is False
    assert "reserved_ratio" in schema["$defs"]["PruneOptions"]["properties"]


def test_the_shipped_recipes_are_valid():
    from pathlib import Path

    folder = Path(__file__).parents[2] / "tools" / "recipes"
    recipes = sorted(folder.glob("*.yaml"))
    assert {r.stem for r in recipes} >= {"digits", "minilm"}
    for file in recipes:
        assert load_recipe(file).name == file.stem


def test_the_page_on_recipes_names_every_key():
    from pathlib import Path

    from slimkit.core.run import recipe

    page = (Path(__file__).parents[2] / "docs" / "run.md").read_text(encoding="utf-8")
    options = [m.model_fields[kind].annotation for kind, m in recipe._STAGES.items()]
    for model in [Recipe, *options]:
        for key in model.model_fields:
            assert f"`{key}`" in page, f"docs/run.md says nothing about {model.__name__}.{key}"
    for kind in recipe._STAGES:
        assert f"`{kind}`" in page


MINIMAL = {
    "train": {"epochs": 1}, "finetune": {"epochs": 1, "keep_zeros": True}, "export": {}, "compare": {},
    "prune": {"keep_ratio": 0.5, "un_prune": [0]}, "sparsify": {"sparsity": 0.5},
    "adapt": {"epochs": 1, "kind": "lora", "targets": ["a"]},
    "cut": {"arguments": {"layers": 2}, "pattern": "h.([0-9]+)", "layers": {0: 1, 1: 3}},
    "distill": {"epochs": 1, "hidden": [{"teacher": "a", "student": "b", "loss": "HiddenMse"}]},
}  # fmt: skip


@pytest.mark.parametrize("kind", JOBS)
def test_a_recipe_as_a_run_keeps_it_is_read_again(kind, tmp_path):
    made = parse_recipe({"version": 1, "name": "x", "model": "m:f", "data": "m:d", "stages": [{kind: MINIMAL[kind]}]})
    kept = json.loads(json.dumps(made.model_dump(mode="json")))
    assert parse_recipe(kept) == made
    (tmp_path / "run.json").write_text(json.dumps({"format": "slimkit-run", "recipe": kept, "folder": "/elsewhere"}))
    assert load_recipe(tmp_path / "run.json", {"seed": 3}).seed == 3
    assert paths_begin(tmp_path / "run.json") == Path("/elsewhere")
    assert paths_begin(tmp_path / "a.yaml") == tmp_path


def test_a_key_that_another_contradicts_is_still_refused():
    terms = {"epochs": 1, "outputs": [{"teacher": 0, "student": 0, "loss": "KDMse"}], "temperature": 2.0}
    with pytest.raises(ConfigError, match="temperature is for a stage without written terms"):
        parse_recipe({"version": 1, "name": "x", "model": "m:f", "data": "m:d", "stages": [{"distill": terms}]})


def test_the_schema_allows_what_a_recipe_may_hold():
    schema = Recipe.model_json_schema()
    for name, part in [("Recipe", schema), *schema["$defs"].items()]:
        for key, about in part.get("properties", {}).items():
            assert about.get("description") or "$ref" in about, f"{name}.{key} says nothing of itself"
            if about.get("default", "") is None:
                assert {"type": "null"} in about["anyOf"], f"{name}.{key} may be unset, and the schema refuses null"
    prune, sparsify = schema["$defs"]["PruneOptions"], schema["$defs"]["SparsifyOptions"]
    assert {"keep_ratio", "un_prune", "node_ratio"} <= set(prune["properties"])
    assert "sparsity" in sparsify["properties"]
    # Either word will do, one must be there.
    assert "reserved_ratio" not in prune.get("required", [])
    assert prune["anyOf"] == [{"required": ["reserved_ratio"]}, {"required": ["keep_ratio"]}]
