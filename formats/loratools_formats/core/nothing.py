"""Files that are adapters by their form, and hold nothing."""

from __future__ import annotations

from loratools_formats.core.adapter import Adapter
from loratools_formats.disk.errors import AdapterError

NOT_GATHERED = (
    "DeepSpeed's ZeRO-3 leaves such a file when the weights were not gathered before saving: train "
    "with stage3_gather_16bit_weights_on_model_save, or gather a checkpoint with zero_to_fp32.py"
)
"""Why trainers save such files, and what to do about it."""


def require_tensors(adapter: Adapter) -> Adapter:
    """Return an adapter, unless it has no tensor with a value in it.

    Kinds that change no weight may have none; a finding of theirs says so.

    Raises:
        AdapterError: it has none.
    """
    if adapter.caveats or any(tensor.numel for tensor in adapter.tensors()):
        return adapter
    raise AdapterError("the adapter holds no tensors", path=adapter.source, hint=NOT_GATHERED)
