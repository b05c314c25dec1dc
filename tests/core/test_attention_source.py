"""Finding attention in source text, and the edits that make room for a prefix."""

import pytest

from slimkit.core.source.attention_source import NoAttentionError, calls_softmax, with_prefix

LONG = '''
def construct(self, x, mask=None):
    """Attend."""
    v = matmul(x, self.weight)
    scores = self.product(self.split(x), x) / self.scale
    if mask is not None:
        scores = self.add(scores, (1.0 - mask) * -1e4)
        scores = scores.masked_fill(mask == 0, -1e9)
        scores += self.bias
    scores = where(mask, scores, self.least)
    weights = self.dropout(self.softmax(cast(scores, float)))
    return BatchMatMul()(weights, v), weights
'''.replace("self.product", "self.matmul")


def test_keys_values_and_everything_beside_the_scores_grow():
    made = with_prefix(LONG, "Net", lambda name: name == "matmul")
    for piece in (
        "slimkit_prefix_rows = self.prefix_rows()",
        "self.matmul(self.split(x), self.prefix_keys(x, True, slimkit_prefix_rows)) / self.prefix_mask(self.scale, 1)",
        "self.add(scores, self.prefix_mask((1.0 - mask) * -10000.0, 0))",
        "scores.masked_fill(self.prefix_mask(mask == 0, False), -1000000000.0)",
        "scores += self.prefix_mask(self.bias, 0)",
        "where(self.prefix_mask(mask, True), scores, self.prefix_mask(self.least, 0))",
        "(weights, self.prefix_values(v, slimkit_prefix_rows))",
        "v = matmul(x, self.weight)",  # a projection is no score
    ):
        assert piece in made


@pytest.mark.parametrize(
    "product", ["q @ k", "matmul(q, k)", "q.matmul(k)", "ops.bmm(q, k)", "BatchMatMul(transpose_b=True)(q, k)"]
)
def test_every_spelling_of_a_product_is_known(product):
    made = with_prefix(f"def f(self, q, k, v): return softmax({product}) @ v", "Net")
    turned = "transpose_b" in product
    assert f"self.prefix_keys(k, {turned}, slimkit_prefix_rows)" in made


BAD = [
    ("return x", "0 times"),
    ("return softmax(softmax(q @ k) @ v)", "2 times"),
    ("return softmax(q @ k + q @ x) @ v", "2 matrix products"),
    ("return softmax(x) @ v", "0 matrix products"),
    ("return softmax(q @ k) * v", "no matrix product takes"),
    ("return softmax(self.hide(q @ k)) @ v", "hide"),
]


@pytest.mark.parametrize(("body", "words"), BAD)
def test_what_is_no_attention_is_refused_with_the_reason(body, words):
    with pytest.raises(NoAttentionError, match=words):
        with_prefix(f"def f(self, x, q, k, v): {body}", "Net")


def test_a_softmax_is_told_from_words_about_it():
    assert calls_softmax("def f(self, x): return self.softmax(x)")
    assert not calls_softmax("def f(self, x):\n    '''No softmax(x) here.'''\n    return log_softmax(x)")
