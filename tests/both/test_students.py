"""make_student: evenly spread layers, cut widths, equal to the teacher where nothing is cut."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit.core.distill.students import spread_layers


@pytest.mark.parametrize(("teacher", "student"), [(6, 3), (12, 4), (12, 12), (7, 2), (4, 1), (24, 7)])
def test_layers_are_spread_from_first_to_last(teacher, student):
    kept = list(spread_layers(teacher, student).values())
    assert len(set(kept)) == student
    assert kept == sorted(kept)
    assert kept[-1] == teacher - 1
    assert student == 1 or kept[0] == 0
    steps = np.diff(kept)
    assert student < 3 or steps.max() - steps.min() <= 1


def net(kit, layers=4):
    blocks = {f"block{i}": kit.named(dense=kit.linear(5, 5), act=kit.relu()) for i in range(layers)}
    return kit.fill(kit.named(**blocks, head=kit.linear(5, 3)))


def test_a_student_by_a_builder_has_the_teachers_blocks(kit):
    teacher = net(kit)
    before = kit.values(teacher)
    student, report = kit.slim.make_student(
        teacher, layers=2, build=lambda layers: net(kit, layers), pattern=r"block(\d+)\."
    )
    assert report["layers"] == {0: 0, 1: 3}
    values = kit.values(student)
    assert (values["block1.dense.weight"] == before["block3.dense.weight"]).all()
    assert (values["head.weight"] == before["head.weight"]).all()
    assert all((before[k] == v).all() for k, v in kit.values(teacher).items())


def test_sizes_that_make_no_student_are_refused(kit):
    teacher = net(kit)
    with pytest.raises(ValueError, match=r"layers, ffn, heads or hidden|no config|build"):
        kit.slim.make_student(teacher)
    with pytest.raises(ValueError, match="at most 4"):
        kit.slim.make_student(teacher, layers=5, build=lambda layers: net(kit, layers), pattern=r"block(\d+)\.")
    with pytest.raises(ValueError, match="pattern"):
        kit.slim.make_student(teacher, layers=2, build=lambda layers: net(kit, layers), pattern=r"stage(\d+)\.")
    with pytest.raises(TypeError):
        kit.slim.make_student(3, layers=2)


def stack(kit, width, skipped=()):
    """Blocks of one class under numbers; those skipped hardly change what runs through them."""

    class Block(kit.Module):
        def __init__(self):
            super().__init__()
            self.dense = kit.linear(width, width)

        def forward(self, x):
            return x + self.dense(x)

        construct = forward

    model = kit.fill(kit.named(blocks=kit.sequential(*(Block() for _ in range(4))), head=kit.linear(width, 3)))
    for name, value in kit.params(model).items():
        if any(name.startswith(f"blocks.{i}.") for i in skipped):
            kit.assign(value, np.asarray(kit.array(value)) * 1e-3)
    return model


def smaller(kit):
    def build(layers=4, ffn=None):
        blocks = stack(kit, 5)
        return kit.named(blocks=kit.sequential(*[b for _, b in kit.children(blocks.blocks)][:layers]), head=blocks.head)

    return build


PATTERN = r"blocks\.(\d+)\."


def test_the_layers_that_data_needs_least_are_dropped(kit, caplog):
    teacher = stack(kit, 5, skipped=(1, 2))
    data = [kit.tensor(np.random.default_rng(i).standard_normal((8, 5)).astype(np.float32)) for i in range(2)]
    _, report = kit.slim.make_student(teacher, layers=2, build=smaller(kit), pattern=PATTERN, calibration=data)
    assert report["layers"] == {0: 0, 1: 3}
    assert "without a look" not in caplog.text
    chosen = kit.slim.make_student(teacher, layer_map=[1, 3], build=smaller(kit), pattern=PATTERN, calibration=data)[1]
    assert chosen["layers"] == {0: 1, 1: 3}
    assert "without a look" not in caplog.text
    kit.slim.make_student(teacher, layers=2, build=smaller(kit), pattern=PATTERN)
    assert "2 of 4 layers are kept without a look at data" in caplog.text


def test_a_layer_map_that_does_not_fit_is_refused(kit):
    teacher = stack(kit, 5)
    for given, more in (([0, 4], {}), ([0, 1], {"layers": 3}), ({1: 0}, {}), ([], {})):
        with pytest.raises(ValueError, match="layer_map"):
            kit.slim.make_student(teacher, layer_map=given, build=smaller(kit), pattern=PATTERN, **more)


def test_widths_that_nobody_measured_are_warned_of(caplog):
    from slimkit.core.distill.students import warn_unmeasured

    warn_unmeasured({"layers": 2, "ffn": 8}, "importance", True)
    warn_unmeasured({"layers": 2, "ffn": 8}, "first", False)
    warn_unmeasured({"layers": 2}, "importance", False)
    assert not caplog.text
    warn_unmeasured({"ffn": 8, "hidden": 4}, "importance", False)
    assert "ffn, hidden: chosen by the weights alone" in caplog.text
