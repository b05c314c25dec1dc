"""Rows that do not count in distillation: padding whatever it holds, labels of -100, batches where nothing counts."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.core.distill.config import LOSSES, KnowledgeDistillConfig, LossTerm
from slimkit.core.distill.losses import reference
from slimkit.core.errors import ConfigError
from tests.both.test_distill import output, term, value_and_gradient

SHAPES = {"logits": (3, 5, 7), "hidden": (3, 5, 6), "relation": (3, 5, 6), "attention": (3, 2, 5, 5)}
MASK = (np.arange(5) < np.array([[3], [5], [1]])).astype(np.float32)


def tensors(name):
    rng = np.random.default_rng(2)
    return tuple(rng.standard_normal(SHAPES[LOSSES[name][0]]).astype(np.float32) for _ in range(2))


def spoiled(x, mask, value):
    """The same with a value in every place that does not count."""
    x = x.copy()
    if x.ndim == 4:
        x[np.broadcast_to((mask[:, :, None] * mask[:, None, :])[:, None] == 0, x.shape)] = value
    else:
        x[mask == 0] = value
    return x


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_what_padding_holds_changes_neither_loss_nor_gradient(kit, name, value):
    s, t = tensors(name)
    clean = value_and_gradient(kit, name, s, t, MASK)
    found = value_and_gradient(kit, name, spoiled(s, MASK, value), spoiled(t, MASK, value), MASK)
    # the same sums with the same float32 numbers; the attention maps alone had other numbers where nothing counts
    np.testing.assert_allclose(found[0], clean[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], clean[1], atol=1e-7)
    # 1e-5: the contract between both wings and NumPy
    assert abs(clean[0] - reference(s, t, LossTerm(name, 1.0), MASK)) < 1e-5
    assert abs(reference(spoiled(s, MASK, value), spoiled(t, MASK, value), LossTerm(name, 1.0), MASK) - clean[0]) < 1e-5


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_in_which_nothing_counts_gives_zero_and_no_gradient(kit, name):
    s, t = tensors(name)
    nothing = np.zeros_like(MASK)
    value, gradient = value_and_gradient(kit, name, s, t, nothing)
    assert value == reference(s, t, LossTerm(name, 1.0), nothing) == 0
    assert (gradient == 0).all()


def net(kit, argument):
    """x (batch, length, 5) -> logits (batch, length, 3), called with one more argument of that name."""

    class Net(kit.Module):
        def __init__(self):
            super().__init__()
            self.head = kit.linear(5, 3)

        if argument == "labels":

            def forward(self, x, labels):
                return self.head(x)
        else:

            def forward(self, x, counts):
                return self.head(x)

        construct = forward

    return Net()


def distilled(kit, argument, mask, x, key=None):
    """The soft loss of one batch whose second argument is the mask; None: without a mask."""
    teacher, student = kit.fill(net(kit, argument), 1), kit.fill(net(kit, argument), 2)
    more = {} if mask is None else {"mask": argument if key is None else key}
    config = KnowledgeDistillConfig().add_output_soft_label(output(term("KDKLDiv"), **more))
    given = (kit.tensor(x), kit.tensor(np.zeros((3, 5), np.int32) if mask is None else mask))
    dual = kit.slim.get_distill_model(teacher, student, config, given)
    return float(dual(*given)) if kit.name == "mindspore" else float(dual(*given)[0].detach())


X = np.random.default_rng(5).standard_normal((3, 5, 5)).astype(np.float32)
LABELS = np.where(MASK > 0, np.arange(15).reshape(3, 5) % 3, -100).astype(np.int32)


@pytest.mark.parametrize("key", [None, 1])  # by name, and by position
def test_labels_as_a_mask_leave_out_those_of_minus_100(kit, key):
    expected = distilled(kit, "counts", MASK, X)
    assert abs(expected - distilled(kit, "counts", None, X)) > 1e-3  # the mask makes a difference
    found = [distilled(kit, "labels", LABELS.astype(kind), X, key) for kind in (np.int32, np.int64)]
    # classes 0 and 1 alone: labels all the same, and no mask of 0 and 1
    found.append(distilled(kit, "labels", np.minimum(LABELS, 1), X, key))
    np.testing.assert_allclose(found, expected, rtol=1e-6)  # the same rows in float32
    assert distilled(kit, "labels", np.full((3, 5), -100, np.int32), X, key) == 0


@pytest.mark.parametrize("kind", [bool, np.int32, np.int64, np.float32, np.float16])
def test_a_mask_of_any_type_means_the_same(kit, kind):
    # float32 sums of the same numbers
    np.testing.assert_allclose(
        distilled(kit, "counts", MASK.astype(kind), X), distilled(kit, "counts", MASK, X), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ((1 - MASK) * -10000.0, "1 on real positions"),  # an additive mask
        (MASK * 0.5, "1 on real positions"),
        (np.arange(15, dtype=np.int32).reshape(3, 5), "1 on real positions"),  # positions
        (MASK[:, None, None, :], None),  # the shape differs, the rows do not
        (MASK[:, :4], "one value for each row"),
        (np.float32(1.0), "one value for each row"),
        (np.ones(3, np.float32), "one value for each row"),
    ],
)
def test_a_mask_that_means_nothing_is_refused(kit, mask, said):
    if said is None:
        assert (
            abs(distilled(kit, "counts", mask, X) - distilled(kit, "counts", MASK, X)) < 1e-7
        )  # the same float32 sums
        return
    with pytest.raises(ConfigError, match=said):
        distilled(kit, "counts", np.asarray(mask), X)
