"""What a prefix or prompt begins as: a text, drawn tokens or random numbers; in both frameworks."""

import numpy as np
import pytest

from slimkit.core.delta import opening
from slimkit.core.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from tests import attention_twins as twins
from tests.both.test_delta_apply import same, snapshot

TEXT, IDS = "four nine two", [4, 9, 2]


def reader():
    """A tokenizer whose tokens are words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"[UNK]": 0, "four": 4, "nine": 9, "two": 2}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def kept(tmp_path):
    """The folder of such a tokenizer."""
    import transformers

    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=reader(), unk_token="[UNK]")
    fast.save_pretrained(tmp_path / "words")
    return tmp_path / "words"


@pytest.fixture
def net(kit):
    return twins.build(kit)


@pytest.fixture
def batch(kit):
    return twins.batch(kit)


def in_front(kit, net, batch, ids):
    """What the net says of the batch with tokens in front of every text."""
    first = np.array([ids] * 2)
    words, mask = (kit.array(t) for t in batch)
    longer = (np.concatenate((first, words), 1), np.concatenate((np.ones_like(first), mask), 1))
    return kit.array(net(*map(kit.tensor, longer)))


def keys_and_values(kit, net, ids):
    """Keys and values (tokens, width) of a text alone in each layer of the net, in NumPy."""
    named = {n.replace("embedding_table", "weight"): kit.array(p) for n, p in kit.params(net).items()}
    x, found = named["words.weight"][ids] + named["places.weight"][: len(ids)], []
    for path in ("layers.0", "layers.1"):
        q, k, v, out = ((named[f"{path}.{n}.weight"].T, named[f"{path}.{n}.bias"])
                        for n in ("query", "key", "value", "out"))  # fmt: skip
        found.append((x @ k[0] + k[1], x @ v[0] + v[1]))
        heads = [t.reshape(len(ids), twins.HEADS, -1).swapaxes(0, 1) for t in (x @ q[0] + q[1], *found[-1])]
        scores = heads[0] @ heads[1].swapaxes(1, 2) / heads[0].shape[-1] ** 0.5
        share = np.exp(scores - scores.max(-1, keepdims=True))
        y = ((share / share.sum(-1, keepdims=True)) @ heads[2]).swapaxes(0, 1).reshape(x.shape)
        x = x + y @ out[0] + out[1]
    return found


def begins_as(kit, net, batch, kind, ids, options):
    """Put a prefix or prompt on the net and hold it to a text of these ids."""
    wanted = keys_and_values(kit, net, ids) if kind == "prefix" else in_front(kit, net, batch, ids)
    put(kit, net, kind, **options)
    if kind == "prompt":
        np.testing.assert_allclose(kit.array(net(*batch)), wanted, atol=1e-6)  # the same arithmetic on the same numbers
        return
    rows = {n.split("layers.")[1]: kit.array(p) for n, p in kit.params(net).items() if "mindpet_delta" in n}
    for i, pair in enumerate(wanted):
        for part, value in zip(("key", "value"), pair, strict=True):
            got = rows[f"{i}.mindpet_delta_prefixtuning.{part}"]
            np.testing.assert_allclose(got, value, atol=1e-5)  # float32, 16 terms


def put(kit, net, kind, **options):
    where = {"positions": ["places"]} if kind == "prefix" else {}
    return kit.slim.apply_delta(net, kind, **where, **options)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("form", ["ids", "tokenizers", "folder"])
def test_a_text_begins_as_if_it_stood_in_front(kit, net, batch, kind, form, tmp_path):
    given = {
        "ids": lambda: {"text_ids": IDS},
        "tokenizers": lambda: {"text": TEXT, "tokenizer": reader()},
        "folder": lambda: {"text": TEXT, "tokenizer": kept(tmp_path)},
    }[form]()
    begins_as(kit, net, batch, kind, IDS, given)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_drawn_tokens_are_the_same_in_both_frameworks_and_their_seed_chooses_them(kit, net, batch, kind):
    count = {"prefix_token_num" if kind == "prefix" else "num_virtual_tokens": 4}
    drawn = [opening.drawn(twins.VOCABULARY, 4, seed) for seed in (0, 5)]
    assert drawn[0] != drawn[1]
    for seed, ids in zip((0, 5), drawn):
        begins_as(kit, net, batch, kind, ids, {"init": "vocabulary", "seed": seed, **count})
        kit.slim.remove_delta(net)


def test_random_numbers_are_nobodys_tokens(kit, net):
    kit.slim.apply_delta(net, "prompt", init="random", num_virtual_tokens=3)
    values = {n: kit.array(p) for n, p in kit.params(net).items()}
    rows = next(v for n, v in values.items() if "mindpet_delta" in n)
    table = next(v for n, v in values.items() if n.startswith("words") and "mindpet" not in n)
    assert min(np.abs(table - row).max(1).min() for row in rows) > 0.1


def test_what_does_not_fit_changes_nothing(kit, net, tmp_path):
    before, form = snapshot(kit, net), type(net)
    for kind in ("prefix", "prompt"):
        for options, error, words in (
            ({"text": TEXT}, ArgumentError, "tokenizer"),
            ({"text": TEXT, "tokenizer": 5}, ArgumentTypeError, "tokenizer"),
            ({"text": TEXT, "tokenizer": tmp_path / "none"}, ArgumentError, "existing folder"),
            ({"text": TEXT, "tokenizer": tmp_path}, ArgumentError, "none that can be read"),
            ({"text": " ", "tokenizer": reader()}, ArgumentError, "at least one token"),
            ({"tokenizer": reader()}, ArgumentError, "there is no text"),
            ({"text_ids": IDS, "text": TEXT, "tokenizer": reader()}, ArgumentError, "text and text_ids exclude"),
            ({"text_ids": IDS, "init": "random"}, ArgumentError, "init and text_ids exclude"),
            ({"text_ids": []}, ArgumentError, "at least one token id"),
            ({"text_ids": [4, twins.VOCABULARY]}, ArgumentError, "size of the vocabulary"),
            ({"init": "vocabluary"}, ArgumentError, "Did you mean 'vocabulary'"),
        ):
            with pytest.raises(error, match=words):
                put(kit, net, kind, **options)
    for options in ({"text_ids": IDS}, {"init": "vocabulary"}):
        with pytest.raises(UnsupportedError, match="projection"):
            put(kit, net, "prefix", projection=True, **options)
    assert type(net) is form
    assert same(snapshot(kit, net), before)
