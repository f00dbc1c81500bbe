"""`compare` equals dense float64 computations, over formats and shelves."""

import csv
import io
import json
import math
import subprocess
import sys

import dense
import numpy as np
import pytest
import scipy.linalg
from numpy.testing import assert_allclose
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools.operations.compare.bases import compare_bases
from loratools.operations.compare.operation import CompareOptions, compare
from loratools_formats import read_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.disk.errors import AdapterError

EXACT = CompareOptions(exact=True)


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-c", "from loratools.cli import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_two_trained_adapters_compare_as_their_dense_changes():
    changes = [dense.peft_changes(dense.TINY / name) for name in ("lora", "rslora")]
    result = compare(
        {name: read_adapter(dense.TINY / name) for name in ("lora", "rslora")}, options=EXACT
    )
    assert [module.name for module in result.modules] == sorted(changes[0])
    for module in result.modules:
        one, other = (change[module.name] for change in changes)
        norms = np.linalg.norm(one), np.linalg.norm(other)
        cosine = np.sum(one * other) / norms[0] / norms[1]
        assert_allclose(module.cosine, cosine, atol=1e-12)
        assert_allclose(module.norms, norms)
        assert_allclose(module.norm_ratio, norms[1] / norms[0])
        assert_allclose(module.moved, np.linalg.norm(other - one) / norms[0], rtol=1e-9)
        direction = 1.0 - (norms[1] - norms[0]) ** 2 / np.linalg.norm(other - one) ** 2
        assert_allclose(module.moved_direction, direction, rtol=1e-9)
        assert_allclose(module.sign_conflict, np.mean(one * other < 0), atol=2.0 / one.size)
        assert_allclose(module.sign_conflict_expected, math.acos(cosine) / math.pi)
        losses = [np.linalg.norm((one + other) / 2 - x) / np.linalg.norm(x) for x in (one, other)]
        assert_allclose(module.linear_losses, losses)
        ranks = [np.linalg.matrix_rank(x) for x in (one, other)]
        left = [np.linalg.svd(x)[0][:, :r] for x, r in zip((one, other), ranks, strict=True)]
        angles = np.degrees(np.sort(scipy.linalg.subspace_angles(*left)))
        found = module.output_angles
        assert_allclose(found, (angles[0], np.median(angles), angles[-1]), atol=1e-4)
        assert_allclose(
            module.output_overlap, np.sum((left[0].T @ left[1]) ** 2) / min(ranks), rtol=1e-6
        )
        assert_allclose(module.output_overlap_random, max(ranks) / len(one))


def test_a_shelf_sorts_into_duplicates_families_and_lineages(make_folder):
    modules = {f"layers.{i}.q": (24, 20, 8) for i in range(3)}
    first = make_folder("first", modules, dtype="f32", seed=1)
    for name, change_b, change_a in (("near", 0.01, 0.0), ("sister", 3.0, 0.02)):
        folder = make_folder(name, modules, dtype="f32", seed=1)
        rng = np.random.default_rng(5)
        file = folder / "adapter_model.safetensors"
        stored = load_file(file)
        for key in stored:
            size = change_b if "lora_B" in key else change_a
            noise = size * rng.standard_normal(stored[key].shape)
            stored[key] = (stored[key] + noise).astype(np.float32)
        save_file(stored, file)
    stranger = make_folder("stranger", modules, dtype="f32", seed=8)
    folders = [first, first.parent / "near", first.parent / "sister", stranger]
    result = compare({folder.name: read_adapter(folder) for folder in folders})
    assert result.duplicates == (("first", "near"),)
    assert result.lineages == (("first", "near", "sister"),)
    assert result.families[0] == ("first", "near")
    assert abs(result.a_cosines[0][3]) < 6 * result.a_random
    changes = [dense.peft_changes(folder) for folder in folders]
    flat = [np.concatenate([c.reshape(-1) for c in change.values()]) for change in changes]
    expected = np.corrcoef(flat) * 0.0
    for i, one in enumerate(flat):
        for j, other in enumerate(flat):
            expected[i, j] = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    assert_allclose(result.cosines, expected, atol=1e-9)
    mean = np.mean(flat, axis=0)
    losses = [np.linalg.norm(mean - x) / np.linalg.norm(x) for x in flat]
    assert_allclose(result.linear_losses, losses)


