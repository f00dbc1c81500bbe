"""How each tensor of a fused checkpoint is stored: plain, in its format again, or as it was.

Weights that no adapter changes stay as they are, byte for byte, where the format's loaders take
them beside the changed ones. No format is known here by its name: codecs say what they can do.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loratools.algebra.device import Device
from loratools.base.codecs import CodedWeight, Encoder, WholeEncoder
from loratools.base.dequantised import (
    DequantisedCheckpoint,
    as_stored,
    config_beside,
    dequantised,
    is_stored_plain,
)
from loratools.base.fourbit.round_trip import round_tripped
from loratools.operations.fuse.draft import FuseInput
from loratools.operations.fuse.options import FuseOptions
from loratools.operations.fuse.plan import FusePlan, TensorPlan, plan_fuse
from loratools.operations.fuse.reencode import Reencoded
from loratools.operations.fuse.requantize import Requantized
from loratools.operations.fuse.trained_on import four_bits
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import AdapterError, OptionError, UnsupportedError


@dataclass(frozen=True)
class Storage:
    """What is read, what will be done with it, and how that is stored.

    Attributes:
        base: the checkpoint as it is read.
        plan: what is done to each of its tensors.
        rounded: names of weights that are rounded to four bits before anything is added.
        verbatim: quantised weights that stay as they are.
        encoders: what stores changed weights in a format of quantised ones.
    """

    base: DequantisedCheckpoint
    plan: FusePlan
    rounded: frozenset[str] = frozenset()
    verbatim: Mapping[str, CodedWeight] = field(default_factory=dict)
    encoders: Mapping[str, Encoder | WholeEncoder] = field(default_factory=dict)

    def encoded(self, plan: TensorPlan, device: Device) -> Reencoded | Requantized:
        """Return the work of storing a changed weight in its format.

        Raises:
            UnsupportedError: the new weight has another shape than the old one.
        """
        encoder = self.encoders[plan.key]
        shape = self.base.weights[plan.key].shape
        if plan.source.shape != shape:
            raise UnsupportedError(
                "a weight that changes its shape cannot keep its quantisation",
                tensor=plan.key,
                got=list(plan.source.shape),
                expected=list(shape),
                hint="Leave out `requantize` and `changed_bits`: changed weights are then stored "
                "in 16 bits",
            )
        if isinstance(encoder, Encoder):
            return Reencoded(plan, encoder, device)
        return Requantized(plan, encoder, device)

    def is_converted(self, plan: TensorPlan) -> bool:
        """Return whether a tensor that no adapter changes is stored in another way than it was."""
        key = plan.key
        was_other = key in self.base.stored or key in self.rounded
        return not plan.is_touched and key not in self.verbatim and (not plan.is_copy or was_other)


def plan_storage(base: Checkpoint, inputs: Sequence[FuseInput], options: FuseOptions) -> Storage:
    """Return how a base and adapters are fused and stored.

    Raises:
        LoratoolsError: as `plan_fuse` does.
        UnsupportedError: a quantised weight is to change, and cannot be read or not be stored so.
        OptionError: an option has no meaning for the base.
    """
    return _Planner(base, inputs, options).storage()


class _Planner:
    """Plans one fusion."""

    def __init__(self, base: Checkpoint, inputs: Sequence[FuseInput], options: FuseOptions) -> None:
        self._base, self._inputs, self._options = base, inputs, options

    def storage(self) -> Storage:
        """Return how it is stored."""
        base, options = self._base, self._options
        try:
            view = dequantised(base)
        except UnsupportedError as unreadable:
            return self._beside_unreadable(unreadable)
        self._check_mode(view)
        rounded: frozenset[str] = frozenset()
        if options.trained_on is not None:
            view, rounded = self._round_trip(view, options.trained_on)
        checkpoint = view.checkpoint
        if options.keeps_format:
            checkpoint = replace(checkpoint, config=base.config)
        plan = plan_fuse(checkpoint, self._inputs, options.code, view.stored)
        touched = {tensor.key for tensor in plan.touched}
        if options.keeps_format:
            return self._kept(view, plan, touched)
        if view.is_quantized and options.dtype is None and options.base_mode is None:
            if touched.isdisjoint(view.stored):
                return Storage(as_stored(base), plan_fuse(base, self._inputs))
            mixed = self._mixed(view, touched)
            if mixed is not None:
                return mixed
        return Storage(view, plan, rounded)

    def _round_trip(
        self, view: DequantisedCheckpoint, spelling: str
    ) -> tuple[DequantisedCheckpoint, frozenset[str]]:
        """Return the base with its linear weights rounded to four bits and back, and their names.

        Raises:
            OptionError: the base is quantised already.
        """
        if view.is_quantized:
            raise OptionError(
                "`trained_on` has no meaning for a quantised base",
                path=self._base.path,
                hint="Leave it out: what is added to are the values of the quantised weights",
            )
        rounded, keys = round_tripped(self._base, four_bits(spelling))
        return replace(view, checkpoint=rounded), keys

    def _kept(
        self, view: DequantisedCheckpoint, plan: FusePlan, touched: Collection[str]
    ) -> Storage:
        """Return how each changed weight is stored in its format; the others stay as they are.

        Raises:
            UnsupportedError: a weight's format is not written.
        """
        bits = self._options.changed_bits
        changed = {key: w for key, w in view.weights.items() if key in touched}
        verbatim = {key: w for key, w in view.weights.items() if key not in touched}
        encoders: dict[str, Encoder | WholeEncoder] = {}
        for key, weight in changed.items():
            encoder = weight.encoder() if bits is None else weight.encoder_in(bits)
            if encoder is None:
                raise self._not_written(weight)
            encoders[key] = encoder
        config = self._base.config
        if bits is not None:
            for key in sorted(changed):  # each has groups of its own size
                config = changed[key].config_in(config, [key.removesuffix(".weight")], bits)
        view = replace(view, checkpoint=replace(view.checkpoint, config=config))
        return Storage(view, plan, verbatim=verbatim, encoders=encoders)

    def _not_written(self, weight: CodedWeight) -> UnsupportedError:
        bits = self._options.changed_bits
        what = "again" if bits is None else f"in {bits} bits"
        option = "requantize" if bits is None else "changed_bits"
        if bits is not None and weight.scheme.bits == bits and weight.encoder() is not None:
            return UnsupportedError(
                f"a weight that has {bits} bits needs no other codes",
                path=self._base.path,
                tensor=weight.key,
                got=str(weight.scheme),
                hint="Pass `requantize=True` instead of `changed_bits`: it keeps these bits",
            )
        return UnsupportedError(
            f"a weight of this format cannot be written {what}",
            path=self._base.path,
            tensor=weight.key,
            got=str(weight.scheme),
            hint=f"Leave out `{option}`: changed weights are then stored in 16 bits",
        )

    def _mixed(self, view: DequantisedCheckpoint, touched: Collection[str]) -> Storage | None:
        """Return storage that leaves quantised weights as they are beside those that become plain.

        Returns:
            None if the format does not allow it.
        """
        weights = view.weights
        config = config_beside(self._base, [w for key, w in weights.items() if key in touched])
        if config is None:
            return None
        verbatim = {key: w for key, w in weights.items() if key not in touched}
        kept = {part.key for weight in verbatim.values() for part in weight.parts}
        checkpoint = replace(view.checkpoint, config=config)
        dropped = tuple(key for key in view.dropped if key not in kept)
        view = replace(view, checkpoint=checkpoint, dropped=dropped)
        plan = plan_fuse(checkpoint, self._inputs, None, view.stored)
        return Storage(view, plan, verbatim=verbatim)

    def _beside_unreadable(self, unreadable: UnsupportedError) -> Storage:
        """Return storage that leaves quantised weights alone.

        Raises:
            UnsupportedError: `unreadable`, if an adapter changes one or finds no place.
        """
        kept, options = as_stored(self._base), self._options
        base = kept.checkpoint
        if (
            options.keeps_format
            or options.trained_on is not None
            or options.dtype is not None
            or options.base_mode is not None
        ):
            raise unreadable
        try:
            plan = plan_fuse(base, self._inputs)
        except AdapterError as error:
            raise unreadable from error
        except UnsupportedError as error:
            key = error.tensor
            if key is None or key not in base.tensors or is_stored_plain(base, key):
                raise
            raise unreadable from error
        touched = [tensor.key for tensor in plan.touched if tensor.key in base.tensors]
        if not all(is_stored_plain(base, key) for key in touched):
            raise unreadable
        return Storage(kept, plan)

    def _check_mode(self, view: DequantisedCheckpoint) -> None:
        mode, path = self._options.base_mode, self._base.path
        quoted = shlex.quote(str(path))
        if mode == "original" and view.is_quantized:
            schemes = {str(weight.scheme) for weight in view.weights.values()}
            raise OptionError(
                "the base is quantised",
                path=path,
                got="; ".join(sorted(schemes)),
                hint="Give the original 16-bit base as BASE",
            )
        if mode == "dequant" and not view.is_quantized:
            raise OptionError(
                "the base is not quantised",
                path=path,
                hint="Leave out `base_mode`, or quantise it first: "
                f"loratools quantize {quoted} -o nf4",
            )
        if self._options.keeps_format and not view.is_quantized:
            raise OptionError(
                "only a quantised base can be quantised again",
                path=path,
                hint="Fuse without `requantize`, then quantise: loratools quantize fused -o nf4",
            )


def caveats(weights: Iterable[CodedWeight]) -> list[Finding]:
    """Return what to know when something is added to weights of their formats."""
    found = {weight.caveat for weight in weights} - {""}
    return [Finding("rescaled-inputs", "warning", None, text) for text in sorted(found)]


def caveats_written(weights: Iterable[CodedWeight]) -> list[Finding]:
    """Return what to know when weights are written in their formats again."""
    found = {weight.caveat_written for weight in weights} - {""}
    return [Finding("nearest-codes", "note", None, text) for text in sorted(found)]


def no_longer_quantised(storage: Storage, dtype: str | None) -> list[Finding]:
    """Return the findings about weights that are no longer quantised."""
    dropped = storage.base.dropped
    if not dropped:
        return []
    if storage.verbatim:
        message = (
            f"changed weights are stored in 16 bits now; {len(storage.verbatim)} others stay "
            "quantised as they were"
        )
        return [Finding("no-longer-quantised", "note", None, message)]
    now = "not quantised any more" if dtype == "f32" else "stored in 16 bits now"
    left = "1 tensor is" if len(dropped) == 1 else f"{len(dropped)} tensors are"
    message = f"weights are {now}; {left} left out, which said only how they were quantised"
    return [
        Finding("no-longer-quantised", "note", None, message),
        *caveats(storage.base.weights.values()),
    ]


def config_of(storage: Storage, options: FuseOptions) -> Mapping[str, Any] | None:
    """Return the configuration to write, None to keep the base's file."""
    plan, view = storage.plan, storage.base
    if options.requantize or not view.is_quantized:
        return plan.config
    if plan.config is not None and options.changed_bits is not None:
        sections = view.checkpoint.config
        return {**plan.config, **{k: sections[k] for k in sections if "quantiz" in k}}
    return (plan.config or view.checkpoint.config) or None
