"""Files of second moments: what a calibrated squeeze knows of each module's inputs.

A safetensors file with `MODULE.gram`, (in, in), or `MODULE.diag`, its diagonal, (in,), for each
module by its path; for a stack of experts, one for all or one each, expert first. The matrix is
X·Xᵀ over all inputs X, up to one factor for the whole file. Metadata hold `format` and the
numbers of inputs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loratools.work.declared import option
from loratools_formats.containers.safetensors_read import SafetensorsFile, read_safetensors
from loratools_formats.containers.safetensors_write import write_safetensors
from loratools_formats.core.change import LowRank
from loratools_formats.core.dtypes import Array
from loratools_formats.core.tensors import TensorRef, in_memory
from loratools_formats.disk import strict_json
from loratools_formats.disk.errors import AdapterError, UnsupportedError

_FORMAT = "loratools-stats"
_MAKE = "Make one with loratools.training.collect_stats, or leave the module out with `exclude`"


@dataclass(frozen=True)
class Calibration:
    """What is known of the inputs.

    Attributes:
        stats: a file of second moments of each module's inputs, made by collect_stats of
            loratools.training; the error for those inputs is minimised.
    """

    stats: Path | None = option(None, heading="Computing", metavar="FILE")


@dataclass(frozen=True)
class Moments:
    """Second moments by module, read when they are asked for."""

    file: SafetensorsFile

    @property
    def path(self) -> Path:
        """Where the file lies."""
        return self.file.file.path

    def check(self, name: str, factors: LowRank) -> None:
        """Refuse a module whose inputs the file does not have.

        Raises:
            AdapterError: they are missing, or of another size.
            UnsupportedError: A of a stack of experts is on the outputs, or its side is not known.
        """
        swapped, is_square = factors.layer.swapped, factors.shape[0] == factors.shape[1]
        if swapped or (swapped is None and factors.layer.parameters and is_square):
            raise UnsupportedError(
                "second moments are of inputs, and A of these experts is not known to be on them",
                tensor=name,
                hint="Put A on the inputs first, which is exact: loratools convert ADAPTER "
                "--to peft --base BASE -o converted",
            )
        tensor = self._tensor(name)
        size = factors.shape[1]
        whole = (size, size) if tensor.key.endswith(".gram") else (size,)
        if tensor.shape not in (whole, (factors.experts, *whole)) or not tensor.dtype.floating:
            raise AdapterError(
                "second moments do not fit the module",
                path=self.path,
                tensor=tensor.key,
                got=f"{tensor.dtype.code} {list(tensor.shape)}",
                expected=list(whole),
            )

    def of(self, name: str, experts: int) -> list[Array]:
        """Return the moments of each matrix of a module, in float64: (in, in) or (in,).

        Raises:
            AdapterError: the file has none for it.
        """
        import numpy as np

        tensor = self._tensor(name)
        values = tensor.load(np.float64)
        stacked = values.ndim == (3 if tensor.key.endswith(".gram") else 2)
        return list(values) if stacked else [values] * experts

    def _tensor(self, name: str) -> TensorRef:
        for ending in ("gram", "diag"):
            found = self.file.tensors.get(f"{name}.{ending}")
            if found is not None:
                return found
        raise AdapterError(
            "no second moments of the module's inputs", path=self.path, tensor=name, hint=_MAKE
        )


def read_moments(path: Path) -> Moments:
    """Open a file of second moments.

    Raises:
        MissingFileError: nothing is there.
        AdapterError: it is no such file.
    """
    file = read_safetensors(path)
    if file.metadata.get("format") != _FORMAT:
        raise AdapterError(
            "not a file of second moments",
            path=path,
            got=f"format {file.metadata.get('format')}",
            expected=_FORMAT,
            hint="Make one with loratools.training.collect_stats",
        )
    return Moments(file)


def write_moments(
    path: str | os.PathLike[str],
    moments: Mapping[str, Array],
    samples: Mapping[str, int],
    *,
    overwrite: bool = False,
) -> Path:
    """Write second moments by module path, and return where.

    Args:
        path: the file.
        moments: (in, in) or (in,) each, of a floating-point type.
        samples: how many inputs each is of.
        overwrite: replace the file if it exists.

    Raises:
        OutputExistsError: the file exists and `overwrite` is false.
        OutputError: it could not be written.
    """
    tensors = [
        in_memory(f"{name}.{'gram' if array.ndim == 2 else 'diag'}", array)
        for name, array in moments.items()
    ]
    counts = strict_json.dumps(dict(samples), sort_keys=True, separators=(",", ":"))
    metadata = {"format": _FORMAT, "loratools.samples": counts}
    write_safetensors(path, tensors, metadata, overwrite=overwrite)
    return Path(path)
