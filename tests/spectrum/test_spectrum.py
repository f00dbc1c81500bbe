"""`spectrum` on adapters of every kind and layer, and what its command prints."""

import csv
import io
import json
import re
import subprocess
import sys

import dense
import numpy as np
import pytest
from numpy.testing import assert_allclose
from safetensors.numpy import load_file, save_file

from loratools.algebra.ranks import RankRule
from loratools.base.decompositions import IntruderOptions
from loratools.kinds import get_kind
from loratools.operations.spectrum.operation import spectrum
from loratools.operations.squeeze import rank_choices, squeeze
from loratools_formats import read_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.disk.errors import UnsupportedError

KINDS = dense.ROOT / "tests" / "golden" / "kinds"
NAMES = sorted(folder.name for folder in KINDS.iterdir())
BASE = dense.TINY / "model"


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-c", "from loratools.cli import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", ["lora", "rslora"])
def test_values_of_trained_adapters_are_those_of_dense_svds(name):
    changes = dense.peft_changes(dense.TINY / name)
    result = spectrum(read_adapter(dense.TINY / name), entries=True)
    assert [matrix.name for matrix in result.matrices] == sorted(changes)
    for matrix in result.matrices:
        change = changes[matrix.name]
        sigma = np.linalg.svd(change, compute_uv=False)[: matrix.rank]
        assert_allclose(matrix.singular_values, sigma, atol=1e-6 * sigma[0])
        energies = np.sum(change**2, axis=1)
        spread = np.sum(sigma**2) ** 2 / np.sum(sigma**4)
        random = (1 + 2 / spread) / (len(change) + 2)
        assert_allclose(
            matrix.row_concentration,
            np.sum(energies**2) / np.sum(energies) ** 2 / random,
            rtol=1e-6,
        )
        fourth = change.size * np.sum(change**4) / np.sum(change**2) ** 2
        assert_allclose(matrix.kurtosis, fourth, rtol=1e-6)
    total = np.sqrt(sum(np.sum(change**2) for change in changes.values()))
    assert_allclose(result.frobenius, total)
    first = [np.sum(c**2) for key, c in changes.items() if ".layers.0." in key]
    assert_allclose(result.layers["0"], np.sqrt(sum(first)))


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_is_measured_as_its_own_change(name):
    folder = KINDS / name
    case = json.loads((folder / "case.json").read_text())
    source = folder / "adapter"
    if not source.exists():
        source = next(file for file in folder.iterdir() if file.stem == "adapter")
    base = folder / "base.safetensors"
    result = spectrum(
        read_adapter(source, case.get("format")),
        base=read_checkpoint(base) if base.exists() else None,
        given=case.get("settings"),
    )
    expected = load_file(folder / "expected.safetensors")
    for matrix in result.matrices:
        want = expected[f"{matrix.name}.weight"].astype(np.float64)
        plane = want if matrix.expert is None else want[matrix.expert]
        sigma = np.linalg.svd(plane.reshape(len(plane), -1), compute_uv=False)
        count = min(len(sigma), len(matrix.singular_values))
        assert_allclose(matrix.singular_values[:count], sigma[:count], atol=2e-5 * sigma[0])
        assert_allclose(matrix.measures.frobenius, np.linalg.norm(plane), rtol=1e-5)
    assert len(result.matrices) >= len([key for key in expected if key.endswith(".weight")])
    assert get_kind(name).name == name


def test_a_dora_is_given_by_its_direction_without_the_base_and_whole_with_it():
    adapter = read_adapter(dense.TINY / "dora")
    alone, whole = spectrum(adapter), spectrum(adapter, base=read_checkpoint(BASE))
    assert alone.directional
    assert not whole.directional
    weights, directions = dense.base_weights(), dense.peft_changes(dense.TINY / "dora")
    stored = dense.tensors(dense.TINY / "dora" / "adapter_model.safetensors")
    for direction, matrix in zip(alone.matrices, whole.matrices, strict=True):
        name = matrix.name
        assert_allclose(direction.measures.frobenius, np.linalg.norm(directions[name]), rtol=1e-9)
        merged = weights[name] + directions[name]
        magnitude = stored[f"base_model.model.{name}.lora_magnitude_vector"]
        merged *= (magnitude / np.linalg.norm(merged, axis=1))[:, None]
        change = merged - weights[name]
        assert_allclose(matrix.measures.frobenius, np.linalg.norm(change), rtol=1e-9)
        moved = np.mean(np.abs(magnitude - np.linalg.norm(weights[name], axis=1)))
        assert_allclose(matrix.base.magnitude_change, moved, rtol=1e-9)


