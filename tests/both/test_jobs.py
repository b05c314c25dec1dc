"""One job through both doors: the same options, defaults and results in a recipe's stage and in a command."""

from __future__ import annotations

import inspect
import json
import textwrap

import numpy as np
import pytest
from typer.testing import CliRunner

from slimkit.cli import adapt, app, distill, export, prune, sparsify
from slimkit.core import files
from slimkit.core.errors import ConfigError
from slimkit.core.jobs.options import JOBS, AdaptOptions, CutOptions, FitOptions
from slimkit.core.run import report
from slimkit.core.run.recipe import Recipe, parse_recipe
from tests.both.test_delta_opening import kept

TASK = """
    import numpy as np
    from tests import attention_twins, kits

    kit = kits.make(FRAMEWORK)

    def net(width=64):
        return kit.fill(kit.named(a=kit.linear(8, width), act=kit.relu(), b=kit.linear(width, 32), act2=kit.relu(),
                                  c=kit.linear(32, 4)))

    def _batch(count=32):
        x = np.random.default_rng(1).standard_normal((count, 8)).astype(np.float32)
        return kit.tensor(x), kit.tensor(x[:, :4].argmax(1).astype(LABELS))

    def batches():
        return [_batch()]

    def data():
        return {"train": [_batch()], "example": _batch(2)[0]}

    def calibrated():
        return {**data(), "calibration": [_batch()[0]]}

    def inputs():
        return [_batch()[0]]

    def attention():
        return attention_twins.build(kit)

    def words():
        given = attention_twins.batch(kit)
        return [(given, given[0])]

    def word_data():
        return {"train": words(), "example": words()[0][0]}

    def energy(model, batch):
        return (model(*batch[0]) ** 2).mean()

    def first(weights):
        return float(abs(weights).sum())

    def unlabelled():
        return {"train": [_batch()[0]], "example": _batch(2)[0]}

    def broken():
        class Data:
            def __iter__(self):
                raise OSError("the disk is gone")
        return {**data(), "train": Data()}

    def keyless():
        return {"train": [_batch()]}
"""


