"""Every kind of adapter other than plain factors, one file each; this is the registry.

Adding a kind: a file with its `KIND`, a name in `_MODULES`, a reader that hands out
`KindDelta(kind=name, …)`, and a golden fixture.
"""

from __future__ import annotations

from importlib import import_module

from loratools.kinds.declaration import Kind
from loratools_formats.disk.errors import UnsupportedError

_MODULES = (
    "adalora",
    "adamss",
    "bias",
    "blockdiag",
    "boft",
    "butterfly_oft",
    "c3a",
    "deft",
    "delora",
    "diag_oft",
    "fourierft",
    "frod",
    "full",
    "gated",
    "glora",
    "gralora",
    "hira",
    "hra",
    "ia3",
    "increlora",
    "kasa",
    "loha",
    "lokr",
    "loldu",
    "loldu_full",
    "loralib",
    "lorat",
    "lycoris_glora",
    "lycoris_ia3",
    "megatron",
    "middle",
    "miss",
    "miss_bat",
    "oft",
    "osf",
    "peanut",
    "psoft",
    "qalora",
    "randlora",
    "randlora_authors",
    "road",
    "sparse",
    "tinylora",
    "token_rows",
    "torchtune",
    "tucker",
    "unilora",
    "unscaled",
    "vblora",
    "vera",
    "waveft",
)


def get_kind(name: str) -> Kind:
    """Return a kind's declaration.

    Raises:
        UnsupportedError: there is none of that name.
    """
    if name not in _MODULES:
        raise UnsupportedError(
            "kind of weight change is not known", got=name, expected=", ".join(_MODULES)
        )
    kind: Kind = import_module(f"loratools.kinds.{name}").KIND
    return kind


def all_kinds() -> tuple[Kind, ...]:
    """Return every declaration, by name."""
    return tuple(get_kind(name) for name in _MODULES)
