"""AdaMSS: factors for each of several groups of outputs, on a common basis of the inputs.

ΔW = Σ E_g B_g A_g V with V (r, in), E_g placing the outputs of group g; where the layer has a bias,
V has a column more and the change of the bias comes from it. Which outputs form a group is not in
the file: PEFT clusters the rows of U in a randomised SVD of [W | bias], from seeds, whenever it
loads the adapter, and so does this. The basis found on the way must be the stored V, and the
groups must have the sizes of the stored factors. Source: `AdamssLayer` in peft 0.21.2, the SVD of
torch and the k-means of scikit-learn, in float32 as there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools.kinds.numbers.random_stream import TorchStream
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import AdapterError, UnsupportedError

_CLUSTER_SEED = 123456789
_CLUSTER_PASSES = 10
_CLUSTER_TOLERANCE = 1e-4  # of the mean variance of a column
_POWER_ITERATIONS = 2
_LEAST_COSINE = 0.99  # between directions that should be the same


def _factors(delta: KindDelta, weight: Weight) -> tuple[Array, Array]:
    """Return (out, Σr) and (Σr, in), the latter with a column more if the layer has a bias."""
    tensors = Tensors(delta)
    basis, (out, in_) = tensors["basis"], weight.shape
    count = min(delta.settings["groups"], out)
    names = {f"{side}.{i}" for side in "ab" for i in range(count)} | {"basis"}
    if {*delta.parts} != names:
        raise AdapterError(
            "the file holds a different number of groups than its config says",
            got=", ".join(sorted(delta.parts)),
            expected=f"{count} groups",
        )
    whole = weight.rows(0, out).astype(np.float32)
    bias = weight.bias() if basis.shape[1] == in_ + 1 else None
    if bias is not None:
        whole = np.concatenate([whole, bias[:, None].astype(np.float32)], axis=1)
    if basis.shape[1] != whole.shape[1] or len(basis) > min(whole.shape):
        raise tensors.wrong_shape("basis", f"(r, {in_}), or a column more for a bias")
    u, v = _randomised_svd(whole, len(basis), delta.settings["seed"])
    if np.abs(np.sum(v * basis, axis=1)).min() < _LEAST_COSINE:
        raise AdapterError(
            "the base is not the one that the adapter was trained on: its singular vectors are not "
            "those of the file"
        )
    labels = _clustered(u, count)
    rank = sum(tensors[f"a.{i}"].shape[0] for i in range(count))
    b, a, first = np.zeros((out, rank)), np.zeros((rank, basis.shape[1])), 0
    for i in range(count):
        left, right, rows = tensors[f"b.{i}"], tensors[f"a.{i}"], np.flatnonzero(labels == i)
        if left.shape != (len(rows), len(right)) or right.shape[1] != len(basis):
            raise tensors.wrong_shape(f"b.{i}", f"({len(rows)}, {len(right)}), the size of a group")
        span = slice(first, first + len(right))
        b[rows, span], a[span] = left, right @ basis
        first += len(right)
    return b, a


def _randomised_svd(whole: Array, rank: int, seed: int) -> tuple[Array, Array]:
    """Return U (out, r) and V (r, in) as `torch.svd_lowrank` finds them, up to signs."""
    tall = whole if whole.shape[0] >= whole.shape[1] else whole.T
    start = TorchStream(seed).normal((tall.shape[1], rank), 1.0)
    q, _ = np.linalg.qr(tall @ start)
    for _ in range(_POWER_ITERATIONS):
        q, _ = np.linalg.qr(tall.T @ q)
        q, _ = np.linalg.qr(tall @ q)
    u, _, vt = np.linalg.svd(q.T @ tall, full_matrices=False)
    left = q @ u
    return (left, vt) if tall is whole else (vt.T, left.T)


def _clustered(points: Array, count: int) -> Array:
    """Return the group of each row: Lloyd's algorithm from rows drawn at random.

    Rotations and mirrorings of the points change nothing, so signs of singular vectors do not
    matter.

    Raises:
        UnsupportedError: a group ran empty, which scikit-learn fills by rules of its own.
    """
    points = points - points.mean(axis=0)
    share = np.full(len(points), 1.0, np.float32) / np.float32(len(points))
    stream: Any = np.random.RandomState(_CLUSTER_SEED)
    centres = points[stream.choice(len(points), size=count, replace=False, p=share)]
    tolerance = _CLUSTER_TOLERANCE * points.var(axis=0).mean()
    labels = np.full(len(points), -1)
    for _ in range(_CLUSTER_PASSES):
        before, labels = labels, _nearest(points, centres)
        sizes = np.bincount(labels, minlength=count)
        if not sizes.all():
            raise UnsupportedError(
                "the groups of AdaMSS cannot be computed again: one of them ran empty"
            )
        sums = np.zeros_like(centres)
        np.add.at(sums, labels, points)
        moved = sums / sizes[:, None]
        shift, centres = np.sum((moved - centres) ** 2), moved
        if np.array_equal(labels, before):
            return labels
        if shift <= tolerance:
            break
    return _nearest(points, centres)


def _nearest(points: Array, centres: Array) -> Array:
    distances = np.sum(centres**2, axis=1) - 2.0 * (points @ centres.T)
    result: Array = np.argmin(distances, axis=1)
    return result


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    b, a = _factors(delta, weight)
    return Product(b, a[:, : weight.shape[1]])


def _bias(delta: KindDelta, weight: Weight, bias: Array) -> Array:
    del bias
    b, a = _factors(delta, weight)
    added: Array = b @ a[:, -1]
    return added


KIND = Kind(
    name="adamss",
    title="AdaMSS",
    source="peft AdamssLayer",
    parts=("basis",),
    optional=("a.*", "b.*"),
    needs="weight",
    form=_form,
    bias=_bias,
)