@pytest.fixture
def task(kit, tmp_path, monkeypatch):
    labels = {"torch": "np.int64", "mindspore": "np.int32"}[kit.name]
    text = textwrap.dedent(TASK).replace("FRAMEWORK", repr(kit.name)).replace("LABELS", labels)
    (tmp_path / f"jobs_{kit.name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    # Latency and pages are not looked at here, and measuring and drawing would take most of the time.
    monkeypatch.setattr(kit.room("measurement"), "fastest_ms", lambda calls, budget_s: [0.1] * len(calls))
    monkeypatch.setattr(report, "render", lambda _: "")
    return f"jobs_{kit.name}.py"


def command(kit, task, *arguments, net="net"):
    """Run a command on the task's network; the parsed JSON."""
    given = [arguments[0], "-f", kit.name, "--factory", f"{task}:{net}", *arguments[1:], "--json"]
    done = CliRunner().invoke(app, [str(a) for a in given])
    assert done.exit_code == 0, done.exception or done.stderr
    return json.loads(done.stdout)


def write_recipe(kit, task, tmp_path, *stages, data="data", net="net", **more):
    content = {"version": 1, "name": "x", "framework": kit.name, "model": f"{task}:{net}", "data": f"{task}:{data}"}
    (tmp_path / "r.yaml").write_text(json.dumps({**content, "stages": list(stages), **more}))


def recipe(kit, task, tmp_path, *stages, out="run", **how):
    """Run a recipe as a user does; its report."""
    write_recipe(kit, task, tmp_path, *stages, **how)
    done = CliRunner().invoke(app, ["run", "r.yaml", "-o", out, "-q"])
    assert done.exit_code == 0, done.exception or done.stderr
    return files.read_json(tmp_path / out / "report.json")


def checked(kit, task, tmp_path, *stages, **how):
    write_recipe(kit, task, tmp_path, *stages, **how)
    return CliRunner().invoke(app, ["run", "r.yaml", "--check"])


# What a report says was measured. ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pattern", "share"), [("1:4", 0.75), ("3:4", 0.25)])
def test_a_patterns_zeros_are_told_as_they_were_counted(kit, task, tmp_path, pattern, share):
    stage = recipe(kit, task, tmp_path, {"sparsify": {"method": "wanda", "pattern": pattern}}, data="calibrated")[
        "stages"
    ][-1]
    counted = stage["measurement"]["zeros"] / sum(np.prod(layer["shape"]) for layer in stage["measurement"]["layers"])
    assert counted == share
    assert f"{share:.3f}, by wanda" in stage["facts"]["headline"]
    given = ("sparsify", "--method", "wanda", "--pattern", pattern, "--calib", f"{task}:inputs", "-o", "s")
    done = command(kit, task, *given)
    assert done["ratio"] == share
    measured = command(kit, task, "inspect", done["out"] if kit.name == "mindspore" else "s/model.safetensors",
                       "--example", "2,8", "--macs")  # fmt: skip
    assert measured["facts"]["zeros"] == done["zeros"] == stage["measurement"]["zeros"]


@pytest.mark.parametrize("rule", ["dlp", "measured"])
def test_ratios_by_a_rule_come_through_both_doors(kit, task, tmp_path, rule):
    stage = recipe(kit, task, tmp_path, {"sparsify": {"method": "wanda", "uniform": rule}}, data="calibrated")["stages"]
    done = command(
        kit, task, "sparsify", "--method", "wanda", "--uniform", rule, "--calib", f"{task}:inputs", "-o", "s"
    )
    told = stage[-1]["facts"]["report"]["allocation"]
    assert told == done["allocation"]
    assert told[f"{rule}_error"] > 0


def test_a_layer_that_fell_back_is_told_by_what_was_done(kit, task, tmp_path):
    from slimkit.core.jobs.work import sparse_headline

    rows = {"a": {"method": "par"}, "b": {"method": "magnitude"}}
    assert sparse_headline({"zeros": 1, "weights": 4, "layers": rows}).endswith(
        "0.250, by par (1 layers) and magnitude (1 layers)"
    )


def test_training_is_told_by_what_was_trained(kit, task, tmp_path):
    train = {"epochs": 50, "max_steps": 3, "learning_rate": 0.01}
    facts = recipe(kit, task, tmp_path, {"train": train})["stages"][-1]["facts"]
    assert facts["steps"] == 3
    assert facts["headline"].startswith("3 epochs of 3 updates in all")


def test_magnitude_needs_no_calibration(kit, task, tmp_path):
    stage = recipe(kit, task, tmp_path, {"sparsify": {"method": "magnitude"}})["stages"][-1]
    done = command(kit, task, "sparsify", "--method", "magnitude", "-o", "s")
    assert stage["measurement"]["zeros"] == done["zeros"] > 0
    # Ratios that are measured are measured on data.
    refused = checked(kit, task, tmp_path, {"sparsify": {"method": "magnitude", "uniform": False}})
    assert "stages[0].sparsify: needs calibration" in str(refused.exception)


# Every delta kind. ---------------------------------------------------------------------------------------------------

KINDS = {
    "lora": ({"rank": 2}, ("--rank", 2)),
    "lora from the gradient": ({"rank": 2, "settings": {"init": "gradient"}}, ("--rank", 2, "--set", "init=gradient")),
    "lora from the inputs": ({"settings": {"init": "activations"}}, ("--set", "init=activations")),
    "lora over int8": ({"rank": 2, "settings": {"base_dtype": "int8"}}, ("--rank", 2, "--set", "base_dtype=int8")),
    "lora of the weight": ({"rank": 2, "settings": {"init": "pissa"}}, ("--rank", 2, "--set", "init=pissa", "--merge")),
    "adapter": ({"settings": {"bottleneck_size": 4}}, ("--set", "bottleneck_size=4")),
    "low_rank_adapter": ({}, ()),
    "ia3": ({}, ()),
    "miss": ({"rank": 2}, ("--rank", 2)),
    "shira": ({"rank": 2, "settings": {"support": "magnitude"}}, ("--rank", 2, "--set", "support=magnitude")),
    "prefix": ({"settings": {"prefix_token_num": 2}}, ("--set", "prefix_token_num=2")),
    "prompt": ({"settings": {"num_virtual_tokens": 2}}, ("--set", "num_virtual_tokens=2")),
    "prefix from a text": ({"settings": {"text": "four two", "tokenizer": "words"}},
                           ("--set", "text=four two", "--set", "tokenizer=words")),
    "prompt from drawn tokens": ({"settings": {"init": "vocabulary", "num_virtual_tokens": 3}},
                                 ("--set", "init=vocabulary", "--set", "num_virtual_tokens=3")),
}  # fmt: skip


@pytest.mark.parametrize("way", KINDS)
def test_every_kind_adapts_through_both_doors(kit, task, tmp_path, way):
    of_kind, flags = KINDS[way]
    kind = way.split()[0]
    front = kind in ("prefix", "prompt")
    if way.endswith("text"):
        kept(tmp_path)
    net, train = ("attention", "words") if front else ("net", "batches")
    targets = {} if front else {"targets": ["a"]}
    stage = {"kind": kind, "max_steps": 2, **targets, **of_kind}
    how = {"net": net, "data": "word_data" if front else "data", **({"loss": f"{task}:energy"} if front else {})}
    stages = [{"adapt": stage}]
    if kind == "prefix":
        stages.append({"finetune": {"max_steps": 1, "learning_rate": 1e-4}})
    found = recipe(kit, task, tmp_path, *stages, **how)
    facts = found["stages"][1]["facts"]
    assert facts["kind"] == kind
    assert facts["reload_difference"] <= 1e-5  # what the stage itself demands
    given = ["adapt", "--kind", kind, "--data", f"{task}:{train}", "--max-steps", 2, "-o", "d", *flags]
    given += ["--loss", f"{task}:energy"] if front else ["--target", "a"]
    done = command(kit, task, *given, net=net)
    assert done["trained_parameters"] == facts["trained_parameters"] > 0
    assert done["layers"] == facts["layers"]
    if kind == "prefix":
        # A run cut short after the delta goes on to the same weights: its structure is made again from the files.
        (tmp_path / "run" / "stages" / "02-finetune" / "stage.json").unlink()
        again = recipe(kit, task, tmp_path, *stages, **how)
        assert again["stages"][2]["digest"] == found["stages"][2]["digest"]


def test_a_delta_learns_from_labels_twice_and_from_the_dense_model(kit, task, tmp_path, monkeypatch):
    stage = {"targets": ["a"], "rank": 2, "max_steps": 2, "rdrop": 1.0, "distill_weight": 0.5}
    seen = []
    repeat = kit.slim.rdrop_repeat
    monkeypatch.setattr(kit.slim, "rdrop_repeat", lambda *items: seen.append(len(items[0])) or repeat(*items))
    found = recipe(kit, task, tmp_path, {"prune": {"reserved_ratio": 0.9, "alignment": 1}}, {"adapt": stage})
    facts = found["stages"][2]["facts"]
    assert facts["rdrop"] == 1.0
    assert facts["terms"] == ["output: KDKLDiv"]
    assert facts["reload_difference"] <= 1e-5
    assert len(seen) == 4  # inputs and labels of two steps
    done = command(
        kit, task, "adapt", "--data", f"{task}:batches", "--target", "a", "--max-steps", 1, "--rdrop", 2, "-o", "d"
    )
    assert done["rdrop"] == 2.0


def test_rdrop_is_for_classes(kit, task, tmp_path):
    with pytest.raises(AssertionError, match=r"rdrop compares the classes of cross_entropy"):  # the command's exit
        recipe(kit, task, tmp_path, {"adapt": {"targets": ["a"], "rdrop": 1.0, "loss": "mse", "max_steps": 1}})


def test_a_lora_without_alpha_has_the_same_scale_through_every_door(kit, task, tmp_path):
    recipe(kit, task, tmp_path, {"adapt": {"targets": ["a"], "rank": 4, "max_steps": 1}})
    command(kit, task, "adapt", "--data", f"{task}:batches", "--target", "a", "--rank", 4, "--max-steps", 1, "-o", "d")
    net = kit.fill(kit.named(a=kit.linear(8, 64)))
    python = kit.slim.apply_delta(net, "lora", ["a"], rank=4).layers["a"]
    for folder in ("run/stages/01-adapt/delta", "d"):
        manifest = (tmp_path / folder / "manifest.json").read_text()
        assert python["alpha"] / python["rank"] == 2
        assert f'"alpha": {python["alpha"]}' in manifest


def test_options_of_another_kind_are_named(kit, task, tmp_path, caplog):
    with pytest.raises(ConfigError, match=r"stages\[0\].adapt: settings: bottleneck is no option of adapter.*Did you"):
        parse_recipe(
            {"version": 1, "name": "x", "model": "m.py:f", "data": "m.py:d",
             "stages": [{"adapt": {"kind": "adapter", "settings": {"bottleneck": 4}}}]}
        )  # fmt: skip
    asked = AdaptOptions(kind="adapter", rank=3)
    assert "rank: not for kind adapter" in caplog.text
    assert "rank" not in asked.arguments()


# Seeds. --------------------------------------------------------------------------------------------------------------


def test_random_importance_follows_the_runs_seed(kit, task, tmp_path):
    kept = {}
    for seed, out in ((1, "one"), (2, "two"), (1, "again")):
        recipe(kit, task, tmp_path, {"prune": {"reserved_ratio": 0.7, "importance": "random"}}, out=out, seed=seed)
        edits = files.read_json(tmp_path / out / "stages" / "01-prune" / "structure.json")
        kept[out] = [v["keep"] for v in edits[0]["prune"]["variables"].values()]
    assert kept["one"] == kept["again"] != kept["two"]
    for seed, out in ((1, "p1"), (2, "p2")):
        given = ("--importance", "random", "--example", "2,8", "--keep-ratio", 0.7, "--seed", seed, "-o", out)
        command(kit, task, "prune", *given)
        plan = files.read_json(tmp_path / out / "plan.json")
        kept[out] = [v["keep"] for v in plan["variables"].values()]
    assert kept["p1"] != kept["p2"]


def test_the_order_of_training_data_follows_the_runs_seed(kit, task, tmp_path):
    (tmp_path / task).write_text(
        (tmp_path / task).read_text()
        + textwrap.dedent("""
            class Rows:
                def __len__(self):
                    return 16

                def __getitem__(self, at):
                    x, y = _batch(16)
                    return (x[at], y[at]) if kit.name == "torch" else (kit.array(x)[at], kit.array(y)[at])

            def rows():
                return {"train": Rows(), "example": _batch(2)[0]}
        """)
    )
    train = {"train": {"batch_size": 4, "learning_rate": 0.01}}
    losses = [
        recipe(kit, task, tmp_path, train, data="rows", out=f"s{n}", seed=seed)["stages"][1]["curves"]["loss_by_step"]
        for n, seed in enumerate((1, 2, 1))
    ]
    # MindSpore's threads may add up in another order: float32, some 100 terms
    assert np.allclose(losses[0], losses[2], rtol=1e-5)
    assert not np.allclose(losses[0], losses[1], rtol=1e-3)


# Clipping. -----------------------------------------------------------------------------------------------------------

ONE_STEP = {"optimizer": "sgd", "schedule": "constant", "max_steps": 1, "learning_rate": 1.0}


def moved(kit, task, tmp_path, out, **clip):
    """How far each parameter moves in one plain gradient step."""
    recipe(kit, task, tmp_path, {"train": {**ONE_STEP, **clip}}, out=out)
    after, _ = files.read_tensors(tmp_path / out / "stages" / "01-train" / "model.safetensors")
    scope: dict = {}
    exec((tmp_path / task).read_text(), scope)
    before = {n: kit.array(p) for n, p in kit.params(scope["net"]()).items()}
    names = dict(zip(before, after)) if set(before) != set(after) else {n: n for n in before}
    return np.concatenate([(after[names[n]] - before[n]).ravel() for n in before])


def test_norm_and_value_are_two_bounds_under_their_own_names(kit, task, tmp_path):
    free = moved(kit, task, tmp_path, "free")
    norm = moved(kit, task, tmp_path, "norm", gradient_clip_norm=0.01)
    value = moved(kit, task, tmp_path, "value", gradient_clip_value=0.001)
    both = moved(kit, task, tmp_path, "both", gradient_clip_value=0.001, gradient_clip_norm=0.002)
    old = moved(kit, task, tmp_path, "old", gradient_clip=0.001)
    assert np.abs(free).max() > 0.01
    np.testing.assert_allclose(norm, free * 0.01 / np.linalg.norm(free), atol=1e-6)  # float32 beside weights of 0.3
    np.testing.assert_allclose(value, np.clip(free, -0.001, 0.001), atol=1e-6)
    assert np.linalg.norm(both) == pytest.approx(0.002, rel=1e-2)
    np.testing.assert_array_equal(old, value)


def test_commands_clip_by_the_same_names(kit, task, tmp_path):
    found = {}
    for name, flags in (
        ("free", ("--gradient-clip-norm", 0)),
        ("norm", ("--gradient-clip-norm", 0.01)),
        ("value", ("--gradient-clip-norm", 0, "--gradient-clip-value", 1e-4)),
    ):
        given = ("--optimizer", "sgd", "--learning-rate", 1.0, "--schedule", "constant", "--max-steps", 1, *flags)
        command(kit, task, "adapt", "--data", f"{task}:batches", "--target", "a", *given, "-o", name)
        tensors, _ = files.read_tensors(next((tmp_path / name).glob("*.safetensors")))
        found[name] = next(v for n, v in tensors.items() if n.endswith("lora_b"))  # begins at zero: what it moved
    np.testing.assert_allclose(found["norm"], found["free"] * 0.01 / np.linalg.norm(found["free"]), rtol=1e-4)
    np.testing.assert_allclose(found["value"], np.clip(found["free"], -1e-4, 1e-4), rtol=1e-4)
    assert np.abs(found["free"]).max() > 1e-4


# One table of defaults. ----------------------------------------------------------------------------------------------


def test_defaults_words_and_help_are_the_classs_through_every_door():
    commands = {"prune": prune, "sparsify": sparsify, "distill": distill, "adapt": adapt, "export": export}
    schema = Recipe.model_json_schema()["$defs"]
    for job, options in JOBS.items():
        made = schema[options.__name__]["properties"]
        for key, field in options.model_fields.items():
            assert made[key]["description"] == field.description
            if job in commands and key != "reserved_ratio":
                assert made[key].get("default") in (field.default, None) or field.default_factory
        if job in commands:
            taken = inspect.signature(getattr(commands[job], job)).parameters
            for key in set(taken) & set(options.model_fields):
                default = options.model_fields[key].default
                taking = taken[key].default
                # A switch is off until it is given; beside other words true and false are words.
                same = taking is False or taking == default or taking == str(default).lower()
                assert same or options.model_fields[key].default_factory, (job, key)
    learning = {job: options.model_fields["learning_rate"].default for job, options in JOBS.items()
                if issubclass(options, FitOptions)}  # fmt: skip
    assert learning == {"train": 1e-3, "finetune": 1e-3, "distill": 2e-4, "adapt": 5e-4}
    assert "SparseConfig: magnitude" in JOBS["sparsify"].model_fields["method"].description


def test_words_are_enums_of_the_schema_read_from_the_rooms_tables():
    from slimkit.core.delta.spec import KINDS as DELTAS
    from slimkit.core.sparse.config import METHODS

    made = Recipe.model_json_schema()["$defs"]
    assert made["SparsifyOptions"]["properties"]["method"]["enum"] == list(METHODS)
    assert made["AdaptOptions"]["properties"]["kind"]["enum"] == list(DELTAS)
    assert made["PruneOptions"]["properties"]["budget"]["enum"][:2] == ["params", "macs"]
    assert "l1" in made["PruneOptions"]["properties"]["importance"]["anyOf"][0]["enum"]
    assert made["DistillTerm"]["properties"]["loss"]["enum"][0] == "KDCrossEntropy"
    assert "onnx" in json.dumps(made["ExportOptions"]["properties"]["formats"])
    assert made["TrainOptions"]["properties"]["schedule"]["enum"] == ["cosine", "linear", "constant"]


def test_the_pages_show_the_classes_tables():
    from pathlib import Path

    from slimkit.core.jobs.pages import refreshed

    docs = Path(__file__).parents[2] / "docs"
    for page in ("run.md", "cli.md"):
        text = (docs / page).read_text(encoding="utf-8")
        assert text.count("<!-- options ") > 5
        assert refreshed(text) == text, f"run: python -m slimkit.core.jobs.pages docs/{page}"


def test_an_importance_of_ones_own_scores_through_both_doors(kit, task, tmp_path):
    own = f"{task}:first"
    found = recipe(kit, task, tmp_path, {"prune": {"reserved_ratio": 0.7, "importance": own}})
    done = command(kit, task, "prune", "--importance", own, "--example", "2,8", "--keep-ratio", 0.7, "-o", "p")
    assert done["parameters"] == found["stages"][1]["facts"]["parameters"] < done["parameters_before"]


# run --check. --------------------------------------------------------------------------------------------------------

MISTAKES = {
    "a method": ([{"sparsify": {"method": "hesian"}}], {"data": "calibrated"}, "stages[0].sparsify.method"),
    "a ratio beside a pattern": (
        [{"sparsify": {"pattern": "1:4", "sparse_ratio": 0.6}}], {"data": "calibrated"}, "stages[0].sparsify: Sparse"
    ),
    "an importance": ([{"prune": {"reserved_ratio": 0.5, "importance": "l3"}}], {}, "stages[0].prune.importance"),
    "its function": (
        [{"prune": {"reserved_ratio": 0.5, "importance": "TASK:frist"}}], {}, "Did you mean 'first'"
    ),
    "a kind": ([{"adapt": {"kind": "lorra"}}], {}, "Did you mean 'lora'"),
    "a lora": ([{"adapt": {"settings": {"init": "kaimng"}}}], {}, "stages[0].adapt: init"),
    "an adapter": ([{"adapt": {"kind": "adapter", "settings": {"non_linearity": "gleu"}}}], {}, "Did you mean 'gelu'"),
    "a low rank": ([{"adapt": {"kind": "low_rank_adapter", "settings": {"low_rank_size": 0}}}], {}, "low_rank_size"),
    "a prefix": ([{"adapt": {"kind": "prefix", "settings": {"dropout_rate": 1.5}}}], {}, "stages[0].adapt: dropout"),
    "a prompt": ([{"adapt": {"kind": "prompt", "settings": {"init": "vocabularly"}}}], {}, "stages[0].adapt: init"),
    "a loss": ([{"train": {}}], {"loss": "cross_entrpy"}, "loss: must be one of"),
    "a loss function": ([{"train": {"loss": "TASK:enrgy"}}], {}, "Did you mean 'energy'"),
    "a loss's arguments": ([{"train": {"loss": "TASK:first"}}], {}, "TASK:first cannot be called"),
    "a metrics function": ([{"train": {}}], {"metrics": "TASK:scores"}, "metrics: TASK has no function"),
    "a metrics's arguments": ([{"train": {}}], {"metrics": "TASK:data"}, "metrics: TASK:data cannot be called"),
    "a model": ([{"train": {}}], {"net": "nett"}, "Did you mean 'net'"),
    "a model's arguments": ([{"cut": {"arguments": {"widht": 8}}}], {}, "stages[0].cut.arguments: TASK:net"),
    "a term": (
        [{"distill": {"outputs": [{"teacher": 0, "student": 0, "loss": "KDMs"}]}}], {}, "Did you mean 'KDMse'"
    ),
    "a data function": ([{"train": {}}], {"data": "dta"}, "Did you mean 'data'"),
    "data without a key": ([{"train": {}}], {"data": "keyless"}, "keys train and example"),
    "no calibration": ([{"train": {}}, {"sparsify": {}}], {}, "stages[1].sparsify: needs calibration"),
    "no labels": ([{"train": {}}], {"data": "unlabelled"}, "stages[0].train: the loss reads (inputs, labels)"),
    "labels that nothing learns": ([{"distill": {}}], {}, "stages[0].distill: learns from inputs alone"),
    "a batch that cannot be read": ([{"train": {}}], {"data": "broken"}, "data['train']: reading one batch raised"),
    "open axes": ([{"export": {"dynamic": ["x"]}}], {}, "stages[0].export"),
}  # fmt: skip


@pytest.mark.parametrize("what", MISTAKES)
def test_a_check_finds_what_a_run_would_trip_over(kit, task, tmp_path, what):
    stages, how, words = MISTAKES[what]
    stages = json.loads(json.dumps(stages).replace("TASK", task))
    how = {k: v.replace("TASK", task) for k, v in how.items()}
    found = checked(kit, task, tmp_path, *stages, **how)
    assert isinstance(found.exception, ConfigError), found.exception or found.stdout
    assert words.replace("TASK", task) in str(found.exception)
    assert {p.name for p in tmp_path.iterdir()} <= {"r.yaml", task, "__pycache__"}


def test_a_check_of_a_good_recipe_says_so_and_writes_nothing(kit, task, tmp_path):
    stages = [{"train": {}}, {"prune": {"reserved_ratio": 0.7}}, {"distill": {"hard_weight": 0.5}}, {"sparsify": {}},
              {"export": {}},
              {"adapt": {"kind": "low_rank_adapter"}}]  # fmt: skip
    found = checked(kit, task, tmp_path, *stages, data="calibrated")
    assert found.exit_code == 0, found.exception
    assert "6 stages, nothing wrong" in found.stdout
    assert not (tmp_path / "runs").exists()


def test_a_distillation_without_terms_learns_the_answers(kit, task, tmp_path):
    stages = [{"prune": {"reserved_ratio": 0.7}}, {"distill": {"max_steps": 2, "match": ["b=b"], "hard_weight": 0.5}}]
    facts = recipe(kit, task, tmp_path, *stages)["stages"][2]["facts"]
    assert facts["steps"] == 2
    assert any("KDKLDiv" in term for term in facts["terms"])
    assert len(facts["terms"]) == 2


def test_a_distillation_keeps_the_zeros_that_were_made_and_a_training_says_that_it_fills_them(
    kit, task, tmp_path, caplog
):
    stages = [{"sparsify": {"method": "magnitude"}}, {"distill": {"max_steps": 3, "hard_weight": 0.5}}]
    _, sparse, taught = recipe(kit, task, tmp_path, *stages)["stages"]
    assert taught["measurement"]["zeros"] >= sparse["measurement"]["zeros"] > 0
    assert "zeros kept" in taught["facts"]["headline"]
    assert "fills the zeros" not in caplog.text
    recipe(kit, task, tmp_path, *stages, {"finetune": {"max_steps": 1}}, out="again")
    assert "fills the zeros" in caplog.text


def test_a_registered_method_is_a_word_of_both_doors(kit, task, tmp_path):
    from slimkit.core.sparse import METHODS

    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
            from slimkit.core.sparse import SparseMethod, register_sparse_method

            def every(p):
                keep = p.weight * 0 == 0
                keep[:, :: p.options["step"]] = False
                return p.weight * keep, keep, {}

            register_sparse_method("every", SparseMethod(every, needs_data=False, options={"step": 2}))
        """)
    )
    stage = {"sparsify": {"method": "every", "options": {"step": 4}, "sparse_ratio": 0.25}}
    assert "must be one of" in str(checked(kit, task, tmp_path, stage).exception)
    try:
        facts = recipe(kit, task, tmp_path, stage, imports=["mine.py"])["stages"][1]["facts"]
        assert facts["report"]["ratio"] == 0.25
        del METHODS["every"]
        given = ["--import", "mine.py", "sparsify", "-f", kit.name, "--factory", f"{task}:net", "--method", "every"]
        (tmp_path / "mine.py").rename(tmp_path / "again.py")
        given = ["--import", "again.py", *given[2:], "--set", "step=4", "--json"]
        done = CliRunner().invoke(app, [*given, "-o", "short"])
        assert (done.exit_code, json.loads(done.stdout)["ratio"]) == (1, 0.25)  # half was asked for
        done = CliRunner().invoke(app, [*given, "--sparsity", "0.25", "-o", "s"])
        assert done.exit_code == 0, done.exception
        assert json.loads(done.stdout)["ratio"] == 0.25
    finally:
        METHODS.pop("every", None)


STACK = """
    import numpy as np
    from tests import kits

    kit = kits.make(FRAMEWORK)

    class Block(kit.Module):
        def __init__(self):
            super().__init__()
            self.dense = kit.linear(6, 6)

        def forward(self, x):
            return x + self.dense(x)

        construct = forward

    def net(layers=4):
        model = kit.fill(kit.named(blocks=kit.sequential(*(Block() for _ in range(layers))), head=kit.linear(6, 3)))
        for name, value in kit.params(model).items():
            if layers == 4 and name.startswith(("blocks.0.", "blocks.2.")):
                kit.assign(value, np.asarray(kit.array(value)) * 1e-3)
        return model

    def data():
        x = kit.tensor(np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32))
        return {"train": [x], "example": x, "calibration": [x]}
"""


def test_a_recipe_keeps_the_blocks_that_its_data_needs(kit, tmp_path, monkeypatch):
    (tmp_path / f"stack_{kit.name}.py").write_text(textwrap.dedent(STACK).replace("FRAMEWORK", repr(kit.name)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kit.room("measurement"), "fastest_ms", lambda calls, budget_s: [0.1] * len(calls))
    monkeypatch.setattr(report, "render", lambda _: "")
    cut = {"arguments": {"layers": 2}, "keep_blocks": 2}
    facts = recipe(kit, f"stack_{kit.name}.py", tmp_path, {"cut": cut})["stages"][1]["facts"]
    assert facts["layers"] == {"0": 1, "1": 3}
    with pytest.raises(ValueError, match="two ways"):
        CutOptions(arguments={}, keep_blocks=2, pattern="a.(1)", layers={0: 1})
