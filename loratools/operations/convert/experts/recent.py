"""Keep the bytes of the tensors read last, for stacks that are written one matrix at a time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import replace

from loratools_formats.core.tensors import Buffer, TensorRef

_KEPT = 8
"""Stacks of about two layers: A and B of two parameters each."""


class Recent:
    """The tensors read last; those that lie in a file as they are need no keeping."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, tuple[TensorRef, Buffer]] = OrderedDict()
        self._lock = threading.Lock()
        self._made: dict[int, tuple[TensorRef, TensorRef]] = {}

    def of(self, tensor: TensorRef) -> TensorRef:
        """Return a tensor whose bytes are kept for a while once they are read."""
        if tensor.file is not None:
            return tensor
        known = self._made.get(id(tensor))
        if known is None:
            known = tensor, replace(tensor, read=lambda: self._read(tensor))
            self._made[id(tensor)] = known
        return known[1]

    def _read(self, tensor: TensorRef) -> Buffer:
        with self._lock:
            found = self._kept.get(id(tensor))
            if found is None:
                found = tensor, tensor.read()
                self._kept[id(tensor)] = found
            self._kept.move_to_end(id(tensor))
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return found[1]
