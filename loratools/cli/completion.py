"""What a shell completes after an option without a fixed list of values: formats, methods, types.

Click asks while the user types, so each list is made only then, from what is registered.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable

from click.shell_completion import CompletionItem

from loratools.work.declared import Option


def completions(option: Option, incomplete: str, command: str | None) -> list[CompletionItem]:
    """Return the values of a command's option that begin as what was typed, in any case."""
    if option.metavar is not None and option.metavar.startswith("ADAPTER"):
        return path_completions(None, None, incomplete)
    source = _SOURCES.get((option.name.rstrip("_"), bool(option.choices)))
    if source is _dtypes and command == "convert":
        source = _stored
    values: Iterable[tuple[str, str | None]]
    values = ((one, None) for one in option.choices) if source is None else source()
    return _beginning(incomplete, values)


def rule_completions(context: object, parameter: object, incomplete: str) -> list[CompletionItem]:
    """Return the codes of rules that begin as what was typed."""
    typed = incomplete.upper()
    return [CompletionItem(code, help=text) for code, text in _rules() if code.startswith(typed)]


def method_completions(context: object, parameter: object, incomplete: str) -> list[CompletionItem]:
    """Return the merge methods that begin as what was typed."""
    return _beginning(incomplete, _methods())


def format_completions(context: object, parameter: object, incomplete: str) -> list[CompletionItem]:
    """Return the formats that begin as what was typed."""
    return _beginning(incomplete, _formats("name"))


def _beginning(incomplete: str, values: Iterable[tuple[str, str | None]]) -> list[CompletionItem]:
    typed = incomplete.lower()
    return [
        CompletionItem(name, help=text) for name, text in values if name.lower().startswith(typed)
    ]


def path_completions(context: object, parameter: object, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete a path, of an argument that may have more behind it (`:0.5`)."""
    return [CompletionItem(incomplete, type="file")]


def _readable() -> list[tuple[str, str | None]]:
    return _formats("is_readable")


def _writable() -> list[tuple[str, str | None]]:
    return _formats("is_writable")


def _formats(ability: str) -> list[tuple[str, str | None]]:
    from loratools_formats.contract.registry import registered_formats

    return [
        (entry.name, entry.format.description)
        for entry in registered_formats()
        if entry.format is not None and getattr(entry.format, ability)
    ]


def _methods() -> list[tuple[str, str | None]]:
    from loratools.operations.merge.methods import registered_methods

    return [(one.name, one.method.summary) for one in registered_methods() if one.method]


def _targets() -> list[tuple[str, str | None]]:
    from loratools.operations.check.targets import known_targets

    return [(name, target.label) for name, target in known_targets().items()]


def _rules() -> list[tuple[str, str | None]]:
    from loratools.operations.check.rules import RULES

    return [(rule.code, rule.summary) for rule in RULES]


def _dtypes() -> list[tuple[str, str | None]]:
    from loratools.operations.fuse.gguf import Outtype

    return [(name, None) for name in typing.get_args(Outtype) if name != "keep"]


def _stored() -> list[tuple[str, str | None]]:
    """Return the types that a conversion can store factors in, in one format or another."""
    from loratools_formats.contract.registry import registered_formats

    formats = [entry.format for entry in registered_formats() if entry.format is not None]
    known = dict.fromkeys(name for each in formats for name in each.dtypes)
    return [(name, None) for name in known or ("f32", "f16", "bf16")]


def _tables() -> list[tuple[str, str | None]]:
    from loratools.naming.tables import bundled_tables

    return [(table.name, None) for table in bundled_tables()]


_SOURCES: dict[tuple[str, bool], Callable[[], list[tuple[str, str | None]]]] = {
    ("from", False): _readable,
    ("to", False): _writable,
    ("method", False): _methods,
    ("target", False): _targets,
    ("select", False): _rules,
    ("ignore", False): _rules,
    ("dtype", False): _dtypes,
    ("names", False): _tables,
}
"""Completions by the option's name, and by whether its declaration lists its values."""
