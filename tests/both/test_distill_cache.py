"""The teacher cache: exact with all classes, close with a few, resumable, verified, refused where it does not fit."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimkit.core.distill.config import KnowledgeDistillConfig
from slimkit.core.distill.squeezing import spread_logits, squeeze_logits
from slimkit.core.errors import ConfigError, FileFormatError
from tests.both.test_distill import inner, output, pieces, soft, term

DATA = [np.random.default_rng(i).standard_normal((n, 5)).astype(np.float32) for i, n in enumerate((6, 6, 4))]


def config():
    return (
        KnowledgeDistillConfig()
        .add_output_soft_label(output(term("KDCrossEntropy", temperature=2), term("KDKLDiv")))
        .add_inter_soft_label(inner(term("HiddenMse"), widths=[4, 8]))
    )


def batches(kit):
    return [kit.tensor(x) for x in DATA]


def test_all_classes_give_the_online_loss(kit, tmp_path):
    teacher, student = pieces(kit)
    names = list(kit.params(teacher))
    online = kit.slim.get_distill_model(teacher, student, config())
    expected = [float(soft(kit, online, x)) for x in batches(kit)]
    online.get_student_model()
    cache = kit.slim.TeacherCache.build(teacher, batches(kit), config(), tmp_path / "c", top_k=3)
    assert list(kit.params(teacher)) == names
    dual = kit.slim.get_distill_model(cache, student, config())
    found = [float(soft(kit, dual, x)) for x in batches(kit)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)  # the same float32 numbers, read back
    # Rows are found one by one, whatever batch they come in.
    mixed = np.concatenate([DATA[2][2:], DATA[0][:2]])
    again = kit.slim.get_distill_model(pieces(kit)[0], pieces(kit)[1], config())
    np.testing.assert_allclose(
        float(soft(kit, dual, kit.tensor(mixed))), float(soft(kit, again, kit.tensor(mixed))), rtol=1e-6
    )


def test_a_student_learns_from_the_cache(kit, tmp_path):
    teacher, student = pieces(kit)
    cache = kit.slim.TeacherCache.build(teacher, batches(kit), config(), tmp_path / "c")
    dual = kit.slim.get_distill_model(kit.slim.TeacherCache(tmp_path / "c"), student, config(), batches(kit)[0])
    losses = (
        kit.room("train").Trainer(dual).train([(x,) for x in batches(kit)], 5).get_metric_values("train_loss_epoch")
    )
    assert losses[-1] < losses[0]
    cache.verify()


def test_a_stopped_build_goes_on_to_the_same_bytes(kit, tmp_path):
    teacher, _ = pieces(kit)
    whole = kit.slim.TeacherCache.build(teacher, batches(kit), config(), tmp_path / "whole")

    class Stops(list):
        def __iter__(self):
            yield batches(kit)[0]
            raise KeyboardInterrupt

    # A shard is written when full or at the end; the interrupted build may have written nothing, and still goes on.
    with pytest.raises(KeyboardInterrupt):
        kit.slim.TeacherCache.build(teacher, Stops([0]), config(), tmp_path / "cut")
    part = kit.slim.TeacherCache.build(teacher, batches(kit)[:1], config(), tmp_path / "cut")
    facts = json.loads((tmp_path / "cut" / "cache.json").read_text())
    facts["complete"] = False
    (tmp_path / "cut" / "cache.json").write_text(json.dumps(facts))
    with pytest.raises(FileFormatError, match="not finished"):
        kit.slim.TeacherCache(tmp_path / "cut")
    on = kit.slim.TeacherCache.build(teacher, batches(kit), config(), tmp_path / "cut")
    assert len(on.facts["shards"]) == 2
    assert len(part.facts["shards"]) == 1
    for x in batches(kit):
        (_, first), (_, second) = whole.lookup((x,), {}), on.lookup((x,), {})
        assert all((kit.array(first[i]) == kit.array(second[i])).all() for i in first)


def test_what_does_not_fit_is_refused(kit, tmp_path):
    teacher, student = pieces(kit)
    cache = kit.slim.TeacherCache.build(teacher, batches(kit), config(), tmp_path / "c")
    other = KnowledgeDistillConfig().add_output_soft_label(output(term("KDMse")))
    with pytest.raises(ConfigError, match="other tensors"):
        kit.slim.get_distill_model(cache, student, other)
    with pytest.raises(ConfigError, match="another teacher"):
        kit.slim.TeacherCache.build(kit.fill(teacher, 9), batches(kit), config(), tmp_path / "c")
    with pytest.raises(ConfigError, match="another top_k"):
        kit.slim.TeacherCache.build(pieces(kit)[0], batches(kit), config(), tmp_path / "c", top_k=2)
    with pytest.raises(ConfigError, match="sample 1 of this batch"):
        dual = kit.slim.get_distill_model(cache, student, config())
        changed = DATA[0].copy()
        changed[1] += 1
        dual(kit.tensor(changed))
    with pytest.raises(ConfigError, match="trains"):
        kit.slim.TeacherCache.build(teacher, batches(kit), config().set_teacher_train(), tmp_path / "d")


@pytest.mark.parametrize("how", [{"top_k": 2}, {"sampled": 2}])
def test_answers_that_are_no_numbers_are_refused(kit, tmp_path, how):
    teacher = pieces(kit)[0]
    bias = list(kit.params(teacher).values())[-1]
    kit.assign(bias, np.array([0.0, np.nan, 0.0], np.float32))
    logits = KnowledgeDistillConfig().add_output_soft_label(output(term("KDCrossEntropy")))
    with pytest.raises(ConfigError, match="NaN or infinity"):
        kit.slim.TeacherCache.build(teacher, batches(kit), logits, tmp_path / "c", **how)


def test_a_changed_file_is_found(kit, tmp_path):
    teacher, _ = pieces(kit)
    cache = kit.slim.TeacherCache.build(teacher, batches(kit), config(), tmp_path / "c")
    file = tmp_path / "c" / cache.facts["shards"][0]["file"]
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(FileFormatError, match="changed"):
        cache.verify()
    file.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(FileFormatError, match="safetensors"):
        kit.slim.TeacherCache(tmp_path / "c").lookup((batches(kit)[0],), {})


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), k=st.integers(1, 12))
def test_kept_logits_keep_all_probability(seed, k):
    logits = np.random.default_rng(seed).standard_normal((3, 9)).astype(np.float32) * 3
    full = spread_logits(squeeze_logits(logits, k, "float32"), 9)
    order = np.argsort(-logits, -1)[:, :k]
    assert (np.take_along_axis(full, order, -1) == np.take_along_axis(logits, order, -1)).all()
    # float32 sums of nine exponentials
    np.testing.assert_allclose(np.exp(full).sum(-1), np.exp(logits).sum(-1), rtol=1e-5)


def test_sixty_four_of_many_classes_come_within_one_per_cent():
    from slimkit.core.distill.config import LossTerm
    from slimkit.core.distill.losses import reference

    rng = np.random.default_rng(0)
    # a trained teacher's logits over 8,192 classes: a few large ones above a wide floor
    teacher = rng.standard_normal((64, 8192)) + 12 * rng.exponential(1.0, (64, 8192)) ** 3 / 40
    student = teacher + rng.standard_normal(teacher.shape)
    kept = spread_logits(squeeze_logits(teacher.astype(np.float32), 64, "float32"), 8192)
    term = LossTerm("KDCrossEntropy", 1.0)
    exact, close = reference(student, teacher, term), reference(student, kept, term)
    assert abs(close - exact) < 0.01 * exact


# Classes that were drawn. ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_mean_loss_over_draws_is_the_loss_of_all_classes(temperature):
    from slimkit.core.distill.config import LossTerm
    from slimkit.core.distill.losses import reference
    from slimkit.core.distill.sampling import draw, undrawn

    rng = np.random.default_rng(0)
    teacher = rng.standard_normal((4, 300)).astype("f4") * 2
    student = teacher + rng.standard_normal(teacher.shape).astype("f4")  # wrong about the same classes
    term = LossTerm("KDCrossEntropy", 1.0, temperature)
    exact = reference(student, teacher, term)
    drawn = [draw(teacher, 16, temperature, np.random.default_rng(seed)) for seed in range(400)]
    found = [reference(student, undrawn(kept, 300, temperature), term) for kept in drawn]
    assert abs(np.mean(found) - exact) < 4 * np.std(found) / np.sqrt(len(found))
    # a cut to as many classes, the rest even, is off by far more than all these draws together
    cut = reference(student, spread_logits(squeeze_logits(teacher, 16, "float32"), 300), term)
    assert abs(cut - exact) > 4 * abs(np.mean(found) - exact)
    for kept in drawn[:5]:
        assert kept["ids"].shape == (4, 16)
        np.testing.assert_allclose(kept["weights"].sum(-1), 1, rtol=1e-6)  # float32


def test_sixteen_drawn_classes_are_within_one_per_cent_at_under_one_per_cent_of_the_bytes():
    from slimkit.core.distill.config import LossTerm
    from slimkit.core.distill.losses import log_softmax, reference
    from slimkit.core.distill.sampling import draw, undrawn

    rng = np.random.default_rng(0)
    # a language model's logits: a few large ones above a wide floor
    teacher = (rng.standard_normal((256, 8192)) + 12 * rng.exponential(1.0, (256, 8192)) ** 3 / 40).astype("f4")
    student = teacher + rng.standard_normal(teacher.shape).astype("f4")
    kept = draw(teacher, 16, 1.0, np.random.default_rng(1))
    drawn = undrawn(kept, 8192, 1.0)
    assert sum(part.nbytes for part in kept.values()) < 0.01 * teacher.nbytes
    term = LossTerm("KDCrossEntropy", 1.0)
    exact = reference(student, teacher, term)
    assert abs(reference(student, drawn, term) - exact) < 0.01 * exact
    # What is learned from is the distribution: its mean over rows, and with it the gradient, is the teacher's.
    p, q = np.exp(log_softmax(teacher.astype("f8"))), np.exp(log_softmax(drawn.astype("f8")))
    direction = student - student.mean(-1, keepdims=True)
    slopes = ((q - p) * direction).sum(-1)
    assert abs(slopes.mean()) < 4 * slopes.std() / np.sqrt(len(slopes))


def test_a_cache_of_draws_is_small_resumed_and_its_own(kit, tmp_path):
    teacher = kit.fill(kit.linear(5, 40))
    student = kit.fill(kit.linear(5, 40), 1)
    config = KnowledgeDistillConfig().add_output_soft_label(output(term("KDCrossEntropy", temperature=2)))
    build = kit.slim.TeacherCache.build
    cache = build(teacher, batches(kit), config, tmp_path / "a", sampled=4, seed=3)
    build(teacher, batches(kit)[::-1], config, tmp_path / "b", sampled=4, seed=3)
    other = kit.slim.TeacherCache(tmp_path / "b")
    for x in batches(kit):  # a sample's draw is its own, in whatever order it came
        one, two = (kit.array(c.lookup((x,), {})[1][0]) for c in (cache, other))
        assert (one == two).all()
        assert ((one > -1000).sum(-1) <= 4).all()
    dual = kit.slim.get_distill_model(cache, student, config, batches(kit)[0])
    assert np.isfinite(float(soft(kit, dual, batches(kit)[0])))
    for changed in ({"sampled": 5}, {"sampled": 4, "seed": 4}, {}):
        with pytest.raises(ConfigError, match="another"):
            build(teacher, batches(kit), config, tmp_path / "a", **changed)
    for odd, words in (
        ((term("KDMse"),), "KDMse"),
        ((term("KDKLDiv"), term("KDKLDiv", temperature=2)), "temperatures"),
    ):
        with pytest.raises(ConfigError, match=words):
            build(teacher, batches(kit), KnowledgeDistillConfig().add_output_soft_label(output(*odd)), tmp_path / "c",
                  sampled=4)  # fmt: skip
    warm = KnowledgeDistillConfig().add_output_soft_label(output(term("KDCrossEntropy")))
    with pytest.raises(ConfigError, match="temperatures"):
        kit.slim.get_distill_model(cache, student, warm)
