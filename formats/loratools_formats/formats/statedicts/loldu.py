"""LoLDU's state dicts: trained vectors alone, or parametrisations with all they hold; read only.

A file of vectors leaves alpha and the method of initialisation to be given. A whole state dict says
all, beside the base; the weights of other modules have to be left out of it.
Source: `minloldu/` of SKDDJ/LoLDU 4fe87a0.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from loratools_formats.contract.registry import Format
from loratools_formats.formats.statedicts.statedict import SUFFIXES, StateDict, has_names

if TYPE_CHECKING:
    from loratools_formats.core.adapter import Adapter, Delta

_PARTS = {
    "original": "residual",
    "0.vector_z": "z",
    "0.lora_A": "upper",
    "0.lora_B": "lower",
    "0.P": "permutation",
    "0.scaling_factor": "scale",
    "0.layer_weights": "copy",
    "0.lora_dropout_mask": "mask",
}
_WHOLE = frozenset(_PARTS.values()) - {"copy", "mask"}
_KEY = re.compile(
    rf"(?P<module>.+)\.parametrizations\.weight\.(?P<part>{'|'.join(map(re.escape, _PARTS))})"
)
_TELLING = re.compile(rb".+\.parametrizations\.weight\.0\.vector_z")
_INITS = ("lu", "s_uniform", "s_normal", "ones", "zeros", "constant")


def _sniff(path: Path) -> bool:
    return has_names(path, _TELLING, safetensors=True)


def _read(path: Path) -> Adapter:
    from loratools_formats.core.adapter import Missing, OtherDelta

    state = StateDict(path)
    own = state.by_module(_KEY, _PARTS, "names with .parametrizations.weight. in them")
    modules: dict[str, Delta] = {}
    for module, parts in own.items():
        state.check_factors({part: parts[part] for part in parts if part == "z"}, 1)
        if set(parts) == {"z"}:
            settings = {
                "alpha": Missing("the lora_alpha of the training script"),
                "init_method": Missing(
                    f"{', '.join(_INITS)}; after uniform or normal the random start is lost",
                    choices=_INITS,
                ),
            }
            modules[module] = OtherDelta("loldu", parts, settings)
        elif set(parts) >= _WHOLE:
            state.check_factors({"residual": parts["residual"]})
            state.check_number(parts["scale"])
            out, in_ = parts["residual"].shape
            modules[module] = OtherDelta("loldu_full", parts, shape=(out, in_))
        else:
            raise state.lacking(module, parts, "vector_z alone, or all of the parametrisation")
    return state.adapter(FORMAT.name, modules)


FORMAT = Format(
    name="loldu",
    description="state dict of LoLDU",
    suffixes=SUFFIXES,
    is_folder=False,
    sniff=_sniff,
    read=_read,
)
