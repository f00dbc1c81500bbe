"""Fused values put back into a format whose scales depend on all values of a weight.

A change that is small next to the steps of the format is not rounded but erased: most codes stay
the same. So the share of ΔW that is found again in the new values is measured for each weight,
from the bytes that are stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from loratools.algebra.device import Device
from loratools.base.codecs import WholeEncoder
from loratools.operations.fuse.blocks import Block, fused_blocks
from loratools.operations.fuse.plan import TensorPlan
from loratools.operations.fuse.tensor import TensorReport, measured
from loratools.operations.fuse.terms import View, load_terms
from loratools_formats.checkpoints.shard_plan import Blank, Sink
from loratools_formats.core.tensors import TensorRef


class Requantized:
    """One changed weight that is stored in its format again, as a whole.

    Args:
        plan: the dequantised weight, with what is added to it.
        encoder: how it is stored.
        device: where products are computed.
    """

    def __init__(self, plan: TensorPlan, encoder: WholeEncoder, device: Device) -> None:
        self.plan = plan
        self._encoder = encoder
        self._device = device

    @property
    def blanks(self) -> tuple[Blank, ...]:
        """The tensors that are computed."""
        return self._encoder.blanks

    def fill(self, sinks: Mapping[str, Sink]) -> TensorReport:
        """Compute and write all of them; returns what survives.

        Raises:
            AdapterError: values are not finite.
        """
        values = (block.total.astype(np.float32) for block in self._blocks())
        return self._measured(self._encoder.write(sinks, values).tensor())

    def _blocks(self) -> Iterator[Block]:
        view = View.of(self.plan.source.shape, self.plan.changes)
        terms = load_terms(self.plan.changes, view)
        return fused_blocks(
            self.plan.source, view, terms, self.plan.patches, single=None, device=self._device
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
        scheme = self._encoder.scheme
        report = measured(self.plan, scheme.short, (base, delta, lost), scheme.name)
        return replace(report, surviving=found / delta if delta else 1.0)