def test_choices_and_suggestions_are_those_of_squeeze():
    adapter = read_adapter(dense.TINY / "lora")
    result = spectrum(adapter)
    assert list(result.choices) == rank_choices(adapter)
    rules = {
        "--energy 0.9": RankRule(energy=0.9),
        "--energy 0.99": RankRule(energy=0.99),
        "--threshold-rank": RankRule(threshold=True),
    }
    for suggestion in result.suggestions:
        if suggestion.rule in rules:
            squeezed = squeeze(adapter, rules[suggestion.rule])
            ranks = {module.name: module.rank_out for module in squeezed.modules}
            assert suggestion.ranks == ranks
            assert_allclose(suggestion.relative_error, squeezed.relative_error, rtol=1e-3)


@pytest.fixture
def odd(make_folder):
    """Return an adapter of eighteen layers with one oddity in each of several modules."""
    rng = np.random.default_rng(0)
    tensors = {}
    for layer in range(18):
        b, a = rng.standard_normal((40, 8)), rng.standard_normal((8, 30))
        if layer == 1:
            b *= 5.0
        if layer == 2:
            b[:] = 0.0
        if layer == 3:
            a[0, 0] = np.nan
        if layer == 4:
            b[:, 1:] *= 0.01
        if layer == 5:
            b, a = b * 1e-5, a * 1e5
        if layer == 6:
            b[1:] *= 0.01
        if layer == 7:
            b[:, 3] = 0.0
        prefix = f"base_model.model.layers.{layer}.q"
        tensors[f"{prefix}.lora_A.weight"] = a.astype(np.float32)
        tensors[f"{prefix}.lora_B.weight"] = b.astype(np.float32)
    folder = make_folder(dtype="f32")
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_what_stands_out_is_found_where_it_is(odd):
    found = {(f.kind, f.name.split(".")[1]) for f in spectrum(read_adapter(odd)).findings}
    assert {
        ("outlier", "1"),
        ("dead", "2"),
        ("non-finite", "3"),
        ("spike", "4"),
        ("one-sided", "5"),
        ("rows", "6"),
        ("dead-ranks", "7"),
    } <= found
    assert ("rows", "1") not in found
    assert not any(layer == "0" or int(layer) > 7 for _, layer in found)


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_told(make_folder, dtype, factor, value):
    folder = make_folder(dtype=dtype, modules={f"layers.{n}.q": (24, 20, 8) for n in range(2)})
    tensors = load_file(folder / "adapter_model.safetensors")
    (key,) = [key for key in tensors if factor in key and "layers.1" in key]
    tensors[key][-1, -1] = value
    save_file(tensors, folder / "adapter_model.safetensors")
    result = spectrum(read_adapter(folder))
    assert [matrix.finite for matrix in result.matrices] == [True, False]


def test_the_largest_numbers_of_float32_are_finite(make_folder):
    folder = make_folder(dtype="f32", modules={"layers.0.q": (24, 20, 8)})
    tensors = load_file(folder / "adapter_model.safetensors")
    largest = {key: np.full_like(value, np.finfo(np.float32).max) for key, value in tensors.items()}
    save_file(largest, folder / "adapter_model.safetensors")
    (matrix,) = spectrum(read_adapter(folder)).matrices
    assert matrix.finite
    b, a = (float(np.finfo(np.float32).max) * np.sqrt(8 * n) for n in (24, 20))
    assert_allclose(matrix.measures.frobenius, abs(matrix.scale) * b * a, rtol=1e-12)


@pytest.mark.slow
def test_scores_against_references_are_those_of_the_sample(make_folder, tmp_path):
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for seed in range(5):
        make_folder(seed=seed, modules={"layers.0.q": (24, 20, 8)}).rename(shelf / f"a{seed}")
    (shelf / "notes.txt").write_text("no adapter")
    suspect = make_folder(seed=9, modules={"layers.0.q": (24, 20, 8)}, lora_alpha=400)
    done = run("spectrum", suspect, "--against", shelf, "--json")
    assert done.returncode == 0, done.stderr
    assert "notes.txt" in done.stderr
    found = json.loads(done.stdout)
    assert [(each["code"], each["where"]) for each in found["notices"]] == [
        ("no-reference", "notes.txt")
    ]
    assert found["notes"] == [each["message"] for each in found["notices"]]
    scores = found["modules"][0]["reference_scores"]
    norms = [
        np.log(np.linalg.norm(dense.peft_changes(shelf / f"a{seed}")["layers.0.q"]))
        for seed in range(5)
    ]
    own = np.log(np.linalg.norm(dense.peft_changes(suspect)["layers.0.q"]))
    expected = (own - np.mean(norms)) / np.std(norms, ddof=1)
    assert_allclose(scores["log_frobenius"], expected, rtol=1e-6)
    text = run("spectrum", suspect, "--against", shelf).stdout
    assert "reference" in text
    assert not re.search("safe|backdoor", text)
    few = run("spectrum", shelf / "a0", "--against", dense.TINY / "texts")
    assert few.returncode == 2
    assert few.stderr.count("error") == 1


