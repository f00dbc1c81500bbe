"""Write `docs/rules.md`: every rule of `check`, and what it knows of serving programs.

    python tests/check/make_docs.py

A test compares the file with what this makes.
"""

import dataclasses
import json
from pathlib import Path

from loratools.operations.check.rule import GROUPS
from loratools.operations.check.rules import RULES
from loratools.operations.check.targets import Target, known_targets

STATISTICS = Path(__file__).with_name("statistics.json")
PATH = Path(__file__).parents[2] / "docs" / "rules.md"


def rules():
    """Return the text of the page."""
    lines = [
        "# Rules of `loratools check`",
        "",
        "Made by `tests/check/make_docs.py` from the rules themselves; do not edit.",
        "",
        "A finding says what was read. No finding says that the rules which ran met nothing, and",
        "nothing about what an adapter was trained to do.",
    ]
    for group, about in GROUPS.items():
        lines += ["", f"## {group[0].upper()}{group[1:]}", "", about]
        for rule in (rule for rule in RULES if rule.group == group):
            lines += ["", f"### {rule.code} {rule.slug}", "", f"*{rule.severity}*. {rule.summary}"]
            if rule.statistical:
                lines[-1] += " This is a statistic."
            lines += ["", rule.why, "", f"Fix: {rule.fix}", "", f"Source: {rule.source}."]
            lines += ["", measured(rule.code)] if rule.statistical else []
    lines += ["", "## Serving programs", "", *targets()]
    return "\n".join(lines) + "\n"


def measured(code):
    """Return how often a rule is wrong and how often right, as `measure_statistics.py` found."""
    record = json.loads(STATISTICS.read_text())
    parts = []
    for what, counts in record[code].items():
        if isinstance(counts, list):
            parts.append(f"it flags {counts[0]} of {counts[1]} {what} ({share(counts)})")
        else:
            each = ", ".join(f"{share(value)} at {key}" for key, value in counts.items())
            parts.append(f"by the {what}, it finds {each} (of {value_count(counts)} tries each)")
    return (
        f"Measured on {record['made']} (`tests/check/measure_statistics.py`): {'; '.join(parts)}."
    )


def share(counts):
    hits, of = counts
    return f"{hits / of:.1%}"


def value_count(counts):
    (tries,) = {of for _, of in counts.values()}
    return tries


def targets():
    """Return the table of what programs accept."""
    shown = [
        f.name for f in dataclasses.fields(Target)
        if f.name in ("rslora", "mixed_ranks", "other_kinds", "replacements", "token_rows",
                      "embeddings", "experts", "convolutions", "biases", "pickles")
    ]  # fmt: skip
    yield "`refused` stops with an error, `ignored` has no effect, `unknown` was not looked at."
    yield ""
    yield "| target | version | as of | formats | kinds | " + " | ".join(shown) + " |"
    yield "|" + "---|" * (len(shown) + 5)
    for target in known_targets().values():
        kinds = "all" if target.kinds == ("*",) else ", ".join(target.kinds)
        cells = [target.name, target.version, target.checked, ", ".join(target.formats), kinds]
        cells += [getattr(target, name) for name in shown]
        yield "| " + " | ".join(cells) + " |"
    yield ""
    for target in known_targets().values():
        retired = f" Retired: {target.retired}." if target.retired else ""
        yield f"- {target.title}: {target.source}.{retired}"


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(rules(), encoding="utf-8")
