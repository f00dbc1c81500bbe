"""Other forms of a report than text: a page, pictures, comma-separated values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from loratools.cli.output import note
from loratools.face.result import Result
from loratools.work.declared import option
from loratools.work.requests import Reporting
from loratools_formats.contract.files import check_further
from loratools_formats.disk.errors import OptionError, OutputError
from loratools_formats.disk.publish import publish_file, resolved


@contextlib.contextmanager
def after(output: Path | None) -> Iterator[None]:
    """Let an error of a further output say that the output itself is there."""
    try:
        yield
    except OutputError as error:
        if output is not None:
            error.hint = f"{output} was written before that; check free space and permissions"
        raise


@dataclass(frozen=True)
class Pages:
    """Other forms of a report than text.

    Attributes:
        html: also write the report as an HTML page that needs no network and no other file.
        plot: also draw the report's pictures into a file that ends in .png, .svg or .pdf; this
            needs matplotlib.
        overwrite: replace the files of reports if they exist.
        csv: print a row of numbers for every module.
    """

    html: Path | None = option(None, heading="Report", metavar="FILE")
    plot: Path | None = option(None, heading="Report", metavar="FILE")
    overwrite: bool = option(False, heading="Output")
    csv: bool = option(False, heading="Report")

    @property
    def files(self) -> list[Path]:
        """What is to be written."""
        return [path for path in (self.html, self.plot) if path is not None]

    def check(
        self, reporting: Reporting, inputs: Iterable[Path | None] = (), *, overwrite: bool = False
    ) -> None:
        """Refuse what cannot be written before any work.

        Args:
            reporting: how the report is printed.
            inputs: what is read or written besides.
            overwrite: replace the files if they exist.

        Raises:
            OptionError: two forms are to be printed, or two things go to one file.
            OutputExistsError: a file exists, or is an input.
            MissingDependencyError: pictures are asked for without matplotlib.
        """
        if self.csv and reporting.json:
            raise OptionError("`csv` and `json` exclude each other")
        if self.plot is not None:
            from loratools.page.plot import check_plot

            check_plot(self.plot)
        if not self.files:
            return
        others = [path for path in inputs if path is not None]
        known = {resolved(path) for path in others}
        for path in self.files:
            if resolved(path) in known:
                raise OptionError("a report goes over something else", got=str(path))
            known.add(resolved(path))
            check_further(path, others, overwrite=overwrite or self.overwrite)

    def write(self, result: Result, *, overwrite: bool = False) -> None:
        """Write what is asked for, each file whole or not at all.

        Raises:
            OutputError: a file cannot be written.
        """
        overwrite = overwrite or self.overwrite
        if self.html is not None:
            with publish_file(self.html, overwrite=overwrite) as temporary:
                temporary.write_text(result.html(), encoding="utf-8")
        if self.plot is not None:
            result.plot(self.plot, overwrite=overwrite)

    def say(self, reporting: Reporting) -> None:
        """Say what was written."""
        if not reporting.quiet:
            for path in self.files:
                note(f"wrote {path}")
