"""`formats` and `methods`: what is registered, broken plugins included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from loratools.face.declare import public
from loratools.face.result import Result
from loratools.work.json_object import named
from loratools_formats.contract.registry import get_format, registered_formats


@dataclass(frozen=True)
class FormatInfo:
    """A registered format.

    Attributes:
        name: what users type.
        package: which package registers it.
        broken: whether it could not be loaded.
        error: why not.
        read: whether it can be read.
        write: whether it can be written.
        description: one line; None if it is broken.
    """

    name: str
    package: str
    broken: bool
    error: str | None
    read: bool
    write: bool
    description: str | None


@dataclass(frozen=True, kw_only=True, repr=False)
class FormatsResult(Result):
    """The registered formats.

    Attributes:
        formats: sorted by name, broken ones included.
    """

    operation: ClassVar[str] = "formats"

    formats: tuple[FormatInfo, ...]


@dataclass(frozen=True, kw_only=True)
class MethodInfo:
    """A registered merge method.

    Attributes:
        name: what users type.
        package: which package registers it.
        broken: whether it could not be loaded.
        error: why not.
        kind: `span`, `core` or `elementwise`; None if it is broken.
        paper: where it is defined.
        summary: one line.
        parameters: default values by name.
    """

    name: str
    package: str
    broken: bool
    error: str | None
    kind: str | None = named("class")
    paper: str | None
    summary: str | None
    parameters: dict[str, Any]


@dataclass(frozen=True, kw_only=True, repr=False)
class MethodsResult(Result):
    """The registered merge methods.

    Attributes:
        methods: sorted by class and name, broken ones last.
    """

    operation: ClassVar[str] = "methods"

    methods: tuple[MethodInfo, ...]


@public()
def formats(name: str | None = None) -> FormatsResult:
    """Return the registered formats. A broken plugin is an entry, not an error.

    >>> import loratools as lt
    >>> [entry.write for entry in lt.formats("peft").formats]
    [True]

    Args:
        name: the name of one format, in capital or small letters; all formats by default.

    Raises:
        UnknownFormatError: no format has the name, or that one is broken.
    """
    only = None if name is None else get_format(name).name
    return FormatsResult(
        formats=tuple(
            FormatInfo(
                name=entry.name,
                package=entry.package,
                broken=entry.format is None,
                error=entry.error,
                read=entry.format is not None and entry.format.is_readable,
                write=entry.format is not None and entry.format.is_writable,
                description=None if entry.format is None else entry.format.description,
            )
            for entry in registered_formats()
            if only in (None, entry.name)
        )
    )


@public()
def methods(name: str | None = None) -> MethodsResult:
    """Return the registered merge methods. A broken plugin is an entry, not an error.

    >>> import loratools as lt
    >>> [entry.parameters["density"] for entry in lt.methods("ties").methods]
    [0.2]

    Args:
        name: the name of one method, in capital or small letters; all methods by default.

    Raises:
        OptionError: no method has the name, or that one is broken.
    """
    from loratools.operations.merge.methods import get_method, registered_methods

    only = None if name is None else get_method(name).name
    return MethodsResult(
        methods=tuple(
            MethodInfo(
                name=entry.name,
                package=entry.package,
                broken=entry.method is None,
                error=entry.error,
                kind=None if entry.method is None else entry.method.kind,
                paper=None if entry.method is None else entry.method.paper,
                summary=None if entry.method is None else entry.method.summary,
                parameters={}
                if entry.method is None
                else {name.rstrip("_"): value for name, value in entry.method.parameters.items()},
            )
            for entry in registered_methods()
            if only in (None, entry.name)
        )
    )
