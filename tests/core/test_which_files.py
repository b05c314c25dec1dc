"""A folder with more weight files than one model needs: those that transformers reads are taken, or none."""

from __future__ import annotations

import json

import numpy as np
import pytest

from slimkit.core.checkpoint import openweights, shards
from slimkit.core.checkpoint.weightfile import Arrays, stream_safetensors
from slimkit.core.errors import FileFormatError


def write(file, **tensors):
    held = Arrays({name: np.asarray(value, np.float32) for name, value in tensors.items()})
    stream_safetensors(file, held.entries, ((name, held.raw(name)) for name in held.entries))


def index(folder, **table):
    (folder / openweights.INDEXES[0]).write_text(json.dumps({"metadata": {}, "weight_map": table}))


def located(folder):
    return {name: shards.sampled(place, [0])[0] for name, place in shards.locate(folder).items()}


def opened(folder):
    with openweights.open_weights(folder, openweights.refuse_torch) as weights:
        return {name: weights.read(name)[0] for name in weights.entries}


READERS = pytest.mark.parametrize("read", [located, opened])


@READERS
def test_another_file_beside_the_whole_one_is_not_read(tmp_path, read):
    write(tmp_path / "model.safetensors", a=[1], b=[2])
    write(tmp_path / "zz_backup.safetensors", a=[7], b=[8], c=[9])
    assert read(tmp_path) == {"a": 1, "b": 2}


@READERS
def test_an_index_that_a_whole_file_has_replaced_is_not_read(tmp_path, read):
    write(tmp_path / "model.safetensors", a=[1], b=[2])
    write(tmp_path / "model-00001-of-00001.safetensors", a=[7], b=[8])
    index(tmp_path, a="model-00001-of-00001.safetensors", b="model-00001-of-00001.safetensors")
    assert read(tmp_path) == {"a": 1, "b": 2}


@READERS
def test_files_that_no_index_names_are_not_read(tmp_path, read):
    write(tmp_path / "one.safetensors", a=[1])
    write(tmp_path / "two.safetensors", b=[2])
    write(tmp_path / "old.safetensors", a=[7])
    index(tmp_path, a="one.safetensors", b="two.safetensors")
    assert read(tmp_path) == {"a": 1, "b": 2}


@READERS
def test_a_tensor_in_two_shards_is_refused_where_its_values_differ(tmp_path, read):
    write(tmp_path / "one.safetensors", a=[1], c=[3])
    write(tmp_path / "two.safetensors", b=[2], c=[3])
    index(tmp_path, a="one.safetensors", b="two.safetensors", c="one.safetensors")
    assert read(tmp_path) == {"a": 1, "b": 2, "c": 3}
    write(tmp_path / "two.safetensors", b=[2], c=[4])
    with pytest.raises(FileFormatError, match=r"(different|other) values"):
        read(tmp_path)


@READERS
def test_a_tensor_that_the_index_promises_and_no_file_holds_is_named(tmp_path, read):
    write(tmp_path / "one.safetensors", a=[1])
    index(tmp_path, a="one.safetensors", b="one.safetensors")
    with pytest.raises(FileFormatError, match="'b'"):
        read(tmp_path)
