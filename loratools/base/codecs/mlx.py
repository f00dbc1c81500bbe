"""MLX's quantised weights: affine of 2 to 8 bits, and the modes mxfp4, mxfp8 and nvfp4.

A module has `weight` U32 (…, out, in · bits / 32), a dense stream of codes, and `scales` (…, out,
in / group). Affine values are scale · code, rounded to the type of the scales, plus `biases`,
rounded again. The other modes have bytes as scales and no biases: E8M0 for groups of 32, E4M3 for
nvfp4's groups of 16, whose product with the code is rounded to BF16. transformers' `metal` calls
the biases `qbiases`.

Sources: `mlx.core.quantize` of mlx 0.32, `mlx.nn.QuantizedLinear`, mlx-lm's per-module entries of
`quantization` in config.json; the metal quantiser of transformers 5.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from loratools.base.codecs.bits import (
    E2M1,
    are_few,
    by_group,
    fours,
    numbers,
    small_floats,
    times_groups,
    unpacked,
)
from loratools.base.codecs.codec import Codec, CodedWeight, Encoder, Scheme, Stored
from loratools.base.codecs.levels import Attempt, rounded
from loratools.base.codecs.mlx_encode import (
    EIGHT,
    MODES,
    AffineEncoder,
    FloatingEncoder,
    affine,
)
from loratools.base.codecs.parts import matrix_rows
from loratools_formats.checkpoints.siblings import missing_part, sibling, wrong_shape
from loratools_formats.core.dtypes import DTYPES, OF_MODELS, Array, encode
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import UnsupportedError

_BITS = (2, 3, 4, 5, 6, 8)
_GROUPS = (32, 64, 128)
_KEYS = ("quantization", "quantization_config")
_BIASES = ("biases", "qbiases")


class _Mlx(CodedWeight):
    """What MLX's weights have in common."""

    def config_beside(
        self, config: Mapping[str, Any], modules: Collection[str]
    ) -> Mapping[str, Any] | None:
        """Return the configuration with an entry `false` for each plain module, as mlx-lm has it.

        transformers' metal has no such entries.
        """
        sections = {k: config[k] for k in _KEYS if isinstance(config.get(k), Mapping)}
        if any(section.get("quant_method") for section in sections.values()):
            return None
        return _with_entries(config, sections, dict.fromkeys(sorted(modules), False))

    def encoder_in(self, bits: int) -> Encoder | None:
        """Return an encoder of affine codes of eight bits, with scales of their own."""
        group = self._group_in_eight()
        if bits != EIGHT or group is None:
            return None
        return AffineEncoder(self.parts[0].key, self.shape, self.dtype, EIGHT, group)

    def config_in(
        self, config: Mapping[str, Any], modules: Collection[str], bits: int
    ) -> Mapping[str, Any]:
        """Return the configuration with an entry for each module, as mlx-lm has it.

        Raises:
            UnsupportedError: the configuration has no such entries; transformers' metal has none.
        """
        sections = {k: config[k] for k in _KEYS if isinstance(config.get(k), Mapping)}
        if not sections or any(section.get("quant_method") for section in sections.values()):
            raise UnsupportedError(
                "config.json cannot describe how single modules are quantised",
                got=f"no entry {' or '.join(_KEYS)} as mlx-lm writes them",
                hint="Leave out `changed_bits`: changed weights are then stored in 16 bits",
            )
        entry: dict[str, Any] = {"group_size": self._group_in_eight(), "bits": bits}
        if any(section.get("mode", "affine") != "affine" for section in sections.values()):
            entry["mode"] = "affine"
        return _with_entries(config, sections, dict.fromkeys(sorted(modules), entry))

    def _group_in_eight(self) -> int | None:
        """Return values that share a scale in eight bits: as many as now, if affine can."""
        own = self.scheme.group
        if own in _GROUPS:
            return own
        return _GROUPS[0] if self.shape[-1] % _GROUPS[0] == 0 else None


