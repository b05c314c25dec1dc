"""The command line without a model: inspect, convert, migrate, schema, exit codes, help, and real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import typer.main
from typer.testing import CliRunner

from slimkit.cli import app, exits, main
from slimkit.cli.exits import Interrupted
from slimkit.core import files
from slimkit.core.errors import ConfigError, FileFormatError
from slimkit.core.jobs import migrate
from slimkit.core.log import logger
from tests.chain import tiny_models
from tests.conftest import INSTALLED

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOG_v": "3"}


def run(*arguments, code=0):
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == code, done.exception or done.stderr
    return json.loads(done.stdout) if "--json" in arguments else done.stdout


def error_of(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments]).exception


def process(*arguments, **more):
    return subprocess.run(
        [sys.executable, "-m", "slimkit", *map(str, arguments)],
        capture_output=True, text=True, env=ENVIRONMENT, timeout=120, **more,
    )  # fmt: skip


# what every command owes its user -----------------------------------------------------------------------------------


def commands():
    return typer.main.get_command(app).commands


def test_every_command_is_documented_and_shows_an_example():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for name, command in commands().items():
        assert f"## slimkit {name}" in page, f"docs/cli.md says nothing about {name}"
        assert "Example: slimkit " + name in " ".join(command.help.split()), name
        for parameter in command.params:
            flags = [flag for flag in parameter.opts if flag.startswith("--")]
            assert parameter.help or flags == ["--help"], f"{name} {parameter.name} has no help"
            for flag in flags:
                assert f"`{flag}" in page, f"docs/cli.md says nothing about {name} {flag}"


def test_the_exit_codes_of_the_page_are_those_of_the_code():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for code, what in exits.EXITS.items():
        assert f"| {code} | {what} |" in page


def test_exit_codes(capsys):
    def raising(error):
        def command():
            raise error

        return command

    for error, code, words in (
        (FileFormatError("x is damaged"), 2, "slimkit: x is damaged"),
        (Interrupted("the same command goes on"), 130, "slimkit: interrupted; the same command goes on"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "out"), 2, "slimkit: out: No space left on device"),
        (ZeroDivisionError("division"), 70, "ZeroDivisionError"),
    ):
        with pytest.raises(SystemExit) as stop:
            exits.exiting(raising(error))
        assert stop.value.code == code
        assert words in capsys.readouterr().err


def test_a_program_that_calls_a_command_keeps_its_logging(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(1))
    before = (list(logger.handlers), logger.level)
    assert isinstance(error_of("inspect", tmp_path / "x.npy", "-q"), FileFormatError)
    assert (list(logger.handlers), logger.level) == before


def test_help_loads_no_framework_and_no_numpy():
    """Of the whole and of every command, one after the other in one process."""
    code = (
        "import contextlib, io, sys\n"
        "from slimkit.cli import _COMMANDS, app\n"
        "for command in ('', *_COMMANDS):\n"
        "    sys.argv = ['slimkit', *filter(None, [command]), '--help']\n"
        "    said = io.StringIO()\n"
        "    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit): app()\n"
        "    loaded = {'torch', 'mindspore', 'numpy', 'transformers', 'scipy', 'yaml', 'onnx'} & set(sys.modules)\n"
        "    print(command, 'Usage' in said.getvalue(), sorted(loaded))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert len(lines) > 10, done.stderr
    assert [line for line in lines if not line.endswith("True []")] == []


def test_completion_offers_the_words_of_an_option():
    asked = {"_SLIMKIT_COMPLETE": "complete_bash", "COMP_WORDS": "slimkit sparsify --method p", "COMP_CWORD": "3"}
    code = "from slimkit.cli import app; app(prog_name='slimkit')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, env={**ENVIRONMENT, **asked}, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout.split() == ["par", "par_v2"], done.stderr


# inspect ------------------------------------------------------------------------------------------------------------


def test_inspect_weights_counts_zeros_without_a_framework(tmp_path):
    half = np.arange(8, dtype=np.float32).reshape(2, 4) % 2
    files.write_tensors(tmp_path / "w.safetensors", {"fc.weight": half, "fc.bias": np.zeros(2, np.float16)})
    code = (
        "import sys; sys.modules['torch'] = sys.modules['mindspore'] = None\n"
        f"sys.argv = ['slimkit', 'inspect', {str(tmp_path / 'w.safetensors')!r}, '--json']\n"
        "from slimkit.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)
    seen = json.loads(done.stdout)
    assert seen["facts"]["dtypes"] == {"F16": 1, "F32": 1}
    assert seen["facts"]["sparsity"] == 0.5
    rows = {row["tensor"]: row for row in seen["rows"]}
    assert rows["fc.weight"] == {
        "tensor": "fc.weight", "shape": [2, 4], "dtype": "F32", "parameters": 8, "zeros": 4, "sparsity": 0.5,
    }  # fmt: skip
    assert rows["fc.bias"]["zeros"] is None
    headers = run("inspect", tmp_path / "w.safetensors", "--no-values", "--json")
    assert "sparsity" not in headers["facts"]


def test_inspect_reads_negative_zero_and_bfloat16(tmp_path):
    from slimkit.core.checkpoint.saving import Items, write_items
    from slimkit.core.checkpoint.weightfile import Entry

    items = Items()
    bits = np.array([[0x8000, 0x0000], [0x3F80, 0xBF80]], np.uint16)  # -0, 0, 1, -1
    items.add("w", Entry("BF16", (2, 2)), lambda: bits)
    write_items(tmp_path / "b.safetensors", items, with_manifest=False)
    assert run("inspect", tmp_path / "b.safetensors", "--json")["rows"][0]["zeros"] == 2


def test_inspect_tells_a_w16a16s_folder_and_a_run(tmp_path):
    from slimkit.core.ascend.w16a16s import save_arrays

    save_arrays(tmp_path / "w", {"fc.weight": np.eye(4, dtype=np.float32)}, {"model_type": "none"})
    seen = run("inspect", tmp_path / "w", "--json")
    assert (seen["kind"], seen["rows"][0]["kind"], seen["rows"][0]["sparsity"]) == ("w16a16s", "W16A16S", 0.75)
    (tmp_path / "r").mkdir()
    files.write_json(tmp_path / "r" / "report.json", {"format": "other"})
    assert isinstance(error_of("inspect", tmp_path / "r"), FileFormatError)


def test_a_long_table_is_cut_for_people_and_whole_for_programs(tmp_path):
    files.write_tensors(tmp_path / "w.safetensors", {f"layer.{i:02d}": np.ones((2, 2)) for i in range(40)})
    text = run("inspect", tmp_path / "w.safetensors")
    assert "layer.29" in text
    assert "layer.30" not in text
    assert "and 10 more" in text
    assert "layer.39" in run("inspect", tmp_path / "w.safetensors", "--all")
    assert len(run("inspect", tmp_path / "w.safetensors", "--json")["rows"]) == 40


# convert ------------------------------------------------------------------------------------------------------------


def norms(path):
    files.write_tensors(path, {"bn.weight": np.ones(2, np.float32), "bn.bias": np.zeros(2, np.float32)})
    return path


def test_convert_there_and_back_needs_no_framework(tmp_path):
    source = norms(tmp_path / "a.safetensors")
    planned = run("convert", source, tmp_path / "b.ckpt", "--dry-run", "--json")
    assert not (tmp_path / "b.ckpt").exists()
    done = run("convert", source, tmp_path / "b.ckpt", "--json")
    assert done["renamed"] == planned["renamed"] == {"bn.weight": "bn.gamma", "bn.bias": "bn.beta"}
    run("convert", tmp_path / "b.ckpt", tmp_path / "c.safetensors", "--to", "torch")
    back, _ = files.read_tensors(tmp_path / "c.safetensors")
    assert sorted(back) == ["bn.bias", "bn.weight"]
    np.testing.assert_array_equal(back["bn.weight"], np.ones(2))


def test_convert_with_a_map_and_a_choice(tmp_path):
    source = norms(tmp_path / "a.safetensors")
    files.write_json(tmp_path / "map.json", {"bn.weight": "norm.gamma"})
    done = run(
        "convert", source, tmp_path / "b.ckpt", "--name-map", tmp_path / "map.json", "--only", "*.weight", "--json"
    )
    assert done["renamed"] == {"bn.weight": "norm.gamma"}
    files.write_tensors(tmp_path / "f.safetensors", {"h.qkv.weight": np.arange(24, dtype=np.float32).reshape(6, 4)})
    files.write_json(tmp_path / "map.json", {"h.qkv.weight": ["h.q.weight", "h.k.weight", "h.v.weight"]})
    apart = run(
        "convert", tmp_path / "f.safetensors", tmp_path / "g.ckpt", "--name-map", tmp_path / "map.json", "--json"
    )
    assert apart["split"]
    files.write_json(tmp_path / "map.json", {"h.q.weight + h.k.weight + h.v.weight": "h.qkv.weight"})
    run("convert", tmp_path / "g.ckpt", tmp_path / "h.safetensors", "--name-map", tmp_path / "map.json")
    back, _ = files.read_tensors(tmp_path / "h.safetensors")
    np.testing.assert_array_equal(back["h.qkv.weight"].ravel(), np.arange(24))
    files.write_json(tmp_path / "map.json", ["bn.weight"])
    assert isinstance(
        error_of("convert", source, tmp_path / "b.ckpt", "--name-map", tmp_path / "map.json"), ConfigError
    )
    assert isinstance(error_of("convert", source, tmp_path / "b.ckpt", "--example", "1,2"), ConfigError)


@pytest.mark.skipif(len(INSTALLED) < 2, reason="compares both frameworks")
def test_convert_proves_both_networks_and_keeps_nothing_that_differs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.py").write_text(
        "import torch\ndef net():\n    return torch.nn.Sequential(torch.nn.Linear(4, 3))\n"
    )
    (tmp_path / "two.py").write_text(
        "from mindspore import nn\ndef net():\n    return nn.SequentialCell(nn.Dense(4, 3))\n"
        "def other():\n    return nn.SequentialCell(nn.Dense(4, 3), nn.ReLU())\n"
    )
    files.write_tensors(
        tmp_path / "a.safetensors", {"0.weight": np.ones((3, 4), np.float32), "0.bias": -np.ones(3, np.float32)}
    )
    to = ("convert", "a.safetensors", "b.ckpt", "--source-factory", "one.py:net", "--example", "2,4")
    assert run(*to, "--result-factory", "two.py:net", "--json")["largest_difference"] < 1e-5
    before = {f: f.read_bytes() for f in tmp_path.glob("b.ckpt*")}
    wrong = error_of(*to, "--result-factory", "two.py:other", "--force")
    assert "--tolerance" in str(wrong)
    assert {f: f.read_bytes() for f in tmp_path.glob("b.ckpt*")} == before


# migrate ------------------------------------------------------------------------------------------------------------

OLD = '''\
import torch
from msmodelslim.pytorch.prune.prune_torch import PruneTorch as P  # keep me
from msmodelslim.common.knowledge_distill.knowledge_distill import (
    KnowledgeDistillConfig,
    get_distill_model,
)
from mindpet.delta.lora import LoRADense
from tk.graph import freeze_delta, TrainableParamsCheckPoint
import msmodelslim.pytorch
"""msmodelslim in a docstring stays"""


def f():
    from msmodelslim.pytorch.sparse.sparse_tools import Compressor, Quantizer
    return P(None).set_node_reserved_ratio(0.5)
'''

NEW = '''\
import torch
from slimkit import PruneTorch as P  # keep me
from slimkit import KnowledgeDistillConfig, get_distill_model
from slimkit_ms import LoRADense
from slimkit_ms import freeze_delta, TrainableParamsCheckPoint
import msmodelslim.pytorch
"""msmodelslim in a docstring stays"""


def f():
    from slimkit import Compressor
    from msmodelslim.pytorch.sparse.sparse_tools import Quantizer
    return P(None).set_node_reserved_ratio(0.5)
'''


def test_migrate_rewrites_imports_and_lists_the_rest(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(OLD)
    shown = run("migrate", script, code=1)
    assert "-from mindpet.delta.lora import LoRADense" in shown
    assert "+from slimkit_ms import LoRADense" in shown
    assert "train.py:14: msmodelslim.pytorch.sparse.sparse_tools.Quantizer has no counterpart" in shown
    assert "least share each node keeps" in shown
    assert script.read_text() == OLD
    done = run("migrate", script, "--write", "--json", code=1)
    assert script.read_text() == NEW
    assert [name for _, name in done["scripts"][0]["unknown"]] == [
        "import msmodelslim.pytorch",
        "msmodelslim.pytorch.sparse.sparse_tools.Quantizer",
    ]
    compile(script.read_text(), "train.py", "exec")


def test_migrate_is_finished_where_nothing_is_left(tmp_path):
    script = tmp_path / "ok.py"
    script.write_bytes(b"from msmodelslim import set_logger_level\r\nx = '\xc3\xa9'; y = 1\r\n")
    assert run("migrate", script, "--write") != ""
    assert script.read_bytes() == b"from slimkit import set_logger_level\r\nx = '\xc3\xa9'; y = 1\r\n"
    assert "nothing to rewrite" in run("migrate", script)
    script.write_text("def (")
    assert isinstance(error_of("migrate", script), FileFormatError)


def test_migrate_chooses_the_package_by_what_the_script_imports():
    common = "from msmodelslim.common.prune.transformer_prune.prune_model import PruneConfig\n"
    assert migrate.migrate("import mindspore\n" + common).text.endswith("from slimkit_ms import PruneConfig\n")
    assert migrate.migrate(common).text == "from slimkit import PruneConfig\n"
    assert migrate.migrate(common, "mindspore").text == "from slimkit_ms import PruneConfig\n"


def test_the_table_of_names_is_the_documents():
    assert migrate.markdown() in (ROOT / "docs" / "migrate.md").read_text(encoding="utf-8")


# schema, run --------------------------------------------------------------------------------------------------------


def test_the_schema_names_every_stage(tmp_path):
    run("schema", "--out", tmp_path / "s.json")
    made = json.loads((tmp_path / "s.json").read_text())
    assert made == json.loads(run("schema"))
    assert {"model", "data", "stages"} <= set(made["properties"])
    assert "SparsifyStage" in made["$defs"]


def test_run_says_what_it_would_do(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "version: 1\nname: r\nmodel: m.py:f\ndata: m.py:d\nstages:\n  - prune: {reserved_ratio: 0.5}\n  - export: {}\n"
    )
    would = run("run", recipe, "--dry-run", "--json", "--set", "name=other")
    assert would["stages"] == ["prune", "export"]
    assert would["folder"] == "runs/other"
    assert not Path(would["folder"]).exists()
    assert isinstance(error_of("run", recipe, "--set", "stages.7.prune=1"), ConfigError)


# a real process -----------------------------------------------------------------------------------------------------


def forked(arguments, folder):
    """The command in a process of its own that has loaded everything already; its output goes to files."""
    child = os.fork()
    if child:
        return child
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))
        sys.argv = ["slimkit", *map(str, arguments)]
        logger.handlers.clear()
        logger.propagate = False
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


@pytest.mark.skipif("torch" not in INSTALLED or not hasattr(os, "fork"), reason="walks a PyTorch model")
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_stopped_sparsify_resumes_to_the_same_bytes(tmp_path, one_thread, number, code, word):
    model = tiny_models.hugging_face(tmp_path, "llama", num_hidden_layers=16)
    text = tiny_models.text(tmp_path / "text.jsonl", labels=False)
    command = ("sparsify", "-m", model, "--method", "par_v2", "--calib", text, "--samples", 8, "-o")
    out = tmp_path / "cut"
    run(*command, tmp_path / "whole")
    child = forked([*command, out, "--json"], tmp_path)
    end = time.monotonic() + 120
    while not list(out.glob(".slimkit-sparse/block-*.json")) and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(child, number)
    said_code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = (tmp_path / "stderr").read_text()
    assert said_code == code, said
    assert (tmp_path / "stdout").read_text() == ""
    assert f"{word}; the same command goes on from the last finished block" in said.splitlines()[-1]
    assert not (out / "model.safetensors").exists()
    assert run(*command, out, "--dry-run", "--json")["blocks_done"] >= 1
    run(*command, out)
    for file in ("model.safetensors", "sparse_report.json", "config.json"):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_without_any_framework_the_rest_works_and_one_line_says_what_is_missing(tmp_path):
    norms(tmp_path / "a.safetensors")
    (tmp_path / "old.py").write_text("from msmodelslim import set_logger_level\n")
    (tmp_path / "nets.py").write_text("def net():\n    return 1\n")
    code = """
        import importlib.abc, importlib.util, sys

        class Blocked(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("torch", "mindspore"):
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        real = importlib.util.find_spec
        importlib.util.find_spec = lambda n, *a: None if n in ("torch", "mindspore") else real(n, *a)
        sys.meta_path.insert(0, Blocked())
        from slimkit.cli import app, main
        for line in ("convert a.safetensors b.ckpt", "inspect b.ckpt", "migrate old.py --write", "schema --out s.json"):
            app(line.split(), standalone_mode=False)
        for framework in ("torch", "mindspore"):
            sys.argv = ["slimkit", "prune", "--factory", "nets:net", "-f", framework, "-o", "x"]
            try:
                main()
            except SystemExit as stop:
                print("EXIT", stop.code)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path
    )
    assert [line for line in done.stdout.splitlines() if line.startswith("EXIT")] == ["EXIT 2", "EXIT 2"], done.stderr
    assert "slimkit[torch]" in done.stderr
    assert "slimkit[mindspore]" in done.stderr
    assert "Traceback" not in done.stderr
    assert {f.name for f in tmp_path.iterdir()} >= {"b.ckpt", "s.json"}


def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(tmp_path):
    done = process("convert", tmp_path / "none.safetensors", tmp_path / "x.ckpt", "--json")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
