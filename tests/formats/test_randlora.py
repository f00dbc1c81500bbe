"""RandLoRA of its authors' experiments, beside its definition; the sums are written out."""

from __future__ import annotations

import numpy as np
import pytest
from statedicts import base_of, close, deltas_of, saved

from loratools.algebra.ranks import RankRule
from loratools.operations.squeeze import squeeze
from loratools.operations.to_lora import to_lora
from loratools_formats import read_adapter
from loratools_formats.disk.errors import AdapterError, UnsupportedError

RNG = np.random.default_rng(0)
RANK, COUNT, HIDDEN, ALPHA = 2, 3, 6, 5
FULL = RankRule(rank=64)


def random(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def product(a, b, lambdas, gammas):
    """Return P of a longer and a shorter side, summed as the two sides count the directions."""
    whole = 0.0
    for place in range(COUNT * RANK):
        column = b[place // RANK, :, place % RANK]
        summand, direction = place % COUNT, place // COUNT
        a_row = a[min(summand, len(a) - 1), direction]
        row = lambdas[summand, direction] * a_row[: gammas.shape[1]] * gammas[summand]
        whole = whole + np.outer(column, row).astype(np.float64)
    return whole


def fused(folder):
    """Return a file of a fused layer, of which the first and the last third are adapted."""
    a, b = random(1, RANK, HIDDEN + 3), random(COUNT, 4 * HIDDEN, RANK)
    lambdas, gammas = random(COUNT, 2 * RANK), random(COUNT, 2 * HIDDEN)
    tensors = {"randlora_lambda": lambdas, "randlora_gamma": gammas, "basis_a": a, "basis_b": b}
    path = saved(folder / "lora.safetensors", {f"h.0.c_attn.{k}": v for k, v in tensors.items()})
    thirds = []
    for i in range(2):
        rows = b[:, i * HIDDEN : (i + 1) * HIDDEN]
        own = lambdas[:, i * RANK :][:, :RANK], gammas[:, i * HIDDEN :][:, :HIDDEN]
        thirds.append(product(a, rows, *own))
    zero = np.zeros((HIDDEN, HIDDEN))
    return path, ALPHA / RANK / np.sqrt(COUNT) * np.concatenate([thirds[0], zero, thirds[1]])


def test_a_fused_layer_of_gpt2(tmp_path):
    path, want = fused(tmp_path)
    got, result = deltas_of(path, {"h.0.c_attn": want.shape}, rule=FULL, alpha=ALPHA, groups="101")
    close(got["h.0.c_attn"], want, 1e-5)
    assert result.relative_error < 1e-6
    _, result = deltas_of(
        path, {"h.0.c_attn": want.shape}, rule=RankRule(rank=3), alpha=ALPHA, groups="101"
    )
    sigma = np.linalg.svd(want, compute_uv=False)
    best = np.sqrt(np.sum(sigma[3:] ** 2) / np.sum(sigma**2))
    assert result.relative_error == pytest.approx(best, rel=1e-3)
    with pytest.raises(AdapterError, match="groups"):
        deltas_of(path, {}, rule=FULL, alpha=ALPHA, groups="111")
    with pytest.raises(UnsupportedError, match="to-lora"):
        squeeze(read_adapter(path), RankRule(rank=2))


@pytest.mark.parametrize("form", ["gpt2", "vision"])
@pytest.mark.parametrize("sides", [(4, 8), (8, 4), (6, 6), (4, 6)])
def test_layers_of_one_projection(tmp_path, form, sides):
    out, in_ = sides
    vision = form == "vision"
    a, b = random(COUNT if vision else 1, RANK, 9), random(COUNT, 10, RANK)
    lambdas, gammas = random(COUNT, RANK), random(COUNT, min(sides))
    names = ("w_loramat_B", "w_loramat_A") if vision else ("randlora_lambda", "randlora_gamma")
    tensors = {names[0]: lambdas, names[1]: gammas, "basis_a": a, "basis_b": b}
    path = saved(tmp_path / "lora.safetensors", {f"m.{k}": v for k, v in tensors.items()})
    whole = product(a, b[:, : max(sides)], lambdas, gammas)
    if vision:
        want = ALPHA / RANK * (whole if whole.shape == sides else whole.T)
        base = base_of(tmp_path / "base", {"m": np.zeros((out, in_))})
    else:
        want = ALPHA / RANK / np.sqrt(COUNT) * whole.reshape(in_, out).T
        base = base_of(tmp_path / "base", {"m": np.zeros((in_, out))})
    result = to_lora(read_adapter(path), FULL, base=base, given={"alpha": str(ALPHA)})
    (delta,) = result.adapter.modules.values()
    delta = delta.require_factors()
    close(delta.scale * delta.b.load("f8") @ delta.a.load("f8"), want, 1e-5)
    with pytest.raises(UnsupportedError, match="`base`"):
        to_lora(read_adapter(path), FULL, given={"alpha": str(ALPHA)})


def test_a_model_pickled_whole_is_refused(tmp_path):
    import torch

    model = torch.nn.Module()
    model.register_parameter("w_loramat_B", torch.nn.Parameter(torch.ones(COUNT, RANK)))
    torch.save(model, tmp_path / "model.pth")
    with pytest.raises(AdapterError, match=r"not a plain map .*torch\.nn\.modules"):
        read_adapter(tmp_path / "model.pth", "randlora")


@pytest.mark.parametrize("lost", ["basis_a", "basis_b", "randlora_gamma"])
def test_tensors_that_are_not_there_are_missed(tmp_path, lost):
    tensors = {
        "m.randlora_lambda": random(COUNT, RANK), "m.randlora_gamma": random(COUNT, HIDDEN),
        "m.basis_a": random(1, RANK, 9), "m.basis_b": random(COUNT, 9, RANK),
    }  # fmt: skip
    del tensors[f"m.{lost}"]
    with pytest.raises(AdapterError, match="lacks a factor"):
        read_adapter(saved(tmp_path / "lora.safetensors", tensors))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("basis_a", (1, RANK + 1, 9)),
        ("basis_b", (COUNT - 1, 9, RANK)),
        ("basis_b", (COUNT, 5, RANK)),
    ],
)
def test_bases_that_do_not_fit_are_refused(tmp_path, name, shape):
    tensors = {
        "m.randlora_lambda": random(COUNT, RANK), "m.randlora_gamma": random(COUNT, HIDDEN),
        "m.basis_a": random(1, RANK, 9), "m.basis_b": random(COUNT, 9, RANK),
    } | {f"m.{name}": random(*shape)}  # fmt: skip
    base = base_of(tmp_path / "base", {"m": np.zeros((8, HIDDEN))})
    path = saved(tmp_path / "lora.safetensors", tensors)
    with pytest.raises(AdapterError, match=r"do(es)? not fit"):
        to_lora(read_adapter(path), FULL, base=base, given={"alpha": str(ALPHA)})
