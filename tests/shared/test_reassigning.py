"""Groups of adapters that move: none is left empty, and none is lost."""

import itertools

import numpy as np
import pytest

from loratools.operations.shared.reassigning import _moved


def test_a_group_that_others_leave_does_not_lose_its_last():
    moved = _moved([[0], [1], [2]], np.array([[1, 0, 2], [2, 1, 0], [0, 0, 1]], float))
    assert all(moved)
    assert sorted(itertools.chain(*moved)) == [0, 1, 2]


@pytest.mark.parametrize("seed", range(12))
def test_no_group_is_left_empty(seed):
    rng = np.random.default_rng(seed)
    count, groups = int(rng.integers(3, 9)), int(rng.integers(2, 4))
    which = np.concatenate([np.arange(groups), rng.integers(0, groups, count - groups)])
    begun = [[int(i) for i in np.flatnonzero(which == group)] for group in range(groups)]
    moved = _moved(begun, rng.integers(0, 4, (count, groups)).astype(float))
    assert all(moved)
    assert sorted(itertools.chain(*moved)) == list(range(count))
