"""`provenance`: how an output was made, back to the originals."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from loratools.face.declare import public
from loratools.face.result import Result
from loratools.operations import provenance as operation
from loratools.operations.provenance import ChainStep


@dataclass(frozen=True, kw_only=True, repr=False)
class ProvenanceResult(Result):
    """How an output was made.

    Attributes:
        path: the output.
        steps: every operation, each after those that made its inputs.
        changed: files that are not the ones which the statement is about any more.
    """

    operation: ClassVar[str] = "provenance"

    path: Path
    steps: tuple[ChainStep, ...]
    changed: tuple[str, ...]

    def cyclonedx(self) -> str:
        """Return it as a CycloneDX bill of materials for machine learning, in JSON.

        Raises:
            MissingDependencyError: cyclonedx-python-lib is not installed.
        """
        from loratools.operations.bill_of_materials import bill_of_materials

        return bill_of_materials(self.path.name, self.steps)


@public()
def provenance(path: str | os.PathLike[str]) -> ProvenanceResult:
    """Return how an output was made, back to the originals, from the statement beside it.

    >>> import tempfile
    >>> import loratools as lt
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made = lt.squeeze("examples/tiny-llama/lora", rank=8, output=f"{folder}/small")
    ...     lt.provenance(f"{folder}/small").steps[0].operation
    'squeeze'

    Args:
        path: a folder, a file, or the statement about one.

    Raises:
        MissingFileError: nothing is there, or nothing says how it was made.
        AdapterError: the statement is not sound.
    """
    return ProvenanceResult.of(operation.chain(Path(path)))
