"""What commands can be asked for besides their work: what to read, to write and to print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loratools.work.declared import option
from loratools.work.spellings import nbytes, share

Progress = Callable[[int, int], None]
"""Called with (done, in all) while an operation runs."""
PLACES = frozenset({"output", "overwrite", "in_place", "dry_run"})
"""Options of `Writing` that say where one result goes, and that whoever runs many sets itself."""


@dataclass(frozen=True)
class Reading:
    """How adapters are read.

    Attributes:
        from_: read as this format instead of recognising it.
        carry_unknown: keep tensors that the format does not know.
        ignore_key: a configuration key that is not known and has no effect on the weights.
        initial: the adapter as saved before training, for PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ.
        base: the base model: a folder or a file.
    """

    from_: str | None = option(None, heading="Input", metavar="FORMAT")
    carry_unknown: bool = option(False, heading="Input")
    ignore_key: tuple[str, ...] = option((), heading="Input", metavar="KEY")
    initial: Path | None = option(None, heading="Input", reference="adapter")
    base: Path | None = option(None, heading="Input", reference="model")


@dataclass(frozen=True)
class Writing:
    """Where a result goes.

    Attributes:
        output: where to write the result.
        in_place: write the result over the input, in one step.
        overwrite: replace the output if it exists.
        dry_run: compute and report, but write nothing.
        max_error: write nothing, and fail (exit code 1), if the relative error is above this.
    """

    output: Path | None = option(None, heading="Output", short="-o")
    in_place: bool = option(False, heading="Output")
    overwrite: bool = option(False, heading="Output")
    dry_run: bool = option(False, heading="Output")
    max_error: float | None = option(None, heading="Output", metavar="SHARE", parse=share)


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How the weights of a checkpoint are spread over files.

    Attributes:
        max_shard_bytes: split weights into files of at most this size, such as 5GB.
    """

    max_shard_bytes: int | None = option(
        None, heading="Output", name="max_shard_size", metavar="SIZE", parse=nbytes
    )


@dataclass(frozen=True)
class Reporting:
    """What a command prints.

    Attributes:
        json: print one JSON object.
        quiet: print errors only.
        verbose: list every module.
    """

    json: bool = option(False, heading="Report")
    quiet: bool = option(False, heading="Report", short="-q")
    verbose: bool = option(False, heading="Report", short="-v")
