"""Fused values put back into four bits, and how much of each change survives that.

A change that is small next to the steps of the codebook is not rounded but erased: most codes stay
the same. So the share of ΔW that is found again in the new values is measured for each weight,
from the bytes that are stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from loratools.algebra.device import Device
from loratools.base.codecs.bitsandbytes import FourBitWeight
from loratools.base.fourbit.encode import FourBitOptions
from loratools.base.fourbit.store import blanks, fill
from loratools.operations.fuse.blocks import Block, fused_blocks
from loratools.operations.fuse.plan import TensorPlan
from loratools.operations.fuse.tensor import TensorReport
from loratools.operations.fuse.terms import View, load_terms, stacked
from loratools_formats.checkpoints.bitsandbytes import QuantizedWeight, quantized_weights
from loratools_formats.checkpoints.shard_plan import Blank, Sink
from loratools_formats.core.dtypes import Array
from loratools_formats.core.tensors import Buffer, TensorRef
from loratools_formats.disk.errors import AdapterError


class Requantized:
    """One changed weight that is stored in four bits again, as it was before.

    Args:
        plan: the dequantised weight, with what is added to it.
        weight: how it is stored.
        transposed: whether it is stored transposed, as Conv1D weights are.
        device: where products are computed.
    """

    def __init__(
        self, plan: TensorPlan, weight: QuantizedWeight, device: Device, *, transposed: bool
    ) -> None:
        self.plan = plan
        self.weight = weight
        self._transposed = transposed
        self._device = device
        self._options = FourBitOptions(
            quant_type=weight.quant_type,
            blocksize=weight.blocksize,
            double_quant=weight.nested is not None,
        )

    @property
    def blanks(self) -> tuple[Blank, ...]:
        """The tensors it is stored as."""
        return blanks(self.weight.key, self.weight.shape, self._options)

    def fill(self, sinks: Mapping[str, Sink]) -> TensorReport:
        """Compute and write all of them; returns what survives.

        Raises:
            AdapterError: values are not finite.
        """
        kept = {blank.key: _Kept(blank, sinks[blank.key]) for blank in self.blanks}
        key, shape = self.weight.key, self.weight.shape
        fill(kept, key, shape, self.weight.dtype, self._options, self._pieces())
        written = quantized_weights({name: sink.tensor() for name, sink in kept.items()})[key]
        return self._measured(FourBitWeight(written, transposed=self._transposed).tensor())

    def _pieces(self) -> Iterator[Array]:
        """Yield the new values in the order in which they are stored."""
        pieces = (block.total.astype(np.float32) for block in self._blocks())
        if self._transposed:
            yield np.ascontiguousarray(np.concatenate(list(pieces)).T)
        else:
            yield from pieces

    def _blocks(self) -> Iterator[Block]:
        view = View.of(self.plan.source.shape, stacked=stacked(self.plan.changes))
        terms = load_terms(self.plan.changes, view)
        return fused_blocks(
            self.plan.source, view, terms, self.plan.patches, single=False, device=self._device
        )

    def _measured(self, values: TensorRef) -> TensorReport:
        base, delta, lost, found = 0.0, 0.0, 0.0, 0.0
        for block in self._blocks():
            total = block.total.reshape(-1)
            old = self.plan.old_values(block.start, block.base.reshape(-1))
            new = values.elements(block.start, block.start + len(total)).astype(np.float64)
            change = total - old
            base += float(np.dot(old, old))
            delta += float(np.dot(change, change))
            found += float(np.dot(new - old, change))
            lost += float(np.dot(new - total, new - total))
        if not math.isfinite(base + delta + lost):
            raise AdapterError("base tensor holds NaN or infinite values", tensor=self.plan.key)
        return TensorReport(
            self.plan.key,
            self.plan.modules,
            self.weight.quant_type.upper(),
            math.sqrt(base),
            math.sqrt(delta),
            math.sqrt(lost),
            surviving=found / delta if delta else 1.0,
        )


class _Kept:
    """A sink that keeps what it passes on, to be read again."""

    def __init__(self, blank: Blank, sink: Sink) -> None:
        self._blank, self._sink = blank, sink
        self._data = bytearray() if blank.is_text else bytearray(blank.nbytes)

    def write_at(self, offset: int, data: Buffer) -> None:
        """Take bytes."""
        view = memoryview(data).cast("B")
        self._data[offset : offset + len(view)] = view
        self._sink.write_at(offset, data)

    def tensor(self) -> TensorRef:
        """Return what was written."""
        shape = (len(self._data),) if self._blank.is_text else self._blank.shape
        return TensorRef(self._blank.key, self._blank.dtype, shape, lambda: self._data)
