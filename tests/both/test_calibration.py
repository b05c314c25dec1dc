"""Calibration sets in both frameworks: into Compressor, apart from what judges, and written by the model itself."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.core.errors import ArgumentError

VOCABULARY = 37


def language_model(kit, seed=0):
    return kit.fill(kit.sequential(kit.embedding(VOCABULARY, 8), kit.linear(8, VOCABULARY)), seed)


def documents(seed, n=12, tokens=80):
    return np.random.default_rng(seed).integers(0, VOCABULARY, (n, tokens)).tolist()


def test_a_set_calibrates_and_the_text_it_is_from_cannot_judge(kit):
    slim, dense, small = kit.slim, language_model(kit), language_model(kit)
    found = slim.calibration(documents(0), None, n=8, length=32, masks=False)
    assert len(found) == 2
    assert tuple(found[0].shape) == (4, 32)
    slim.Compressor(small, slim.SparseConfig(method="wanda", sparse_ratio=0.5)).compress(found)
    held = slim.compare_models(dense, {"half": small}, documents(1), length=16, speed=False, calibrated=found)
    told = held.data["calibrated on"]
    assert told[0]["sha256"] == found.record["sha256"]
    assert told[0]["seen"] == 0
    with pytest.raises(ArgumentError, match="8 of 8 calibration windows stand in the held-out text"):
        slim.compare_models(dense, {"half": small}, documents(0), length=16, speed=False, calibrated=found)


def test_batches_have_masks_of_the_frameworks_own(kit):
    batch = kit.slim.calibration([[1, 2, 3], [4, 5, 6, 7, 8]], None, n=2, length=5, pack=False, seed=1)[0]
    ids, mask = kit.array(batch["input_ids"]), kit.array(batch["attention_mask"])
    assert sorted(mask.sum(1).tolist()) == [3, 5]
    assert (ids[mask == 0] == 0).all()
    with pytest.raises(ArgumentError, match="masks=False"):
        kit.slim.calibration([[1, 2, 3]], None, n=1, length=5, masks=False)


def test_a_model_writes_text_that_is_likely_to_it(kit, tmp_path):
    model = language_model(kit)
    rows = kit.slim.own_text(model, 8, 40, seed=3, start=0, file=tmp_path / "own.jsonl")
    assert len(rows) == 8
    again = kit.slim.own_text(model, 8, 40, seed=3, start=0, file=tmp_path / "own.jsonl")
    assert again.record == rows.record

    def loss(docs):
        told = kit.slim.compare_models(model, {"same": model}, docs, speed=False)
        return told.dense.figures["perplexity"]

    assert loss([r.tolist() for r in rows]) < loss(documents(0))
    with pytest.raises(ArgumentError, match="start is needed"):
        kit.slim.own_text(model, 2, 4)


def test_both_frameworks_draw_the_same_windows_and_write_the_same_text():
    from tests import kits
    from tests.conftest import INSTALLED

    if len(INSTALLED) < 2:
        pytest.skip("compares both frameworks")
    digests, texts = set(), []
    for name in INSTALLED:
        kit = kits.make(name)
        digests.add(kit.slim.calibration(documents(0), None, n=8, length=32).record["sha256"])
        texts.append(np.stack(kit.slim.own_text(language_model(kit), 4, 20, start=1).rows))
    assert len(digests) == 1
    assert (texts[0] == texts[1]).mean() > 0.99  # a draw within rounding of two tokens' border may differ
