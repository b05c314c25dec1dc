"""The single commands on tiny models: each writes what the next one reads, and says the same to people and programs."""

from __future__ import annotations

import json
import shutil
import signal

import numpy as np
import pytest
from typer.testing import CliRunner

from slimkit.cli import app
from slimkit.cli.exits import Interrupted
from slimkit.core.errors import ConfigError, FileFormatError, SlimkitError, UnsupportedError
from tests.chain import tiny_models
from tests.conftest import INSTALLED

pytestmark = pytest.mark.skipif("torch" not in INSTALLED, reason="the commands' PyTorch side")


def run(*arguments, code=0):
    """Run a command; with --json the parsed object, else the lines for people."""
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == code, done.exception or done.stderr
    return json.loads(done.stdout) if "--json" in arguments else done.stdout


def refused(*arguments):
    """The error that a command raises; it must be one of ours."""
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert isinstance(done.exception, (SlimkitError, Interrupted)), done.exception
    return done.exception


def tree(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def here(tmp_path_factory, one_thread):
    folder = tmp_path_factory.mktemp("cli")
    for family in ("llama", "bert"):
        tiny_models.hugging_face(folder, family)
    tiny_models.text(folder / "labelled.jsonl")
    tiny_models.text(folder / "plain.jsonl", labels=False)
    (folder / "nets.py").write_text(tiny_models.TORCH_NET)
    return folder


@pytest.fixture(autouse=True)
def _inside(here, monkeypatch):
    monkeypatch.chdir(here)


# prune, and what reads its folder -----------------------------------------------------------------------------------


def test_a_pruned_llama_loads_with_transformers(here, tmp_path):
    import transformers

    how = ("-m", "llama", "--importance", "l1", "--keep-ratio", 0.7, "--alignment", 8, "-o", tmp_path / "p", "--json")
    planned = run("prune", *how, "--dry-run")
    assert planned["dry_run"] is True
    assert not (tmp_path / "p").exists()
    done = run("prune", *how)
    assert done["parameters"] == planned["parameters"] < done["parameters_before"]
    assert done["written"] == "transformers"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "p")
    assert sum(p.numel() for p in model.parameters()) == done["parameters"]
    transformers.AutoTokenizer.from_pretrained(tmp_path / "p")
    report = json.loads((tmp_path / "p" / "prune_report.json").read_text())
    assert report["kept"] == done["kept"]
    assert report["reloaded"] <= 1e-5
    assert report["report"]["serves"]["transformers"]["meets"]
    assert {"config.json", "generation_config.json", "tokenizer_config.json"} <= set(tree(tmp_path / "p"))
    card = (tmp_path / "p" / "README.md").read_text()
    assert "slimkit prune --model llama --keep-ratio 0.7 --importance l1 --alignment 8" in card
    assert 'LlamaForCausalLM.from_pretrained("this folder")' in card
    assert 'tags: ["slimkit", "pruned"]' in card
    assert run("inspect", tmp_path / "p" / "plan.json", "--json")["facts"]["left_params"] == done["parameters"]


def test_a_pruned_bert_that_no_config_describes_goes_on_through_the_commands(here, tmp_path):
    pruned, sparse = tmp_path / "p", tmp_path / "s"
    how = ("--importance", "l1", "--form", "any", "--alignment", 1)
    done = run("prune", "-m", "bert", *how, "--keep-ratio", 0.8, "-o", pruned, "--json")
    assert done["written"] == "slimkit"  # two blocks lose a head, the first none
    again = run(
        "sparsify", "-m", pruned, "--method", "wanda", "--calib", "plain.jsonl", "-o", sparse, "--samples", 8, "--json"
    )
    assert again["resumable"] is False
    assert again["ratio"] == pytest.approx(0.5, abs=0.01)
    seen = run("inspect", sparse, "--json")
    assert seen["kind"] == "pruned"
    assert seen["facts"]["parameters"] == done["parameters"]
    assert sum(row["zeros"] or 0 for row in seen["rows"]) >= again["zeros"]
    out = run("export", "-m", sparse, "--length", 8, "-o", tmp_path / "m.onnx", "--json")
    assert out["max_difference"] < 1e-4
    assert out["zeros"] >= again["zeros"]
    assert run("inspect", tmp_path / "m.onnx", "--json")["facts"]["inputs"]["input_ids"] == [1, 8]


