"""Single files of different namings brought into the first one's before they are merged.

Names are resolved as `convert` does, by tables and the maps that files carry, and by nothing else:
where they do not lead to one naming, nothing is merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratools.merge.align import MergeInput
from loratools.naming.rename import NamingOptions, renamed
from loratools_formats.errors import LoratoolsError
from loratools_formats.singlefile.write import SINGLE_FILES


def in_one_naming(inputs: Sequence[MergeInput]) -> list[MergeInput]:
    """Return the inputs with the module names of the first.

    Raises:
        AdapterError: names that nothing resolves.
        OptionError: names that fit several architectures, or have no component.
    """
    formats = [item.adapter.format for item in inputs]
    target = next((name for name in SINGLE_FILES if name in formats[:1]), None)
    if target is None or target == "safetensors":
        return list(inputs)
    result = [inputs[0]]
    for item in inputs[1:]:
        adapter = item.adapter
        if adapter.format not in SINGLE_FILES or adapter.format == target:
            result.append(item)
            continue
        try:
            named = renamed(adapter, target, NamingOptions()).adapter
        except LoratoolsError as error:
            error.hint = (
                f"It is a {adapter.format} file and the first a {target} file; bring it into that "
                "naming first: loratools convert, with --names, --names-from or --base"
            )
            raise
        result.append(replace(item, adapter=named))
    return result