def test_a_lineage_is_seen_across_ranks(make_folder, tmp_path):
    modules = {f"layers.{i}.q": (24, 60, 8) for i in range(3)}
    first = make_folder("first", modules, dtype="f32", seed=1)
    stranger = make_folder("stranger", modules, dtype="f32", seed=8)
    lt.squeeze(first, rank=3, output=tmp_path / "squeezed")
    longer = make_folder("longer", modules, dtype="f32", seed=1, r=10)
    file = longer / "adapter_model.safetensors"
    rng = np.random.default_rng(3)
    stored = {
        key: np.concatenate([v, rng.standard_normal((2, 60), np.float32)])
        if "lora_A" in key
        else rng.standard_normal((24, 10), np.float32)
        for key, v in load_file(file).items()
    }
    save_file(stored, file)
    shelf = {"first": first, "squeezed": tmp_path / "squeezed", "longer": longer,
             "stranger": stranger}  # fmt: skip
    result = lt.compare(shelf)
    assert result.lineages == (("first", "squeezed", "longer"),)
    assert_allclose(result.a_cosines[0][2], 1.0, rtol=1e-12)
    assert_allclose(result.a_overlaps[0][1], 1.0, atol=1e-5)
    a = [dense.tensors(f / "adapter_model.safetensors") for f in (first, stranger)]
    shares = []
    for key in (key for key in a[0] if "lora_A" in key):
        q = [np.linalg.qr(x[key].T.astype(np.float64))[0] for x in a]
        shares.append((np.sum((q[0].T @ q[1]) ** 2) / 8 - 8 / 60) / (1 - 8 / 60))
    assert_allclose(result.a_overlaps[0][3], np.mean(shares), rtol=1e-6)
    pair = lt.compare([first, tmp_path / "squeezed"])
    lead = dense.tensors(tmp_path / "squeezed" / "adapter_model.safetensors")
    key = "base_model.model.layers.0.q.lora_A.weight"
    one, other = a[0][key][:3].astype(np.float64), lead[key].astype(np.float64)
    wanted = np.linalg.norm(other - one) / np.linalg.norm(one)
    assert_allclose(pair.modules[0].a_change, wanted, rtol=1e-9)
    json.dumps(pair.to_dict(), allow_nan=False)


def test_a_large_shelf_is_compared_in_single_precision_as_it_says(make_folder):
    modules = {"layers.0.q": (300, 200, 8), "layers.1.q": (200, 2000, 8)}
    folders = [
        make_folder(f"a{seed}", modules, dtype="bf16" if seed % 2 else "f32", seed=seed)
        for seed in range(17)
    ]
    result = lt.compare(folders)
    assert [finding.code for finding in result.findings] == ["single-precision"]
    assert "float32" in result.notes[0]
    changes = [dense.peft_changes(folder) for folder in folders]
    flat = np.array([np.concatenate([c.reshape(-1) for c in one.values()]) for one in changes])
    flat /= np.linalg.norm(flat, axis=1)[:, None]
    assert_allclose(result.cosines, flat @ flat.T, atol=1e-6)


@pytest.mark.parametrize("count", [3, 17])
def test_changes_whose_terms_cancel_and_factors_of_any_size_are_compared_exactly(
    make_folder, count
):
    """Half of a factor takes the other half away but for one part in 10⁵."""
    rng = np.random.default_rng(0)
    folders = []
    for seed in range(count):
        folder = make_folder(f"a{seed}", {"layers.0.q": (60, 50, 8)}, dtype="f32", seed=seed)
        file = folder / "adapter_model.safetensors"
        stored = load_file(file)
        b_key, a_key = (next(key for key in stored if f"lora_{side}" in key) for side in "BA")
        if seed < 2:
            b, a = stored[b_key][:, :4], stored[a_key][:4]
            noise = 1e-5 * rng.standard_normal(a.shape).astype(np.float32)
            stored = {b_key: np.concatenate([b, -b], axis=1), a_key: np.concatenate([a, a + noise])}
        elif seed == 2:
            stored = {b_key: stored[b_key] * np.float32(1e-30), a_key: stored[a_key] * 1e-5}
        save_file({k: np.ascontiguousarray(v, np.float32) for k, v in stored.items()}, file)
        folders.append(folder)
    result = lt.compare(folders)
    flat = np.array([dense.peft_changes(folder)["layers.0.q"].reshape(-1) for folder in folders])
    norms = np.linalg.norm(flat, axis=1)
    flat /= norms[:, None]
    assert_allclose(result.cosines, flat @ flat.T, atol=1e-6)
    assert_allclose(result.norms, norms, rtol=1e-6)


