"""What a single file says about itself: kept, and kept true.

Everything is kept. Of an adapter that an operation made, the rank and alpha that sd-scripts records
(`ss_network_dim`, `ss_network_alpha`) are brought up to date; digests of the tensors are computed
again wherever they are present. Sources: `precalculate_safetensors_hashes` of sd-scripts for
`sshs_model_hash` and `sshs_legacy_hash`, and the SAI model specification for
`modelspec.hash_sha256`.
"""

from __future__ import annotations

import hashlib
import json
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
    if "ss_network_args" in metadata:
        metadata |= _network_args(metadata["ss_network_args"], adapter)
    return metadata


def _network_args(text: str, adapter: Adapter) -> dict[str, str]:
    """Return what sd-scripts records of a network's arguments, true of what the file holds now.

    Arguments that only another kind has are left out.
    """
    try:
        args = json.loads(text)
    except ValueError:
        return {}
    if not isinstance(args, dict):
        return {}
    changes = adapter.modules.values()
    kinds = {"lora" if change.factors is not None else change.kind for change in changes}
    if "algo" in args and len(kinds) == 1 and _ALGO_OF.get(args["algo"]) not in kinds:
        kind = next(iter(kinds))
        args = {key: value for key, value in args.items() if key not in _OF_OTHER_KINDS}
        args["algo"] = next((algo for algo, own in _ALGO_OF.items() if own == kind), kind)
    if not any(change.is_dora for change in changes):
        args.pop("dora_wd", None)
    convolutions = [
        part
        for change in changes
        if (part := change.factors) is not None and math.prod(part.layer.kernel) > 1
    ]
    if kinds == {"lora"} and {"conv_dim", "conv_alpha"} & args.keys():
        ranks = {f"{part.rank}" for part in convolutions}
        alphas = {f"{part.scale * part.rank:g}" for part in convolutions}
        for key, values in (("conv_dim", ranks), ("conv_alpha", alphas)):
            if key in args and len(values) == 1:
                args[key] = next(iter(values))
            else:
                args.pop(key, None)
    return {"ss_network_args": json.dumps(args)}


_ALGO_OF = {
    "lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr", "full": "full",
    "diag-oft": "diag_oft", "boft": "butterfly_oft", "glora": "lycoris_glora",
    "ia3": "lycoris_ia3",
}  # fmt: skip
"""LyCORIS' names of kinds, and what each is called here."""
_OF_OTHER_KINDS = frozenset(
    {
        "factor", "decompose_both", "full_matrix", "use_tucker", "use_cp", "use_scalar",
        "unbalanced_factorization", "block_size", "constraint", "rescaled", "rank_dropout_scale",
    }
)  # fmt: skip


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
