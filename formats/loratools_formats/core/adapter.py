"""What an adapter is, whatever file it came from.

An adapter is a set of weight changes ΔW, one per adapted weight (`change.py`), plus tensors that
replace base tensors. Readers resolve scale and layout once and hand out these classes; operations
see only them; writers encode them again. Nothing here reads bytes or computes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from loratools_formats.core.change import LowRank, ModuleChange
from loratools_formats.core.findings import Finding
from loratools_formats.core.summary import adapter_line, adapter_table
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import UnsupportedError
from loratools_formats.disk.files import RegularFile


@dataclass(frozen=True)
class Replacement:
    """A tensor that takes the place of a base tensor, or of some of its rows.

    Attributes:
        kind: `bias`, `module` (PEFT's modules_to_save), `embedding` (a whole, perhaps resized
            matrix), `token_rows` (the rows listed), `other` (a base tensor found in the file
            though its config does not mention it; loaders copy it over all the same), or
            `parameter` (one that is no weight or bias; loaders drop it if the base has none).
        target: name of the base tensor.
        tensor: the new values.
        rows: for `token_rows`, the rows they go to.
    """

    kind: Literal["bias", "module", "embedding", "token_rows", "other", "parameter"]
    target: str
    tensor: TensorRef
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Addition:
    """A tensor that is added to a bias or a norm's weight, times the adapter's strength.

    Attributes:
        target: name of the base tensor.
        tensor: what is added.
    """

    target: str
    tensor: TensorRef


@dataclass(frozen=True)
class Dialect:
    """One way of spelling single-file adapters, met in a file.

    Attributes:
        name: what it is called.
        why: what it is recognised by.
        example: a key of the file in that spelling.
        keys: how many are.
    """

    name: str
    why: str
    example: str
    keys: int


@dataclass(frozen=True)
class ExpertLayout:
    """How a file stores the factors of experts.

    Attributes:
        name: `stacked`, `each`, `3d`, `flat-3d`, `shared-outer` or `tinker`.
        described: how they lie and what tells that, for people.
    """

    name: str
    described: str


@dataclass(frozen=True, repr=False)
class Adapter:
    """An adapter read from somewhere, or made by an operation.

    Each tensor of a file is in exactly one of `modules`, `shared`, `additions`, `replacements` and
    `carried`.

    Attributes:
        format: name of the format it was read as.
        source: the path it was read from.
        modules: weight changes by module path, as the base model names it where the format knows.
        shared: tensors that the deltas of several modules are made of, by their key in the file.
        additions: tensors that are added to biases and norms, by their key in the file.
        replacements: tensors that replace base tensors, by their key in the file.
        carried: tensors that are none of these, preserved unchanged, by key.
        config: the format's own configuration, untouched.
        metadata: the weight file's string metadata.
        base_model: the base model's name, if recorded.
        findings: what its reader, and the operations that made it, found worth telling.
        dialects: of a single file, how its keys are spelled.
        attachments: other files to keep beside the output, such as the tokenizer's, by name: a
            path to copy, or the content itself.
        inputs: the files it was read from, the weights first, for digests and the check that
            they did not change.
        other_inputs: files that took part in making it, by their role.
        provenance: how it was made, if an operation made it.
        expert_layout: how its file stores the factors of experts; None if it has none.
        write_as: the layout of experts to write, where a format has several; empty for its usual.
    """

    format: str
    source: Path | None
    modules: Mapping[str, ModuleChange]
    shared: Mapping[str, TensorRef] = field(default_factory=dict)
    additions: Mapping[str, Addition] = field(default_factory=dict)
    replacements: Mapping[str, Replacement] = field(default_factory=dict)
    carried: Mapping[str, TensorRef] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    base_model: str | None = None
    findings: tuple[Finding, ...] = ()
    dialects: tuple[Dialect, ...] = ()
    attachments: Mapping[str, Path | bytes] = field(default_factory=dict)
    inputs: tuple[RegularFile, ...] = field(default=(), compare=False)
    other_inputs: Mapping[str, tuple[RegularFile, ...]] = field(default_factory=dict, compare=False)
    provenance: Mapping[str, Any] | None = None
    expert_layout: ExpertLayout | None = None
    write_as: str = ""

    def __repr__(self) -> str:
        return adapter_line(self)

    def _repr_html_(self) -> str:
        return adapter_table(self)

    @property
    def weights_nbytes(self) -> int:
        """Size of the weight file it was read from; of its tensors if from none."""
        return self.inputs[0].nbytes if self.inputs else sum(t.nbytes for t in self.tensors())

    def tensors(self) -> Iterator[TensorRef]:
        """Yield every tensor of the adapter."""
        for delta in self.modules.values():
            yield from delta.tensors()
        yield from self.shared.values()
        for addition in self.additions.values():
            yield addition.tensor
        for replacement in self.replacements.values():
            yield replacement.tensor
        yield from self.carried.values()

    def factors(self) -> dict[str, LowRank]:
        """Return the factors of the modules that have some, by module path."""
        found = {name: change.factors for name, change in self.modules.items()}
        return {name: factors for name, factors in found.items() if factors is not None}

    @property
    def caveats(self) -> tuple[Finding, ...]:
        """The findings of severity `error`: reasons why operations on ΔW refuse the adapter."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def notices(self) -> tuple[Finding, ...]:
        """All other findings."""
        return tuple(finding for finding in self.findings if finding.severity != "error")

    @property
    def remarks(self) -> tuple[str, ...]:
        """The messages of `notices`."""
        return tuple(notice.message for notice in self.notices)

    def require_true_delta(self, operation: str, kept: Collection[str] = ()) -> None:
        """Refuse an adapter whose tensors do not tell its ΔW.

        Args:
            operation: what needs ΔW, for the message.
            kept: codes of findings that do not hinder the operation.

        Raises:
            UnsupportedError: a finding hinders it.
        """
        for caveat in self.caveats:
            if caveat.code not in kept:
                raise UnsupportedError(
                    f"{operation} needs the true weight change: {caveat.message}",
                    path=self.source,
                    hint=caveat.hint or None,
                )

    def check_unchanged(self) -> None:
        """Raise `AdapterError` if an input file was written to since it was opened."""
        for files in (self.inputs, *self.other_inputs.values()):
            for file in files:
                file.check_unchanged()
