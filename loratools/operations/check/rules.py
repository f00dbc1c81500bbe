"""All rules, by code, and the choice of some of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from loratools.operations.check import (
    configuration,
    expert_rules,
    files,
    noops,
    numbers,
    publication,
    serving,
    serving_settings,
    structure,
)
from loratools.operations.check.rule import Rule
from loratools_formats.disk.errors import OptionError

RULES: tuple[Rule, ...] = (
    *files.RULES,
    *structure.RULES,
    *configuration.RULES,
    *numbers.RULES,
    *noops.RULES,
    *serving.RULES,
    *serving_settings.RULES,
    *expert_rules.RULES,
    *publication.RULES,
)
UNREADABLE = RULES[0]

OF_READERS = {code: rule for rule in RULES for code in rule.of_readers}
"""The rule of each code that readers' findings have."""


def rule_named(text: str) -> Rule:
    """Return the rule of a code or a slug.

    Raises:
        OptionError: there is none.
    """
    for rule in RULES:
        if text.upper() == rule.code or text.lower() == rule.slug:
            return rule
    names = [name for rule in RULES for name in (rule.code, rule.slug)]
    begun = sorted(rule.code for rule in RULES if text and rule.code.startswith(text.upper()))
    close = difflib.get_close_matches(text, names, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else "Name one as `check` does, such as LT505"
    raise OptionError(
        "no such rule",
        got=text,
        hint=f"It begins several; name one: {', '.join(begun)}" if begun else hint,
    )


def rules_named(texts: Iterable[str]) -> set[Rule]:
    """Return the rules that codes, beginnings of codes and slugs name.

    >>> sorted(rule.code for rule in rules_named(["LT30", "missing-pair"]))[:2]
    ['LT101', 'LT301']

    Raises:
        OptionError: one names none.
    """
    found: set[Rule] = set()
    for text in texts:
        prefix = text.strip().upper()
        of_prefix = {rule for rule in RULES if prefix and rule.code.startswith(prefix)}
        found |= of_prefix or {rule_named(text.strip())}
    return found