def test_a_card_keeps_the_licence_and_says_who_reads_the_folder(here, tmp_path):
    shutil.copytree("bert", tmp_path / "licensed")
    (tmp_path / "licensed" / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n\n# Old words\n")
    run(
        "prune",
        "-m",
        tmp_path / "licensed",
        "--importance",
        "l1",
        "-r",
        0.8,
        "--alignment",
        1,
        "--form",
        "any",
        "-o",
        tmp_path / "p",
    )
    card = (tmp_path / "p" / "README.md").read_text()
    assert card.startswith('---\nlicense: "apache-2.0"\n')
    assert "load_pruned" in card
    assert "Old words" not in card


def test_an_ask_that_a_floor_holds_back_ends_with_one_and_the_layers(here, tmp_path):
    net = ("--factory", "nets.py:net", "--arg", "width=64", "--example", "2,3,8,8")
    said = run("prune", *net, "--keep-ratio", 0.1, "--node-ratio", 0.9, "--alignment", 1, "-o", tmp_path / "p", code=1)
    assert "Not reached: --node-ratio 0.9 holds 3 at 58; a lower one lets them go on" in said
    done = run("prune", *net, "--keep-ratio", 0.1, "--alignment", 1, "-o", tmp_path / "q", "--json")
    assert done["kept"] == pytest.approx(0.1, abs=0.01)


def test_a_factorys_net_prunes_sparsifies_exports_and_is_measured(here, tmp_path):
    net = ("--factory", "nets.py:net", "--arg", "width=64")
    shape = ("--example", "2,3,8,8")
    done = run("prune", *net, *shape, "--keep-ratio", 0.5, "-o", tmp_path / "p", "--json")
    run("sparsify", *net, "-m", tmp_path / "p", "--method", "magnitude", "-o", tmp_path / "s", "--quiet")
    measured = run("inspect", tmp_path / "s", *net, *shape, "--macs", "--json")["facts"]
    assert measured["parameters"] == done["parameters"]
    assert measured["zeros"] == pytest.approx(measured["parameters"] / 2, rel=0.05)
    assert measured["macs"] > 0
    assert run("export", *net, *shape, "-m", tmp_path / "s", "-o", tmp_path / "n.onnx", "--json")["opset"] == 13
    by_data = run("sparsify", "--factory", "nets:net", "--calib", "nets:batches", "-o", tmp_path / "d", "--json")
    assert by_data["config"]["method"] == "par"
    assert by_data["written"] == "weights"


def test_arrays_calibrate_importance_and_compensation(here, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((12, 3, 8, 8)).astype(np.float32))
    done = run(
        "prune", "--factory", "nets:net", "--example", "1,3,8,8", "--importance", "taylor", "--calib",
        tmp_path / "x.npy", "--compensate", "--un-prune", "0", "--un-prune=-1", "--keep-ratio", 0.7,
        "-o", tmp_path / "p", "--json",
    )  # fmt: skip
    assert "compensation" in done["report"]


# sparsify -----------------------------------------------------------------------------------------------------------


def test_the_everyday_form_of_sparsify(here, tmp_path):
    import transformers

    everyday = (
        "sparsify",
        "-m",
        "llama",
        "--method",
        "par",
        "--sparsity",
        0.5,
        "--calib",
        "plain.jsonl",
        "--samples",
        8,
    )
    planned = run(*everyday, "-o", tmp_path / "s", "--dry-run", "--json")
    assert (planned["zeros"], planned["batches"], len(planned["layers"])) == (planned["weights"] // 2, 2, 21)
    assert not (tmp_path / "s").exists()
    done = run(*everyday, "-o", tmp_path / "s", "--json")
    assert done["resumable"] is True
    assert (done["zeros"], done["weights"]) == (planned["zeros"], planned["weights"])
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "s")
    again = run(*everyday, "-o", tmp_path / "s", "--force", "--json")
    # What is written holds times, of one digit more or less.
    assert abs(done.pop("bytes")["written"] - again.pop("bytes")["written"]) < 1_000
    assert again == done
    assert not [f.name for f in (tmp_path / "s").iterdir() if f.name.startswith(".")]
    assert "--seed" in run("sparsify", "--help")  # of what is drawn from text


# training -----------------------------------------------------------------------------------------------------------


def test_adapt_learns_saves_and_exports_merged(here, tmp_path):
    from slimkit import load_delta

    import torch
    import transformers

    adapt = (
        "adapt",
        "-m",
        "bert",
        "-d",
        "labelled.jsonl",
        "--eval",
        "labelled.jsonl",
        "--rank",
        2,
        "--learning-rate",
        0.01,
    )
    planned = run(*adapt, "-o", tmp_path / "a", "--dry-run", "--json")
    assert planned["task"] == "classification"
    assert 0 < planned["trained_share"] < 0.5
    assert not (tmp_path / "a").exists()
    done = run(*adapt, "--epochs", 2, "-o", tmp_path / "a", "--merge", "--json")
    assert done["labels"] == {"neg": 0, "pos": 1}
    assert set(done["evaluation"]) == {"loss", "accuracy"}
    assert done["steps"] == 4
    assert not (tmp_path / "a" / ".slimkit-train").exists()
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "a" / "merged")
    assert merged.config.label2id == {"neg": 0, "pos": 1}
    base = transformers.AutoModelForSequenceClassification.from_pretrained("bert", num_labels=2)
    load_delta(base, tmp_path / "a")
    ids = {"input_ids": torch.arange(4, 12).reshape(1, -1)}
    gap = (base.eval()(**ids).logits - merged.eval()(**ids).logits).detach().abs().max()
    assert float(gap) < 1e-5  # float32: one merged product instead of two
    assert run("inspect", tmp_path / "a", "--json")["facts"]["deltas"] == {"default": "lora"}
    on_base = ("-m", "bert", "--delta", tmp_path / "a", "--length", 8, "--json")
    assert run("export", *on_base, "-o", tmp_path / "m.onnx")["max_difference"] < 1e-4
    measured = run("inspect", "bert", *on_base[2:], "--macs")["facts"]
    assert measured["trainable"] == done["trained_parameters"]


