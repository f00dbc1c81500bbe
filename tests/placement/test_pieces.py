"""Factors put together: the sum of their pieces, whatever scale the first of them has."""

from __future__ import annotations

import numpy as np
import pytest

from loratools.base.placement.pieces import Piece, put_together
from loratools_formats.core.change import Layer, LowRank
from loratools_formats.core.tensors import in_memory


@pytest.mark.parametrize("scales", [(0.0, 1.5), (0.5, 0.0), (0.0, 0.0), (-3.0, 1.0)])
def test_scales_of_zero_and_below(scales):
    generator = np.random.default_rng(0)
    pieces, wanted = [], np.zeros((8, 5))
    for index, scale in enumerate(scales):
        b, a = generator.standard_normal((4, 2)), generator.standard_normal((2, 5))
        pair = LowRank(in_memory("a", a, "F32"), in_memory("b", b, "F32"), scale)
        rows = slice(4 * index, 4 * index + 4)
        pieces.append(Piece(pair, 0, (), 0, ((rows.start, rows.stop),)))
        wanted[rows] = scale * (b.astype("f4").astype(float) @ a.astype("f4").astype(float))
    made = put_together(pieces, None, (8, 5), Layer("linear"))
    found = made.scale * (made.b.load(np.float64) @ made.a.load(np.float64))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