def test_stacked_experts_and_convolutions_are_matrices_of_their_own(make_folder):
    rng = np.random.default_rng(1)
    conv_a = rng.standard_normal((4, 6, 3, 3)).astype(np.float32)
    conv_b = rng.standard_normal((10, 4, 1, 1)).astype(np.float32)
    folder = make_folder(dtype="f32", r=4, lora_alpha=8)
    save_file(
        {
            "base_model.model.conv.lora_A.weight": conv_a,
            "base_model.model.conv.lora_B.weight": conv_b,
        },
        folder / "adapter_model.safetensors",
    )
    (matrix,) = spectrum(read_adapter(folder)).matrices
    change = 2.0 * conv_b.reshape(10, 4).astype(np.float64) @ conv_a.reshape(4, -1)
    assert matrix.layer == "conv"
    assert_allclose(matrix.singular_values, np.linalg.svd(change, compute_uv=False)[:4], rtol=1e-5)


def test_a_kind_that_needs_the_base_is_refused_without_it():
    with pytest.raises(UnsupportedError, match="depends on the base model"):
        spectrum(read_adapter(KINDS / "oft" / "adapter"))


@pytest.mark.slow
def test_a_second_run_takes_the_svds_from_the_cache(tmp_path, monkeypatch):
    adapter, base = read_adapter(dense.TINY / "lora"), read_checkpoint(BASE)
    options = IntruderOptions(cache=tmp_path / "cache")
    first = spectrum(adapter, base=base, intruders=options)
    assert len(list((tmp_path / "cache").iterdir())) == 28

    def fail(weight):
        raise AssertionError("a base weight was decomposed again")

    monkeypatch.setattr("loratools.base.decompositions.base_svd", fail)
    assert spectrum(adapter, base=base, intruders=options) == first
    other = spectrum(read_adapter(dense.TINY / "rslora"), base=base, intruders=options)
    assert len(other.matrices) == 28
    assert all(matrix.base.exact for matrix in other.matrices)
    broken = next((tmp_path / "cache").iterdir())
    broken.write_bytes(broken.read_bytes()[:1000])
    monkeypatch.undo()
    assert spectrum(adapter, base=base, intruders=options) == first


@pytest.mark.slow
def test_csv_and_json_carry_every_number(odd):
    rows = list(csv.DictReader(io.StringIO(run("spectrum", odd, "--csv").stdout)))
    modules = json.loads(run("spectrum", odd, "--json").stdout)["modules"]
    assert [row["name"] for row in rows] == [module["name"] for module in modules]
    for row, module in zip(rows, modules, strict=True):
        for key, value in module.items():
            if isinstance(value, float):
                assert float(row[key]) == value
    both = run("spectrum", odd, "--csv", "--json")
    told = json.loads(both.stdout)
    assert (both.returncode, told["written"], "modules" in told) == (2, False, False)
    assert told["error"]["message"] == "--csv and --json exclude each other"


@pytest.mark.slow
def test_hostile_names_are_harmless_in_text_and_csv(make_folder):
    rng = np.random.default_rng(2)
    tensors = {}
    for name in ("=cmd|'/c calc'!A0", "<script>alert(1)</script>", "a\x1b[31mb"):
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = rng.standard_normal((4, 6)).astype(np.float32)
        tensors[f"{prefix}.lora_B.weight"] = rng.standard_normal((5, 4)).astype(np.float32)
    folder = make_folder(r=4)
    save_file(tensors, folder / "adapter_model.safetensors")
    for arguments in (["--csv"], []):
        done = run("spectrum", folder, *arguments)
        if done.returncode == 0:
            assert "\x1b" not in done.stdout
        else:
            assert (done.returncode, done.stdout) == (2, "")
    rows = list(csv.reader(io.StringIO(run("spectrum", folder, "--csv").stdout)))
    assert all(not cell.startswith(("=", "+", "@")) for row in rows for cell in row)
