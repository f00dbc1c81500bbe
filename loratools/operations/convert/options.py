"""How to convert: what to write, and how names of single files are resolved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loratools.work.declared import option
from loratools.work.spellings import dtype as dtype_name
from loratools.work.spellings import key_value
from loratools_formats.disk.errors import OptionError

PeftLayout = Literal["0.18", "0.19.1"]


@dataclass(frozen=True)
class ConvertOptions:
    """What to convert to.

    Attributes:
        to: format to write; by default found from the output's name.
        dtype: type of the factors in the output: f32, f16 or bf16, or q8_0 in a GGUF file.
        set_: text to add to the output's metadata; `lora_B_layout=rank_major` or
            `=grouped_by_expert` states how the input packs stacked experts instead.
        keep_alpha: leave scales beside factors, as they are.
        fold_alpha: move scales into factors even if that rounds.
        allow_lossy: leave out what the format cannot hold.
        names_of: the release of transformers whose module names are written: 5, or 4 (as in the
            base's files); both need the base.
        experts: how a PEFT folder stores experts: in stacked parameters, one by one, in a stack for
            each projection, or with the outer factors shared.
        peft_layout: the release of PEFT that will read stacked experts: 0.18, which has A on the
            outputs of most models, or 0.19.1 and later.
        for_: the program that will load the output, such as vllm, sglang, peft, unsloth, mlx or
            llamacpp; it chooses the format and the layout of experts.

    Raises:
        OptionError: scales are to be kept and moved.
    """

    to: str | None = option(None, heading="Output", metavar="FORMAT")
    dtype: str | None = option(
        None, heading="Computing", aliases=("--outtype",), metavar="DTYPE", parse=dtype_name
    )
    set_: tuple[tuple[str, str], ...] = option(
        (), heading="Output", aliases=("--metadata",), metavar="KEY=VALUE", parse=key_value
    )
    keep_alpha: bool = option(False, heading="Computing")
    fold_alpha: bool = option(False, heading="Computing")
    allow_lossy: bool = option(False, heading="Output")
    names_of: Literal["4", "5"] | None = option(None, heading="Output")
    experts: Literal["stacked", "each", "3d", "shared-outer"] | None = option(
        None, heading="Output"
    )
    peft_layout: PeftLayout | None = option(None, heading="Output")
    for_: str | None = option(None, heading="Output", metavar="PROGRAM")

    def __post_init__(self) -> None:
        if self.for_ is not None and self.experts is not None:
            raise OptionError("`for_` chooses the layout of experts: leave out `experts`")
        if self.keep_alpha and self.fold_alpha:
            raise OptionError("`keep_alpha` and `fold_alpha` exclude each other")

    @property
    def alpha(self) -> Literal["exact", "fold", "keep"]:
        """What becomes of scales, as `SingleFileOptions` says it."""
        return "keep" if self.keep_alpha else "fold" if self.fold_alpha else "exact"


@dataclass(frozen=True)
class SingleFileOptions:
    """How to write or read single-file adapters, whose names need resolving.

    Attributes:
        names: names of an architecture in single files: ace_step15, auraflow, chroma, cosmos2,
            flux1, flux2, hidream, hunyuan_video, hunyuan_video15, ideogram4, krea2, ltx2,
            ltx_video, lumina2, qwen_image, qwen_image21, sd1, sd3, sdxl, wan2, wan_animate2,
            z_image, or a FILE.toml of yours.
        names_from: an adapter with dotted names, by which flattened names are translated.
        component: the part of a pipeline to take, or the part that names without a component belong
            to.
        alpha: what becomes of scales: moved into the factors where that is `exact`, or always
            (`fold`), or never (`keep`).
        as_it_is: whether keys and scales stay as they are, since the naming does.
        strip_training_metadata: leave out what the metadata of single files says about the training
            data.
    """

    names: str | None = option(None, heading="Input", metavar="TABLE")
    names_from: Path | None = option(None, heading="Input", reference="adapter")
    component: str | None = option(None, heading="Input", metavar="NAME")
    alpha: Literal["exact", "fold", "keep"] = "exact"
    as_it_is: bool = False
    strip_training_metadata: bool = option(False, heading="Output")

    def record(self) -> dict[str, Any]:
        """Return the options that were given, for an output's provenance."""
        values = {
            "names": None if self.names is None else Path(self.names).name,
            "names_from": None if self.names_from is None else self.names_from.name,
            "component": self.component,
            "alpha": None if self.alpha == "exact" else self.alpha,
            "strip_training_metadata": self.strip_training_metadata or None,
        }
        return {key: value for key, value in values.items() if value is not None}