def _with_entries(
    config: Mapping[str, Any], sections: Mapping[str, Any], entries: Mapping[str, Any]
) -> dict[str, Any]:
    return {**config, **{name: {**section, **entries} for name, section in sections.items()}}


class _Affine(_Mlx):
    """scale · code + bias, rounded after each."""

    def __init__(
        self, key: str, codes: TensorRef, scales: TensorRef, biases: TensorRef, bits: int
    ) -> None:
        *stack, words = codes.shape
        self._width = words * 32 // bits
        group = self._width // scales.shape[-1]
        self._codes, self._scales, self._biases, self._bits = codes, scales, biases, bits
        super().__init__(
            key,
            (*stack, self._width),
            scales.dtype,
            (codes, scales, biases),
            Scheme("MLX affine", bits, group),
        )

    def rows(self, start: int, stop: int) -> Array:
        """Return rows, rounded to the type of the scales after each operation."""
        data = matrix_rows(self._codes, start, stop).view(np.uint8)
        grid = self._grid(start, stop)
        levels, shape = 1 << self._bits, grid[0].shape
        if self.dtype.bits > 16 or not are_few(levels, self._width // shape[1]):
            return affine(numbers(data, self._bits, self._width), *grid, self.dtype)
        every = np.tile(np.arange(levels, dtype=np.float32), shape)
        table = encode(affine(every, *grid, self.dtype), self.dtype).reshape(*shape, levels)
        return by_group(unpacked(data, self._bits, self._width, np.uint16), table)

    def _grid(self, start: int, stop: int) -> tuple[Array, Array]:
        """Return the scales and biases of rows, each (rows, groups) as stored."""
        return matrix_rows(self._scales, start, stop), matrix_rows(self._biases, start, stop)

    def _attempt(self, start: int, stop: int) -> Attempt:
        """Return rows as they are stored."""
        data = matrix_rows(self._codes, start, stop).view(np.uint8)
        codes = unpacked(data, self._bits, self._width)
        grid = self._grid(start, stop)
        shape = (*grid[0].shape, -1)
        values = rounded(affine(codes.astype(np.float32), *grid, self.dtype), self.dtype)
        return Attempt(codes.reshape(shape), values.reshape(shape), grid)

    def encoder(self) -> Encoder:
        """Return what stores new values with the old scales, or new ones where that is nearer."""
        names = (self._scales.key, self._biases.key)
        group = self.shape[-1] // self._scales.shape[-1]
        return AffineEncoder(
            self._codes.key,
            self.shape,
            self.dtype,
            self._bits,
            group,
            names=names,
            old=self._attempt,
        )


class _Floating(_Mlx):
    """A small float times the scale of its group, in one of the modes without biases."""

    def __init__(
        self,
        key: str,
        mode: str,
        codes: TensorRef,
        scales: TensorRef,
        of_all: TensorRef | None,
    ) -> None:
        self._mode = MODES[mode]
        *stack, words = codes.shape
        self._codes, self._scales = codes, scales
        self._of_all = of_all
        super().__init__(
            key,
            (*stack, words * 32 // self._mode.bits),
            DTYPES["BF16"],
            (codes, scales, *(() if of_all is None else (of_all,))),
            Scheme(f"MLX {mode}", self._mode.bits, self._mode.group),
        )

    def rows(self, start: int, stop: int) -> Array:
        """Return rows in float32, to be rounded to BF16."""
        data = matrix_rows(self._codes, start, stop).view(np.uint8)
        codes = data if self._mode.bits == EIGHT else None
        values = fours(data, E2M1) if codes is None else small_floats(codes, self._mode.kind)
        return times_groups(values, self._mode.scales(matrix_rows(self._scales, start, stop)))

    def encoder(self) -> Encoder:
        """Return what stores new values with the old scales, or new ones where that is nearer."""
        return FloatingEncoder(self._codes, self._scales, self._mode, self.scheme)


def _declare(stored: Stored) -> dict[str, CodedWeight]:
    stated = _stated(stored)
    found: dict[str, CodedWeight] = {}
    for module, scales in stored.named(".scales").items():
        codes = stored.tensors.get(f"{module}.weight")
        if codes is None or codes.dtype.code != "U32" or len(codes.shape) < 2:
            continue
        if scales.shape[:-1] != codes.shape[:-1] or not scales.shape[-1]:
            raise wrong_shape(scales, f"{list(codes.shape[:-1])} and the number of groups")
        biases = next(
            (stored.tensors[f"{module}.{b}"] for b in _BIASES if f"{module}.{b}" in stored.tensors),
            None,
        )
        key = f"{module}.weight"
        if scales.dtype.code == "U8":
            found[key] = _floating(stored, module, codes, scales)
        else:
            if biases is None:
                raise missing_part(f"{module}.biases")
            sibling(stored.tensors, scales.key, OF_MODELS)
            sibling(stored.tensors, biases.key, (scales.dtype.code,), scales.shape)
            bits = _bits(codes, scales, _entry(stated, module))
            found[key] = _Affine(key, codes, scales, biases, bits)
    return found


def _floating(stored: Stored, module: str, codes: TensorRef, scales: TensorRef) -> CodedWeight:
    """Return a weight in the mode whose shapes are those of its tensors."""
    groups = scales.shape[-1]
    fits = [
        name
        for name, mode in MODES.items()
        if codes.shape[-1] * 32 == groups * mode.group * mode.bits
    ]
    if len(fits) != 1:
        raise wrong_shape(scales, f"a mode of MLX: {', '.join(MODES)}")
    of_all = stored.tensors.get(f"{module}.global_scale")
    if of_all is not None:
        raise UnsupportedError("a scale over a whole weight of MLX is not known", tensor=of_all.key)
    return _Floating(codes.key, fits[0], codes, scales, of_all)


def _stated(stored: Stored) -> Mapping[str, Any]:
    for key in _KEYS:
        found = stored.config.get(key)
        if isinstance(found, Mapping):
            return found
    return stored.stated


def _entry(stated: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """Return what is stated of a module, else of all."""
    own = stated.get(module)
    return {**stated, **own} if isinstance(own, Mapping) else stated


def _bits(codes: TensorRef, scales: TensorRef, stated: Mapping[str, Any]) -> int:
    """Return the bits of a code; the shapes leave few choices, of which the statement is one.

    Where it is none of them, it is not about this weight: an entry under another name may be.

    Raises:
        AdapterError: the shapes are those of no number of bits.
        UnsupportedError: they are those of several, and none of them is stated.
    """
    total, groups = codes.shape[-1] * 32, scales.shape[-1]
    fits = [(b, g) for b in _BITS for g in _GROUPS if groups * g * b == total]
    if not fits:
        raise wrong_shape(scales, f"groups of {', '.join(map(str, _GROUPS))} for {codes.key}")
    bits, group = stated.get("bits"), stated.get("group_size")
    said = [fit for fit in fits if fit[0] == bits and group in (None, fit[1])]
    chosen = said or fits
    if len(chosen) > 1:
        told = "config.json does not say" if bits is None else f"config.json says {bits}"
        several = " or ".join(f"{b} in groups of {g}" for b, g in fits)
        raise UnsupportedError(
            "the bits of a quantised weight of MLX are not known",
            tensor=codes.key,
            got=f"{told if group is None else f'{told} in groups of {group}'}; {several} fit",
            hint='Put "quantization": {"group_size": …, "bits": …} into config.json, or an '
            f'entry "{_module(codes.key)}": {{"group_size": …, "bits": …}} where this module has '
            "its own",
        )
    return chosen[0][0]


def _module(key: str) -> str:
    return key.removesuffix(".weight")


CODEC = Codec("MLX", ("metal",), _declare, keeps_conv1d=True)
