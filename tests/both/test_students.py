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