def test_a_shelf_of_mixed_ranks_has_the_same_overlaps_of_a_as_its_pairs(make_folder):
    folders = [
        make_folder(
            f"a{seed}", {"layers.0.q": (60, 200, 3 + seed % 3)}, seed=seed % 9, r=3 + seed % 3
        )
        for seed in range(18)
    ]
    result = lt.compare(folders)
    pair = lt.compare([folders[1], folders[10]])
    assert_allclose(result.a_overlaps[1][10], pair.a_overlaps[0][1], rtol=1e-4)
    spaces = [
        np.linalg.qr(value.T)[0]
        for folder in folders
        for key, value in dense.tensors(folder / "adapter_model.safetensors").items()
        if "lora_A" in key
    ]
    for i, one in enumerate(spaces):
        for j, other in enumerate(spaces):
            least, most = sorted((one.shape[1], other.shape[1]))
            share = np.sum((one.T @ other) ** 2) / least
            expected = (share - most / 200) / (1 - most / 200)
            assert_allclose(result.a_overlaps[i][j], expected, atol=1e-4)


def test_adapters_of_hostile_names_are_harmless_everywhere(make_folder, tmp_path):
    names = ["=cmd|'x'!A1", "\x1b[31mred", "<script>alert(1)", "norm", "＝1+1"]
    folders = [make_folder("one", dtype="f32", seed=seed).rename(tmp_path / name)
               for seed, name in enumerate(names)]  # fmt: skip
    rows = list(csv.reader(io.StringIO(run("compare", *folders, "--csv").stdout)))
    assert all(not cell.startswith(("=", "＝")) for row in rows for cell in row)
    assert rows[0][:3] == ["adapter", "norm", "linear_loss"]
    assert [len(row) for row in rows] == [13] * 6
    result = lt.compare(folders)
    for row, name, cosines, of_a in zip(
        rows[1:], names, result.cosines, result.a_cosines, strict=True
    ):
        assert (name in row[0]) == ("\x1b" not in name)
        assert [float(cell) for cell in row[3:]] == [*cosines, *of_a]
    done = run("compare", *folders, "--html", tmp_path / "report.html")
    assert done.returncode == 0
    page = (tmp_path / "report.html").read_text()
    for text in (done.stdout, done.stderr, page, *map("".join, rows)):
        assert "\x1b" not in text
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_modules_that_only_one_has_or_of_other_shapes_are_listed(make_folder):
    one = make_folder("one", {"a.q": (24, 20, 8), "b.q": (24, 20, 8), "c.q": (10, 20, 8)})
    other = make_folder("other", {"a.q": (24, 20, 8), "c.q": (12, 20, 8)}, seed=1)
    result = compare({"one": read_adapter(one), "other": read_adapter(other)})
    assert [module.name for module in result.modules] == ["a.q"]
    reasons = {module.name: (module.adapters, module.reason) for module in result.unmatched}
    assert reasons["b.q"] == (("one",), "only one adapter has it")
    assert reasons["c.q"][0] == ("one", "other")
    assert "10×20, 12×20" in reasons["c.q"][1]
    lone = make_folder("lone", {"z.q": (24, 20, 8)})
    with pytest.raises(AdapterError, match="share no module"):
        compare({"one": read_adapter(one), "lone": read_adapter(lone)})


@pytest.mark.slow
def test_formats_compare_under_the_base_models_names(tmp_path):
    done = run("convert", dense.TINY / "lora", tmp_path / "mlx", "--to", "mlx", "--allow-lossy")
    assert done.returncode == 0, done.stderr
    result = compare(
        {"peft": read_adapter(dense.TINY / "lora"), "mlx": read_adapter(tmp_path / "mlx")}
    )
    assert len(result.modules) == 28
    assert_allclose(result.cosines, 1.0, atol=1e-6)
    assert result.unmatched == ()


