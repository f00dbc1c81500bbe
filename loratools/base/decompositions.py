"""Leading singular triplets of base weights with a change, and a cache of the bases' own SVDs."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loratools.algebra.intruders import (
    BaseSvd,
    Leading,
    base_svd,
    certified,
    in_base,
    merged_certified,
    merged_in_base,
)
from loratools.algebra.thin import Thin
from loratools.work.declared import option
from loratools.work.typed import check_options
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import OptionError, OutputError

_EXACT_SIDE = 1024


@dataclass(frozen=True)
class IntruderOptions:
    """How intruder dimensions are looked for.

    Attributes:
        count: leading singular vectors of W + ΔW to examine for intruder dimensions; 0 for none.
        epsilon: a vector intrudes if its |cos| with each singular vector of W is below this.
        exact: decompose base weights of any size, which is slow; by default, bounds decide for
            weights of more than 1024 rows or columns.
        cache: keep decompositions of base weights in this folder, by a digest of their values.

    Raises:
        OptionError: a number out of range.
    """

    count: int = option(10, heading="Method", name="intruders")
    epsilon: float = option(0.5, heading="Method")
    exact: bool = option(False, heading="Method", name="exact_svd")
    cache: Path | None = option(None, heading="Computing", metavar="FOLDER")

    def __post_init__(self) -> None:
        check_options(self)
        if self.count < 0:
            raise OptionError("the number of singular vectors is negative", got=self.count)
        if not 0.0 < self.epsilon <= 1.0:
            raise OptionError(
                "epsilon is a cosine", got=self.epsilon, expected="above 0, at most 1"
            )


def leading(weight: Array, delta: Thin, options: IntruderOptions) -> tuple[Leading, bool]:
    """Return the leading triplets of W + ΔW, judged, and whether their cosines are exact.

    Args:
        weight: W (out, in) float64.
        delta: ΔW.
        options: how many, and how to look for them.
    """
    if not delta.is_product:
        return leading_of_merged(weight, weight + delta.dense(), options)
    found = _whole_svd(weight, options)
    if found is not None:
        return in_base(found, delta, options.count, options.epsilon), True
    return certified(weight, delta, options.count, options.epsilon), False


def leading_of_merged(
    weight: Array, merged: Array, options: IntruderOptions
) -> tuple[Leading, bool]:
    """Return the leading triplets of a merged weight of any form, judged, and whether exactly.

    Args:
        weight: W (out, in) float64.
        merged: W' (out, in) float64.
        options: how many, and how to look for them.
    """
    found = _whole_svd(weight, options)
    if found is not None:
        return merged_in_base(found, merged, options.count, options.epsilon), True
    return merged_certified(weight, merged, options.count, options.epsilon), False


def _whole_svd(weight: Array, options: IntruderOptions) -> BaseSvd | None:
    """Return W's SVD if it is kept, asked for, or small."""
    kept = _Cache(options.cache, weight)
    found = kept.load()
    if found is None and (options.exact or min(weight.shape) <= _EXACT_SIDE):
        found = base_svd(weight)
        kept.store(found)
    return found


class _Cache:
    """Decompositions of base weights in a folder, by the SHA-256 of their shape and values."""

    def __init__(self, folder: Path | None, weight: Array) -> None:
        self._shape = weight.shape
        self._file: Path | None = None
        if folder is not None:
            digest = hashlib.sha256(repr(weight.shape).encode())
            digest.update(np.ascontiguousarray(weight, np.float64).view(np.uint8).data)
            self._file = folder / f"{digest.hexdigest()}.svd.npz"

    def load(self) -> BaseSvd | None:
        """Return the cached decomposition of the weight; None if there is none, or a broken one."""
        if self._file is None or not self._file.is_file():
            return None
        try:
            with self._file.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                found = BaseSvd(arrays["u"], arrays["s"], arrays["vt"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            return None  # cut short or foreign: it is computed again and replaced
        rows, columns = self._shape
        size = min(self._shape)
        shapes = (found.u.shape, found.s.shape, found.vt.shape)
        return found if shapes == ((rows, size), (size,), (size, columns)) else None

    def store(self, found: BaseSvd) -> None:
        """Keep a decomposition; it appears whole or not at all.

        Raises:
            OutputError: the folder cannot be written to.
        """
        if self._file is None:
            return
        buffer = io.BytesIO()
        np.savez(buffer, u=found.u, s=found.s, vt=found.vt)
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._file.parent, delete=False) as file:
                file.write(buffer.getbuffer())
            os.replace(file.name, self._file)
        except OSError as error:
            raise OutputError(
                f"the cache cannot be written: {error.strerror}", path=self._file.parent
            ) from error
