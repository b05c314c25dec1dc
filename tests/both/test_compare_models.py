"""Comparison on held-out data: figures against loops written out in NumPy, in both frameworks."""

from __future__ import annotations

import json

import numpy as np
import pytest

from slimkit.core.compare.comparison import Comparison
from slimkit.core.errors import ArgumentError, ArgumentTypeError, ConfigError, FileFormatError

VOCABULARY = 23


def language_model(kit, seed, width=8):
    return kit.fill(kit.sequential(kit.embedding(VOCABULARY, width), kit.linear(width, VOCABULARY)), seed)


def documents(rng, sizes=(17, 1, 9, 30, 2, 12)):
    return [rng.integers(0, VOCABULARY, n).tolist() for n in sizes]


def by_hand(values, docs, length):
    """Log-probabilities of each window, (windows of (document, tokens, (length - 1, vocabulary)))."""
    table, weight, bias = list(values.values())
    found = []
    for number, document in enumerate(docs):
        for begin in range(0, len(document), length):
            ids = np.array(document[begin : begin + length])
            if len(ids) < 2:
                continue
            logits = (table[ids[:-1]] @ weight.T + bias).astype(np.float64)
            found.append((number, ids[1:], logits - np.log(np.exp(logits).sum(-1, keepdims=True))))
    return found


@pytest.mark.parametrize("length", [4, 8, 512])
def test_language_figures_are_those_of_a_loop_written_out(kit, rng, length):
    docs, dense, small = documents(rng), language_model(kit, 0), language_model(kit, 1)
    found = kit.slim.compare_models(dense, {"small": small}, docs, length=length, speed=False)
    p, q = (by_hand(kit.values(m), docs, length) for m in (dense, small))
    tokens = sum(len(ids) for _, ids, _ in q)
    loss = -sum(lq[np.arange(len(ids)), ids].sum() for _, ids, lq in q)
    kls = np.concatenate([(np.exp(lp) * (lp - lq)).sum(-1) for (_, _, lp), (_, _, lq) in zip(p, q)])
    right = sum((lq.argmax(-1) == ids).sum() for _, ids, lq in q)
    agree = sum((lq.argmax(-1) == lp.argmax(-1)).sum() for (_, _, lp), (_, _, lq) in zip(p, q))
    figures = found["small"].figures
    # float32 logits of both sides, 8 terms each
    assert figures["perplexity"] == pytest.approx(np.exp(loss / tokens), rel=1e-6)
    assert figures["kl"] == pytest.approx(kls.mean(), rel=1e-5)
    assert figures["kl_p99"] == pytest.approx(np.quantile(kls, 0.99), rel=1e-5)
    assert figures["accuracy"] == pytest.approx(right / tokens)
    assert figures["agreement"] == pytest.approx(agree / tokens)
    assert found.data["predicted tokens"] == tokens
    assert found.data["documents"] == 5  # the one of a single token predicts nothing
    assert f"windows of {length} tokens" in str(found)


def test_a_model_is_at_no_distance_from_itself(kit, rng):
    model = language_model(kit, 0)
    found = kit.slim.compare_models(model, {"same": model}, documents(rng), length=8, speed=False)
    same = found["same"]
    assert same.figures["kl"] == 0
    assert same.figures["agreement"] == 1
    assert same.intervals["perplexity"] == pytest.approx((1, 1))
    assert same.intervals["accuracy"] == (0, 0)


def test_the_kl_of_the_likeliest_tokens_is_never_above_the_exact_one_and_nears_it(kit, rng):
    docs, dense, small = documents(rng), language_model(kit, 0), language_model(kit, 1)
    found = {}
    for k in (1, 4, 16, VOCABULARY, None):
        comparison = kit.slim.compare_models(dense, {"small": small}, docs, length=8, top_k=k, speed=False)
        found[k] = comparison["small"].figures["kl"]
        assert comparison.kl == ("exact" if k is None else str(k))
    assert found[1] <= found[4] + 1e-9 <= found[16] + 2e-9 <= found[None] + 1e-6  # float32 log-probabilities
    assert found[VOCABULARY] == pytest.approx(found[None], abs=1e-6)


