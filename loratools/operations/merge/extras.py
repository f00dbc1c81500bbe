"""What adapters carry besides deltas: replaced tensors, unknown tensors, configuration.

Values that replace base tensors are no deltas and cannot be summed. One that all who have it agree
on is kept; a clash is refused unless the user says how to settle it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from loratools.operations.merge.align import MergeInput
from loratools_formats.core.adapter import Addition, Replacement
from loratools_formats.core.dtypes import Array, common_dtype, encode
from loratools_formats.core.tensors import TensorRef, have_same_bits, in_memory
from loratools_formats.disk.errors import AdapterError, OptionError, UnsupportedError


def refuse_replaced_modules(inputs: Sequence[MergeInput]) -> None:
    """Refuse a tensor that one adapter replaces and another changes by factors.

    Loaders look for it under another name once the module has factors, so the values of the first
    would be lost; an adapter that has both itself names it rightly.

    Raises:
        AdapterError: there is such a tensor.
    """
    changed = {name for item in inputs for name in item.adapter.modules}
    for item in inputs:
        for key, replacement in item.adapter.replacements.items():
            module = replacement.target.rpartition(".")[0]
            if module in changed and module not in item.adapter.modules:
                raise AdapterError(
                    "one adapter replaces a tensor of a module that another changes by factors",
                    path=item.adapter.source,
                    tensor=key,
                    hint="A file cannot hold both",
                )


def agreed_replacements(inputs: Sequence[MergeInput], policy: str | None) -> dict[str, Replacement]:
    """Return the replacements of the merged adapter.

    Args:
        inputs: the adapters.
        policy: None to refuse clashes, `first`, `average`, or an adapter's name.

    Raises:
        AdapterError: a clash that the policy, if any, does not settle, or values that cannot be
            averaged.
        OptionError: no adapter has the name given.
    """
    names = [item.name for item in inputs]
    if policy not in (None, "first", "average", *names):
        raise OptionError(
            "no such way to settle replacements",
            got=policy,
            expected=", ".join(["first", "average", *names]),
        )
    result: dict[str, Replacement] = {}
    for key in sorted({key for item in inputs for key in item.adapter.replacements}):
        holders = [item for item in inputs if key in item.adapter.replacements]
        found = [item.adapter.replacements[key] for item in holders]
        if all(_same(found[0], other) for other in found[1:]):
            result[key] = found[0]
        elif policy is None:
            raise AdapterError(
                "adapters replace the same base tensor by different values",
                tensor=key,
                got=", ".join(item.name for item in holders),
                hint="Settle it with `replacements`: first, average or an adapter's name",
            )
        elif policy == "average":
            result[key] = _average(key, found)
        elif policy == "first":
            result[key] = found[0]
        else:
            result[key] = _named(key, policy, holders)
    return result


def _named(key: str, name: str, holders: Sequence[MergeInput]) -> Replacement:
    for item in holders:
        if item.name == name:
            return item.adapter.replacements[key]
    raise AdapterError(
        f"other adapters clash over a tensor that {name} does not replace",
        tensor=key,
        got=", ".join(item.name for item in holders),
        hint="Settle it with `replacements`: first, average or one of these names",
    )


def _same(first: Replacement, second: Replacement) -> bool:
    return (first.kind, first.target, first.rows) == (
        second.kind,
        second.target,
        second.rows,
    ) and have_same_bits(first.tensor, second.tensor)


def _average(key: str, found: list[Replacement]) -> Replacement:
    first = found[0]
    if any((r.tensor.shape, r.rows) != (first.tensor.shape, first.rows) for r in found):
        raise AdapterError(
            "replaced tensors of different shapes or rows cannot be averaged",
            tensor=key,
            got=", ".join(str(list(r.tensor.shape)) for r in found),
        )
    dtype, shape = first.tensor.dtype, first.tensor.shape

    def read() -> bytes:
        values = sum(r.tensor.load(np.float64) for r in found) / len(found)
        return encode(np.asarray(values), dtype).tobytes()

    return replace(first, tensor=TensorRef(first.tensor.key, dtype, shape, read))


def merged_additions(
    inputs: Sequence[MergeInput], coefficients: Callable[[str, Array], Array] | None
) -> dict[str, Addition]:
    """Return the weighted sums of what the adapters add to biases and norms.

    Args:
        inputs: the adapters; one that does not have a tensor counts as zero.
        coefficients: of the adapters, given a target and the (T, T) matrix of inner products of
            what they add to it; None if the method is no weighted sum.

    Raises:
        UnsupportedError: there are some, and the method is no weighted sum.
        AdapterError: shapes differ, or NaN and infinite values.
    """
    result: dict[str, Addition] = {}
    by_target = [{a.target: (k, a) for k, a in i.adapter.additions.items()} for i in inputs]
    for target in sorted({target for each in by_target for target in each}):
        found = [each.get(target) for each in by_target]
        key, first = next(entry for entry in found if entry is not None)
        if coefficients is None:
            raise UnsupportedError(
                "what adapters add to biases and norms can only be merged by a weighted sum",
                tensor=key,
                hint="Use `method=linear`, or pass `linear_differences=True` to add up differences "
                "by their weights",
            )
        shape = first.tensor.shape
        if any(entry is not None and entry[1].tensor.shape != shape for entry in found):
            raise AdapterError("adapters add tensors of different shapes to one", tensor=key)
        rows = np.stack(
            [
                np.zeros(shape).reshape(-1)
                if entry is None
                else entry[1].tensor.load(np.float64).reshape(-1)
                for entry in found
            ]
        )
        if not np.isfinite(rows).all():
            raise AdapterError("tensor holds NaN or infinite values", tensor=key)
        shares = coefficients(target, rows @ rows.T)
        dtypes = [entry[1].tensor.dtype for entry in found if entry is not None]
        values = (shares @ rows).reshape(shape)
        tensor = in_memory(first.tensor.key, values, common_dtype(dtypes).code)
        result[key] = replace(first, tensor=tensor)
    return result


def agreed_carried(inputs: Sequence[MergeInput], policy: str | None) -> dict[str, TensorRef]:
    """Return the carried tensors of all adapters, such as the embeddings that kohya's files bundle.

    Args:
        inputs: the adapters.
        policy: as for `agreed_replacements`.

    Raises:
        AdapterError: two adapters carry different tensors under one name, and the policy does not
            settle which it is to be.
    """
    result: dict[str, TensorRef] = {}
    for key in sorted({key for item in inputs for key in item.adapter.carried}):
        holders = [item for item in inputs if key in item.adapter.carried]
        found = [item.adapter.carried[key] for item in holders]
        if all(have_same_bits(found[0], other) for other in found[1:]) or policy == "first":
            result[key] = found[0]
        elif policy == "average" and all(tensor.dtype.floating for tensor in found):
            result[key] = _average(key, [Replacement("other", key, t) for t in found]).tensor
        elif policy in [item.name for item in holders]:
            result[key] = found[[item.name for item in holders].index(policy)]
        else:
            raise AdapterError(
                "adapters carry different tensors under one name",
                tensor=key,
                got=", ".join(item.name for item in holders),
                hint="Settle it with `replacements`: first, average or an adapter's name",
            )
    return result
