"""What is worth telling about an adapter that is written, whichever operation made it."""

from __future__ import annotations

from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.findings import Finding


def about_output(adapter: Adapter) -> list[Finding]:
    """Return what its format tells of an adapter to be written, and what diffusers misreads."""
    found = get_format(adapter.format).writing_findings(adapter)
    if adapter.format != "kohya":
        return found
    from loratools.operations.check.kohya_names import about_alphas
    from loratools.operations.check.targets import known_targets

    lost = about_alphas(adapter, known_targets()["diffusers"])
    if lost is None:
        return found
    text = f"{lost.message}. Files of diffusers' own naming have no such fault"
    hint = "For diffusers: loratools convert OUTPUT --to diffusers -o converted.safetensors"
    return [*found, Finding("alpha-of-others", "warning", lost.where, text, hint)]
