"""Seeds of all that is random: which are taken, and the one of each matrix.

Any whole number from 0 is a seed. One of 2⁶⁴ or more stands for a number of 64 bits, its digest:
JSON, YAML and TOML written by others hold no longer one safely, and statements, recipes and
metadata name that number, which makes the same bytes.
"""

from __future__ import annotations

import hashlib
import zlib

from loratools_formats.disk.errors import OptionError

_BITS = 64
_OF_CHECKSUM = 32


def seed_of_64_bits(seed: int) -> int:
    """Return the seed that a number stands for: itself, below 2⁶⁴.

    >>> seed_of_64_bits(7), seed_of_64_bits(10**30) < 2**64
    (7, True)

    Raises:
        OptionError: it is negative.
    """
    if seed < 0:
        raise OptionError("seed is negative", got=seed, expected="a whole number from 0")
    if seed < 1 << _BITS:
        return seed
    data = seed.to_bytes((seed.bit_length() + 7) // 8, "little")
    return int.from_bytes(hashlib.blake2b(data, digest_size=_BITS // 8).digest(), "little")


def seed_of_matrix(seed: int, label: str) -> int:
    """Return the seed of one matrix by its label; another one for every seed of 64 bits."""
    low = seed & ((1 << _OF_CHECKSUM) - 1)
    return zlib.crc32(label.encode(), low) | seed >> _OF_CHECKSUM << _OF_CHECKSUM
