"""Fused values stored as the base stores them, and how much of each change survives that.

A change that is small next to the steps of a format is not rounded but erased: most codes stay the
same. So two numbers are measured for each weight on the values that are stored: the share of ΔW
that is found again in them, and how far they are from W + ΔW. One alone misleads: noise may happen
to lie along ΔW.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from loratools.algebra.device import Device
from loratools.base.codecs import Encoder
from loratools.operations.fuse.blocks import fused_blocks, single_precision
from loratools.operations.fuse.plan import TensorPlan
from loratools.operations.fuse.tensor import TensorReport, measured
from loratools.operations.fuse.terms import View, load_terms
from loratools_formats.checkpoints.shard_plan import Blank, Sink
from loratools_formats.core.dtypes import Array

_PIECE = 1 << 17  # elements encoded at a time, which stay in a core's cache


class Reencoded:
    """One changed weight that is stored in a format of quantised weights.

    Args:
        plan: the plain weight, with what is added to it.
        encoder: how it is stored.
        device: where products are computed.
    """

    def __init__(self, plan: TensorPlan, encoder: Encoder, device: Device) -> None:
        self.plan = plan
        self._encoder = encoder
        self._width = plan.source.shape[-1]
        self._device = device

    @property
    def blanks(self) -> tuple[Blank, ...]:
        """The tensors that are computed."""
        return self._encoder.blanks

    @np.errstate(over="ignore", invalid="ignore")
    def fill(self, sinks: Mapping[str, Sink]) -> TensorReport:
        """Compute and write them; returns what survives.

        Raises:
            AdapterError: values are not finite.
        """
        plan = self.plan
        view = View.of(plan.source.shape, plan.changes)
        terms = load_terms(plan.changes, view)
        code = plan.source.dtype.code
        blocks = fused_blocks(
            plan.source,
            view,
            terms,
            plan.patches,
            single=single_precision(view, terms, code, base_code=code),
            device=self._device,
            step=self._encoder.step,
        )
        base = delta = lost = found = 0.0
        for block in blocks:
            flat = block.total.reshape(-1)
            old = plan.old_values(block.start, block.base.reshape(-1))
            for start, stop in self._pieces(block.start, flat.size):
                total = flat[start:stop]
                stored = self._put((block.start + start) // self._width, total, sinks)
                before = old[start:stop].astype(np.float64)
                change = total - before
                base += float(np.dot(before, before))
                delta += float(np.dot(change, change))
                found += float(np.dot(stored - before, change))
                error = stored - total
                lost += float(np.dot(error, error))
        scheme = self._encoder.scheme
        report = measured(plan, scheme.short, (base, delta, lost), scheme.name)
        return replace(report, surviving=found / delta if delta else 1.0)

    def _pieces(self, first: int, size: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of a block's elements that are encoded together: whole steps of rows.

        A block that holds several matrices, or begins inside one, is cut where they end.
        """
        step = self._encoder.step * self._width
        height = max(_PIECE // step, 1) * step
        plane = math.prod(self.plan.source.shape[-2:])
        at = 0
        while at < size:
            end = min(size, at + height, at + plane - (first + at) % plane)
            yield at, end
            at = end

    def _put(self, row: int, total: Array, sinks: Mapping[str, Sink]) -> Array:
        """Write rows, and return what loaders make of them: (elements,) float64."""
        wanted = total.astype(np.float32).reshape(-1, self._width)
        encoded = self._encoder.encode(row, wanted)
        for key, offset, data in encoded.pieces:
            sinks[key].write_at(offset, data.data)
        values: Array = encoded.values.reshape(-1).astype(np.float64)
        return values
