"""`slimkit distill`, `adapt` and `compress` on networks of one's own: the same commands in both frameworks."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest
from typer.testing import CliRunner

from slimkit.cli import app
from slimkit.cli.exits import Interrupted
from slimkit.core import files
from slimkit.core.errors import ConfigError, FileFormatError, SlimkitError
from tests.chain import tiny_models
from tests.conftest import INSTALLED

ADAPT = (
    "adapt",
    "--data",
    "x.npz",
    "--target",
    "fc1",
    "--rank",
    2,
    "--learning-rate",
    0.05,
    "--epochs",
    3,
    "--batch-size",
    8,
)
DISTILL = (
    "distill", "--data", "x.npz", "--student-arg", "width=4", "--match", "fc2=fc2", "--learning-rate", 0.02,
    "--epochs", 3, "--batch-size", 8,
)  # fmt: skip


@pytest.fixture(params=INSTALLED)
def net(request, tmp_path, monkeypatch):
    """The options that name a small network of the framework, in a folder with data for it."""
    plain = tiny_models.TORCH_PLAIN if request.param == "torch" else tiny_models.MS_PLAIN
    name = f"plain_{request.param}"
    (tmp_path / f"{name}.py").write_text(plain)
    draw = np.random.default_rng(0)
    x = draw.standard_normal((32, 6)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x, labels=x[:, :3].argmax(1), scores=x[:, :3] * 2)
    np.savez(tmp_path / "held.npz", x=x[:10], labels=x[:10, :3].argmax(1))
    monkeypatch.chdir(tmp_path)
    files.write_tensors(tmp_path / "only.safetensors", {"x": x, "labels": x[:, :3].argmax(1)})
    np.savez(tmp_path / "x.npz", x=x, labels=x[:, :3].argmax(1))
    return ("--framework", request.param, "--factory", f"{name}.py:net")


def factory(net, function):
    return net[3].replace(":net", f":{function}")


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def run(*arguments):
    done = invoke(*arguments, "--json")
    assert done.exit_code == 0, done.exception or done.stderr
    return json.loads(done.stdout)


def refused(*arguments):
    done = invoke(*arguments)
    assert isinstance(done.exception, (SlimkitError, Interrupted)), done.exception
    return done.exception


def tree(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def saved(net, tmp_path):
    """The network's weights in a file, so that a teacher or base is the same in every command."""
    out = tmp_path / "dense"
    run("sparsify", *net, "--method", "magnitude", "--sparsity", 0.01, "-o", out)
    return ("--model", out / ("model.safetensors" if net[1] == "torch" else "model.ckpt"))


def test_adapt_a_network_with_labelled_arrays(net, tmp_path):
    base = saved(net, tmp_path)
    planned = run(*ADAPT, *net, *base, "-o", "a", "--dry-run")
    assert not (tmp_path / "a").exists()
    assert (planned["task"], planned["layers"], planned["samples"]) == ("cross_entropy", ["fc1"], 32)
    done = run(*ADAPT, *net, *base, "--eval", "held.npz", "--also-train", "fc2.*", "--merge", "-o", "a")
    assert done["trained_parameters"] == 2 * (6 + 16) + 16 * 3 + 3
    assert done["steps"] == 12
    assert done["loss_by_epoch"][-1] < done["loss_by_epoch"][0]
    assert 0 <= done["evaluation"]["accuracy"] <= 1
    assert run("inspect", "a")["facts"]["deltas"] == {"default": "lora"}
    # What was written is the model that was evaluated: a delta on the base and the merged weights answer alike.
    on_base = run("export", *net, *base, "--delta", "a", "--example", "2,6", "-o", "d.onnx")
    merged = tmp_path / "a" / "merged" / base[1].name
    alone = run("export", *net, "--model", merged, "--example", "2,6", "-o", "m.onnx")
    assert max(on_base["max_difference"], alone["max_difference"]) < 1e-4
    x = np.load("held.npz")["x"][:2]
    answers = [_onnx(file, x) for file in ("d.onnx", "m.onnx")]
    np.testing.assert_allclose(*answers, atol=1e-5)  # float32: one merged product instead of two


