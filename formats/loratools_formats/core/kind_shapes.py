"""The shapes of the tensors of each declared kind, and the one check of a module against them.

NumPy broadcasts a (1, 2) where a (12, 2) is due, and a loader of the kind refuses it. This table
says what is due, so that a module with contradictory shapes is refused when it is read, before
anything is computed from it.

A shape is a row of axes. An axis is a number or a name; one name has one length in a module. `out`
and `in` are those of the weight as a matrix. A name that ends in `*` is the product of its axis and
all axes after it, which are the same in each tensor of one module. `#name` is a tensor of that many
numbers with at most one axis longer than 1.
`x.*` are parts with a number or a word of their own, and `r.` is a length that each of them has.
`a|b` are alternatives. `part if other` holds instead of `part` where the module has `other`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError

_FACTORS = {"a": "r in", "b": "out r"}

SHAPES: dict[str, dict[str, str]] = {
    "adalora": _FACTORS | {"e": "r 1"},
    "adamss": {"basis": "k v", "a.*": "r. k", "b.*": "g. r."},
    "bias": {"added": "1 out"},
    "blockdiag": {"a": "ar ac", "b": "br bc"},
    "boft": {"blocks": "levels n b b", "gain": "#out"},
    "butterfly_oft": {"blocks": "levels n b b", "gain": "#out"},
    "c3a": {"kernel": "p q size"},
    "deft": {"p": "out r", "r": "r in"},
    "delora": _FACTORS | {"lambda": "#1", "w_norm": "in"},
    "diag_oft": {"blocks": "n b b", "gain": "#out"},
    "fourierft": {"spectrum": "n"},
    "frod": {"v": "in in", "diagonal": "in", "sparse": "n", "places": "2 n", "size": "size*"},
    "full": {"diff": "rows*"},
    "gated": _FACTORS | {"gate": "#r"},
    "glora": {
        **{f"{path}.Xd": f"out r{path}" for path in "AB"},
        **{f"{path}.Xu": f"r{path} in" for path in "AB"},
        **{f"{path}.X": "out 1|1" for path in "AB"},
        **{f"{path}.zeros": "out in" for path in "AB"},
        "C.Xd": "in rC", "C.Xu": "rC 1", "C.X": "in 1", "C.zeros": "in 1",
        **{f"{path}.X": "out|1" for path in "DE"},
        **{f"{path}.zeros": "out" for path in "DE"},
    },
    "gralora": {"a": "n width r", "b": "n r height", "general_a": "h in", "general_b": "out h"},
    "hira": {"a": "r in*", "b": "out r*"},
    "hra": {"u": "in r"},
    "ia3": {"gain": "#n"},
    "increlora": {"a.*": "r. in", "b.*": "out r.", "e.*": "#r."},
    "kasa": _FACTORS | {"diagonal": "#r"},
    "loha": {
        "w1_a": "out r1",
        "w1_b": "r1 in",
        "w2_a": "out r2",
        "w2_b": "r2 in",
        "w1_a if t1": "r1 out",
        "w1_b if t1": "s1 i",
        "t1": "r1 s1 kernel*",
        "w2_a if t2": "r2 out",
        "w2_b if t2": "s2 i",
        "t2": "r2 s2 kernel*",
    },
    "lokr": {
        "w1": "m n*",
        "w1_a": "m r1",
        "w1_b": "r1 n*",
        "w2": "p q*",
        "w2_a": "p r2",
        "w2_b": "r2 q*",
        "w2_t": "r2 s2 kernel*",
        "w2_a if w2_t": "r2 p",
        "w2_b if w2_t": "s2 q",
    },
    "loldu": {"z": "#r"},
    "loldu_full": {
        "residual": "out in",
        "permutation": "out out",
        "lower": "out r",
        "upper": "r in",
        "z": "#r",
        "scale": "#1",
        "copy": "out in",
        "mask": "mask*",
    },
    "loralib": {"a": "ar ac", "b": "br bc"},
    "lorat": {"a": "r in", "b": "rows r", "a.*": "r. in", "b.*": "rows r.", "alpha": "#1",
              "rslora": "#1"},
    "lycoris_glora": {"a1": "i r1*", "a2": "r1 i*", "b1": "out r2*", "b2": "r2 in*"},
    "lycoris_ia3": {"gain": "#n", "on_input": "#1"},
    "megatron": {"a": "r in", "b": "rows r", "magnitude": "#rows"},
    "middle": {"a": "r in", "b": "out s", "middle": "s r"},
    "miss": {"block": "r width"},
    "miss_bat": {"block": "n r r"},
    "oft": {"triangles": "n entries"},
    "osf": {"u": "out k", "s": "k", "v": "k in"},
    "peanut": {"a": "r out", "b": "out r", "encoder.*": "r r", "decoder.*": "r r"},
    "psoft": {"matrix": "entries|r r", "left": "r", "right": "r"},
    "qalora": {"a": "r groups", "b": "out r"},
    "randlora": {"lambda": "r n", "gamma": "n smaller", "a": "r width*", "b": "height m r"},
    "randlora_authors": {"lambda": "n x", "gamma": "n y", "a": "k r width", "b": "m height r"},
    "road": {"theta": "n", "alpha": "n"},
    "sparse": {"values": "n", "indices": "2 n|n", "a": "r in", "b": "out r"},
    "tinylora": {"a": "s columns", "b": "rows r", "p": "u r s", "v.*": "u"},
    "token_rows": {"values": "n out"},
    "torchtune": _FACTORS,
    "tucker": {"up": "out r*", "down": "s i*", "mid": "r s kernel*"},
    "unilora": {
        "bank": "n",
        "indices_a": "r in",
        "scales_a": "r in",
        "indices_b": "out r",
        "scales_b": "out r",
    },
    "unscaled": _FACTORS,
    "vblora": {
        "bank": "h length",
        "logits_a": "r x h",
        "logits_b": "y r h",
        "indices_a": "r x k",
        "indices_b": "y r k",
        "weights_a": "r x l",
        "weights_b": "y r l",
    },
    "vera": {"lambda_b": "out", "lambda_d": "r", "a": "r width", "b": "height s"},
    "waveft": {"spectrum": "n"},
}  # fmt: skip


def check_shapes(
    kind: str,
    parts: Mapping[str, TensorRef],
    shape: tuple[int | None, int | None] = (None, None),
) -> dict[str, int]:
    """Check the tensors of one module against its kind; return the lengths by name.

    A part or a kind that the table does not have is left to the declaration, which refuses it.

    Args:
        kind: name of the declaration.
        parts: tensors of the module, own and shared, by part.
        shape: (out, in) of the weight, None or 0 for what is not known.

    Raises:
        AdapterError: a tensor has another shape than the kind and the other tensors ask for, or
            no elements.
    """
    lengths = {name: side for name, side in zip(("out", "in"), shape, strict=True) if side}
    table = SHAPES.get(kind, {})
    for part, tensor in parts.items():
        wanted = _wanted(table, part, parts)
        if wanted is None:
            continue
        fitting = (_bound(axes, part, tensor.shape, lengths) for axes in wanted.split("|"))
        found = next((lengths for lengths in fitting if lengths is not None), None)
        if found is None or 0 in tensor.shape:
            raise AdapterError(
                f"tensor does not fit the others of a module of kind {kind}",
                tensor=tensor.key,
                got=list(tensor.shape),
                expected=_worded(wanted, part, lengths),
            )
        lengths = found
    return lengths


def _wanted(table: Mapping[str, str], part: str, parts: Mapping[str, TensorRef]) -> str | None:
    """Return the shape that a part must have, None if the table does not have the part."""
    stem = part.partition(".")[0]
    for key, shape in table.items():
        name, _, condition = key.partition(" if ")
        if condition and name == part and condition in parts:
            return shape
    return table.get(part, table.get(f"{stem}.*"))


def _axes(wanted: str, part: str) -> Iterator[str]:
    """Yield the axes of a shape, lengths of a numbered part with its number."""
    number = part.partition(".")[2]
    for axis in wanted.split():
        yield f"{axis}{number}" if axis.endswith(".") else axis


def _bound(
    wanted: str, part: str, shape: tuple[int, ...], lengths: Mapping[str, int]
) -> dict[str, int] | None:
    """Return the lengths with those of one more tensor, None if it does not fit them."""
    result = dict(lengths)
    axes = list(_axes(wanted, part))
    if axes[0].startswith("#"):
        if sum(side > 1 for side in shape) > 1:
            return None
        axes, shape = [axes[0][1:]], (math.prod(shape),)
    elif axes[-1].endswith("*"):
        if len(shape) < len(axes):
            return None
        axes[-1] = axes[-1][:-1]
        for number, side in enumerate((*shape[len(axes) - 1 :], 0)):  # 0 ends them
            if result.setdefault(f"{axes[-1]}*{number}", side) != side:
                return None
        shape = (*shape[: len(axes) - 1], math.prod(shape[len(axes) - 1 :]))
    if len(axes) != len(shape):
        return None
    for axis, side in zip(axes, shape, strict=True):
        expected = int(axis) if axis.isdigit() else result.setdefault(axis, side)
        if expected != side:
            return None
    return result


def _worded(wanted: str, part: str, lengths: Mapping[str, int]) -> str:
    """Return a shape for people, with the lengths that are known."""
    forms = []
    for form in wanted.split("|"):
        axes = []
        for axis in _axes(form, part):
            name = axis.strip("#*")
            length = f"{lengths[name]}" if name in lengths else name
            axes.append(f"{length} numbers" if axis.startswith("#") else length)
            if axis.endswith("*"):
                axes[-1] += " …"
        forms.append(axes[0] if axes[0].endswith(" numbers") else f"({', '.join(axes)})")
    return " or ".join(forms)
