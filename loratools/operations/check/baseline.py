"""A baseline: findings that are known and accepted, so that new ones stand out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from loratools_formats.disk.errors import AdapterError
from loratools_formats.disk.strict_json import read_object

SCHEMA = 1
_MAX_BYTES = 16 << 20


def fingerprint(code: str, reference: str, where: str | None, target: str | None) -> str:
    """Return what makes a finding one and the same in every run: rule, adapter, place, target.

    Neither the message nor a line counts, which other versions word or number otherwise.
    """
    parts = json.dumps([code, reference, where, target], ensure_ascii=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


def read_baseline(path: Path) -> frozenset[str]:
    """Return the fingerprints of a baseline.

    Raises:
        MissingFileError: it is not there.
        AdapterError: it is no baseline.
    """
    values = read_object(path, _MAX_BYTES, name="baseline")
    found = values.get("fingerprints")
    if values.get("schema") != SCHEMA or not isinstance(found, dict):
        raise AdapterError(
            "not a baseline", path=path, expected=f"schema {SCHEMA} and fingerprints"
        )
    return frozenset(found)


def baseline_text(findings: dict[str, str]) -> str:
    """Return the text of a baseline, one line for each finding.

    Args:
        findings: fingerprint → a line for people.
    """
    values: dict[str, Any] = {"schema": SCHEMA, "fingerprints": dict(sorted(findings.items()))}
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
