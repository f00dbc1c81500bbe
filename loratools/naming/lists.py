"""Lists of dotted module names, with which flattened ones can be looked up.

They come from a checkpoint's headers, from another adapter, or from the map that files of ours
carry. Flattening the list and looking up is the only way back that guesses nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from loratools.naming.bare_base import told_component
from loratools.naming.tables import flattened
from loratools_formats.checkpoints.checkpoint import CONFIG_FILE, checkpoint_names
from loratools_formats.checkpoints.pipelines import ADAPTED, is_pipeline, pipeline_names
from loratools_formats.contract.files import read_adapter
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.single_file_keys import parse
from loratools_formats.disk import strict_json
from loratools_formats.disk.errors import AdapterError, OptionError
from loratools_formats.disk.strict_json import parsed_object, read_object

MAP_KEY = "loratools.module_map"
_PROBE = ".lora_A.weight"
_MOST_JSON_BYTES = 64 << 20
CHECKPOINT_PREFIX = "model.diffusion_model."
_FLAT_PREFIXES = {
    "unet.": ("lora_unet_", "lycoris_"),
    "transformer.": ("lora_transformer_", "lora_unet_", "lora_unet__", "lycoris_"),
    "transformer_2.": ("lora_unet_", "lora_unet__"),
    "diffusion_model.": ("lora_unet_", "lora_unet__", "lycoris_", "lora_transformer_"),
    "prior.": ("lora_prior_",),
    "decoder.": ("lora_decoder_",),
    "text_encoder.": ("lora_te_", "lora_te1_"),
    "text_encoder_2.": ("lora_te2_", "lora_te3_"),
    "text_encoder_3.": ("lora_te3_",),
}


def embedded_map(adapter: Adapter) -> dict[str, str]:
    """Return the map from flattened to dotted names that a file of ours carries; empty if none.

    Raises:
        AdapterError: it is not such a map.
    """
    text = adapter.metadata.get(MAP_KEY)
    if text is None:
        return {}
    values = parsed_object(text.encode(), MAP_KEY, path=adapter.source, max_depth=2)
    if not all(isinstance(v, str) for v in values.values()):
        raise AdapterError(f"metadata {MAP_KEY} is not a map of names", path=adapter.source)
    return {name: dotted for name, dotted in values.items() if _is_flattened(name, dotted)}


def _is_flattened(name: str, dotted: str) -> bool:
    """Return whether a name is another one flattened, which a map of names must not contradict."""
    flat, full = parse(name + _PROBE), parse(dotted + _PROBE)
    if flat is None or full is None or not flat.flat:
        return False
    return flat.path == flattened(full.path)


def as_metadata(names: Mapping[str, str]) -> dict[str, str]:
    """Return a map from flattened to dotted names as metadata."""
    return {
        MAP_KEY: strict_json.dumps(
            dict(names), sort_keys=True, separators=(",", ":"), ensure_ascii=True
        )
    }


def names_of_base(path: Path, component: str | None) -> list[str]:
    """Return the module names of a checkpoint, with a component before them.

    Args:
        path: checkpoint file or folder, or an index; of files only headers need be there.
        component: what to put before paths; not needed where the checkpoint's own names tell.

    Raises:
        OptionError: a component is needed.
        AdapterError: no sound checkpoint.
    """
    if path.name in ADAPTED and is_pipeline(path.parent):
        path = path.parent  # the other components tell the architecture
    if is_pipeline(path):
        return sorted({key.rpartition(".")[0] for key in pipeline_names(path)})
    names = checkpoint_names(path)
    modules = sorted({key.rpartition(".")[0] for key in names if key.count(".")})
    for prefix in (CHECKPOINT_PREFIX, "diffusion_model."):
        below = [m.removeprefix(prefix) for m in modules if m.startswith(prefix)]
        if below:
            return [f"diffusion_model.{module}" for module in below]
    config = path / CONFIG_FILE
    values = read_object(config, _MOST_JSON_BYTES, max_depth=None) if config.is_file() else {}
    component = component or told_component(modules, values)
    if component is None:
        raise OptionError(
            "the base checkpoint does not say which component of a pipeline it is",
            path=path,
            hint="Pass `component`, such as unet, transformer or diffusion_model",
        )
    return [f"{component}.{module}" for module in modules]


def names_of_adapter(path: Path) -> list[str]:
    """Return the dotted module names of another adapter.

    Raises:
        OptionError: it has none.
        AdapterError: no sound adapter.
    """
    other = read_adapter(path)
    dotted = [name for name in other.modules if "." in name]
    dotted += embedded_map(other).values()
    if not dotted:
        raise OptionError("the adapter has no dotted names", path=path)
    return dotted


def looked_up(
    names: Iterable[str], dotted: Iterable[str], known: Mapping[str, str]
) -> dict[str, str]:
    """Return the dotted name of each flattened one that is in a list or a map.

    Args:
        names: module names, flattened or not.
        dotted: a list of dotted names, components included.
        known: a map from flattened to dotted names, which comes first.

    Raises:
        AdapterError: two names of the list are the same when flattened.
    """
    table: dict[str, set[str]] = {}
    for name in dotted:
        for component, prefixes in _FLAT_PREFIXES.items():
            if name.startswith(component):
                path = flattened(name.removeprefix(component))
                for prefix in prefixes:
                    table.setdefault(prefix + path, set()).add(name)
    result = {}
    for name in names:
        found = {known[name]} if name in known else table.get(name, set())
        if len(found) > 1:
            raise AdapterError(
                "several names are the same when flattened",
                tensor=name,
                got=", ".join(sorted(found)),
            )
        if found:
            result[name] = next(iter(found))
    return result
