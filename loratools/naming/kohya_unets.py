"""Files with kohya's names of a UNet, as Stable Diffusion 1, 2 and XL have it.

diffusers looks for the alphas of such files by names that its own converter does not give them.
Attention, and parts of the text encoders, get the alpha that most modules of their component have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_COMPONENT = re.compile(r"lora_[a-z0-9]+_")
_OF_UNETS = re.compile(
    r"lora_unet_((input|output|down|up)_blocks|mid(dle)?_block|conv_(in|out)|out_2|time_emb"
    r"|label_emb|add_emb)"
)


def component(name: str) -> str:
    """Return the part of a module's name that says whether it is of the UNet or a text encoder.

    >>> component("lora_unet_mid_block_attentions_0_proj_in"), component("proj_in")
    ('lora_unet_', '')
    """
    found = _COMPONENT.match(name)
    return "" if found is None else found[0]


def is_of_a_unet(names: Iterable[str]) -> bool:
    """Return whether the names of a kohya file fit a UNet, which may have text encoders beside it.

    >>> is_of_a_unet(["lora_unet_mid_block_attentions_0_proj_in"]), is_of_a_unet(["lora_unet_x"])
    (True, False)
    """
    return all(_OF_UNETS.match(name) for name in names if name.startswith("lora_unet_"))
