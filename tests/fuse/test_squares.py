"""‖ΔW‖² of blocks, from factors, beside the blocks of the change that they make."""

from __future__ import annotations

import numpy as np

from loratools.algebra.device import Device
from loratools.operations.fuse.blocks import fused_blocks
from loratools.operations.fuse.tensor import SquaresOfProducts, are_products
from loratools.operations.fuse.terms import Term, View
from loratools_formats.core.tensors import in_memory


def test_squares_of_blocks_are_those_of_what_is_added_there() -> None:
    rng = np.random.default_rng(0)
    view = View(3, 700, 1500)
    base = np.zeros((view.planes, view.rows, view.columns), np.float32)

    def term(plane: int, rows: tuple[int, int], columns: tuple[int, int]) -> Term:
        left = rng.standard_normal((rows[1] - rows[0], 5))
        right = rng.standard_normal((5, columns[1] - columns[0]))
        return Term("m", plane, rows, columns, left, right, -0.7)

    terms = [[term(0, (0, 700), (0, 1500))], [], [term(2, (310, 420), (3, 700))]]
    assert are_products(terms)
    squares = SquaresOfProducts(terms, view)
    blocks = fused_blocks(in_memory("w", base), view, terms, [], single=None, device=Device("cpu"))
    found = [(float(np.vdot(b.total, b.total)), squares.of(b)) for b in blocks]
    assert len(found) == 3 * 3
    for true, said in found:
        np.testing.assert_allclose(said, true, rtol=1e-12)


def test_terms_over_each_other_are_not_taken_for_products_alone() -> None:
    rng = np.random.default_rng(0)
    one = Term("m", 0, (0, 4), (0, 4), rng.random((4, 2)), rng.random((2, 4)), 1.0)
    assert are_products([[one], []])
    assert not are_products([[one, one]])
