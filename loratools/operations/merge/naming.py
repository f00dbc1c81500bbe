"""Bring single files of different namings into the naming of the first before a merge.

Names are resolved as `convert` does, by tables and the maps that files carry, and by nothing else:
where they do not lead to one naming, nothing is merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratools.naming.places import module_key
from loratools.naming.rename import NamingOptions, renamed
from loratools.naming.together import in_one_spelling
from loratools.operations.merge.align import MergeInput
from loratools_formats.contract.commands import command_on
from loratools_formats.contract.registry import get_format
from loratools_formats.disk.errors import AdapterError, LoratoolsError


def in_one_naming(inputs: Sequence[MergeInput]) -> list[MergeInput]:
    """Return the inputs with the module names of the first.

    Raises:
        AdapterError: names that nothing resolves, or a component of which adapters share nothing.
        OptionError: names that fit several architectures, or have no component.
    """
    target = get_format(inputs[0].adapter.format).naming if inputs else None
    if target is None:
        return list(inputs)
    single = [item for item in inputs if get_format(item.adapter.format).naming is not None]
    alike = in_one_spelling([item.adapter for item in single])
    if alike is not None:
        spelled = iter(alike)
        inputs = [
            item
            if get_format(item.adapter.format).naming is None
            else replace(item, adapter=next(spelled))
            for item in inputs
        ]
        return _with_shared_components(inputs)
    if target == "safetensors":
        return _with_shared_components(inputs)
    result = [inputs[0]]
    for item in inputs[1:]:
        adapter = item.adapter
        if get_format(adapter.format).naming in (None, target):
            result.append(item)
            continue
        try:
            named = renamed(adapter, target, NamingOptions()).adapter
        except LoratoolsError as error:
            error.hint = (
                f"It is a {adapter.format} file and the first a {target} file; bring it into that "
                "naming first, with `names`, `names_from` or `base`: "
                + command_on(adapter, "convert", f"--to {target} --names TABLE", output="renamed")
            )
            raise
        result.append(replace(item, adapter=named))
    return _with_shared_components(result)


def _with_shared_components(inputs: Sequence[MergeInput]) -> list[MergeInput]:
    """Return the inputs, whose parts of a pipeline are adapted by more than one alike.

    Adapters of different architectures may share a text encoder, and nothing else.
    """
    found = [_by_component(item) for item in inputs]
    for index, (item, components) in enumerate(zip(inputs, found, strict=True)):
        for component, names in components.items():
            others = [f[component] for i, f in enumerate(found) if i != index and component in f]
            if others and not names & set().union(*others):
                raise AdapterError(
                    "an adapter shares no module of a component with the others",
                    path=item.adapter.source,
                    got=min(names),
                    expected=f"such as {min(others[0])}",
                    hint="Are they adapters of the same model?",
                )
    return list(inputs)


def _by_component(item: MergeInput) -> dict[str, set[str]]:
    components: dict[str, set[str]] = {}
    for name in item.adapter.modules:
        key = module_key(name)
        components.setdefault("" if key is None else key.prefix, set()).add(name)
    return components
