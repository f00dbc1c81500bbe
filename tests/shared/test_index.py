"""Indexes of adapters: estimated cosines against exact ones, neighbours, copies, kin."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from shared_fleets import MODULES, PREFIX, fleet, matrices, write
from told import found

import loratools as lt
from loratools.algebra import sketch
from loratools.cli import cli
from loratools.operations.index.file import read_index
from loratools_formats.disk.errors import AdapterError, LoratoolsError, OptionError

FIRST = "--+-++++++--++-+-+-+--++"
SCHEMAS = Path(lt.__file__).parent / "schemas"


def exact_cosines(paths):
    """Return cosines of whole changes, from dense matrices; a missing module counts as zero."""
    adapters = [lt.read(path) for path in paths]
    names = sorted({name for adapter in adapters for name in adapter.modules})
    shapes = {n: lt.delta(a, n).shape for a in adapters for n in a.modules}
    flat = [
        np.concatenate([
            (lt.delta(a, n) if n in a.modules else np.zeros(shapes[n])).ravel() for n in names
        ])
        for a in adapters
    ]  # fmt: skip
    unit = np.stack([one / np.linalg.norm(one) for one in flat])
    return unit @ unit.T


def indexed(folder, paths, **options):
    out = folder / "index.safetensors"
    return lt.fleet_index(paths, output=out, **options), out


def test_signs_are_those_of_the_scheme_for_ever():
    """Indexes are kept, so other signs need another scheme."""
    assert sketch.SCHEME == "signs-16x16x16-v1"
    found = sketch.signs("layers.0.q_proj", "in", 5)
    assert found.shape == (5, 256)
    assert set(np.unique(found)) == {-1.0, 1.0}
    assert "".join("+" if one > 0 else "-" for one in found[0, :24]) == FIRST
    assert abs(sketch.signs("m", "out", 4096).mean()) < 5.0 / (4096 * 256) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("modules", [1, 4, 24])
@pytest.mark.parametrize("rank", [1, 4])
def test_estimates_are_within_their_stated_error(modules, rank):
    """Of products of any inner structure, over many draws of names and so of signs."""
    rng = np.random.default_rng(modules * 10 + rank)
    off = []
    for draw in range(40):
        ones, others, sketches = [], [], np.zeros((2, sketch.LENGTH))
        for module in range(modules):
            b = rng.standard_normal((3, 20, rank))
            a = rng.standard_normal((3, rank, 17))
            # Two changes with a part in common, and sizes that differ from module to module.
            size = rng.exponential()
            common = b[2] @ a[2]
            one, other = (size * (common + b[i] @ a[i]) for i in (0, 1))
            ones.append(one.ravel())
            others.append(other.ravel())
            p = sketch.signs(f"{draw}.{module}", "in", 17)
            q = sketch.signs(f"{draw}.{module}", "out", 20)
            for i, whole in enumerate((one, other)):
                sketches[i] += np.einsum(
                    "nbi,nm,mbj->bij", q.reshape(20, 16, 16), whole, p.reshape(17, 16, 16)
                ).ravel()
        x, y = np.concatenate(ones), np.concatenate(others)
        exact = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
        estimate = sketch.unit(sketches[0]) @ sketch.unit(sketches[1])
        shares = [np.array([[w @ w for w in part]]) for part in (ones, others)]
        shares = [each / each.sum() for each in shares]
        off.append((estimate - exact) / sketch.standard_errors(*shares)[0, 0])
    assert np.sqrt(np.mean(np.square(off))) < 1.2
    assert np.abs(off).max() < 4.0
    assert abs(np.mean(off)) < 4.0 / len(off) ** 0.5


def test_sketches_of_an_index_estimate_exact_cosines(tmp_path):
    modules = {f"layers.{i}.{n}": (48, 40) for i in range(6) for n in ("q", "k")}
    paths = fleet(tmp_path, 12, modules=modules, common=5, noise=0.1)
    result, out = indexed(tmp_path, paths)
    index = read_index(out)
    order = [int(entry.path.rpartition("-")[2]) for entry in index.entries]
    exact = exact_cosines(paths)[np.ix_(order, order)]
    errors = sketch.standard_errors(index.shares, index.shares)
    assert np.abs((index.sketch @ index.sketch.T - exact) / errors).max() < 4.0
    assert result.standard_error == pytest.approx(np.median(errors), rel=0.2)
    assert result.adapters == result.added == 12
    assert result.bytes_out == out.stat().st_size
    compared = lt.compare(paths)
    np.testing.assert_allclose(
        np.array(compared.whole_cosines)[np.ix_(order, order)], exact, atol=1e-9
    )


def test_the_split_into_factors_does_not_matter(tmp_path):
    (one,) = matrices(1)
    rng = np.random.default_rng(0)
    turned = {}
    for name, (b, a) in one.items():
        g = rng.standard_normal((3, 3)) + 3.0 * np.eye(3)
        turned[name] = (b @ g, np.linalg.inv(g) @ a)
    paths = [write(tmp_path / "a", one), write(tmp_path / "b", turned)]
    _, out = indexed(tmp_path, paths)
    found = read_index(out)
    np.testing.assert_allclose(found.sketch[0], found.sketch[1], atol=1e-6)
    assert found.entries[0].norm == pytest.approx(found.entries[1].norm, rel=1e-6)


def test_neighbours_come_in_the_order_of_their_exact_cosines(tmp_path):
    paths = fleet(tmp_path, 10, common=4, noise=0.1)
    _, out = indexed(tmp_path, paths[1:])
    found = lt.fleet_similar(paths[0], out, top=9)
    exact = exact_cosines(paths)[0]
    expected = sorted(range(1, 10), key=lambda i: -exact[i])
    assert [each.path for each in found.neighbours] == [f"adapter-{i}" for i in expected]
    for each in found.neighbours:
        assert each.cosine == pytest.approx(exact[int(each.path[-1])], abs=1e-6)
        assert abs(each.estimate - each.cosine) < 5.0 * each.standard_error
    quick = lt.fleet_similar(paths[0], out, exact=False, top=3)
    assert [each.cosine for each in quick.neighbours] == [None] * 3
    itself = lt.fleet_similar(paths[4], out, top=1).neighbours[0]
    assert (itself.path, itself.same_a) == ("adapter-4", True)
    assert itself.cosine == pytest.approx(1.0)
    assert itself.estimate == pytest.approx(1.0, abs=1e-6)


def test_copies_and_kin_are_found(tmp_path):
    paths = fleet(tmp_path, 6)
    shutil.copytree(paths[0], tmp_path / "copy")
    lt.squeeze(paths[1], energy=0.999, output=tmp_path / "squeezed", dtype="bf16")
    made = matrices(6)[0]
    frozen = {
        name: (np.random.default_rng(5).standard_normal(b.shape), a)
        for name, (b, a) in made.items()
    }
    write(tmp_path / "frozen", frozen)
    paths += [tmp_path / name for name in ("copy", "squeezed", "frozen")]
    _, out = indexed(tmp_path, paths)
    found = lt.fleet_dedup(out)
    assert {frozenset(group) for group in found.groups} == {
        frozenset(("adapter-0", "copy")), frozenset(("adapter-1", "squeezed")),
    }  # fmt: skip
    for pair in found.pairs:
        places = [next(i for i, p in enumerate(paths) if p.name == n)
                  for n in (pair.first, pair.second)]  # fmt: skip
        exact = exact_cosines([paths[i] for i in places])[0, 1]
        assert pair.cosine == pytest.approx(exact, abs=1e-6)
        assert pair.norm_ratio == pytest.approx(1.0, abs=0.01)
    assert [set(group) for group in found.same_a] == [{"adapter-0", "copy", "frozen"}]
    assert any({"adapter-0", "copy", "frozen"} <= set(group) for group in found.same_start)
    assert not found.unverified


def test_an_update_is_the_same_as_an_index_made_from_nothing(tmp_path):
    paths = fleet(tmp_path, 5)
    _, out = indexed(tmp_path, paths[:3])
    write(tmp_path / "new", matrices(1, seed=9)[0])
    shutil.rmtree(paths[0])
    later = [*paths[1:], tmp_path / "new"]
    result = lt.fleet_index(later, output=out, update=True)
    assert (result.kept, result.added) == (2, 3)
    fresh = tmp_path / "fresh.safetensors"
    lt.fleet_index(later, output=fresh, workers=3)
    assert out.read_bytes() == fresh.read_bytes()
    assert lt.fleet_index(later, output=out, update=True).added == 0
    assert out.read_bytes() == fresh.read_bytes()


def test_the_rest_of_the_batch_does_not_matter(tmp_path, monkeypatch):
    paths = fleet(tmp_path, 5)
    _, out = indexed(tmp_path, paths)
    monkeypatch.setattr("loratools.operations.index.making._BATCH", 2)
    again = tmp_path / "again.safetensors"
    lt.fleet_index(paths, output=again)
    assert again.read_bytes() == out.read_bytes()


def test_adapters_that_cannot_be_read_are_listed_and_stop_nothing(tmp_path):
    paths = fleet(tmp_path, 2)
    made = matrices(1)[0]
    made["layers.0.mlp.down_proj"][0][0, 0] = np.nan
    paths.append(write(tmp_path / "nan", made))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "adapter_model.safetensors").write_bytes(b"torn")
    shutil.copy(paths[0] / "adapter_config.json", tmp_path / "torn")
    paths.append(tmp_path / "torn")
    result, out = indexed(tmp_path, paths)
    assert result.adapters == 2
    assert [Path(each.path).name for each in result.failed] == ["nan", "torn"]
    with pytest.raises(LoratoolsError):
        lt.fleet_index(paths[2:])
    done = CliRunner().invoke(
        cli, ["fleet", "index", *map(str, paths), "-o", str(out), "--overwrite"],
        standalone_mode=False,
    )  # fmt: skip
    assert done.return_value == 1
    assert "failed: " in done.stderr
    assert read_index(out).entries


def test_adapters_that_are_gone_or_changed_are_not_compared(tmp_path):
    paths = fleet(tmp_path, 4)
    _, out = indexed(tmp_path, paths)
    shutil.rmtree(paths[1])
    shutil.rmtree(paths[2])
    write(paths[2], matrices(1, seed=4)[0])
    found = lt.fleet_similar(paths[0], out)
    known = {each.path: each.cosine is not None for each in found.neighbours}
    assert known == {f"adapter-{i}": i in (0, 3) for i in range(4)}
    assert sorted(found.unverified) == ["adapter-1", "adapter-2"]


def test_an_index_may_move_with_its_adapters(tmp_path):
    paths = fleet(tmp_path / "shelf", 3)
    _, out = indexed(tmp_path / "shelf", paths)
    (tmp_path / "shelf").rename(tmp_path / "moved")
    found = lt.fleet_similar(tmp_path / "moved/adapter-0", tmp_path / "moved/index.safetensors")
    assert not found.unverified
    assert out.name == "index.safetensors"


def test_doras_are_indexed_by_their_directions(tmp_path):
    made = matrices(1)[0]
    magnitudes = {
        f"{PREFIX}{name}.lora_magnitude_vector": np.ones(out, np.float32)
        for name, (out, _) in MODULES.items()
    }
    paths = [write(tmp_path / "plain", made),
             write(tmp_path / "dora", made, extra=magnitudes, use_dora=True)]  # fmt: skip
    _, out = indexed(tmp_path, paths)
    found = read_index(out)
    assert [entry.directional for entry in found.entries] == [True, False]
    np.testing.assert_array_equal(found.sketch[0], found.sketch[1])


def test_refusals(tmp_path):
    paths = fleet(tmp_path, 2)
    _, out = indexed(tmp_path, paths)
    with pytest.raises(OptionError, match="twice"):
        lt.fleet_index([paths[0], paths[0]])
    with pytest.raises(OptionError, match="no adapters"):
        lt.fleet_index([])
    with pytest.raises(OptionError, match="takes over an earlier output"):
        lt.fleet_index(paths, update=True)
    with pytest.raises(LoratoolsError, match="exists"):
        lt.fleet_index(paths, output=out)
    with pytest.raises(AdapterError, match="no index"):
        lt.fleet_dedup(paths[0] / "adapter_model.safetensors")
    with pytest.raises(OptionError, match="cosine"):
        lt.fleet_dedup(out, threshold=1.5)
    with pytest.raises(OptionError, match="too few"):
        lt.fleet_similar(paths[0], out, top=0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"version": 1}, "another version"),
        ({"scheme": "other"}, "another version"),
        ({"adapters": [{}]}, "sound"),
        ({"adapters": []}, "sound"),
        ({"modules": ["x"]}, "sound"),
        ("{", "sound"),
        ("[]", "sound"),
    ],
)
def test_indexes_that_are_not_sound_are_refused(change, match, tmp_path):
    _, out = indexed(tmp_path, fleet(tmp_path, 2))
    with safe_open(out, "numpy") as file:
        metadata = file.metadata()
    text = change if isinstance(change, str) else json.dumps(
        json.loads(metadata["loratools_index"]) | change
    )  # fmt: skip
    broken = tmp_path / "broken.safetensors"
    save_file(load_file(out), broken, metadata={"loratools_index": text})
    with pytest.raises(LoratoolsError, match=match):
        lt.fleet_dedup(broken)


def test_spellings_of_one_adapter_are_copies(tmp_path):
    """Names before and after transformers 4.52; kohya's, ComfyUI's and diffusers' of FLUX."""
    paths = []
    for seed, (folder, start) in enumerate(
        [("new", "model.language_model."), ("old", "model."), ("bare", "")] * 2
    ):
        (factors,) = matrices(1, seed=seed // 3)
        named = {start + name: pair for name, pair in factors.items()}
        named |= {"lm_head": factors["layers.0.mlp.down_proj"]}
        paths.append(write(tmp_path / f"{folder}{seed // 3}", named))
    rng = np.random.default_rng(5)
    flux = {}
    for key, out in (("img_attn_qkv", 48), ("img_attn_proj", 16), ("txt_attn_qkv", 48)):
        for name, shape in (("w1_a", (out, 2)), ("w1_b", (2, 16)), ("w2_a", (out, 2)),
                            ("w2_b", (2, 16))):  # fmt: skip
            values = rng.standard_normal(shape).astype(np.float32)
            flux[f"lora_unet_double_blocks_0_{key}.hada_{name}"] = values
        clip = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
        flux[f"{clip}.lora_down.weight"] = rng.standard_normal((2, 16)).astype(np.float32)
        flux[f"{clip}.lora_up.weight"] = rng.standard_normal((16, 2)).astype(np.float32)
    spellings = [tmp_path / f"{name}.safetensors" for name in ("hada", "kohya", "comfy", "split")]
    save_file(flux, spellings[0])
    lt.to_lora(spellings[0], energy=1.0, output=spellings[1])
    lt.convert(spellings[1], to="comfyui", names="flux1", output=spellings[2])
    lt.convert(spellings[1], to="diffusers", names="flux1", output=spellings[3])
    _, out = indexed(tmp_path, [*paths, *spellings])
    wanted = [{"new0", "old0", "bare0"}, {"new1", "old1", "bare1"}, {p.name for p in spellings}]
    groups = [set(group) for group in lt.fleet_dedup(out).groups]
    assert sorted(map(sorted, groups)) == sorted(map(sorted, wanted))
    nearest = lt.fleet_similar(spellings[3], out).neighbours[:4]
    assert {n.path for n in nearest} == wanted[2]
    assert all(n.cosine == pytest.approx(1.0, abs=1e-6) for n in nearest)


def test_commands_print_what_functions_return(tmp_path):
    import jsonschema  # slow to import

    paths = fleet(tmp_path, 3)
    result, out = indexed(tmp_path, paths)
    pairs = [
        (result, ["index", *paths, "-o", tmp_path / "other.safetensors"]),
        (lt.fleet_similar(paths[0], out), ["similar", paths[0], "--index", out]),
        (lt.fleet_dedup(out), ["dedup", out]),
    ]
    for expected, line in pairs:
        arguments = ["fleet", *map(str, line)]
        done = CliRunner().invoke(cli, [*arguments, "--json"], standalone_mode=False)
        printed = json.loads(done.stdout)
        known = json.dumps(expected.to_dict())
        assert found(done.stdout, "output") == found(known, "output")
        schema = SCHEMAS / f"{expected.operation}.json"
        jsonschema.validate(printed, json.loads(schema.read_text(encoding="utf-8")))
        if line[0] != "index":
            assert CliRunner().invoke(cli, arguments, standalone_mode=False).stdout
