"""What PEFT leaves out when it loads a folder, though the file holds it.

PEFT makes its layers from the configuration before it loads tensors, and drops those which belong
to no layer with a warning. Source: `check_target_module_exists` in peft/tuners/tuners_utils.py and
`set_peft_model_state_dict` in peft/utils/save_and_load.py, 0.21.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loratools_formats.checkpoints.checkpoint import config_of
from loratools_formats.checkpoints.facts import DEFAULT_HEAD, is_vocabulary
from loratools_formats.contract.format import Loss
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.file_names import ADAPTER_CONFIG
from loratools_formats.core.findings import Finding
from loratools_formats.core.peft_facts import ALL_LINEAR, refused_modules
from loratools_formats.disk.errors import AdapterError, and_more
from loratools_formats.formats.peft import keys
from loratools_formats.formats.peft.patterns import is_plain, match_patterns, matching

_LAYER_NUMBER = re.compile(r".*\.[^.]*\.(\d+)\.")
_SLOW_PATTERNS = 16
"""Most regular expressions that are matched one by one, each in a process of its own."""


def loading_findings(adapter: Adapter) -> list[Finding]:
    """Return the modules that PEFT makes no layer for, and the patterns that match no module."""
    values = adapter.config
    names = {
        keys.setting_name(path): path
        for path, change in adapter.modules.items()
        if not change.layer.parameters
    }
    found: list[Finding] = []
    try:
        missed = (
            [name for name, path in names.items() if not _is_linear(adapter, path)]
            if values.get("target_modules") == ALL_LINEAR
            else _not_targeted(values, list(names))
        )
    except AdapterError as error:
        text = f"it is not known whether target_modules names every module: {error.message}"
        return [Finding("targets-unclear", "note", "target_modules", text)]
    if missed:
        paths = [names[name] for name in missed]
        text = (
            f"PEFT makes no layer for {and_more(paths)} and drops the tensors, since "
            f"{_chooser(values)} in {ADAPTER_CONFIG} leaves it out"
        )
        hint = "Name the modules in target_modules"
        found.append(Finding("not-targeted", "error", paths[0], text, hint))
    return [*found, *_targets_without_tensors(values, list(names)), *_unmatched(adapter)]


def _is_linear(adapter: Adapter, path: str) -> bool:
    """Return whether PEFT counts a module among all linear ones."""
    kind = adapter.modules[path].layer.kind
    return kind not in ("embedding", "conv") and path.rpartition(".")[2] != DEFAULT_HEAD


def refused_in(base: Path, modules: Iterable[str]) -> list[Loss]:
    """Return the modules that PEFT refuses to adapt in a base model."""
    kind = config_of(base).get("model_type")
    reason = f"would be refused by PEFT, which adapts no module of that name in {kind}"
    remedy = "Take such modules out with `drop`"
    return [Loss(name, reason, remedy) for name in refused_modules(kind, modules)]


def _not_targeted(values: Mapping[str, Any], names: list[str]) -> list[str]:
    """Return the modules that the configuration does not choose, in order.

    Raises:
        AdapterError: a regular expression is broken, too long or too slow.
    """
    target = values.get("target_modules")
    if target is None or values.get("layers_pattern"):
        return []
    chosen = _named(target, names)
    excluded = _named(values.get("exclude_modules") or [], names)
    numbers = values.get("layers_to_transform")
    if numbers not in (None, []) and not isinstance(target, str):
        wanted = numbers if isinstance(numbers, list) else [numbers]
        listed = {each for each in target if isinstance(each, str)}
        chosen = {name for name in chosen if name in listed or _number(name) in wanted}
    missed = [name for name in names if name not in chosen or name in excluded]
    # PEFT then makes a layer for the other end of a tied embedding, too.
    if values.get("ensure_weight_tying") and any(is_vocabulary(name) for name in chosen):
        return [name for name in missed if not is_vocabulary(name)]
    return missed


def _named(what: Any, names: list[str]) -> set[str]:
    """Return the names that a regular expression matches whole, or that end in a listed name."""
    if isinstance(what, str):
        return set(match_patterns({f"^(?:{what})": 1}, names, None))
    listed = {each for each in what if isinstance(each, str)}
    return {name for name in names if not listed.isdisjoint(_ends(name))}


def _ends(name: str) -> Iterator[str]:
    """Yield a name, and what of it follows each dot."""
    yield name
    for dot in re.finditer(r"\.", name):
        yield name[dot.end() :]


def _number(name: str) -> int | None:
    match = _LAYER_NUMBER.match(name)
    return None if match is None else int(match[1])


def _chooser(values: Mapping[str, Any]) -> str:
    given = [key for key in ("exclude_modules", "layers_to_transform") if values.get(key)]
    return " with ".join(["target_modules", *given])


def _targets_without_tensors(values: Mapping[str, Any], names: list[str]) -> list[Finding]:
    target = values.get("target_modules")
    if not isinstance(target, list) or values.get("target_parameters"):
        return []
    there = {end for name in names for end in _ends(name)}
    idle = sorted(each for each in target if isinstance(each, str) and each not in there)
    if not idle:
        return []
    text = f"target_modules names {', '.join(idle[:4])}, and the file has no module of that name"
    return [Finding("target-without-tensors", "note", "target_modules", text)]


def _unmatched(adapter: Adapter) -> list[Finding]:
    names = [
        name
        for path, change in adapter.modules.items()
        for name in change.layer.parameters or (keys.setting_name(path),)
    ]
    found = []
    for key in ("rank_pattern", "alpha_pattern"):
        given = adapter.config.get(key)
        patterns = list(given) if isinstance(given, dict) else []
        plain = [each for each in patterns if is_plain(each)]
        slow = [each for each in patterns if not is_plain(each)][:_SLOW_PATTERNS]
        matched = matching([*plain, *slow], names)
        idle = [each for each in (*plain, *slow) if each not in matched]
        if idle:
            text = f"{key} has patterns that match no module: {', '.join(idle[:4])}"
            found.append(Finding("pattern-unmatched", "warning", key, text))
    return found
