"""Names of tensors as PEFT saves them, from names as training code leaves them in a state dict.

PEFT saves `base_model.model.<module>.lora_A.weight`. A state dict that was saved without it may
have wrappers in its names, other modules around the model, the adapter's own name, or no
`base_model.model.`; PEFT loads nothing of the last, in silence. What these names mean shows as long
as all of a file's names have the same thing in them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from loratools_formats.core.findings import Finding
from loratools_formats.core.peft_facts import PREFIX
from loratools_formats.core.tensors import TensorRef
from loratools_formats.core.wrapped_names import WRAPPERS, unwrapped
from loratools_formats.disk.errors import AdapterError, printable

_PARTS = (
    r"lora_[ABN]|lora_embedding_[ABN]|lora_magnitude_vector|lora_diag|hada_[wt]\w+|lokr_[wt]\w+|ia3_l"
    r"|oft_[a-z]\w*|boft_[a-z]\w*|vera_lambda_[bd]|randlora_\w+|hra_u|miss_\w+|bone_\w+"
    r"|trainable_tokens_delta"
)
_IN_MEMORY = re.compile(
    rf"(.+\.(?:{_PARTS}))\.(?!weight$|bias$|(?:{_PARTS})(?:\.|$))([^.]+)((?:\.weight|\.bias)?)"
)
_ON_DISK = re.compile(rf".+\.(?:{_PARTS})(?:\.weight|\.bias)?")
_SAVED_MODULE = re.compile(r"(.+)\.modules_to_save\.([^.]+)\.(.+)")
_SAVED_BARE = re.compile(r"(.+)\.modules_to_save\.(weight|bias)")
_WITHOUT_LEAF = ("lora_magnitude_vector", "trainable_tokens_delta")


def as_saved(
    tensors: Mapping[str, TensorRef], folder: Path
) -> tuple[dict[str, TensorRef], list[Finding]]:
    """Return tensors under the names that PEFT saves, with a note if they had others.

    Raises:
        AdapterError: the file holds several adapters, or two tensors of one name.
    """
    names = {name: name for name in tensors}
    seen: list[str] = []
    wrappers = sorted({part for name in names for part in name.split(".")} & WRAPPERS)
    if wrappers:
        seen += wrappers
        _apply(names, unwrapped)
    _without_head(names, seen)
    _without_adapter(names, seen, folder)
    _without_copies(names, seen)
    if all(not name.startswith(PREFIX) for name in names.values()) and any(
        _ON_DISK.fullmatch(name) for name in names.values()
    ):
        seen.append(f"no {PREFIX.removesuffix('.')}")
        _apply(names, lambda name: PREFIX + name)
    if not seen:
        return dict(tensors), []
    renamed: dict[str, TensorRef] = {}
    for old, new in names.items():
        if new in renamed:
            raise AdapterError(
                "two tensors have one name without wrappers", path=folder, tensor=new
            )
        renamed[new] = tensors[old]
    first = next(old for old, new in names.items() if old != new)
    text = (
        f"names are read without what training code left in them ({', '.join(seen)}); "
        "what is written has the names that PEFT saves"
    )
    return renamed, [Finding("wrapped-names", "note", printable(first), text)]


def _apply(names: dict[str, str], change: Callable[[str], str]) -> None:
    names.update({old: change(name) for old, name in names.items()})


def _without_head(names: dict[str, str], seen: list[str]) -> None:
    """Leave out what all names have around the model: before `base_model`, and DDP's after it."""
    heads = {name.partition(PREFIX)[0] if PREFIX in name else None for name in names.values()}
    if len(heads) == 1 and None not in heads and (head := str(heads.pop())):
        seen.append(printable(head.removesuffix(".")))
        _apply(names, lambda name: name.removeprefix(head))
    for head in ("module.", f"{PREFIX}module."):
        if names and all(name.startswith(head) for name in names.values()):
            seen.append("module")
            kept = head.removesuffix("module.")
            names.update({old: kept + name.removeprefix(head) for old, name in names.items()})
    while names and all(name.startswith(2 * PREFIX) for name in names.values()):
        seen.append(f"a second {PREFIX.removesuffix('.')}")  # of a PEFT model in a PEFT model
        _apply(names, lambda name: name.removeprefix(PREFIX))


def _without_copies(names: dict[str, str], seen: list[str]) -> None:
    """Give the trained copies of saved modules the names of the modules, where these are missing.

    Beside them they are repeated, and stay.
    """
    known = set(names.values())
    own: dict[str, str] = {}
    for name in known:
        match = _SAVED_MODULE.fullmatch(name) or _SAVED_BARE.fullmatch(name)
        if match is not None and (new := f"{match[1]}.{match[match.re.groups]}") not in known:
            own[name] = new
    if own:
        seen.append("modules_to_save")
        _apply(names, lambda name: own.get(name, name))


def _without_adapter(names: dict[str, str], seen: list[str], folder: Path) -> None:
    # PEFT puts the adapter's name into every part's name, or into none.
    if any(_ON_DISK.fullmatch(name) for name in names.values()):
        return
    found = {name: _IN_MEMORY.fullmatch(name) for name in names.values()}
    adapters = sorted({match[2] for match in found.values() if match is not None})
    if not adapters:
        return
    if len(adapters) > 1:
        raise AdapterError(
            "the file holds several adapters",
            path=folder,
            got=", ".join(map(printable, adapters[:4])),
            hint="Save each with PEFT: model.save_pretrained(PATH, selected_adapters=[NAME])",
        )

    def change(name: str) -> str:
        match = found[name]
        if match is not None:
            bare = match[1].rpartition(".")[2] in _WITHOUT_LEAF
            return match[1] if bare else match[1] + match[3]
        saved = _SAVED_MODULE.fullmatch(name)
        own = saved is not None and saved[2] == adapters[0]
        return f"{saved[1]}.{saved[3]}" if saved is not None and own else name

    seen.append(f"the adapter's name {printable(adapters[0])}")
    _apply(names, change)
