"""`replay`: what made an output, done again and compared with it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from loratools import __version__
from loratools.face.declare import public
from loratools.face.result import Result
from loratools.operations.provenance import changed, output_of, statement_of
from loratools.operations.replayed import ReplayedFile, compared
from loratools.pipeline.functions import writing_function
from loratools.pipeline.inputs import Finder
from loratools.pipeline.recorded import RecordedCall, RecordedInput
from loratools.work.declared import option
from loratools.work.environment import differences, environment
from loratools.work.history import about, tells_how, unfolded
from loratools.work.requests import Progress
from loratools_formats.contract.files import check_target
from loratools_formats.disk.errors import AdapterError, UncheckedError
from loratools_formats.disk.temporaries import temporary_folder


@dataclass(frozen=True)
class Replaying:
    """Where inputs are found, and whether to keep what is made.

    Attributes:
        inputs: a place to look for inputs: an adapter, a model, or a folder that holds some.
        output: keep the repeated output here.
    """

    inputs: tuple[Path, ...] = option((), heading="Input", name="input", metavar="PATH")
    output: Path | None = option(None, heading="Output", short="-o")


@dataclass(frozen=True, kw_only=True, repr=False)
class ReplayResult(Result):
    """What doing it again gave.

    Attributes:
        path: the output that was made once.
        done: the operations that ran, the last one for the output itself.
        identical: whether every file has the same bytes.
        files: every file that was compared.
        changed: files of the output that are not the ones which its statement is about any more.
        differences: of the machine and the versions, which may explain a mismatch.
        left_out: files that name paths, which are not compared.
    """

    operation: ClassVar[str] = "replay"

    path: Path
    done: tuple[str, ...]
    identical: bool
    files: tuple[ReplayedFile, ...]
    changed: tuple[str, ...]
    differences: tuple[str, ...]
    left_out: tuple[str, ...]


@public()
def replay(
    path: str | os.PathLike[str],
    *,
    options: Replaying,
    progress: Progress | None = None,
) -> ReplayResult:
    """Do again what made an output, from the inputs that are recorded, and compare the bytes.

    Inputs are looked for by their digests: in `input`, where they lay, and on the Hub at the commit
    that was read. One that is nowhere, and was made by an operation itself, is made again.

    >>> import tempfile
    >>> import loratools as lt
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     source = "examples/tiny-llama/lora"
    ...     made = lt.squeeze(source, rank=8, output=f"{folder}/small")
    ...     lt.replay(f"{folder}/small", input=[source]).identical
    True

    Args:
        path: the output, with its statement beside it.
        progress: called with (operations done, operations in all).

    Raises:
        MissingFileError: there is no statement.
        UncheckedError: an input is nowhere or was in memory only, or the statement does not tell
            enough to do it again.
        AdapterError: the statement is not sound.
        OutputExistsError: the output exists.
    """
    made = output_of(Path(path))
    statement = statement_of(Path(path))
    if options.output is not None:
        check_target(options.output, [made])
    with temporary_folder("loratools-replay") as folder:
        run = _Replay(statement, options.inputs, folder, progress)
        again = run.output(statement, made.name, options.output)
        files, left_out = compared(made, again, statement)
    stale = tuple(changed(statement, made))
    recorded = {
        **statement["predicate"].get("environment", {}),
        "loratools": str(statement["predicate"].get("tool", {}).get("version")),
    }
    return ReplayResult(
        path=made,
        done=tuple(run.done),
        identical=all(one.identical for one in files),
        files=files,
        changed=stale,
        differences=differences(
            recorded, {**environment(with_torch="torch" in recorded), "loratools": __version__}
        ),
        left_out=left_out,
    )


class _Replay:
    """One run: what was found, made and done."""

    def __init__(
        self,
        statement: Mapping[str, Any],
        given: Sequence[Path],
        folder: Path,
        progress: Progress | None,
    ) -> None:
        *self._earlier, _ = unfolded(statement)
        self._finder = Finder(given)
        self._folder = folder
        self._progress = progress
        self._open: list[str] = []
        self._made: dict[str, Path] = {}
        self.done: list[str] = []

    def output(self, statement: Mapping[str, Any], name: str, output: Path | None) -> Path:
        """Make an output again from its statement, and return where."""
        key = str(statement["subject"])
        if key in self._made:
            return self._made[key]
        if key in self._open or len(self._open) > 64:
            raise AdapterError("the statement says that a file was made from itself")
        self._open.append(key)
        place = output
        if place is None:
            home = self._folder / f"{len(self._open)}-{len(self._made)}"
            home.mkdir()
            place = home / name
        self._call(statement["predicate"], place)
        self._open.pop()
        self._made[key] = place
        return place

    def _call(self, predicate: Mapping[str, Any], output: Path | None) -> Any:
        call = RecordedCall.of(predicate)
        function, declaration = writing_function(call.function)
        arguments: dict[str, Any] = {}
        for name, value in call.arguments.items():
            if isinstance(value, RecordedInput):
                arguments[name] = self._source(name, value, call)
            else:
                found = [(self._source(name, one, call), one) for one in value]
                named = {one.known_as: source for source, one in found if one.known_as is not None}
                arguments[name] = named or [(source, one.weight) for source, one in found]
        options = dict(call.options)
        call.check(declaration)
        if output is not None:
            options["output"] = output
        result = function(**arguments, **options)
        self.done.append(declaration.name.replace("_", "-"))
        if self._progress is not None:
            self._progress(len(self.done), len(self.done))
        return result

    def _source(self, name: str, value: RecordedInput, call: RecordedCall) -> Any:
        if value.is_made:
            if value.made not in call.steps:
                raise UncheckedError(
                    f"the input {name} was made in memory, and nothing says how",
                    hint="Write it first, and pass its path",
                )
            return self._call(call.steps[str(value.made)], None).adapter
        found = self._finder.find(value)
        if found is not None:
            return found
        if value.reference is not None:
            return value.reference  # names these bytes for ever
        weights = [one.digest for one in value.files if tells_how(one.name)]
        for statement in self._earlier:
            if weights and all(about(statement, digest) is not None for digest in weights):
                return self.output(statement, value.name, None)
        raise UncheckedError(
            f"the input {name} is not where it was, and is not given",
            got=value.described(),
            hint="Pass the file or folder with `input=PATH`",
        )
