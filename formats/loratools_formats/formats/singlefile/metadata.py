"""What a single file says about itself: kept, and kept true.

Everything is kept. Of an adapter that an operation made, the rank and alpha that sd-scripts records
(`ss_network_dim`, `ss_network_alpha`) are brought up to date; digests of the tensors are computed
again wherever they are present. Sources: `precalculate_safetensors_hashes` of sd-scripts for
`sshs_model_hash` and `sshs_legacy_hash`, and the SAI model specification for
`modelspec.hash_sha256`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence

from loratools_formats.containers.safetensors_write import header_bytes, in_file_order
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.tensors import TensorRef

_LEGACY_OFFSET = 0x100000
_LEGACY_BYTES = 0x10000


def updated(adapter: Adapter) -> dict[str, str]:
    """Return an adapter's metadata with ranks and alphas that are true of it now."""
    metadata = dict(adapter.metadata)
    if adapter.provenance is None:
        return metadata
    found = [change.factors for change in adapter.modules.values()]
    plain = [part for part in found if part is not None]
    # Convolutions have a rank of their own, which sd-scripts records elsewhere.
    plain = [part for part in plain if math.prod(part.layer.kernel) == 1] or plain
    if plain and "ss_network_dim" in metadata:
        metadata["ss_network_dim"] = _one({f"{part.rank}" for part in plain})
    if plain and "ss_network_alpha" in metadata:
        metadata["ss_network_alpha"] = _one({f"{part.scale * part.rank:g}" for part in plain})
    return metadata


def _one(values: set[str]) -> str:
    return values.pop() if len(values) == 1 else "Dynamic"


_DIGEST_LENGTHS = {"sshs_model_hash": 64, "modelspec.hash_sha256": 66, "sshs_legacy_hash": 8}


def with_room_for_digests(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return metadata with zeros for the digests that `with_digests` will put in.

    A file may hold anything in their place; the size of the new file must not depend on it.
    """
    lengths = {key: _DIGEST_LENGTHS[key] for key in metadata.keys() & _DIGEST_LENGTHS.keys()}
    return {**metadata, **{key: "0" * length for key, length in lengths.items()}}


def with_digests(metadata: dict[str, str], tensors: Sequence[TensorRef]) -> dict[str, str]:
    """Return metadata with the digests of these tensors in place of those that it holds.

    Reads every tensor if there are any.
    """
    whole = {"sshs_model_hash", "modelspec.hash_sha256"} & metadata.keys()
    legacy = "sshs_legacy_hash" in metadata
    if not whole and not legacy:
        return metadata
    result = dict(metadata)
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    ordered = in_file_order(tensors)
    position = len(header_bytes(ordered, training))
    digest, window = hashlib.sha256(), hashlib.sha256()
    for chunk in _chunks(ordered):
        digest.update(chunk)
        first = max(_LEGACY_OFFSET - position, 0)
        last = max(_LEGACY_OFFSET + _LEGACY_BYTES - position, 0)
        window.update(chunk[first:last])
        position += len(chunk)
    if "sshs_model_hash" in whole:
        result["sshs_model_hash"] = digest.hexdigest()
    if "modelspec.hash_sha256" in whole:
        result["modelspec.hash_sha256"] = f"0x{digest.hexdigest()}"
    if legacy:
        result["sshs_legacy_hash"] = window.hexdigest()[:8]
    return result


def _chunks(tensors: Iterable[TensorRef]) -> Iterable[memoryview]:
    for tensor in tensors:
        yield memoryview(tensor.raw()).cast("B")
