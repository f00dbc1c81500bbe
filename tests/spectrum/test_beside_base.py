"""Kinds and DoRAs of full rank beside large bases: intruders of W' itself, by the definition."""

import json

import dense
import numpy as np
import pytest
from numpy.testing import assert_allclose
from safetensors.numpy import load_file, save_file

import loratools as lt

KINDS = dense.ROOT / "tests" / "golden" / "kinds"
SIDES = (560, 530)


@pytest.fixture
def wide_dora(tmp_path):
    """Return a base of one weight with more than 256 singular values, and a DoRA on it."""
    rng = np.random.default_rng(4)
    out, in_ = SIDES
    weight = rng.standard_normal(SIDES).astype(np.float32) / 20
    weight += (np.linspace(3, 1, 6) * rng.standard_normal((out, 6)) @ rng.standard_normal((6, in_))
               / 20).astype(np.float32)  # fmt: skip
    (tmp_path / "base").mkdir()
    save_file({"layers.0.q.weight": weight}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    b = 0.3 * rng.standard_normal((out, 4)).astype(np.float32)
    a = 0.3 * rng.standard_normal((4, in_)).astype(np.float32)
    magnitude = np.linalg.norm(weight, axis=1) * rng.uniform(0.7, 1.4, out)
    prefix = "base_model.model.layers.0.q"
    (tmp_path / "dora").mkdir()
    save_file(
        {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b,
         f"{prefix}.lora_magnitude_vector": magnitude.astype(np.float32)},
        tmp_path / "dora" / "adapter_model.safetensors",
    )  # fmt: skip
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"],
              "use_dora": True}  # fmt: skip
    (tmp_path / "dora" / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path / "dora", tmp_path / "base"


def merged(folder, base):
    """Return W and m/‖W + BA‖ ⊙ (W + BA) in float64."""
    stored = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    weight = load_file(base / "model.safetensors")["layers.0.q.weight"].astype(np.float64)
    a, b, m = (
        next(value for key, value in stored.items() if part in key).astype(np.float64)
        for part in ("lora_A", "lora_B", "magnitude")
    )
    scale = config["lora_alpha"] / (np.sqrt(len(a)) if config.get("use_rslora") else len(a))
    whole = weight + scale * b @ a
    return weight, whole * (m.reshape(-1) / np.linalg.norm(whole, axis=1))[:, None]


@pytest.mark.slow
@pytest.mark.parametrize("exact", [True, False])
def test_a_dora_of_full_rank_has_the_intruders_of_the_definition(wide_dora, exact, monkeypatch):
    if not exact:
        monkeypatch.setattr("loratools.base.decompositions._EXACT_SIDE", 100)
    result = lt.spectrum(wide_dora[0], base=wide_dora[1])
    (matrix,) = result.matrices
    assert matrix.tail > 0.0
    weight, after = merged(*wide_dora)
    cosines, found, _ = dense.intruders(weight, after - weight, 10, 0.5)
    assert matrix.base.exact is exact
    assert matrix.base.leading == 10
    assert len(found) > 0
    if exact:
        assert_allclose(matrix.base.cosines, cosines, atol=1e-7)
        assert (matrix.base.intruders, matrix.base.undetermined) == (len(found), 0)
    else:
        assert matrix.base.intruders <= len(found)
        assert len(found) <= matrix.base.intruders + matrix.base.undetermined
    norms = np.linalg.norm(weight, axis=1), np.linalg.norm(after, axis=1)
    assert_allclose(matrix.base.magnitude_change, np.mean(np.abs(norms[1] - norms[0])), rtol=1e-6)
    cosine = np.sum(weight * after, axis=1) / norms[0] / norms[1]
    assert_allclose(matrix.base.direction_change, np.mean(1.0 - cosine), rtol=1e-6)


@pytest.mark.parametrize("name", ["oft", "boft", "loha", "lokr", "ia3", "hra", "vera"])
def test_kinds_have_the_intruders_of_their_own_change(name):
    folder = KINDS / name
    if not (folder / "base.safetensors").exists():
        pytest.skip("its fixture has no base")
    case = json.loads((folder / "case.json").read_text())
    result = lt.spectrum(
        lt.read(folder / "adapter"), base=folder / "base.safetensors",
        set=case.get("settings") or {},
    )  # fmt: skip
    expected, stored = load_file(folder / "expected.safetensors"), None
    stored = load_file(folder / "base.safetensors")
    seen = 0
    for matrix in result.matrices:
        if matrix.base is None or matrix.expert is not None:
            continue
        key = next((k for k in stored if k.endswith(f"{matrix.name}.weight")), None)
        if key is None:
            continue
        weight = stored[key].astype(np.float64)
        weight = weight.reshape(len(weight), -1)
        change = expected[f"{matrix.name}.weight"].astype(np.float64).reshape(weight.shape)
        cosines, found, _ = dense.intruders(weight, change, 10, 0.5)
        assert matrix.base.leading == len(cosines)
        near = np.abs(cosines - 0.5) < 1e-4
        assert abs(matrix.base.intruders - len(found)) <= near.sum()
        assert_allclose(matrix.base.cosines, cosines, atol=1e-3)
        seen += 1
    assert seen