def _onnx(file, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def test_other_data_and_losses_adapt_alike(net, tmp_path):
    by_file = run(*ADAPT, *net, "--data", "only.safetensors", "--dry-run", "-o", "a")
    assert by_file["samples"] == 32
    made = run(*ADAPT, *net, "--data", factory(net, "batches"), "--samples", 16, "-o", "b")
    assert (made["samples"], made["steps"]) == (2, 6)
    own = run(*ADAPT, *net, "--loss", factory(net, "margin"), "--kind", "adapter", "-o", "c")
    assert own["task"].endswith(":margin")
    assert own["kind"] == "adapter"


@pytest.mark.parametrize("data", [(), ("--calib", "x.npz")], ids=("weights", "data"))
def test_compress_a_network_that_was_trained_whole(net, tmp_path, data):
    base = saved(net, tmp_path)
    given = ("--data", "x.npz", "--learning-rate", 0.05, "--epochs", 3, "--batch-size", 8)
    run("train", *net, *base, *given, "-o", "t")
    tuned = tmp_path / "t" / base[1].name
    how = ("compress", *net, *base, "--tuned", tuned, "--bytes-ratio", 0.7, *data)
    planned = run(*how, "-o", "d", "--dry-run")
    assert not (tmp_path / "d").exists()
    done = run(*how, "-o", "d")
    assert done["layers"] == planned["layers"]
    assert set(done["layers"]) == {"fc1", "fc2"}
    assert done["delta_bytes"] == sum(f.stat().st_size for f in (tmp_path / "d").iterdir()) - _beside(tmp_path / "d")
    assert "slimkit compress --model" in (tmp_path / "d" / "README.md").read_text()
    assert "--tuned" in (tmp_path / "d" / "README.md").read_text()
    assert run("inspect", "d")["facts"]["deltas"] == {"default": "lora"}
    x = np.load("held.npz")["x"][:2]
    answers = []
    for name, more in (("b", base), ("d", (*base, "--delta", "d")), ("t", ("--model", tuned))):
        run("export", *net, *more, "--example", "2,6", "-o", f"{name}.onnx")
        answers.append(_onnx(f"{name}.onnx", x))
    assert np.abs(answers[1] - answers[2]).mean() < 0.5 * np.abs(answers[0] - answers[2]).mean()


def _beside(folder):
    """Bytes of the files about a delta, which are written after it."""
    return sum(f.stat().st_size for f in folder.iterdir() if f.name in ("README.md", "compress_report.json"))


def test_compress_refuses_what_is_no_tuning_of_the_base(net, tmp_path):
    base = saved(net, tmp_path)
    how = ("compress", *net, *base, "-o", "d")
    for more, kind, words in (
        (("--tuned", "nowhere.pt"), FileFormatError, "--tuned must be an existing file"),
        (("--tuned", base[1]), ValueError, "every value is the same"),
        (("--tuned", base[1], "--bytes-ratio", 0.01), ValueError, "--bytes-ratio"),
        (("--tuned", base[1], "--bytes-ratio", 2), ConfigError, "--bytes-ratio"),
        (("--tuned", base[1], "--kind", "zip"), ConfigError, "--kind"),
    ):
        error = refused(*how, *more)
        assert isinstance(error, kind), error
        assert words in str(error)
        assert not (tmp_path / "d").exists()


def test_distill_a_network_into_a_smaller_one(net, tmp_path):
    base = saved(net, tmp_path)
    planned = run(*DISTILL, *net, *base, "-o", "d", "--dry-run")
    assert not (tmp_path / "d").exists()
    assert planned["terms"] == ["fc2/HiddenMse".replace("/", ": "), "output: KDKLDiv"] or len(planned["terms"]) == 2
    done = run(*DISTILL, *net, *base, "-o", "d")
    assert done["parameters"] < done["teacher_parameters"]
    assert done["written"] == "weights"
    assert done["loss_by_epoch"][-1] < done["loss_by_epoch"][0]
    small = run("inspect", "d" if net[1] == "mindspore" else "d/model.safetensors", *net, "--arg", "width=4",
                "--example", "2,6", "--macs")  # fmt: skip
    assert small["facts"]["parameters"] == done["parameters"]
    mixed = run(*DISTILL, *net, *base, "--hard-weight", 0.5, "--output-loss", "KDMse", "-o", "h")
    assert mixed["steps"] == done["steps"]
    other = run("distill", *net, "--student-factory", factory(net, "net"), "--student-arg", "width=8", "--data",
                factory(net, "inputs"), "-o", "f")  # fmt: skip
    assert other["samples"] == 4


@pytest.mark.parametrize("command", [ADAPT, DISTILL], ids=lambda c: c[0])
def test_a_stopped_run_goes_on_to_the_same_bytes(net, tmp_path, monkeypatch, command):
    from slimkit.core.jobs import fitting

    class Stop:
        def on_step_end(self, trainer):
            if trainer.global_step == 5:
                signal.raise_signal(signal.SIGTERM)

    base = saved(net, tmp_path)
    run(*command, *net, *base, "-o", "whole")
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "ProgressBar", Stop)
        stop = refused(*command, *net, *base, "-o", "cut")
    assert (type(stop), stop.code) == (Interrupted, 143)
    assert [f.name for f in (tmp_path / "cut").iterdir()] == [".slimkit-train"]
    assert "begun with another" in str(refused(*command, *net, *base, "--seed", 1, "-o", "cut"))
    # As a version left it that did not know an option, on either level: at its default that is no other job.
    job = tmp_path / "cut" / ".slimkit-train" / "job.json"
    kept = json.loads(job.read_text())
    del kept["plan"]["gradient_clip_value"]
    job.write_text(json.dumps(kept))
    run(*command, *net, *base, "-o", "cut")
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


