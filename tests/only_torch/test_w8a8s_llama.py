"""A sparse int8 Llama: every tensor has its word, layers served as one agree, and int8 costs little."""

import copy
import json

import pytest

import slimkit
from slimkit.core.errors import ArgumentError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, attention_bias=True, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    mask = torch.ones(4, 16, dtype=torch.int64)
    mask[0, 10:] = 0
    batches = [{"input_ids": torch.randint(0, 64, (4, 16)), "attention_mask": mask} for _ in range(6)]
    sparse = copy.deepcopy(model)
    config = slimkit.SparseConfig(method="par", sparse_ratio=0.3, weight_bits=8)
    slimkit.Compressor(sparse, config).compress(batches)
    return model, sparse, batches


def test_the_folder_is_what_the_reader_asks_for(llama, tmp_path):
    _, sparse, batches = llama
    report = slimkit.save_w8a8s(tmp_path, sparse, batches)
    assert len(report.layers) == 14
    assert report.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    read = slimkit.load_w8a8s(tmp_path)
    described = json.loads((tmp_path / "quant_model_description.json").read_text())
    assert read.config["quantize"] == "w8a8s"  # without it MindIE reads no description
    for name in sparse.state_dict():  # vLLM-Ascend asks for the word of the tied output layer too
        assert described[name] == ("W8A8S" if name.endswith("proj.weight") else "FLOAT")
    assert "lm_head.weight" not in read.tensors
    # Query, key and value are served as one layer with one input step; so are gate and up.
    for block in range(2):
        for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            steps = {
                (float(read.layers[f"model.layers.{block}.{n}"].input_scale[0]),
                 int(read.layers[f"model.layers.{block}.{n}"].input_offset[0]))
                for n in group
            }  # fmt: skip
            assert len(steps) == 1
    emulated = copy.deepcopy(sparse)
    slimkit.emulate_w8a8s(emulated, tmp_path)
    documents = [batch["input_ids"][1].tolist() for batch in batches]
    found = slimkit.compare_models(sparse, {"int8": emulated}, documents, length=16, speed=False)
    lost = found["int8"].figures["perplexity"] / found.dense.figures["perplexity"]
    assert 0.97 < lost < 1.03


def test_padding_does_not_widen_a_range(llama, tmp_path):
    _, sparse, batches = llama
    model = copy.deepcopy(sparse)
    with torch.no_grad():
        model.model.embed_tokens.weight[63] *= 100
    calm = [{**b, "input_ids": b["input_ids"].clamp(max=62)} for b in batches]
    loud = copy.deepcopy(calm)
    for batch in loud:
        batch["input_ids"][0, 10:] = 63  # under the mask
    ranges = [slimkit.save_w8a8s(tmp_path / str(k), model, b).layers for k, b in enumerate((calm, loud))]
    for name, row in ranges[0].items():
        assert ranges[1][name]["high"] == pytest.approx(row["high"], rel=1e-5)


def test_layers_that_are_served_as_one_must_all_be_int8(llama, tmp_path):
    _, sparse, batches = llama
    with pytest.raises(ArgumentError, match="served as one"):
        slimkit.save_w8a8s(tmp_path / "a", sparse, batches, targets=["*.q_proj", "*.down_proj"])
    assert list(tmp_path.iterdir()) == []
    report = slimkit.save_w8a8s(tmp_path / "b", sparse, batches, targets=["*.down_proj"])
    assert len(report.layers) == 2


def test_bfloat16_cannot_hold_the_grid_and_is_refused_before_anything_changes(llama, tmp_path):
    dense, _, batches = llama
    model = copy.deepcopy(dense).to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    config = slimkit.SparseConfig(method="hessian", weight_bits=8)
    with pytest.raises(ArgumentError, match="bfloat16"):
        slimkit.Compressor(model, config).compress(batches)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    model.save_pretrained(tmp_path / "bf16")
    with pytest.raises(ArgumentError, match="bfloat16"):
        slimkit.sparsify_checkpoint(tmp_path / "bf16", tmp_path / "out", config, batches)
    assert not (tmp_path / "out").exists()


