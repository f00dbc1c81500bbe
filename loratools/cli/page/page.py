"""A whole page: head, style, parts and the script that sorts and filters tables."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from loratools.cli.page.parts import escaped
from loratools_formats.disk.publish import publish_file

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(title: str, sections: Sequence[str]) -> str:
    """Return an HTML document that loads nothing: its policy forbids every request.

    Args:
        title: shown above the sections.
        sections: HTML from `parts`, where every text is escaped.
    """
    folder = files("loratools.cli.page")
    style = (folder / "style.css").read_text(encoding="utf-8")
    script = (folder / "script.js").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escaped(title)}</title><style>{style}</style></head>"
        f"<body><main><h1>{escaped(title)}</h1>{''.join(sections)}</main>"
        f"<script>{script}</script></body></html>\n"
    )


def write_page(path: Path, title: str, sections: Sequence[str], *, overwrite: bool) -> None:
    """Write a page whole or not at all.

    Raises:
        OutputExistsError: it exists and `overwrite` is false.
        OutputError: it cannot be written.
    """
    with publish_file(path, overwrite=overwrite) as temporary:
        temporary.write_text(page(title, sections), encoding="utf-8")
