"""Threads over modules: results in order, side by side where that is worth it."""

import threading

import pytest

from loratools.algebra.once import once
from loratools.work.parallel import in_order


def test_long_items_run_side_by_side_and_come_in_order():
    meet = threading.Barrier(2, timeout=30)

    def function(item):
        meet.wait()  # nobody passes alone
        return item

    assert list(in_order(function, range(8), workers=2)) == list(range(8))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_an_error_comes_in_its_place(workers):
    def function(item):
        if item == 3:
            raise TimeoutError("of the item, not of waiting for it")
        return item

    results = in_order(function, range(6), workers)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(TimeoutError, match="of the item"):
        next(results)


def test_properties_of_two_objects_are_computed_side_by_side():
    meet = threading.Barrier(2, timeout=30)

    class Slow:
        @once
        def value(self):
            """Wait for the other object."""
            return meet.wait() * 0 + id(self)

    objects = [Slow(), Slow()]
    assert list(in_order(lambda each: each.value, objects, workers=2)) == list(map(id, objects))
    assert [each.value for each in objects] == list(map(id, objects))  # not computed again
    assert Slow.value.__doc__ == "Wait for the other object."
