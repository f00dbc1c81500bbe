"""A third-party format: adapters as one JSON file with base64 factors.

Stands for a package by somebody else: it uses only what `loratools_formats` documents.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

from loratools_formats import Adapter, Format, LoratoolsError, LowRank, ModuleChange, TensorRef
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.disk.errors import AdapterError
from loratools_formats.disk.files import RegularFile, read_small_file

MAGIC = b'{"demo-adapter":'


def _tensor(key: str, entry: dict) -> TensorRef:
    data = base64.b64decode(entry["data"])
    return TensorRef(key, DTYPES[entry["dtype"]], tuple(entry["shape"]), lambda: data)


def _entry(tensor: TensorRef) -> dict:
    data = base64.b64encode(tensor.raw()).decode()
    return {"dtype": tensor.dtype.code, "shape": list(tensor.shape), "data": data}


def _encoded(adapter: Adapter) -> bytes:
    modules = {}
    for name, delta in adapter.modules.items():
        part = delta.require_factors()
        modules[name] = {"scale": part.scale, "a": _entry(part.a), "b": _entry(part.b)}
    return MAGIC + json.dumps(modules, sort_keys=True).encode() + b"}"


class Demo(Format):
    """Adapters in one JSON file."""

    name = "demo"
    description = "One JSON file, for the tests"
    suffixes = (".demo.json",)

    def sniff(self, path: Path) -> bool:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC

    def read(self, path: Path) -> Adapter:
        try:
            modules = json.loads(read_small_file(path, 1 << 24))["demo-adapter"]
        except ValueError as error:
            if isinstance(error, LoratoolsError):
                raise
            raise AdapterError(f"not a demo adapter: {error}", path=path) from error
        return Adapter(
            format=self.name,
            source=path,
            modules={
                name: ModuleChange(
                    LowRank(_tensor(f"{name}.a", m["a"]), _tensor(f"{name}.b", m["b"]), m["scale"])
                )
                for name, m in modules.items()
            },
            inputs=(RegularFile(path),),
        )

    def write(self, adapter: Adapter, path: Path) -> None:
        path.write_bytes(_encoded(adapter))

    def weights_nbytes(self, adapter: Adapter) -> int:
        return len(_encoded(adapter))


FORMAT = Demo()