def test_the_commands_make_a_folder_out_of_a_folder(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from slimkit.cli import app
    from tests.chain import tiny_models

    monkeypatch.chdir(tmp_path)
    tiny_models.hugging_face(tmp_path, "llama")
    tiny_models.text(tmp_path / "t.jsonl")
    calib = ("--calib", "t.jsonl", "--samples", "8", "--max-length", "8")

    def run(*arguments):
        return CliRunner().invoke(app, [*arguments, *calib])

    done = run("sparsify", "-m", "llama", "--method", "hessian", "--weight-bits", "8", "-o", "int8")
    assert done.exit_code == 0, done.output
    done = run("export", "-m", "int8", "--format", "w8a8s", "-o", "npu")
    assert done.exit_code == 0, done.output
    assert "int8 layers, 50." in done.stdout
    assert len(slimkit.load_w8a8s("npu").layers) == 21
    assert CliRunner().invoke(app, ["inspect", "npu"]).exit_code == 0
    # Two options of this format alone, from the one table.
    few = run("export", "-m", "int8", "--format", "w8a8s", "--ranges", "percentile", "--most-error", "1e-9", "-o", "x")
    assert "no layer is left" in str(few.exception)
    odd = CliRunner().invoke(app, ["export", "-m", "int8", "-o", "m.onnx", "--most-error", "0.2"])
    assert "--most-error is an option of --format w8a8s" in str(odd.exception)
    for arguments in (
        ("export", "-m", "int8", "-o", "m.onnx", *calib),
        ("export", "-m", "int8", "--format", "w8a8s", "-o", "x"),
    ):
        refused = CliRunner().invoke(app, arguments)
        assert "--calib is needed for --format w8a8s" in str(refused.exception)


def test_what_is_served_as_one_stays_float_together(llama, tmp_path):
    _, sparse, batches = llama
    errors = {n: row["input_error"] for n, row in slimkit.save_w8a8s(tmp_path / "a", sparse, batches).layers.items()}
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
    groups = [[f"model.layers.{k}.{part}" for part in own] for k in range(2) for own in parts]
    # The group whose worst layer is worst of all: others stay below the middle of its least and its most.
    group = max(groups, key=lambda own: max(errors[n] for n in own))
    least, most = min(errors[n] for n in group), max(errors[n] for n in group)
    report = slimkit.save_w8a8s(tmp_path / "b", sparse, batches, most_error=(least + most) / 2)
    assert set(group) <= set(report.kept_float)
    assert any(error < (least + most) / 2 for error in report.kept_float.values())
    described = json.loads((tmp_path / "b" / "quant_model_description.json").read_text())
    assert {described[f"{n}.weight"] for n in report.kept_float} == {"FLOAT"}
    assert sorted([*report.layers, *report.kept_float]) == sorted(errors)


def test_a_recipe_makes_the_folder(tmp_path):
    from typer.testing import CliRunner

    from slimkit.cli import app
    from tests.chain import tiny_models

    tiny_models.hugging_face(tmp_path, "llama")
    tiny_models.text(tmp_path / "t.jsonl")
    (tmp_path / "r.yaml").write_text(
        "version: 1\nname: r\nmodel: llama\ncalibrate: {text: t.jsonl, samples: 8, length: 8}\nstages:\n"
        "- sparsify: {method: hessian, sparse_ratio: 0.3, weight_bits: 8, ignore: [lm_head]}\n"
        "- export: {formats: [w8a8s], most_error: 0.5}\n"
    )
    done = CliRunner().invoke(app, ["run", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    stage = json.loads((tmp_path / "run" / "report.json").read_text())["stages"][-1]
    assert stage["facts"]["headline"] == "21 int8 layers, 0 left float16"
    folder = next((tmp_path / "run").rglob("model.w8a8s"))
    assert len(slimkit.load_w8a8s(folder).layers) == 21
    assert (folder / "tokenizer.json").is_file()
