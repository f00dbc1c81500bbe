"""Threads over modules: results in order, side by side where that is worth it."""

import threading
import time

import numpy as np
import pytest

from loratools.algebra.once import once
from loratools.work.parallel import in_order, in_parts


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


def test_idle_threads_take_parts_of_one_item():
    """Four threads and two items: each may use two, and parts come out in order."""
    meet = threading.Barrier(4, timeout=30)
    names = set()

    def part(number):
        if number < 2:
            meet.wait()  # passes only if two threads work on each of both items
        names.add(threading.current_thread().name)
        return number, threading.get_ident()

    def item(_):
        return [number for number, _ in in_parts(part, range(40))]

    assert list(in_order(item, "ab", workers=4)) == [list(range(40))] * 2
    assert len(names) == 4


def test_parts_stay_in_their_thread_where_none_is_idle():
    meet = threading.Barrier(2, timeout=30)

    def item(_):
        meet.wait()
        threads = set(in_parts(lambda _: threading.get_ident(), range(5)))
        meet.wait()  # the other one was not idle meanwhile
        return threads == {threading.get_ident()}

    assert list(in_order(item, range(8), workers=2)) == [True] * 8


def test_parts_outside_a_run_are_done_here():
    assert list(in_parts(lambda _: threading.get_ident(), range(3))) == [threading.get_ident()] * 3


def test_parts_have_the_context_of_their_item():
    def item(_):
        with np.errstate(over="raise"):
            return list(in_parts(lambda _: np.geterr()["over"], range(9)))

    assert list(in_order(item, [0], workers=3)) == [["raise"] * 9]


def test_an_error_of_a_part_ends_its_item_and_gives_the_threads_back():
    def part(number):
        if number == 3:
            raise ValueError("part 3")
        return threading.get_ident()

    def item(_):
        with pytest.raises(ValueError, match="part 3"):
            list(in_parts(part, range(20)))
        return len(set(in_parts(lambda _: time.sleep(0.01) or threading.get_ident(), range(20))))

    assert list(in_order(item, [0], workers=3)) == [3]


def test_parts_of_parts_end():
    def item(_):
        return list(in_parts(lambda _: sum(in_parts(int, range(5))), range(30), at_once=4))

    assert list(in_order(item, [0], workers=2)) == [[10] * 30]
