"""convert_checkpoint by rules, without networks: names, types, values, directions, and what it refuses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimkit.core.checkpoint import weightfile
from slimkit.core.checkpoint.ckpt import Ckpt, stream_ckpt
from slimkit.core.checkpoint.weightfile import Entry, Safetensors, stream_safetensors
from slimkit.core.convert import names
from slimkit.core.errors import ArgumentError, FileFormatError, PatternError, PlanError

TORCH = {
    "conv.weight": (4, 3, 3, 3),
    "bn.weight": (4,),
    "bn.bias": (4,),
    "bn.running_mean": (4,),
    "bn.running_var": (4,),
    "bn.num_batches_tracked": (),
    "embeddings.word_embeddings.weight": (9, 4),
    "emb.weight": (9, 4),
    "fc.weight": (2, 4),
    "fc.bias": (2,),
    "rms.weight": (4,),
    "cls_token": (1, 1, 4),
}
MINDSPORE = {
    "conv.weight", "bn.gamma", "bn.beta", "bn.moving_mean", "bn.moving_variance", "fc.weight", "fc.bias", "rms.gamma",
    "embeddings.word_embeddings.embedding_table", "emb.embedding_table", "cls_token",
}  # fmt: skip


def write(path, shapes, dtype="F32", metadata=None):
    rng = np.random.default_rng(0)
    types = {n: "I64" if s == () else dtype for n, s in shapes.items()}
    tensors = {
        n: weightfile.encode(np.asarray(rng.standard_normal(s) if s else 3, np.float32), types[n])
        for n, s in shapes.items()
    }
    stream_safetensors(path, {n: Entry(types[n], s) for n, s in shapes.items()}, tensors.items(), metadata)
    return tensors


@pytest.fixture
def convert(kit):
    return kit.room("convert").convert_checkpoint


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
def test_rules_there_and_back_bit_for_bit(convert, tmp_path, dtype):
    tensors = write(tmp_path / "a.safetensors", TORCH, dtype)
    report = convert(tmp_path / "a.safetensors", tmp_path / "b.ckpt")
    assert report.to == "mindspore"
    assert report.dropped == ["bn.num_batches_tracked"]
    with Ckpt(tmp_path / "b.ckpt") as found:
        assert set(found.entries) == MINDSPORE
        assert {e.dtype for e in found.entries.values()} == {dtype}
    convert(tmp_path / "b.ckpt", tmp_path / "c.safetensors")
    with Safetensors(tmp_path / "c.safetensors") as back:
        assert set(back.entries) == set(TORCH) - {"bn.num_batches_tracked"}
        assert back.metadata["format"] == "pt"
        for name in back.entries:
            assert np.array_equal(back.raw(name).view(np.uint8), tensors[name].view(np.uint8)), name


def test_a_directory_or_index_is_a_source_and_a_folder_a_destination(convert, kit, tmp_path):
    write(tmp_path / "model.safetensors", {"fc.weight": (2, 4)})
    (tmp_path / "out").mkdir()
    report = convert(tmp_path, tmp_path / "out", to="mindspore")
    assert report.path.endswith("model.safetensors")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_safetensors_source_tells_its_framework_by_metadata_or_names(convert, tmp_path):
    write(tmp_path / "ms.safetensors", {"bn.gamma": (4,), "bn.beta": (4,)})
    assert convert(tmp_path / "ms.safetensors", tmp_path / "x.safetensors").to == "torch"
    write(tmp_path / "pt.safetensors", {"fc.weight": (4, 4)}, metadata={"format": "pt"})
    assert convert(tmp_path / "pt.safetensors", tmp_path / "y.safetensors").to == "mindspore"
    with Safetensors(tmp_path / "y.safetensors") as found:
        assert found.metadata["format"] == "ms"


def test_the_users_map_comes_first(convert, tmp_path):
    write(tmp_path / "a.safetensors", {"enc.0.fc.weight": (2, 4), "enc.0.ln.weight": (4,), "x": (3,)})
    report = convert(
        tmp_path / "a.safetensors",
        tmp_path / "b.ckpt",
        name_map={r"re:^enc\.(\d+)\.": r"blocks.\1.", "x": "bias.of.all"},
    )
    with Ckpt(tmp_path / "b.ckpt") as found:
        assert set(found.entries) == {"blocks.0.fc.weight", "blocks.0.ln.gamma", "bias.of.all"}
    assert report.renamed["x"] == "bias.of.all"


def test_the_users_map_splits_and_joins(convert, tmp_path):
    shapes = {"h.0.qkv.weight": (6, 4), "h.1.qkv.weight": (6, 4), "kv.bias": (5,), "ln.weight": (4,)}
    tensors = write(tmp_path / "a.safetensors", shapes)
    parts = [rf"h.\1.{r}.weight" for r in "qkv"]
    map_ = {r"re:^h\.(\d)\.qkv\.weight$": parts, "kv.bias": {"k.bias": 2, "v.bias": 3}}
    report = convert(tmp_path / "a.safetensors", tmp_path / "b.ckpt", name_map=map_)
    assert report.split["h.1.qkv.weight"] == ["h.1.q.weight", "h.1.k.weight", "h.1.v.weight"]
    assert report.dropped == []
    with Ckpt(tmp_path / "b.ckpt") as found:
        assert set(found.entries) == {f"h.{i}.{r}.weight" for i in "01" for r in "qkv"} | {
            "k.bias",
            "v.bias",
            "ln.gamma",
        }
        assert np.array_equal(found.raw("h.1.k.weight"), tensors["h.1.qkv.weight"][2:4])
        assert np.array_equal(found.raw("v.bias"), tensors["kv.bias"][2:])
    back = {
        tuple(rf"re:^h\.(\d)\.{r}\.weight$" for r in "qkv"): r"h.\1.qkv.weight",
        ("k.bias", "v.bias"): "kv.bias",
    }
    report = convert(tmp_path / "b.ckpt", tmp_path / "c.safetensors", name_map=back)
    assert report.joined["kv.bias"] == ["k.bias", "v.bias"]
    with Safetensors(tmp_path / "c.safetensors") as found:
        assert all(np.array_equal(found.raw(n), tensors[n]) for n in shapes)


def test_numbers_and_strings_come_along(convert, kit, tmp_path):
    room = kit.room("checkpoint")
    path = room.save_checkpoint({"w": np.ones(2), "epoch": 3, "note": "hé"}, tmp_path / "a.safetensors").path
    convert(path, tmp_path / "b.ckpt")
    with Ckpt(tmp_path / "b.ckpt") as found:
        assert found.values == {"epoch": 3, "note": "hé"}


def test_a_function_chooses_what_is_converted(convert, tmp_path):
    stream_ckpt(
        tmp_path / "a.ckpt",
        {"fc.weight": Entry("F32", (2,)), "moment1.fc.weight": Entry("F32", (2,))},
        [("fc.weight", np.zeros(2, np.float32)), ("moment1.fc.weight", np.zeros(2, np.float32))],
    )
    convert(tmp_path / "a.ckpt", tmp_path / "b.safetensors", choice_func=lambda n: not n.startswith("moment"))
    with Safetensors(tmp_path / "b.safetensors") as found:
        assert set(found.entries) == {"fc.weight"}


@pytest.mark.parametrize(
    ("dst", "named", "error", "words"),
    [
        ("b.txt", {}, ArgumentError, "ending of dst"),
        ("b.ckpt", {"to": "torch"}, ArgumentError, "must end in .safetensors, .pt"),
        ("b.pt", {"to": "mindspore"}, ArgumentError, "must end in .ckpt"),
        ("b.ckpt", {"to": "tensorflow"}, ArgumentError, "'torch', 'mindspore'"),
        ("a.safetensors", {}, ArgumentError, "another file"),
        ("b.ckpt", {"name_map": {"nothing": "x"}}, PatternError, "nothing"),
        ("b.ckpt", {"name_map": {"re:(": "x"}}, PatternError, "regular expression"),
        ("b.ckpt", {"name_map": {"re:fc": r"\3"}}, PatternError, "no replacement"),
        ("b.ckpt", {"name_map": {"fc.weight": "fc.bias"}}, PlanError, "more than one"),
        ("b.ckpt", {"name_map": {"fc.weight": ["a", "b", "c"]}}, PlanError, "2 rows, which 3 parts"),
        ("b.ckpt", {"name_map": {"fc.weight": {"a": 1, "b": 2}}}, PlanError, "2 rows, which 2 parts"),
        ("b.ckpt", {"name_map": {"fc.weight": ["fc.bias", "b"]}}, PlanError, "would both become"),
        ("b.ckpt", {"name_map": {("fc.weight", "none"): "b"}}, PatternError, "none"),
        ("b.ckpt", {"name_map": {("fc.weight", "fc.bias"): "b"}}, PlanError, "cannot be joined"),
        ("b.ckpt", {"name_map": {"none": ["a", "b"]}}, PatternError, "none"),
        ("b.ckpt", {"choice_func": lambda n: False}, PatternError, "wants none"),
        ("b.ckpt", {"inputs": np.ones(2)}, ArgumentError, "needs both networks"),
    ],
)
def test_what_cannot_be_is_refused_before_a_byte_is_written(convert, tmp_path, dst, named, error, words):
    write(tmp_path / "a.safetensors", {"fc.weight": (2, 4), "fc.bias": (2,)})
    with pytest.raises(error, match=words):
        convert(tmp_path / "a.safetensors", tmp_path / dst, **named)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_damaged_source_is_refused_by_its_manifest(convert, kit, tmp_path):
    path = kit.room("checkpoint").save_checkpoint({"w": np.arange(9.0)}, tmp_path / "a.safetensors").path
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(FileFormatError, match="'w' is damaged"):
        convert(path, tmp_path / "b.ckpt")


def test_types_that_a_format_lacks_are_refused(convert, tmp_path):
    write(tmp_path / "a.safetensors", {})
    stream_safetensors(tmp_path / "f8.safetensors", {"w": Entry("F8_E4M3", (2,))}, [("w", np.zeros(2, np.uint8))])
    with pytest.raises(ValueError, match="F8_E4M3"):
        convert(tmp_path / "f8.safetensors", tmp_path / "b.ckpt")
    assert not (tmp_path / "b.ckpt").exists()


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{1,6}(\.[a-z0-9]{1,6}){0,3}\.(weight|bias|running_mean)", fullmatch=True),
        st.sampled_from([(4,), (3, 4), (2, 3, 3, 3)]),
        max_size=8,
    )
)
def test_rules_lose_nothing_and_turn_back(shapes):
    there = names.rule_names(shapes, "mindspore")
    assert set(there) == set(shapes)
    back = names.rule_names({new: shapes[old] for old, new in there.items()}, "torch")
    assert {back[new] for new in there.values()} == set(shapes)