def test_bases_differ_where_the_adapter_acts_as_computed_densely(tmp_path):
    import shutil

    from safetensors.numpy import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(dense.TINY / "model", other)
    stored = load_file(other / "model.safetensors")
    rng = np.random.default_rng(0)
    noisy = {
        key: value + (0.01 * rng.standard_normal(value.shape)).astype(value.dtype)
        if key.endswith("q_proj.weight")
        else value
        for key, value in stored.items()
    }
    save_file(noisy, other / "model.safetensors", metadata={"format": "pt"})
    result = compare_bases(
        read_adapter(dense.TINY / "lora"),
        read_checkpoint(dense.TINY / "model"),
        read_checkpoint(other),
    )
    changes = dense.peft_changes(dense.TINY / "lora")
    for module in result.modules:
        before = stored[f"{module.name}.weight"].astype(np.float64)
        difference = noisy[f"{module.name}.weight"].astype(np.float64) - before
        change = changes[module.name]
        u, s, vt = np.linalg.svd(change, full_matrices=False)
        kept = s > s[0] * 1e-12
        p, q = u[:, kept] @ u[:, kept].T, vt[kept].T @ vt[kept]
        norm = np.linalg.norm
        assert_allclose(module.relative, norm(difference) / norm(before))
        assert_allclose(module.outputs, norm(p @ difference) / norm(p @ before), rtol=1e-9)
        assert_allclose(module.projected, norm(p @ difference), rtol=1e-9, atol=1e-15)
        assert_allclose(module.inputs, norm(difference @ q) / norm(before @ q), rtol=1e-9)
        assert_allclose(module.against_change, norm(p @ difference @ q) / norm(change), rtol=1e-6)
        assert (module.relative > 0) == module.name.endswith("q_proj")


def test_names_that_differ_by_wrappers_are_of_one_module(tmp_path):
    """Without the base, where the output layer alone is called the same in both."""
    paths = []
    for start in ("model.language_model.", "model."):
        folder = tmp_path / start
        folder.mkdir()
        rng = np.random.default_rng(0)
        tensors = {}
        for name in (f"{start}layers.0.self_attn.q_proj", "lm_head"):
            for side, shape in (("A", (2, 8)), ("B", (8, 2))):
                values = rng.standard_normal(shape).astype(np.float32)
                tensors[f"base_model.model.{name}.lora_{side}.weight"] = values
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        paths.append(folder)
    found = lt.compare(paths)
    assert found.to_dict()["shared"] == [[2, 2], [2, 2]]
    assert found.to_dict()["whole_cosines"][0][1] == pytest.approx(1.0)
    assert not found.findings


def test_names_that_only_the_base_brings_together_are_told(tmp_path):
    paths = []
    for leaves in (("qkv_proj",), ("q_proj", "k_proj", "v_proj")):
        folder = tmp_path / leaves[0]
        folder.mkdir()
        rng = np.random.default_rng(0)
        tensors = {}
        for leaf in (*leaves, "o_proj"):
            rows = 24 if leaf == "qkv_proj" else 8
            for side, shape in (("A", (2, 8)), ("B", (rows, 2))):
                key = f"base_model.model.model.layers.0.self_attn.{leaf}.lora_{side}.weight"
                tensors[key] = rng.standard_normal(shape).astype(np.float32)
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": list(leaves)}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        paths.append(folder)
    (told,) = lt.compare(paths).findings
    assert told.code == "names-kept"
    assert "qkv_proj" in told.message
    assert "k_proj" in told.message
    assert "base" in told.hint


@pytest.mark.slow
def test_the_command_prints_matrices_and_refuses_nonsense():
    paths = [dense.TINY / name for name in ("lora", "rslora", "dora")]
    done = run("compare", *paths)
    assert done.returncode == 0
    assert "1 " in done.stdout
    assert "--base" in done.stderr
    found = json.loads(run("compare", *paths, "--json").stdout)
    assert (found["schema"], found["operation"]) == (1, "compare")
    assert [each["code"] for each in found["findings"]] == ["direction-only"]
    assert found["notes"] == [each["message"] for each in found["findings"]]
    assert np.shape(found["cosines"]) == (3, 3)
    for arguments in (
        [paths[0]],
        [paths[0], paths[0]],
        [paths[0], paths[1], "--bases", dense.TINY / "model", dense.TINY / "model"],
        [paths[0], dense.ROOT / "examples" / "minilm-lora"],
        [paths[0], dense.TINY / "nothing"],
    ):
        done = run("compare", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
