"""What kinds know of a base weight without the base: its shape."""

from __future__ import annotations

from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import UnsupportedError


class ShapeOnly:
    """A weight whose values are not known, only its shape."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape

    def rows(self, start: int, stop: int) -> Array:
        """Refuse.

        Raises:
            UnsupportedError: always.
        """
        raise _unknown(f"rows {start} to {stop} asked for")

    def bias(self) -> Array | None:
        """Refuse.

        Raises:
            UnsupportedError: always.
        """
        raise _unknown("a bias asked for")


def _unknown(got: str) -> UnsupportedError:
    return UnsupportedError(
        "the weight change depends on the base weight",
        got=got,
        hint="Pass the base model as `base`",
    )