@pytest.mark.parametrize("command", [ADAPT, DISTILL], ids=lambda c: c[0])
def test_a_stopped_run_goes_on_with_another_save_every_and_without_restart(net, tmp_path, monkeypatch, command):
    from slimkit.core.jobs import fitting

    class Stop:
        def on_step_end(self, trainer):
            if trainer.global_step == 2:
                signal.raise_signal(signal.SIGTERM)

    short = (*command, *net, *saved(net, tmp_path), "--max-steps", 4)
    run(*short, "-o", "whole")
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "ProgressBar", Stop)
        stop = refused(*short, "--restart", "--save-every", 1, "-o", "cut")
    assert (type(stop), stop.code) == (Interrupted, 143)
    agreed = json.loads((tmp_path / "cut" / ".slimkit-train" / "job.json").read_text())
    assert not {"save_every", "restart"} & {*agreed, *agreed["plan"]}
    # How often the state is kept, and whether an older one was thrown away, is no part of what the run is.
    assert run(*short, "--save-every", 3, "-o", "cut")["steps"] == 4
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_mistakes_name_the_option_and_leave_nothing(net, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n')
    np.savez("floats.npz", x=np.ones((4, 6), np.float32), labels=np.ones(4, np.float32))
    np.savez("uneven.npz", x=np.ones((4, 6), np.float32), labels=np.ones(3, np.int64))
    for arguments, kind, words in (
        (("adapt", *net, "-d", "t.jsonl"), ConfigError, "tokenizer"),
        (("adapt", *net, "-d", "x.npz", "--label-key", "label"), ConfigError, "Did you mean 'labels'"),
        (("adapt", *net, "-d", "uneven.npz"), FileFormatError, "one length"),
        (("adapt", *net, "-d", "floats.npz"), ConfigError, "(4, 3)"),
        (("adapt", *net, "-d", "x.npz", "--loss", "mae"), ValueError, "--loss"),
        (("adapt", *net, "-d", factory(net, "inputs")), ConfigError, "(inputs, labels)"),
        (("adapt", *net[:2], "--factory", factory(net, "wide"), "-d", "x.npz"), ConfigError, "cannot be called"),
        (("adapt", *net, "-d", "x.npz", "--target", "nothing"), ValueError, "nothing"),
        (("distill", *net, "-d", "x.npz"), ConfigError, "--student-factory"),
        (("distill", *net, "-d", "x.npz", "--layers", 1), ConfigError, "--layers"),
        (("distill", *net, "-d", "x.npz", "--student-arg", "width=4", "--match", "fc1"), ConfigError, "--match"),
        (("distill", *net, "-d", "x.npz", "--student-arg", "width=4", "--match", "fc9=fc1"), ValueError, "fc9"),
        (("adapt", *net, "-d", "x.npz", "--device", "tpu"), ValueError, "--device"),
        (("adapt", *net, "-d", "x.npz", "--device", "npu"), ConfigError, "--device npu"),
    ):
        error = refused(*arguments, "-o", "x")
        assert isinstance(error, kind), (arguments, error)
        assert words in str(error), (arguments, error)
        assert not (tmp_path / "x").exists(), arguments
