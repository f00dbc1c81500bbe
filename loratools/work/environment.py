"""What of a machine may change the last bits of a result: libraries, the BLAS and its kernel.

Sums of products are rounded in an order that BLAS chooses by the processor, so that equal inputs
and options may differ in their last bits elsewhere. A record keeps these facts; metadata of weight
files does not, since results that agree would then differ in what they say of themselves.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from importlib import import_module

_PACKAGES = ("numpy", "ml_dtypes")
_WORDS = {
    "python": "Python",
    "system": "operating system",
    "machine": "processor family",
    "blas": "BLAS",
    "kernel": "BLAS kernel, which the processor decides",
}


def environment(*, with_torch: bool = False) -> dict[str, str]:
    """Return the facts, by name: versions, operating system, processor family, BLAS and kernel.

    Torch is one of them where it computed, not wherever a process happens to have loaded it.
    """
    from threadpoolctl import threadpool_info

    facts = {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        **{name: str(import_module(name).__version__) for name in _PACKAGES},
    }
    if with_torch and "torch" in sys.modules:
        facts["torch"] = str(sys.modules["torch"].__version__)
    numeric = [info for info in threadpool_info() if info.get("user_api") == "blas"]
    ours = [info for info in numeric if "numpy" in str(info.get("filepath"))] or numeric
    if ours:
        facts["blas"] = f"{ours[0].get('internal_api')} {ours[0].get('version')}"
        facts["kernel"] = str(ours[0].get("architecture") or "unknown")
    return facts


def differences(recorded: Mapping[str, str], here: Mapping[str, str]) -> tuple[str, ...]:
    """Return a sentence part for each fact that differs.

    >>> differences({"numpy": "2.0", "kernel": "Haswell"}, {"numpy": "2.1", "kernel": "Haswell"})
    ('numpy: 2.0 then, 2.1 here',)
    """
    return tuple(
        f"{_WORDS.get(name, name)}: {recorded.get(name, 'not recorded')} then, "
        f"{here.get(name, 'none')} here"
        for name in sorted({*recorded, *here})
        if recorded.get(name) != here.get(name) and (name in recorded or name != "torch")
    )
