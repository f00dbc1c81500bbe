"""Findings as SARIF 2.1.0, as GitHub's code scanning reads it.

Source: OASIS SARIF 2.1.0 errata 01, and GitHub docs, SARIF support for code scanning. A finding in
adapter_config.json or README.md has its line. Weights have no lines: their physical location is the
file's first, and the tensor's name stands in a logical location.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from loratools import __version__
from loratools.cli.findings.places import file_of
from loratools.face.check import CheckResult
from loratools.operations.check.outcome import CheckFinding
from loratools.operations.check.rule import Rule
from loratools.operations.check.rules import RULES
from loratools_formats.disk.errors import printable

_SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
_MOST_RESULTS = 25_000


def sarif_of(result: CheckResult) -> str:
    """Return one run with the rules that ran, and their findings."""
    rules = [rule for rule in RULES if rule.code in {*result.rules, "LT001"}]
    places = {rule.code: place for place, rule in enumerate(rules)}
    run = {
        "tool": {
            "driver": {
                "name": "loratools check",
                "semanticVersion": __version__,
                "rules": [_rule(rule) for rule in rules],
            }
        },
        "invocations": [
            {
                "executionSuccessful": result.complete,
                "toolExecutionNotifications": [
                    {
                        "level": "error",
                        "message": {"text": f"{printable(u.adapter)}: {printable(u.reason)}"},
                    }
                    for u in result.unchecked
                ],
            }
        ],
        "results": [_result(f, places[f.code]) for f in result.findings[:_MOST_RESULTS]],
        "columnKind": "unicodeCodePoints",
    }
    log = {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}
    return json.dumps(log, indent=2, ensure_ascii=False)


def _rule(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.code,
        "name": "".join(word.capitalize() for word in rule.slug.split("-")),
        "shortDescription": {"text": rule.summary},
        "fullDescription": {"text": f"{rule.summary} {rule.why}"},
        "help": {
            "text": f"{rule.why}\n\nFix: {rule.fix}\n\nSource: {rule.source}",
            "markdown": f"{rule.why}\n\n**Fix:** {rule.fix}\n\n**Source:** {rule.source}",
        },
        "defaultConfiguration": {"level": rule.severity},
        "properties": {"tags": [rule.group]},
    }


def _result(finding: CheckFinding, place: int) -> dict[str, Any]:
    location: dict[str, Any] = {
        "physicalLocation": {
            "artifactLocation": {"uri": quote(file_of(finding))},
            "region": {"startLine": finding.line or 1},
        }
    }
    if finding.where is not None:
        name = printable(finding.where)
        location["logicalLocations"] = [{"name": name, "fullyQualifiedName": name}]
    text = f"{printable(finding.message, 2000)}. {printable(finding.command or finding.hint, 2000)}"
    return {
        "ruleId": finding.code,
        "ruleIndex": place,
        "level": finding.severity,
        "message": {"text": text},
        "locations": [location],
        "partialFingerprints": {"loratools/v1": finding.fingerprint},
    }
