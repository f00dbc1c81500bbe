"""Trainable tokens: some rows of an embedding are replaced.

ΔW is zero except in the rows at `rows`, where it is their new values less the base's: as a matrix
with the vocabulary as `in`, a product of rank n. Source: `TrainableTokensLayer` in peft 0.21.2,
which changes an output layer that is tied to the embedding along with it; a plain LoRA does not.
"""

from __future__ import annotations

import numpy as np

from loratools.algebra.row_blocks import row_spans
from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools_formats.core.change import KindDelta


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    tensors, places = Tensors(delta), np.array(delta.settings["rows"], np.int64)
    new, (out, in_) = tensors["values"], weight.shape
    if new.shape != (len(places), out) or len(set(places.tolist())) != len(places):
        raise tensors.wrong_shape("values", f"({len(places)}, {out}), a row for each token")
    if places.size and places.max() >= in_:
        raise tensors.wrong_shape("values", f"tokens below {in_}")
    old = np.concatenate([weight.rows(*span)[:, places] for span in row_spans(weight.shape)])
    chosen = np.zeros((len(places), in_))
    chosen[np.arange(len(places)), places] = 1.0
    return Product(new.T - old, chosen)


KIND = Kind(
    name="token_rows",
    title="trainable tokens",
    source="peft TrainableTokensLayer",
    parts=("values",),
    needs="weight",
    form=_form,
    if_tied="an output layer that is tied to the embedding would keep its old rows",
)
