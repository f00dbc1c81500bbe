"""What the public functions return: frozen, with the object that `--json` prints."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from loratools.face.output_names import about_name, check_name
from loratools.face.ran import Asked, Ran
from loratools.operations.about_outputs import about_output
from loratools.operations.reported import adapter_report
from loratools.work.json_object import as_json, hidden, json_name
from loratools.work.requests import Writing
from loratools_formats.contract.files import write_adapter
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import InexactError

if TYPE_CHECKING:
    from loratools.page.parts import Section

SCHEMA = 1


@dataclass(frozen=True, kw_only=True, repr=False)
class Result:
    """What an operation found; `to_dict()` is the object that `--json` prints."""

    operation: ClassVar[str]
    published: ClassVar[Result | None] = None
    """What `push` says of it, if its output was a repository on the Hub."""
    ran: ClassVar[Ran] = Ran()
    """How it came about; the functions of the face set it."""

    @classmethod
    def of(cls, found: Any, **others: Any) -> Self:
        """Return a result with the fields of what an operation found, and others."""
        names = {one.name for one in fields(cls) if one.init} - set(others)
        return cls(**{name: getattr(found, name) for name in names}, **others)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of the command line: how it came about, and what was found."""
        head = {"schema": SCHEMA, "operation": self.operation, **as_json(self.ran)}
        return {**head, **self.content()}

    def content(self) -> dict[str, Any]:
        """Return the part of the JSON object that is equal in equal runs: what was found."""
        made: dict[str, Any] = as_json(self)
        return made if self.published is None else {**made, "published": as_json(self.published)}

    def record(self, asked: Asked, seconds: float, *, failed: bool = False) -> None:
        """Set how it came about.

        Args:
            asked: what the function was asked for.
            seconds: how long it took.
            failed: whether an error kept it from being written.
        """
        output, written = self.destination(asked)
        ran = replace(
            asked.ran, output=output, written=written and not failed, seconds=round(seconds, 3)
        )
        object.__setattr__(self, "ran", ran)

    def destination(self, asked: Asked) -> tuple[str | None, bool]:
        """Return where the result was to go, and whether it was written there."""
        return asked.output, asked.output is not None and not asked.dry_run

    def title(self) -> str:
        """Return the heading of its page."""
        return self.operation.capitalize()

    def sections(self) -> Sequence[Section]:
        """Return the parts of its page: every number and every table of its JSON object."""
        from loratools.page.generic import result_sections

        return result_sections(self.content())

    def html(self) -> str:
        """Return a page that shows the result; it needs no network and no other file."""
        from loratools.page.html import page

        return page(self.title(), self.sections())

    def plot(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Draw the result's pictures into a PNG, SVG or PDF file, and return where.

        Raises:
            OptionError: the name ends in none of them, or the result has no picture.
            MissingDependencyError: matplotlib is not installed.
            OutputExistsError: the file exists and `overwrite` is false.
        """
        from loratools.page.parts import figures
        from loratools.page.plot import plot

        plot(self.title(), figures(self.sections()), Path(path), overwrite=overwrite)
        return Path(path)

    def _repr_html_(self) -> str:
        from loratools.page.html import framed

        return framed(self.html())

    def __repr__(self) -> str:
        shown = [
            f"{one.name}=<{len(value)}>" if isinstance(value, tuple | Mapping) else
            f"{one.name}={value!r}"
            for one in fields(self)
            if json_name(one)
            for value in [getattr(self, one.name)]
        ]  # fmt: skip
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, kw_only=True, repr=False)
class Reported(Result):
    """A result with findings.

    Attributes:
        findings: what a user should know.
        notes: their messages.
    """

    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "notes", tuple(each.message for each in self.findings))


@dataclass(frozen=True, kw_only=True, repr=False)
class CheckpointResult(Reported):
    """A result that is a checkpoint, written or measured.

    Attributes:
        run: computes it, and writes it to a path, over what is there if its second argument is
            true.
    """

    run: Callable[[Path, bool], object] = hidden()

    def write(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Compute the checkpoint again, write it whole or not at all, and return where.

        Raises:
            OutputExistsError: the output exists and `overwrite` is false.
            OutputError: it could not be written; what stood there is intact.
        """
        self.run(Path(path), overwrite)
        return Path(path)


@dataclass(frozen=True)
class InputAdapter:
    """An adapter that was merged, or fused into a base.

    Attributes:
        name: what reports call it.
        weight: factor of its change.
    """

    name: str
    weight: float


@dataclass(frozen=True, kw_only=True, repr=False)
class AdapterResult(Reported):
    """A result that is an adapter, written or not.

    Attributes:
        adapter: what was made; its tensors load on demand.
    """

    adapter: Adapter = hidden()

    def __post_init__(self) -> None:
        about = about_output(self.adapter)
        object.__setattr__(self, "findings", tuple(dict.fromkeys((*self.findings, *about))))
        super().__post_init__()
        made = self.adapter.provenance
        if made is not None and "report" not in made:
            error, nbytes = (getattr(self, name, None) for name in ("relative_error", "bytes_out"))
            told = {**made, "report": adapter_report(self.adapter, error, nbytes=nbytes)}
            object.__setattr__(self, "adapter", replace(self.adapter, provenance=told))

    def title(self) -> str:
        """Return the heading of its page."""
        source = self.adapter.source
        return super().title() if source is None else f"{super().title()} of {source}"

    def write(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the adapter in its format, whole or not at all, and return where.

        Raises:
            OutputExistsError: the output exists and `overwrite` is false.
            OutputError: it could not be written; what stood there is intact.
        """
        write_adapter(self.adapter, path, self.adapter.format, overwrite=overwrite)
        return Path(path)

    def written(self, writing: Writing) -> Self:
        """Write the adapter if an output was given, and return the result."""
        if writing.output is None:
            return self
        check_name(writing.output, self.adapter.format)
        told = about_name(writing.output, self.adapter.format)
        result = replace(self, findings=(*self.findings, *told)) if told else self
        result.write(writing.output, overwrite=writing.overwrite)
        return result


def check_error(result: Any, limit: float | None) -> None:
    """Raise `InexactError`, which carries the result, if its error is above the limit."""
    error = result.relative_error
    if limit is not None and not error <= limit:
        raise InexactError(
            "the relative error is above the limit; nothing was written",
            got=f"{error:.3g}",
            expected=f"at most {limit:g}",
            result=result,
        )