def test_functions_hold_one_model_at_a_time_and_give_the_same(kit, rng):
    docs, held, most = documents(rng), [], []

    class Counted:
        def __init__(self, seed):
            self.seed = seed

        def __call__(self):
            import gc
            import weakref

            gc.collect()
            model = language_model(kit, self.seed)
            held.append(weakref.ref(model))
            most.append(sum(r() is not None for r in held))
            return model

    lazy = kit.slim.compare_models(Counted(0), {"a": Counted(1), "b": Counted(2)}, docs, length=8, speed=False)
    models = [language_model(kit, s) for s in range(3)]
    whole = kit.slim.compare_models(models[0], {"a": models[1], "b": models[2]}, docs, length=8, speed=False)
    assert max(most) <= 2  # the one being made, and at most the one before it
    for name in ("dense", "a", "b"):
        assert lazy[name].figures["perplexity"] == pytest.approx(whole[name].figures["perplexity"], rel=1e-7)


def test_models_come_out_as_they_went_in(kit, rng):
    dense, small = language_model(kit, 0), language_model(kit, 1)
    before = kit.values(small)
    kit.train_mode(small, True)
    kit.slim.compare_models(dense, {"small": small}, documents(rng), length=8, speed=True)
    assert kit.is_training(small)
    assert all((before[n] == v).all() for n, v in kit.values(small).items())


def test_speed_and_weights_stand_beside_the_figures(kit, rng):
    dense, small = language_model(kit, 0), language_model(kit, 1, width=4)
    figures = kit.slim.compare_models(dense, {"small": small}, documents(rng), length=8)["small"].figures
    assert figures["parameters"] == VOCABULARY * 4 * 2 + VOCABULARY
    assert figures["bytes"] == 4 * figures["parameters"]
    assert figures["macs"] == 4 * VOCABULARY  # a token
    assert figures["prefill_per_s"] > 0


def test_intervals_shrink_with_documents_and_depend_on_the_seed_alone(kit, rng):
    dense, small = language_model(kit, 0), language_model(kit, 1)
    docs = [rng.integers(0, VOCABULARY, 8).tolist() for _ in range(120)]
    compare = kit.slim.compare_models
    few = compare(dense, {"s": small}, docs[:8], length=8, speed=False)["s"].intervals["perplexity"]
    many, again, other = (
        compare(dense, {"s": small}, docs, length=8, speed=False, seed=s)["s"].intervals["perplexity"]
        for s in (0, 0, 1)
    )
    assert many == again
    assert many != other
    assert many[1] - many[0] < few[1] - few[0]


def test_encoders_by_cosine_and_order(kit, rng):
    dense = kit.fill(kit.sequential(kit.linear(6, 5)), 0)
    small = kit.fill(kit.sequential(kit.linear(6, 5)), 1)
    batches = [rng.standard_normal((4, 6)).astype(np.float32) for _ in range(3)]
    found = kit.slim.compare_models(
        dense, {"small": small, "same": dense}, [kit.tensor(b) for b in batches], task="encoder", speed=False
    )
    w0, b0 = kit.values(dense).values()
    w1, b1 = kit.values(small).values()
    x = np.concatenate(batches)
    a, b = x @ w0.T + b0, x @ w1.T + b1
    cosine = ((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).mean()
    assert found["small"].figures["cosine"] == pytest.approx(cosine, abs=1e-6)  # float32
    assert found["same"].figures["cosine"] == pytest.approx(1)
    assert found["same"].figures["spearman"] == pytest.approx(1)
    assert "perplexity" not in found["same"].figures


def test_classifiers_by_accuracy_agreement_and_calibration(kit, rng):
    dense = kit.fill(kit.sequential(kit.linear(6, 3)), 0)
    small = kit.fill(kit.sequential(kit.linear(6, 3)), 1)
    pairs = [(rng.standard_normal((5, 6)).astype(np.float32), rng.integers(0, 3, 5)) for _ in range(4)]
    found = kit.slim.compare_models(
        dense, {"small": small}, [(kit.tensor(x), y) for x, y in pairs], task="classifier", speed=False
    )
    x, y = np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs])
    (w0, b0), (w1, b1) = kit.values(dense).values(), kit.values(small).values()
    first, second = (x @ w0.T + b0).argmax(-1), (x @ w1.T + b1).argmax(-1)
    assert found.dense.figures["accuracy"] == pytest.approx((first == y).mean())
    assert found["small"].figures["accuracy"] == pytest.approx((second == y).mean())
    assert found["small"].figures["agreement"] == pytest.approx((first == second).mean())
    assert 0 <= found["small"].figures["calibration_error"] <= 1


