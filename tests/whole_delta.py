"""The change of one weight as a dense array, in the weight's own shape and layout."""

from __future__ import annotations

import numpy as np

from loratools.lowrank.matrices import loaded
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.dtypes import Array
from loratools_formats.core.orientation import is_transposed


def effective_delta(name: str, change: ModuleChange, weight_shape: tuple[int, ...]) -> Array:
    """Return ΔW in float64 for a base weight of a shape; of a DoRA, ΔW is the direction alone.

    Args:
        name: the module, for messages.
        change: its change, which must have factors.
        weight_shape: shape of the base weight as stored: (out, in), (in, out), (out, in, *kernel),
            (vocabulary, dim), or (E, …) for experts.

    Raises:
        AdapterError: the factors do not fit the weight.
        UnsupportedError: the change has no factors, or the weight is square and its orientation
            unknown.
    """
    delta = change.require_factors()
    transposed = is_transposed(name, delta, weight_shape)
    products = [delta.scale * (b.astype(np.float64) @ a) for b, a in loaded(delta)]
    oriented = [product.T if transposed else product for product in products]
    whole = np.stack(oriented) if delta.layer.kind == "experts" else oriented[0]
    return whole.reshape(weight_shape)
