"""Whether a base model is the one that an adapter names; names are all there is to go by."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loratools_formats.checkpoints.checkpoint import CONFIG_FILE, Checkpoint
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.file_names import WRITTEN_ENDINGS
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import printable
from loratools_formats.disk.hub_cache import shown_name
from loratools_formats.disk.strict_json import read_object

_MAX_CONFIG_BYTES = 16 << 20
_GENERIC = frozenset({"", "model", "diffusion-pytorch-model", "ggml-model"})
_PARTS = re.compile(r"[\\/]")


def about_base(adapters: Iterable[Adapter], base: Checkpoint | Path | None) -> tuple[Finding, ...]:
    """Return a note for each base that an adapter names and that is not the given one.

    A folder of the same name is the one named, and one whose name begins with it a variant of it,
    such as its four-bit weights. Names of another owner are one model.
    """
    if base is None:
        return ()
    path, config = (
        (base.path, base.config) if isinstance(base, Checkpoint) else (base, _config(base))
    )
    own = {key for key in map(_key, _names(path, config)) if key not in _GENERIC}
    named = dict.fromkeys(adapter.base_model for adapter in adapters if adapter.base_model)
    return tuple(
        Finding(
            "other-base",
            "note",
            None,
            f"the adapter names {printable(name)} as its base model, and the base given is "
            f"{printable(_shown(path))}; fitting shapes do not show that they are the same",
        )
        for name in named
        if not any(f"{key}-".startswith(f"{_key(name)}-") for key in own)
        and not (os.path.exists(name) and os.path.realpath(name) == os.path.realpath(path))
    )


def distinct_bases(names: Iterable[str | None]) -> list[str]:
    """Return the base models that are named, each once and in order.

    One path may be written in two ways, and a GGUF file records the last part of a local path only:
    that is no name of its own beside the path.

    >>> distinct_bases(["/models/llama", None, "/models/llama/", "llama", "org/other"])
    ['/models/llama', 'org/other']
    """
    named = {
        os.path.realpath(name) if os.path.exists(name) else name.rstrip("/\\"): name
        for name in sorted(filter(None, names), reverse=True)
    }
    owned = {_key(name) for name in named if _PARTS.search(name)}
    return sorted(n for path, n in named.items() if _PARTS.search(path) or _key(n) not in owned)


def _shown(path: Path) -> str:
    return shown_name(path)


def _config(base: Path) -> Mapping[str, Any]:
    file = base / CONFIG_FILE
    return read_object(file, _MAX_CONFIG_BYTES, max_depth=None) if file.is_file() else {}


def _names(path: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a base goes by: its folder, its file, its place in a hub's cache, its config."""
    recorded = config.get("_name_or_path")
    if isinstance(recorded, str):
        yield recorded
    for place in (path.absolute(), Path(os.path.realpath(path))):
        yield place.stem if place.suffix in (*WRITTEN_ENDINGS, ".json") else place.name
        if place.is_file():
            yield place.parent.name
        yield from (p.name.rpartition("--")[2] for p in place.parents if "--" in p.name)


def _key(name: str) -> str:
    last = _PARTS.split(name.rstrip("\\/"))[-1]
    return re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")