def test_adapt_a_language_model_as_peft(here, tmp_path):
    adapt = ("adapt", "-m", "llama", "-d", "plain.jsonl", "--target", "*.q_proj", "--format", "peft", "--samples", 8)
    done = run(*adapt, "--max-steps", 1, "-o", tmp_path / "a", "--json")
    assert done["task"] == "causal-lm"
    seen = run("inspect", tmp_path / "a", "--json")
    assert (seen["kind"], seen["facts"]["rank"]) == ("peft", 8)
    out = run("export", "-m", "llama", "--delta", tmp_path / "a", "--length", 8, "-o", tmp_path / "m.onnx", "--dry-run")
    assert "would write onnx opset 13" in out
    assert not (tmp_path / "m.onnx").exists()


def test_compress_what_a_language_model_has_learned(here, tmp_path):
    from slimkit import load_delta

    import torch
    import transformers

    run("train", "-m", "llama", "-d", "plain.jsonl", "--max-steps", 2, "--learning-rate", 0.003, "-o", tmp_path / "t")
    how = ("compress", "-m", "llama", "--tuned", tmp_path / "t", "--bytes-ratio", 0.3, "--exclude", "lm_head")
    text = ("--calib", "plain.jsonl", "--samples", 4, "--max-length", 32)
    done = run(*how, *text, "-o", tmp_path / "d", "--json")
    assert "model.layers.0.mlp.up_proj" in done["layers"]
    assert "lm_head" not in done["layers"]
    assert "times smaller than the model in bfloat16" in done["notes"][0]
    assert "--calib plain.jsonl" in (tmp_path / "d" / "README.md").read_text()
    base, tuned = (transformers.AutoModelForCausalLM.from_pretrained(f).eval() for f in ("llama", tmp_path / "t"))
    ids = torch.arange(4, 12).reshape(1, -1)
    with torch.no_grad():
        before, wanted = base(ids).logits, tuned(ids).logits
        load_delta(base, tmp_path / "d")
        got = base(ids).logits
    assert float((got - wanted).abs().mean()) < 0.5 * float((before - wanted).abs().mean())
    said = str(refused(*how[:3], "--tuned", "bert", "-o", tmp_path / "x"))
    assert "tuned" in said
    assert not (tmp_path / "x").exists()


def test_distill_cuts_a_student_and_trains_it(here, tmp_path):
    distill = ("distill", "-m", "bert", "--layers", 2, "--ffn", 48, "-d", "plain.jsonl")
    planned = run(*distill, "-o", tmp_path / "d", "--dry-run", "--json")
    assert planned["layers"]["0"] < planned["layers"]["1"]
    kept = run(*distill[:3], "--layer-map", "0,2", *distill[-2:], "-o", tmp_path / "d", "--dry-run", "--json")
    assert kept["layers"] == {"0": 0, "1": 2}
    assert any("last_hidden_state" in term for term in planned["terms"])
    done = run(*distill, "-o", tmp_path / "d", "--epochs", 2, "--learning-rate", 0.003, "--json")
    assert done["loss_by_epoch"][-1] < done["loss_by_epoch"][0]
    seen = run("inspect", tmp_path / "d", "--json")
    assert seen["facts"]["parameters"] == done["parameters"] < done["teacher_parameters"]


def test_a_loss_that_is_no_number_saves_nothing(here, tmp_path):
    adapt = ("adapt", "-m", "bert", "-d", "labelled.jsonl", "--rank", 2, "--samples", 16, "--batch-size", 8)
    assert "--learning-rate" in str(refused(*adapt, "--learning-rate", 1e30, "--epochs", 2, "-o", tmp_path / "a"))
    assert not (tmp_path / "a").exists()
    done = run(*adapt, "--learning-rate", 1e-3, "--max-steps", 1, "-o", tmp_path / "a", "--json")
    assert done["fresh"] == ["classifier.bias", "classifier.weight"]


