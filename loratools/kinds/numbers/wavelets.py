"""Scaling filters of the wavelets that WaveFT uses.

Filters of the Daubechies family and symlets are computed, by factoring Daubechies' polynomial; they
differ in which root of each pair is taken (Daubechies 1992, chapters 6 and 8). Coiflets have no
such form and are a table. The fourth one of PEFT is not the coiflet of the literature, nor
orthonormal; it is what PEFT trains with, so it is here as PEFT has it. Its fifth one is longer than
the room that PEFT makes for it, so that PEFT itself cannot use it.
"""

from __future__ import annotations

import math

import numpy as np

from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import UnsupportedError

_MOST_MOMENTS = 10  # all that PEFT has; beyond, the roots of the polynomial lose digits

_SYMLETS = {2: "0", 3: "0", 4: "01", 5: "10", 6: "101", 7: "100", 8: "0101", 9: "0110", 10: "10101"}
"""By the number of vanishing moments: 1 for each root y of Daubechies' polynomial, by its real
part, whose z lies outside the unit circle. A pair of conjugate roots counts once."""

_COIFLETS = {
    1: (
        -0.07273261951252645, 0.3378976624574818, 0.8525720202116004, 0.3848648468648578,
        -0.07273261951252645, -0.015655728135791993,
    ),
    2: (
        0.01638733646320364, -0.04146493678687178, -0.0673725547237256, 0.3861100668227629,
        0.8127236354494135, 0.4170051844232391, -0.07648859907828076, -0.05943441864643109,
        0.02368017194684777, 0.005611434819368834, -0.0018232088709110323, -0.000720549445520347,
    ),
    3: (
        -0.003793512864380802, 0.007782596425672746, 0.023452696142077168, -0.06577191128146936,
        -0.06112339000297255, 0.40517690240911824, 0.7937772226260872, 0.42848347637737,
        -0.07179982161915484, -0.08230192710629983, 0.03455502757329774, 0.015880544863669452,
        -0.009007976136730624, -0.0025745176881367972, 0.0011175187708306303,
        0.0004662169598204029, -7.0983302506379e-05, -3.459977319727278e-05,
    ),
    4: (
        0.000892313902537003, -0.001629492425226786, -0.007346167936268051, 0.016066782559655206,
        0.026792362270697267, -0.07314290441258073, -0.04877076756791383, 0.42747788393337943,
        0.7842491699914577, 0.4354613422154989, -0.0615536584279808, -0.09176542029839818,
        0.02811565972369683, 0.024945239305530328, -0.010417174666056649, -0.0032702731315608483,
        0.0020166775120449105, 0.0006600112966963782, -0.00017960623150243602,
        -0.0001598819866911797, 4.3110389559021745e-05, 1.791447688858775e-05,
        -2.2414246658720156e-06, -1.5895026298510706e-06,
    ),
}  # fmt: skip
"""By half the number of vanishing moments, as PEFT has them."""


def scaling_filter(name: str) -> Array:
    """Return the scaling filter of a wavelet: (length,) float64.

    Args:
        name: as PEFT has it: `haar`, or a family and a number.

    Raises:
        UnsupportedError: PEFT does not have it, or cannot use it.
    """
    family, number = name.rstrip("0123456789"), name[len(name.rstrip("0123456789")) :]
    order = int(number) if number else 0
    if name == "haar":
        return daubechies(1)
    if family == "db" and 1 <= order <= _MOST_MOMENTS:
        return daubechies(order)
    if family == "sym" and order in _SYMLETS:
        return daubechies(order, _SYMLETS[order])
    if family == "coif" and order in _COIFLETS:
        return np.array(_COIFLETS[order])
    raise UnsupportedError(
        "wavelet family is not one that PEFT can use",
        got=name,
        expected="haar, db1 to db10, sym2 to sym10, or coif1 to coif4",
    )


def daubechies(moments: int, outside: str = "") -> Array:
    """Return a scaling filter with that many vanishing moments: (2·moments,) float64.

    Args:
        moments: number of vanishing moments.
        outside: for each root, 1 if the z outside the unit circle is taken; without it, all lie
            inside, which is the filter of minimum phase that bears Daubechies' name.

    >>> daubechies(2).round(4).tolist()
    [0.483, 0.8365, 0.2241, -0.1294]
    """
    powers = [math.comb(moments - 1 + k, k) for k in range(moments)]
    roots = np.roots(powers[::-1]) if moments > 1 else np.empty(0)
    upper = sorted((y for y in roots if y.imag >= 0.0), key=lambda y: float(y.real))
    filter_ = np.ones(1)
    # y = (2 − z − 1/z)/4: each root y gives a pair z, 1/z.
    for y, chosen in zip(upper, outside or "0" * len(upper), strict=True):
        half = 1.0 - 2.0 * y
        pair = half + np.sqrt(half * half - 1.0 + 0j) * np.array([1.0, -1.0])
        z = pair[np.argsort(np.abs(pair))[int(chosen)]]
        filter_ = np.convolve(filter_, [1.0, -z])
        if y.imag > 0.0:
            filter_ = np.convolve(filter_, [1.0, -np.conj(z)])
    for _ in range(moments):
        filter_ = np.convolve(filter_, [1.0, 1.0])
    filter_ = np.real(filter_)
    return np.asarray(filter_ * (math.sqrt(2.0) / filter_.sum()))
