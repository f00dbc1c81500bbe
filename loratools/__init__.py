"""Tools for LoRA adapter files: exact operations on the true weight change ΔW, in factor space.

>>> import loratools as lt
>>> lt.squeeze("examples/tiny-llama/lora", rank=8).modules[0].rank_out
8

Every function takes a path or an `Adapter` and options by name, and returns a frozen result; it
writes nothing unless `output` is given. Functions are imported when they are first used, so that
importing this package imports nothing else; `loratools/__init__.pyi` has their signatures.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "loratools.face.check": ("check", "rule"),
    "loratools.face.compare": ("compare", "compare_bases"),
    "loratools.face.convert": ("convert", "write"),
    "loratools.face.dequantize": ("dequantize",),
    "loratools.face.extract": ("extract", "extract_choices"),
    "loratools.face.fleet_index": ("fleet_dedup", "fleet_index", "fleet_similar"),
    "loratools.face.fleet_share": ("fleet_add", "fleet_share", "fleet_unshare"),
    "loratools.face.fuse": ("fuse",),
    "loratools.face.info": ("info", "read"),
    "loratools.face.info_base": ("info_base",),
    "loratools.face.lists": ("formats", "methods"),
    "loratools.face.merge": ("merge",),
    "loratools.face.plan_squeeze": ("plan_squeeze",),
    "loratools.face.provenance": ("provenance",),
    "loratools.face.push": ("push",),
    "loratools.face.quantize": ("quantize",),
    "loratools.face.repair": ("repair",),
    "loratools.face.spectrum": ("spectrum",),
    "loratools.face.squeeze": ("squeeze", "squeeze_choices"),
    "loratools.face.tensors": ("delta", "factors", "from_factors"),
    "loratools.face.to_dora": ("to_dora",),
    "loratools.face.to_lora": ("to_lora", "to_lora_choices"),
    "loratools.face.verify": ("verify",),
    "loratools.pipeline.fleet.run": ("fleet",),
    "loratools.pipeline.replay": ("replay",),
    "loratools.pipeline.run": ("run",),
    "loratools_formats.core.adapter": ("Adapter",),
    "loratools_formats.disk.errors": ("LoratoolsError",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]  # noqa: PLE0604 - names of the table


def __getattr__(name: str) -> object:
    if name == "training":  # needs torch, peft and transformers
        return import_module("loratools.training")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