def test_metrics_of_ones_own(kit, rng):
    model = language_model(kit, 0)
    found = kit.slim.compare_models(
        model, {"same": model}, documents(rng), length=8, speed=False, metrics={"layers": lambda m, data: len(data)}
    )
    assert found["same"].figures["layers"] == 6
    assert "layers" in str(found)
    with pytest.raises(ConfigError, match="perplexity"):
        kit.slim.compare_models(model, {"s": model}, [[1, 2]], metrics={"perplexity": lambda m, d: 0.0})
    with pytest.raises(ConfigError, match="no function"):
        kit.slim.compare_models(model, {"s": model}, [[1, 2]], metrics=["json:nothing"])


def test_what_does_not_fit_is_refused_in_one_line(kit, rng):
    dense, compare = language_model(kit, 0), kit.slim.compare_models
    other = kit.fill(kit.sequential(kit.embedding(VOCABULARY, 8), kit.linear(8, VOCABULARY + 1)), 0)
    for problem, error, match in (
        (lambda: compare(dense, {"small": other}, [[1, 2, 3]]), ArgumentError, "24 tokens and the dense model 23"),
        (lambda: compare(dense, {}, [[1, 2, 3]]), ArgumentError, "candidates must be a mapping"),
        (lambda: compare(dense, {"dense": dense}, [[1, 2]]), ArgumentError, "'dense' is the name"),
        (lambda: compare(dense, {"s": 3}, [[1, 2, 3]]), ArgumentTypeError, "function without arguments"),
        (lambda: compare(dense, {"s": dense}, ["a text"]), ArgumentError, "tokenizer"),
        (lambda: compare(dense, {"s": dense}, [[1], []]), ArgumentError, "two tokens"),
        (lambda: compare(dense, {"s": dense}, [[1.5, 2.0]]), ArgumentError, r"dataset\[0\]"),
        (lambda: compare(dense, {"s": dense}, [[1, 2]], length=1), ArgumentError, "length"),
        (lambda: compare(dense, {"s": dense}, [[1, 2]], task="langauge"), ArgumentError, "language"),
    ):
        with pytest.raises(error, match=match):
            problem()


def test_a_comparison_is_written_read_and_held_to_conditions(kit, rng, tmp_path):
    dense, small = language_model(kit, 0), language_model(kit, 1)
    found = kit.slim.compare_models(dense, {"small": small}, documents(rng), length=8, speed=False)
    again = Comparison.load(found.save(tmp_path / "c.json"))
    assert again == found
    assert "<table>" in found._repr_html_()
    ratio = found["small"].figures["perplexity"] / found.dense.figures["perplexity"]
    assert found.broken([f"perplexity > {ratio * 1.01:.4f}x", "kl > 1e9"]) == []
    (told,) = found.broken([f"perplexity > {ratio * 0.99:.4f}x"])
    assert told.startswith("small: perplexity is")
    for wrong, match in (
        ("perplexity", "METRIC"),
        ("perplexity >", "METRIC"),
        ("perplexty > 2", "Did you mean 'perplexity'"),
    ):
        with pytest.raises(ConfigError, match=match):
            found.broken([wrong])
    (tmp_path / "c.json").write_text(json.dumps({"format": "slimkit-comparison", "version": 1}))
    with pytest.raises(FileFormatError):
        Comparison.load(tmp_path / "c.json")
