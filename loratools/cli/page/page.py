"""A whole page: head, style, parts and the script that sorts and filters tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from loratools.cli.page.parts import escaped
from loratools.face.source import destination
from loratools.work.declared import option
from loratools.work.requests import Reporting, Writing
from loratools_formats.disk.errors import OptionError
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


@dataclass(frozen=True)
class Pages:
    """Other forms of a report than text.

    Attributes:
        html: also write a page that needs no network and no other file.
        overwrite: replace the page if it exists.
        csv: print a row of numbers for every module.
    """

    html: Path | None = option(None, heading="Report", metavar="FILE")
    overwrite: bool = option(False, heading="Output")
    csv: bool = option(False, heading="Report")

    def check(self, reporting: Reporting, inputs: Iterable[Path | None]) -> None:
        """Refuse two forms to print, or a page that would take the place of an input.

        Raises:
            OptionError: `csv` and `json` are asked for.
            OutputExistsError: the page exists and `overwrite` is false, or lies in an input.
        """
        if self.csv and reporting.json:
            raise OptionError("`csv` and `json` exclude each other")
        if self.html is not None:
            place = Writing(output=self.html, overwrite=self.overwrite)
            destination(place, None, inputs)

    def write(self, title: str, sections: Callable[[], Sequence[str]]) -> None:
        """Write the page if one is asked for, whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        if self.html is not None:
            with publish_file(self.html, overwrite=self.overwrite) as temporary:
                temporary.write_text(page(title, sections()), encoding="utf-8")

    def notes(self) -> Sequence[str]:
        """Return what to say of it."""
        return () if self.html is None else (f"wrote {self.html}",)
