"""Files of adapters that share bases, as `loratools fleet share` writes them.

What their tensors mean is in `loratools_formats.contract.shared_set`. Such a file is a shelf: it is
read as an adapter without modules, whose findings name its members, so that `info` shows what it is
and operations on one adapter say how to take one out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools_formats.contract.format import Context, Format, Loss
from loratools_formats.disk.errors import UnsupportedError

if TYPE_CHECKING:
    from pathlib import Path

    from loratools_formats.core.adapter import Adapter

_MARKS = (b'"format":"shared-set"', b'"shared_set":')
_SNIFFED_BYTES = 1 << 16


class SharedSetFormat(Format):
    """Adapters in shared bases, one safetensors file."""

    name = "shared-set"
    description = "One file, adapters of one base model in shared bases: loratools fleet share"

    def sniff(self, path: Path) -> bool:
        """Return whether the metadata at the start of a header say that it is one."""
        if not path.is_file():
            return False
        try:
            with path.open("rb") as file:
                start = file.read(_SNIFFED_BYTES)
        except OSError:
            return False
        head = start[8:].replace(b" ", b"")
        return head.startswith(b'{"__metadata__":{') and any(mark in head for mark in _MARKS)

    def read(self, path: Path) -> Adapter:
        """Read the header, and hand out all tensors as carried.

        Raises:
            LoratoolsError: not a sound shared set.
        """
        from dataclasses import replace

        from loratools_formats.containers.safetensors_read import read_safetensors
        from loratools_formats.contract.shared_set import findings_of
        from loratools_formats.contract.shared_set_read import parsed
        from loratools_formats.core.adapter import Adapter

        opened = read_safetensors(path)
        adapter = Adapter(
            format=self.name,
            source=path,
            modules={},
            carried=opened.tensors,
            metadata=opened.metadata,
            inputs=(opened.file,),
        )
        shared = parsed(adapter)
        findings = findings_of(shared, adapter)
        return replace(adapter, findings=findings, base_model=shared.base_model)

    def losses(self, adapter: Adapter) -> list[Loss]:
        """Refuse adapters of other formats.

        Raises:
            UnsupportedError: it is one.
        """
        _require_own(adapter)
        return []

    def from_model(self, adapter: Adapter, context: Context) -> Adapter:
        """Return a set as it is.

        Raises:
            UnsupportedError: it is an adapter of another format.
        """
        del context
        return _require_own(adapter)

    def write(self, adapter: Adapter, path: Path) -> None:
        """Write the file.

        Raises:
            UnsupportedError: it is an adapter of another format.
        """
        from loratools_formats.containers.safetensors_write import write_safetensors

        write_safetensors(path, _require_own(adapter).carried.values(), adapter.metadata)

    def weights_nbytes(self, adapter: Adapter) -> int:
        """Return the size of the file that `write` would make."""
        from loratools_formats.containers.safetensors_write import safetensors_nbytes

        return safetensors_nbytes(adapter.carried.values(), adapter.metadata)


def _require_own(adapter: Adapter) -> Adapter:
    if adapter.format != SharedSetFormat.name:
        raise UnsupportedError(
            "a shared set is made of several adapters together",
            path=adapter.source,
            hint="Make one: loratools fleet share ADAPTERS -o shared.safetensors --rank RANK",
        )
    return adapter


FORMAT = SharedSetFormat()
