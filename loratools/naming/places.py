"""Where a module's name stands in a table, and what a module there is called in a naming."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace
from typing import Literal

from loratools.naming.tables import Place, Scheme, Shape, Table, TextEncoder, filled, flattened
from loratools_formats.core.single_file_keys import COMPONENTS, Key, Naming, parse
from loratools_formats.disk.errors import OptionError


@dataclass(frozen=True)
class FileSpelling:
    """How one file spells its modules, where that differs from file to file of one naming.

    Attributes:
        naming: the class of the file.
        scheme: the naming of the architecture that its paths are of.
        prefix: what stands before them; a component stands for all components.
        flat: whether they are flattened.
        text_prefixes: what stands before the paths of text encoders, by role, where it has some.
    """

    naming: Naming
    scheme: Scheme
    prefix: str
    flat: bool
    text_prefixes: tuple[tuple[str, str], ...] = ()


Target = Naming | Literal["bare"] | FileSpelling
"""A naming of single files, or `bare`: paths within one component, as other formats have them; or
the spelling of a file."""

_PROBE = ".lora_A.weight"
OWN_PREFIXES = ("text_embedding_projection.",)
"""Prefixes of original names that are no denoiser's: LTX-2's projection of text."""
TEXT_PREFIXES = ("lora_te", "text_encoder")
_OUTER = "text_model."


@dataclass(frozen=True)
class TextPlace:
    """A module of a text encoder."""

    role: str
    encoder: TextEncoder
    path: str


@functools.lru_cache(maxsize=1 << 14)
def module_key(name: str) -> Key | None:
    """Return a module name's parts, None if it is no name of a single file's module."""
    key = parse(name + _PROBE)
    return None if key is None or key.module != name else key


def schemes_of(key: Key) -> tuple[Scheme, ...]:
    """Return the schemes that a module's path may belong to, by its prefix.

    ai-toolkit puts `diffusion_model.` before the paths of diffusers' Z-Image.
    """
    if key.naming == "diffusers" or key.prefix == "lora_transformer_":
        return ("diffusers",)
    return ("original", "trained", "diffusers")


def original_spelling(name: str, table: Table) -> str | None:
    """Return a name of diffusers' prefix with that of original names; None if it has another.

    An original path may begin as a component of another pipeline is called: `decoder.` of ACE-Step.

    >>> from loratools.naming.tables import find_table
    >>> original_spelling("transformer.double_blocks.0.img_attn_qkv", find_table("hunyuan_video"))
    'diffusion_model.double_blocks.0.img_attn_qkv'
    """
    key = module_key(name)
    if key is None or table.unmixed or schemes_of(key) != ("diffusers",):
        return None
    if key.flat:
        return f"lora_unet_{key.path}" if table.component == "transformer" else None
    if key.prefix.partition(".")[0] in table.components:
        return f"diffusion_model.{key.path}"
    is_path = table.locate(name, flat=False, schemes=("original",)) is not None
    return f"diffusion_model.{name}" if is_path else None


def located(name: str, table: Table, shape: Shape = (None, None)) -> Place | TextPlace | None:
    """Return where a module's name stands in a table or its text encoders, None if nowhere.

    Args:
        name: of the module, with its component.
        table: of an architecture.
        shape: of its weight, whose proportions the table may tell.
    """
    key = module_key(name)
    if key is None:
        return None
    for role, encoder in table.text_encoders.items():
        prefixes = (
            encoder.kohya,
            *encoder.also,
            f"{role}.",
            f"text_encoders.{encoder.comfyui}.",
        )
        if key.prefix.startswith(prefixes):
            path = _text_path(key, encoder)
            if path is None and not key.flat:
                path = key.path
            return None if path is None else TextPlace(role, encoder, path)
    if key.prefix.startswith(TEXT_PREFIXES):
        return None
    component = key.prefix.partition(".")[0] if key.naming == "diffusers" else ""
    path = key.prefix + key.path if key.prefix in OWN_PREFIXES else key.path
    schemes = schemes_of(key)
    if table.unmixed and "original" in schemes:
        schemes = ("original",)
    for other in ("", *table.other_components):
        own = component in table.components if not other else component == other
        if component and not own:
            continue
        place = table.locate(path, flat=key.flat, schemes=schemes, shape=shape, component=other)
        if place is not None:
            return replace(place, component=other or component)
    return None


def is_located(name: str, table: Table) -> bool:
    """Return whether a module's name stands in a table, in one place or several.

    What the shape of its weight would tell apart is not asked.
    """
    try:
        return located(name, table) is not None
    except OptionError:
        return True


def _text_path(key: Key, encoder: TextEncoder) -> str | None:
    """Return a module's path in a text encoder, None if it is none of those known.

    transformers 5 dropped the outer module of CLIP's paths, which other loaders expect.
    """
    for pattern in encoder.paths:
        for spelled in (
            pattern,
            pattern.removeprefix(_OUTER),
            pattern.removeprefix(encoder.outer),
        ):
            text = re.escape(flattened(spelled) if key.flat else spelled)
            found = re.fullmatch(text.replace(re.escape("{}"), r"(\d{1,4})"), key.path)
            if found is not None:
                return filled(pattern, found.groups())
    return None


def names_at(place: Place, target: Target, table: Table) -> list[str]:
    """Return what the modules at a place are called in the target."""
    scheme = target_scheme(target, table)
    names = place.row.names(scheme)
    if len(names) == len(place.row.parts):
        names = tuple(names[part] for part in place.covered)
    paths = [filled(name, place.numbers) for name in names]
    return [prefixed(path, target, place.component or table.component) for path in paths]


def target_scheme(target: Target, table: Table) -> Scheme:
    """Return which of an architecture's namings a target uses."""
    if isinstance(target, FileSpelling):
        return target.scheme
    if target == "kohya":
        return table.kohya
    return "original" if target == "comfyui" else "diffusers"


def prefixed(path: str, target: Target, component: str) -> str:
    """Return a module's name in the target, which has the component only if it is diffusers'."""
    is_flat = target.flat if isinstance(target, FileSpelling) else target == "kohya"
    if path.startswith(OWN_PREFIXES) and not is_flat:
        return path
    if isinstance(target, FileSpelling):
        has_component = target.prefix.removesuffix(".") in COMPONENTS
        prefix = f"{component}." if has_component else target.prefix
        return prefix + (flattened(path) if target.flat else path)
    if target == "kohya":
        return f"lora_unet_{flattened(path)}"
    return f"diffusion_model.{path}" if target == "comfyui" else f"{component}.{path}"


def dotted_name(path: str, component: str, scheme: Scheme) -> str:
    """Return a module's name with its component, dotted."""
    if path.startswith(OWN_PREFIXES):
        return path
    return f"{component}.{path}" if scheme == "diffusers" else f"diffusion_model.{path}"


def text_name(text: TextPlace, target: Target) -> str:
    """Return what a text encoder's module is called in the target."""
    inner = text.path.removeprefix(text.encoder.outer)
    if isinstance(target, FileSpelling):
        prefix = dict(target.text_prefixes).get(text.role)
        if prefix is not None and prefix.startswith("text_encoders."):
            return prefix + text.path
        if prefix is not None:
            return prefix + (inner if prefix.endswith(".") else flattened(inner))
        target = target.naming if target.naming != "safetensors" else "diffusers"
    if target == "kohya":
        return text.encoder.kohya + flattened(inner)
    if target == "comfyui":
        return f"text_encoders.{text.encoder.comfyui}.transformer.{text.path}"
    return f"{text.role}.{inner}"
