"""Teachers of another vocabulary: tokens read and classes mapped by their text, what is lost is said or an error."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimkit.core.distill.config import KnowledgeDistillConfig, LossTerm
from slimkit.core.distill.foreign import ForeignTeacher
from slimkit.core.distill.losses import log_softmax, reference
from slimkit.core.distill.vocabulary import VocabularyMap, texts_of
from slimkit.core.errors import ArgumentError, ArgumentTypeError, ConfigError
from tests.both.test_distill import inner, output, soft, term

WORDS = ["the", "cat", "dog", "sat", "ran", "on", "mat", "s"]


class Tokenizer:
    """What slimkit reads of a tokenizer: its vocabulary, its special tokens, and what it puts before a text."""

    def __init__(self, tokens, begins=False, **roles):
        self._tokens = {token: number for number, token in enumerate(tokens)}
        for role, token in roles.items():
            setattr(self, f"{role}_token_id", self._tokens[token])
        self.all_special_ids = [self._tokens[token] for token in roles.values()]
        self._begins = begins

    def get_vocab(self):
        return self._tokens

    def __call__(self, text):
        return {"input_ids": [self.bos_token_id, 5] if self._begins else [5]}


BYTE_LEVEL = Tokenizer(["<|end|>", *(f"Ġ{w}" for w in WORDS), "c", "a", "t", "Ċ"], eos="<|end|>")
_PIECES = ["<s>", "</s>", "<0x0A>", "s", *(f"▁{w}" for w in reversed(WORDS))]
PIECES = Tokenizer(_PIECES, begins=True, bos="<s>", eos="</s>")


def test_families_spell_one_text_alike():
    bytewise, pieces = texts_of(BYTE_LEVEL), texts_of(PIECES)
    words = texts_of(Tokenizer(["[PAD]", "cat", "##s", "dog"], pad="[PAD]"))
    assert {bytewise[2], pieces[4 + WORDS[::-1].index("cat")], words[1]} == {("text", b" cat")}
    assert bytewise[12] == pieces[2] == ("text", b"\n")
    assert (words[2], pieces[3]) == (("text", b"s"), ("text", b"s"))
    assert (bytewise[0], pieces[1], words[0]) == (("role", b"eos"), ("role", b"eos"), ("role", b"pad"))
    assert texts_of({"dog": 4}) == {4: ("text", b" dog")}
    with pytest.raises(ArgumentTypeError, match="tokenizer"):
        texts_of(["cat"])
    with pytest.raises(ArgumentError, match="student_classes"):
        VocabularyMap(PIECES, BYTE_LEVEL, student_classes=3)


def test_a_letter_that_is_anothers_mark_does_not_make_the_family():
    assert texts_of({"▁cat": 0, "▁dog": 1, "Ġ": 2})[0] == ("text", b" cat")
    assert texts_of({"Ġcat": 0, "Ġdog": 1, "▁": 2})[0] == ("text", b" cat")


def test_one_token_that_begins_and_ends_texts_stands_for_both():
    both = Tokenizer(["<|end|>", "Ġcat"], bos="<|end|>", eos="<|end|>", unk="<|end|>")
    apart = Tokenizer(["<s>", "</s>", "▁cat"], begins=True, bos="<s>", eos="</s>")
    logits = np.log([[0.125, 0.25, 0.625]])
    np.testing.assert_allclose(np.exp(VocabularyMap(apart, both).logits(logits)), [[0.375, 0.625]], rtol=1e-12)
    # The end is what is foretold.
    ends = np.exp(VocabularyMap(both, apart).logits(np.log([[0.25, 0.75]])))
    np.testing.assert_allclose(ends, [[0, 0.25, 0.75]], atol=1e-12)
    told, _, places, counted = VocabularyMap(both, apart).inputs(np.array([[0, 2, 1]]))
    assert (told.tolist(), places.tolist(), counted) == ([[0, 1, 0]], [[0, 1, 2]], [3, 0, 3])
    told, _, places, _ = VocabularyMap(apart, both).inputs(np.array([[1, 0]]))
    assert (told.tolist(), places.tolist()) == ([[0, 2, 1]], [[1, 2]])


def test_one_tokenizer_and_a_larger_table_are_exact():
    """32,000 against 32,064 in small: padding rows fall off, and nothing of the others moves."""
    again = {"▁": 0, "<0x20>": 1, "▁cat": 2, "▁dog": 3}  # two tokens of one text stay two
    found = VocabularyMap(again, dict(again))
    logits = np.random.default_rng(0).normal(size=(2, 3, 7)).astype(np.float32)
    assert found.same_inputs
    assert found.whole
    assert (found.logits(logits) == logits[..., :4]).all()
    wider = VocabularyMap(again, again, student_classes=6).logits(logits)
    assert (wider[..., :4] == logits[..., :4]).all()
    assert (wider[..., 4:] < -9000).all()
    with pytest.raises(ConfigError, match="3 classes"):
        found.logits(logits[..., :3])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999))
def test_the_mapped_distribution_is_the_teachers_over_what_both_have(seed):
    rng = np.random.default_rng(seed)
    tokens = [f"w{i}" for i in range(12)]
    theirs = [str(t) for t in rng.choice(tokens, rng.integers(1, 12), replace=False)]
    mine = [str(t) for t in rng.choice(tokens, rng.integers(1, 12), replace=False)]
    teacher, student = ({t: i for i, t in enumerate(names)} for names in (theirs, mine))
    found, logits = VocabularyMap(teacher, student), rng.normal(size=(5, len(theirs) + 2)) * 3
    shared = [t for t in mine if t in teacher]
    if not shared:
        with pytest.raises(ConfigError, match="no token of the same text"):
            found.logits(logits)
        return
    p = np.exp(log_softmax(logits))
    kept = p[:, [teacher[t] for t in shared]]
    np.testing.assert_allclose(found.mass(logits), kept.sum(-1), rtol=1e-12)
    mapped = np.exp(log_softmax(found.logits(logits)))
    np.testing.assert_allclose(mapped[:, [student[t] for t in shared]], kept / kept.sum(-1, keepdims=True), rtol=1e-9)
    assert np.isclose(mapped.sum(-1), 1).all()
    assert found.whole == (len(shared) == len(mine))


def test_classes_of_one_text_add_up():
    found = VocabularyMap({"▁": 0, "<0x20>": 1, "▁a": 2}, {"▁a": 0, "▁": 1})
    p = np.array([[0.25, 0.25, 0.5]])
    np.testing.assert_allclose(np.exp(found.logits(np.log(p))), [[0.5, 0.5]], rtol=1e-12)


def test_the_teacher_reads_the_same_text():
    found = VocabularyMap(PIECES, BYTE_LEVEL)
    p = {w: 4 + WORDS[::-1].index(w) for w in WORDS}
    # padded at the front: " cat", a line end and the end of a text are the teacher's own tokens
    ids, mask = np.array([[0, 2, 12, 3], [8, 0, 3, 1]]), np.array([[0, 1, 1, 1], [1, 1, 1, 1]])
    told, valid, places, counted = found.inputs(ids, mask)
    assert told.tolist() == [[0, p["cat"], 2, p["dog"], 0], [0, p["s"], 1, p["dog"], p["the"]]]
    assert valid.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert places.tolist() == [[0, 1, 2, 3], [1, 2, 3, 4]]
    assert counted == [7, 0, 7]
    # A token that the teacher lacks is spelled, and the position after it is that of its last piece.
    spelled = VocabularyMap({"▁c": 0, "at": 1, "▁dog": 2}, {"▁dog": 0, "▁cat": 1})
    told, _, places, counted = spelled.inputs(np.array([[1, 0]]))
    assert (told.tolist(), places.tolist(), counted) == ([[0, 1, 2]], [[1, 2]], [1, 0, 2])
    with pytest.raises(ConfigError, match="cannot spell the student's token 1, b' cat'"):
        VocabularyMap({"▁dog": 0}, {"▁dog": 0, "▁cat": 1}).inputs(np.array([[1]]))
    unsure = VocabularyMap(Tokenizer(["▁dog", "[UNK]"], unk="[UNK]"), {"▁dog": 0, "▁cat": 1})
    told, _, places, counted = unsure.inputs(np.array([[1, 0]]))
    assert (told.tolist(), places.tolist(), counted) == ([[1, 0]], [[0, 1]], [1, 1, 2])


# The cache, in both frameworks. --------------------------------------------------------------------------------

# The teacher has other tokens first, and lacks one of the student's words, which it spells.
STUDENT = ["▁the", "▁cat", "▁dog", "▁sat", "▁cats"]
TEACHER = ["▁ran", "▁sat", "▁dog", "s", "▁cat", "▁the", "▁mat"]
IDS = np.array([[0, 1, 3], [2, 4, 3]])


def model(kit, tokens, seed):
    return kit.fill(kit.sequential(kit.embedding(tokens, 6), kit.linear(6, tokens)), seed)


def vocabularies():
    return ({token: i for i, token in enumerate(names)} for names in (TEACHER, STUDENT))


def config(*terms):
    return KnowledgeDistillConfig().add_output_soft_label(output(*(terms or (term("KDCrossEntropy"),))))


def batches(kit):
    return [kit.tensor(IDS[:1]), kit.tensor(IDS[1:])]


@pytest.mark.parametrize("sampled", [None, 4])
def test_a_student_learns_from_a_teacher_of_another_vocabulary(kit, tmp_path, sampled, caplog):
    teacher, found = model(kit, len(TEACHER), 0), VocabularyMap(*vocabularies())
    how = {"vocabulary": found, "sampled": sampled, "mapped_at_least": 0.2}
    with caplog.at_level(logging.INFO, "slimkit"):
        cache = kit.slim.TeacherCache.build(teacher, batches(kit), config(), tmp_path / "c", **how)
    assert "of the teacher's probability lies on tokens that the student has; 83.3% of the tokens" in caplog.text
    # By hand: "▁cats" is read as "▁cat", "s", and the answer after it is that after "s".
    read = [[5, 4, 1], [2, 3, 1]]
    told = np.stack([kit.array(teacher(kit.tensor(np.array([row])))) for row in read])[:, 0]
    expected = told[..., [5, 4, 2, 1]]
    for row, batch in enumerate(batches(kit)):
        got = kit.array(cache.lookup((batch,), {})[1][0])[0]
        if sampled is None:
            np.testing.assert_allclose(got[:, :4], expected[row], rtol=1e-6)
        assert (got[:, 4] < -1000).all()
    p = np.exp(log_softmax(told.astype(np.float64)))
    mass = cache.facts["mapped"]["probability"]
    assert mass[1] == 6
    assert mass[0] / 6 == pytest.approx(p[..., [5, 4, 2, 1]].sum(-1).mean(), rel=1e-6)
    student = model(kit, len(STUDENT), 1)
    dual = kit.slim.get_distill_model(cache, student, config(), batches(kit)[0])
    assert np.isfinite(float(soft(kit, dual, batches(kit)[0])))
    again = kit.slim.TeacherCache.build(teacher, batches(kit), config(), tmp_path / "c", **how)
    assert again.facts == cache.facts
    with pytest.raises(ConfigError, match="another vocabulary"):
        kit.slim.TeacherCache.build(teacher, batches(kit), config(), tmp_path / "c", sampled=sampled)


def test_draws_over_a_mapped_vocabulary_are_unbiased():
    from slimkit.core.distill.sampling import draw, undrawn

    rng = np.random.default_rng(0)
    names = [f"w{i}" for i in range(260)]
    found = VocabularyMap({n: i for i, n in enumerate(names)}, {n: i for i, n in enumerate(names[::-1][20:])})
    teacher = found.logits(rng.normal(size=(4, 260)) * 2)
    student = teacher + rng.normal(size=teacher.shape)
    loss = LossTerm("KDCrossEntropy", 1.0, 1.0)
    exact = reference(student, teacher, loss)
    drawn = [undrawn(draw(teacher, 16, 1.0, np.random.default_rng(s)), teacher.shape[-1], 1.0) for s in range(300)]
    losses = [reference(student, kept, loss) for kept in drawn]
    assert abs(np.mean(losses) - exact) < 4 * np.std(losses) / np.sqrt(len(losses))


def test_too_little_in_common_is_an_error_that_names_the_way_out(kit, tmp_path):
    teacher, found = model(kit, len(TEACHER), 0), VocabularyMap(*vocabularies())
    build = kit.slim.TeacherCache.build
    with pytest.raises(ConfigError, match=r"At least 90.0% must; mapped_at_least=0\.\d\d accepts it"):
        build(teacher, batches(kit), config(), tmp_path / "c", vocabulary=found)
    assert not (tmp_path / "c").exists()
    with pytest.raises(ConfigError, match="KDMse, and the teacher lacks classes"):
        build(teacher, batches(kit), config(term("KDMse")), tmp_path / "c", vocabulary=found)
    with pytest.raises(ArgumentError, match="mapped_at_least"):
        build(teacher, batches(kit), config(), tmp_path / "c", vocabulary=found, mapped_at_least=1.5)
    with pytest.raises(ArgumentTypeError, match="vocabulary"):
        build(teacher, batches(kit), config(), tmp_path / "c", vocabulary="llama")


@pytest.mark.parametrize("share", [0.146, 0.144, 0.5])
def test_what_the_error_says_is_accepted(share):
    facts = {"mapped": {"probability": [share * 10, 10], "tokens": [0, 0, 0]}}

    def judge(least):
        ForeignTeacher(VocabularyMap(*vocabularies()), config().spec(), facts, np.asarray, np.asarray, least).judge()

    with pytest.raises(ConfigError, match="mapped_at_least") as refused:
        judge(0.9)
    judge(float(str(refused.value).partition("mapped_at_least=")[2].split()[0]))


def test_the_same_vocabulary_writes_the_same_bytes(kit, tmp_path):
    """A map between equal vocabularies, a larger table of the teacher's, and no map at all."""
    teacher = model(kit, len(STUDENT), 0)
    _, mine = vocabularies()
    settings = config(term("KDMse"), term("KDCrossEntropy")).add_inter_soft_label(
        inner(term("HiddenMse"), t="0", s="0")
    )
    plain = kit.slim.TeacherCache.build(teacher, batches(kit), settings, tmp_path / "plain")
    same = VocabularyMap(mine, dict(mine))
    mapped = kit.slim.TeacherCache.build(teacher, batches(kit), settings, tmp_path / "mapped", vocabulary=same)
    assert mapped.facts["mapped"] == {"probability": [6.0, 6], "tokens": [0, 0, 0]}
    larger = model(kit, len(STUDENT) + 3, 2)
    padded = kit.slim.TeacherCache.build(
        larger, batches(kit), settings, tmp_path / "padded", vocabulary=same, mapped_at_least=0
    )
    assert padded.facts["mapped"]["probability"][0] < 6
    for file in plain.facts["shards"]:
        assert (mapped.directory / file["file"]).read_bytes() == (plain.directory / file["file"]).read_bytes()
    unmapped = kit.slim.TeacherCache.build(larger, batches(kit), settings, tmp_path / "larger")
    for batch in batches(kit):
        found, whole = (cache.lookup((batch,), {})[1] for cache in (padded, unmapped))
        assert (kit.array(found[0]) == kit.array(whole[0])[..., : len(STUDENT)]).all()
        assert (kit.array(found[1]) == kit.array(whole[1])).all()
