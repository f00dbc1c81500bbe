"""Adapters that change nothing, since all that they hold is zero.

DeepSpeed's ZeRO-3 leaves such files when the weights were not gathered before they were saved. A
command that worked on one would report success and change nothing.
"""

from __future__ import annotations

from itertools import pairwise

from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import LowRank, ModuleChange
from loratools_formats.core.nothing import NOT_GATHERED
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError
from loratools_formats.disk.provenance import OPERATION_KEY

_BYTES_AT_ONCE = 1 << 22
_FIRST_BYTES = 1 << 12


def require_change(adapter: Adapter) -> Adapter:
    """Return an adapter that was read, unless it holds nothing but zeros.

    Only as much is read as it takes to find a change: as a rule, a part of the first module.

    Raises:
        AdapterError: every change is zero, and nothing is replaced or added.
    """
    others = [
        *(addition.tensor for addition in adapter.additions.values()),
        *(replacement.tensor for replacement in adapter.replacements.values()),
    ]
    if not adapter.modules or not adapter.inputs or adapter.provenance is not None:
        return adapter
    if OPERATION_KEY in adapter.metadata:  # of a file whose scale is 0, which says so
        return adapter
    if all(map(_is_zero_change, adapter.modules.values())) and all(map(_is_zero, others)):
        count = len(adapter.modules)
        raise AdapterError(
            "the adapter changes nothing: the weight change of "
            + ("its only module is zero" if count == 1 else f"all its {count} modules is zero"),
            path=adapter.source,
            tensor=next(iter(adapter.modules)),
            hint=NOT_GATHERED + "; an adapter saved before training is zero, too",
        )
    return adapter


def _is_zero_change(change: ModuleChange) -> bool:
    direction = change.direction
    if isinstance(direction, LowRank):
        bias = direction.bias
        is_zero = _is_zero(direction.b) or _is_zero(direction.a)
        whole = is_zero and (bias is None or _is_zero(bias))
        return whole and (change.magnitude is None or _is_zero(change.magnitude))
    from loratools.kinds import get_kind  # numpy, which `info` does without

    # Of a kind that multiplies the weight, zeros are the greatest change there is.
    if get_kind(direction.kind).needs == "weight":
        return False
    return all(map(_is_zero, (*change.tensors(), *direction.shared.values())))


def _is_zero(tensor: TensorRef) -> bool:
    if not tensor.dtype.floating:
        return False
    size = tensor.nbytes
    # The first bytes tell, as a rule, and a file that is elsewhere need not come for them.
    for start, stop in pairwise([0, *range(_FIRST_BYTES, size, _BYTES_AT_ONCE), size]):
        data = bytes(tensor.raw_range(start, stop))
        if data.count(0) < len(data):
            # Zeros may have a sign.
            return not data.translate(None, b"\x00\x80") and not tensor.load().any()
    return True
