"""How to fuse: the options of `fuse`, for checkpoints and for GGUF models.

What they do to a checkpoint is in `operation`, to a GGUF model in `gguf`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loratools.algebra.device import Computing
from loratools.operations.fuse.trained_on import four_bits
from loratools.work.declared import option
from loratools.work.requests import Sharding
from loratools.work.spellings import dtype as dtype_name
from loratools_formats.disk.errors import OptionError

BaseMode = Literal["dequant", "original"]
_DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class FuseOptions(Sharding, Computing):
    """How to fuse.

    Attributes:
        dtype: type of all weights: f32, f16 or bf16; in a GGUF model, the type of the changed
            tensors, which may also be q8_0, q5_1, q5_0, q4_1 or q4_0. By default each weight keeps
            its own type.
        base_mode: for a quantised base: add to the values that its codes stand for (dequant), or
            refuse any base but the 16-bit original (original).
        requantize: store changed weights in the base's own format, with their present scales, or
            with new ones if the format allows it and they come nearer.
        changed_bits: store changed weights of a quantised base in this many bits of its format,
            and leave the others as they are.
        trained_on: for adapters trained on a base in four bits, as QLoRA does: nf4, fp4, nf4:double
            or fp4:double. The linear weights of the base are rounded to these four bits and back
            before the change is added.
        allow_lossy: write even if less than half of the change survives rounding.
    """

    dtype: str | None = option(
        None, heading="Computing", aliases=("--outtype",), metavar="DTYPE", parse=dtype_name
    )
    base_mode: BaseMode | None = option(None, heading="Computing")
    requantize: bool = option(False, heading="Computing")
    changed_bits: int | None = option(None, heading="Computing", metavar="BITS")
    trained_on: str | None = option(None, heading="Computing", metavar="FOUR-BITS")
    allow_lossy: bool = option(False, heading="Output")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {
            "requantize": self.requantize,
            "changed_bits": self.changed_bits is not None,
            "dtype": self.dtype is not None,
        }
        asked = [f"`{name}`" for name, is_given in given.items() if is_given]
        if len(asked) > 1:
            raise OptionError(f"{' and '.join(asked)} exclude each other")
        if self.trained_on is not None:
            four_bits(self.trained_on)

    @property
    def keeps_format(self) -> bool:
        """Whether changed weights stay in the base's format."""
        return self.requantize or self.changed_bits is not None

    @property
    def code(self) -> str | None:
        """The type's name in a safetensors header; None if each tensor keeps its own.

        Raises:
            OptionError: checkpoints have no such type.
        """
        if self.dtype in (None, "keep"):
            return None
        if self.dtype not in _DTYPES:
            raise OptionError(
                "there is no such type", got=self.dtype, expected=" or ".join(_DTYPES)
            )
        return _DTYPES[self.dtype]
