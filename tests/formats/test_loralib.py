"""State dicts of the original LoRA code, beside its definitions; what they lack must be given."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file
from whole_delta import effective_delta

from loratools.algebra.ranks import RankRule
from loratools.operations.squeeze import squeeze
from loratools.operations.to_lora import to_lora
from loratools_formats import find_format, read_adapter, write_adapter
from loratools_formats.disk.errors import (
    AdapterError,
    OptionError,
    UnknownFormatError,
    UnsupportedError,
)

RNG = np.random.default_rng(0)


def random(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


A, B = random(4, 24), random(36, 4)


def pickled(path, tensors, *, wrapped=False):
    import torch

    state = {key: torch.from_numpy(value) for key, value in tensors.items()}
    torch.save({"model_state_dict": state} if wrapped else state, path)
    return path


def folded(path, shape, module="layers.0.q", **given):
    adapter = read_adapter(path)
    texts = {name: str(value) for name, value in given.items()}
    result = to_lora(adapter, RankRule(), given=texts)
    return effective_delta(module, result.adapter.modules[module], shape), result


def close(got, want):
    assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)


@pytest.mark.parametrize("wrapped", [False, True])
def test_factors_of_a_linear_layer(tmp_path, wrapped):
    tensors = {"layers.0.q.lora_A": A, "layers.0.q.lora_B": B, "layers.0.q.bias": random(36)}
    path = pickled(tmp_path / "lora.pt", tensors, wrapped=wrapped)
    assert find_format(path).name == "loralib"
    got, result = folded(path, (36, 24), alpha=8)
    close(got, 2.0 * B @ A)
    write_adapter(result.adapter, tmp_path / "out", "peft")
    again = read_adapter(tmp_path / "out")
    assert again.config["peft_type"] == "LORA"
    (replacement,) = again.replacements.values()
    assert (replacement.kind, replacement.target) == ("bias", "layers.0.q.bias")
    np.testing.assert_array_equal(replacement.tensor.load(), tensors["layers.0.q.bias"])


def test_factors_of_an_embedding_go_to_peft_as_such(tmp_path):
    """loralib adds (lora_B @ lora_A)ᵀ to an embedding, whatever its model calls it."""
    for name in ("gpt_neox.embed_in", "decoder.embed_positions", "transformer.wte"):
        tensors = {f"{name}.lora_A": A, f"{name}.lora_B": B}
        got, result = folded(pickled(tmp_path / "lora.pt", tensors), (24, 36), name, alpha=8)
        close(got, 2.0 * (B @ A).T)
        assert result.adapter.modules[name].layer.kind == "embedding"


def merged_linear(a, b, enabled, alpha):
    """Return ΔW of MergedLinear, group by group, from its definition."""
    rank, count = b.shape[1], sum(enabled)
    height = len(b) // count
    rows, used = [], 0
    for on in enabled:
        if on:
            part_b = b[used * height : (used + 1) * height]
            rows.append(part_b @ a[used * rank : (used + 1) * rank])
            used += 1
        else:
            rows.append(np.zeros((height, a.shape[1])))
    return alpha / rank * np.concatenate(rows)


def test_fused_projections_need_to_be_told_which_are_adapted(tmp_path):
    a, b = random(8, 24), random(48, 4)
    path = pickled(tmp_path / "lora.pt", {"h.0.c_attn.lora_A": a, "h.0.c_attn.lora_B": b})
    adapter = read_adapter(path)
    with pytest.raises(UnsupportedError, match="groups"):
        to_lora(adapter, RankRule(), given={"alpha": "8"})
    with pytest.raises(AdapterError, match="groups"):
        to_lora(adapter, RankRule(), given={"alpha": "8", "groups": "111"})
    with pytest.raises(OptionError, match="groups"):
        to_lora(adapter, RankRule(), given={"alpha": "8", "groups": "201"})
    for groups in ("101", "110", "11"):
        enabled = [digit == "1" for digit in groups]
        want = merged_linear(a, b, enabled, 8)
        got, result = folded(path, want.shape, "h.0.c_attn", alpha=8, groups=groups)
        close(got, want)
        assert result.adapter.modules["h.0.c_attn"].rank == 8


def test_adalora_as_its_authors_save_it(tmp_path):
    e = random(4, 1)
    e[2] = 0
    tensors = {"layers.0.q.lora_A": A, "layers.0.q.lora_B": B, "layers.0.q.lora_E": e}
    path = pickled(tmp_path / "lora.bin", tensors)
    got, result = folded(path, (36, 24), alpha=16)
    close(got, 16 / (4 + 1e-5) * B @ (A * e))
    assert result.adapter.modules["layers.0.q"].rank == 3


def test_increlora_joins_its_pieces_by_number(tmp_path):
    pieces = {i: (random(1, 24), random(36, 1), random(1, 1)) for i in range(11)}
    tensors = {}
    for i, (a, b, e) in pieces.items():
        tensors |= {f"q.lora_A.{i}": a, f"q.lora_B.{i}": b, f"q.lora_E.{i}": e}
    path = pickled(tmp_path / "lora.pt", tensors)
    want = sum(e * b @ a for a, b, e in pieces.values()) * (8 / (9 + 1e-5))
    got, _ = folded(path, (36, 24), "q", alpha=8, ranknum=9)
    close(got, want)
    with pytest.raises(UnsupportedError, match="ranknum"):
        to_lora(read_adapter(path), RankRule(), given={"alpha": "8"})


def test_gates_of_sora(tmp_path):
    gate = np.array([[0.5, 0.0, 2.0, 0.0]], "f4")
    tensors = {"q.lora.lora_A": A, "q.lora.lora_B": B, "q.lora.gate": gate}
    got, result = folded(pickled(tmp_path / "lora.pt", tensors), (36, 24), "q", alpha=16)
    close(got, 4.0 * B @ (A * gate.T))
    assert result.adapter.modules["q"].rank == 2


def test_alpha_is_never_assumed(tmp_path):
    path = pickled(tmp_path / "lora.pt", {"q.lora_A": A, "q.lora_B": B})
    adapter = read_adapter(path)
    for operation in (lambda: to_lora(adapter, RankRule()), lambda: squeeze(adapter, RankRule())):
        with pytest.raises(UnsupportedError, match="--set alpha=VALUE"):
            operation()


@pytest.mark.parametrize(
    "extra", [{"q.lora_A_rho": A}, {"q.weight": B @ A}, {"k.lora_A": A}, {"q.lora_E.0": A}]
)
def test_other_tensors_are_refused(tmp_path, extra):
    path = pickled(tmp_path / "lora.pt", {"q.lora_A": A, "q.lora_B": B} | extra)
    with pytest.raises(AdapterError):
        read_adapter(path)


def test_safetensors_are_read_when_asked_for(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({"q.lora_A": A, "q.lora_B": B}, path)
    assert list(read_adapter(path, "loralib").modules) == ["q"]


def test_pickles_of_other_names_are_not_claimed(tmp_path):
    path = pickled(tmp_path / "lora.pt", {"q.lora_A.weight": A, "q.lora_B.weight": B})
    with pytest.raises(UnknownFormatError):
        find_format(path)