def stop_by(number):
    """A callback that sends a signal after an update."""

    class Stop:
        def on_step_end(self, trainer):
            if trainer.global_step == 2:
                signal.raise_signal(number)

    return Stop


@pytest.mark.parametrize(
    ("command", "number", "code"),
    [
        (("adapt", "-m", "bert", "-d", "labelled.jsonl", "--rank", 2, "--set", "dropout=0.1"), signal.SIGINT, 130),
        (("distill", "-m", "bert", "--layers", 2, "-d", "plain.jsonl"), signal.SIGTERM, 143),
    ],
    ids=("adapt", "distill"),
)
def test_a_stop_in_training_goes_on_to_the_same_bytes(here, tmp_path, monkeypatch, command, number, code):
    from slimkit.core.jobs import fitting

    options = ("--epochs", 2, "--batch-size", 8)
    run(*command, *options, "-o", tmp_path / "whole")
    monkeypatch.setattr(fitting, "ProgressBar", stop_by(number))
    before = signal.getsignal(number)
    stop = refused(*command, *options, "-o", tmp_path / "cut")
    assert isinstance(stop, Interrupted)
    assert stop.code == code
    assert "same command goes on" in str(stop)
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    monkeypatch.chdir(here)
    with_other = refused(*command, "--epochs", 3, "--batch-size", 8, "-o", tmp_path / "cut")
    assert "another plan" in str(with_other)
    run(*command, *options, "-o", tmp_path / "cut")
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


# what is refused ----------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line_and_leave_nothing(here, tmp_path):
    out = ("-o", tmp_path / "x")
    for arguments, kind, words in (
        (("prune", *out), ConfigError, "--model"),
        (("prune", "-m", "nowhere", *out), FileFormatError, "nowhere"),
        (("prune", "-m", here, *out), ConfigError, "config.json"),
        (("prune", "--factory", "nets:nett", "--example", "1,3,8,8", *out), ConfigError, "Did you mean 'net'"),
        (("prune", "--factory", "nets:nothing", "--example", "1,3,8,8", *out), TypeError, "--factory"),
        (("prune", "--factory", "nets:net", "--example", "1,x", *out), ConfigError, "--example"),
        (
            ("prune", "--factory", "nets:net", "--example", "1,3,8,8", "--calib", "plain.jsonl", *out),
            ConfigError,
            "tokenizer",
        ),
        (("sparsify", "-m", "llama", *out), ConfigError, "--calib"),
        (("sparsify", "-m", "llama", "--calib", "nothing.jsonl", *out), ConfigError, "nothing.jsonl"),
        (("sparsify", "-m", "llama", "--framework", "jax", *out), ValueError, "--framework"),
        (("export", "-m", "llama", "--format", "mindir", *out), UnsupportedError, "mindspore"),
        (("export", "-m", "llama", "--delta", "nowhere", *out), ConfigError, "--delta"),
        (("adapt", "-m", "bert", "-d", "plain.jsonl", *out), ConfigError, "label"),
        (("adapt", "-m", "bert", "-d", "labelled.jsonl", "--kind", "adapter", "--merge", *out), ConfigError, "--merge"),
        (
            ("adapt", "-m", "bert", "-d", "labelled.jsonl", "--kind", "adapter", "--format", "peft", *out),
            ConfigError,
            "peft",
        ),
        (("adapt", "-m", here / "nets.py", "-d", "labelled.jsonl", *out), ConfigError, "tokenizer"),
        (("distill", "-m", "bert", "-d", "plain.jsonl", *out), ConfigError, "--layers"),
        (("inspect", here / "labelled.jsonl"), FileFormatError, "labelled.jsonl"),
        (("inspect", here), FileFormatError, "neither"),
        (("prune", "-m", "llama", "-q", "-v", *out), ConfigError, "--quiet"),
    ):
        error = refused(*arguments)
        assert isinstance(error, kind), (arguments, error)
        assert words in str(error), (arguments, error)
        assert "\n" not in str(error)
        assert not (tmp_path / "x").exists()


def test_nothing_of_the_users_is_overwritten(here, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for command in (("prune", "-m", "llama", "--importance=l1"), ("sparsify", "-m", "llama", "--method", "magnitude")):
        assert "does not exist yet or is empty" in str(refused(*command, "-o", tmp_path))
    assert [f.name for f in tmp_path.iterdir()] == ["mine.txt"]


def test_damaged_text_names_the_line(here, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a cat"}\n{"txt": "a dog"}\n')
    error = refused("sparsify", "-m", "llama", "--calib", tmp_path / "t.jsonl", "-o", tmp_path / "x")
    assert "line 2" in str(error)
    assert "Did you mean" in str(error)
