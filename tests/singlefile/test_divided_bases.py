"""Bases that fuse what an adapter splits, or split what it fuses: every kind, by every command.

ΔW is computed here, densely, in float64, from the weight as the adapter divides it.
"""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_fuse import bases, run  # noqa: F401

import loratools as lt
from loratools.naming.tables import find_table

H = 8
FUSED = {
    "diffusion_model.double_blocks.0.img_attn.qkv": (3 * H, H),
    "diffusion_model.single_blocks.0.linear1": (7 * H, H),
    "diffusion_model.final_layer.adaLN_modulation.1": (2 * H, H),
}
SPLIT = {
    "transformer.transformer_blocks.0.attn.to_v": (H, H),
    "transformer.single_transformer_blocks.0.attn.to_k": (H, H),
    "transformer.single_transformer_blocks.0.proj_mlp": (4 * H, H),
    "transformer.norm_out.linear": (2 * H, H),
}
KINDS = ("lora", "dora", "dora of inputs", "loha", "lokr", "diff", "mixed")
CLOSE = 2e-5  # float32 sums of a few products, and weights of size 1 to 10


def weight(bases, module):  # noqa: F811
    """Return the weight of a module as the adapter divides it, and where it is in each base."""
    whole, parts = (
        load_file(bases["original"]),
        load_file(bases["diffusers"] / "diffusion_pytorch_model.safetensors"),
    )
    path = module.partition(".")[2]
    stored = (whole if module in FUSED else parts)[f"{path}.weight"]
    return stored.astype(np.float64)


def change(kind, shape, w, draw):
    """Return tensors by their leaves, and ΔW."""
    out, in_ = shape
    if kind in ("lora", "dora", "dora of inputs"):
        a, b = draw(3, in_), draw(out, 3)
        tensors = {"lora_down.weight": a, "lora_up.weight": b, "alpha": np.array(1.5, np.float32)}
        delta = 0.5 * (b.astype(float) @ a.astype(float))
        if kind == "dora":
            norms = np.linalg.norm(w + delta, axis=1, keepdims=True)
            scale = (1.25 * norms).astype(np.float32)
            return tensors | {"dora_scale": scale}, (w + delta) / norms * scale - w
        if kind == "dora of inputs":
            norms = np.linalg.norm(w + delta, axis=0, keepdims=True)
            scale = (0.75 * norms).astype(np.float32)
            return tensors | {"dora_scale": scale}, (w + delta) / norms * scale - w
        return tensors, delta
    if kind == "loha":
        parts = [draw(out, 2), draw(2, in_), draw(out, 2), draw(2, in_)]
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        one, two = (x.astype(float) @ y.astype(float) for x, y in (parts[:2], parts[2:]))
        return dict(zip(names, parts, strict=True)), one * two
    if kind == "lokr":
        one, two = draw(2, 2), draw(out // 2, in_ // 2)
        return {"lokr_w1": one, "lokr_w2": two}, np.kron(one.astype(float), two.astype(float))
    diff = draw(*shape)
    return {"diff": diff}, diff.astype(float)


def adapter(bases, kind, modules, path):  # noqa: F811
    """Write an adapter of some modules, and return their ΔW."""
    generator = np.random.default_rng(5)

    def draw(*shape):
        return generator.standard_normal(shape).astype(np.float32)

    tensors, deltas = {}, {}
    for index, (module, shape) in enumerate(modules.items()):
        own = KINDS[index % 3 * 2] if kind == "mixed" else kind
        leaves, deltas[module] = change(own, shape, weight(bases, module), draw)
        tensors |= {f"{module}.{leaf}": tensor for leaf, tensor in leaves.items()}
    save_file(tensors, path)
    return deltas


def in_diffusers(deltas):
    """Return changes by diffusers' names, cut where the original naming fuses."""
    table, found = find_table("flux1"), {}
    for module, delta in deltas.items():
        path = module.partition(".")[2]
        scheme = "original" if module in FUSED else "diffusers"
        place = table.locate(path, flat=False, schemes=(scheme,))
        if scheme == "diffusers":
            found[path] = delta
            continue
        if place.row.swapped_halves:
            halves = np.split(delta, 2)
            found[place.row.diffusers[0]] = np.concatenate(halves[::-1])
            continue
        start, unit = 0, len(delta) // sum(place.row.parts)
        for name, share in zip(place.row.diffusers, place.row.parts, strict=True):
            stop = start + share * unit
            found[name.replace("{}", "0")] = delta[start:stop]
            start = stop
    return found


def added(bases, fused, base):  # noqa: F811
    """Return what fusing added, by diffusers' names."""
    before = bases[base]
    if base == "diffusers":
        name = "diffusion_pytorch_model.safetensors"
        one, two = load_file(before / name), load_file(fused / name)
        prefix = "transformer."
    else:
        one, two = load_file(before), load_file(fused)
        prefix = "diffusion_model."
    changes = {
        prefix + key.removesuffix(".weight").removeprefix("model.diffusion_model."):
        two[key].astype(float) - tensor
        for key, tensor in one.items() if not np.array_equal(two[key], tensor)
    }  # fmt: skip
    if base == "diffusers":
        return {name.partition(".")[2]: delta for name, delta in changes.items()}
    assert set(changes) <= set(FUSED)
    return {n: d for n, d in in_diffusers(changes).items() if np.abs(d).max() > 0}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        np.testing.assert_allclose(found[name], delta, rtol=0, atol=CLOSE, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("modules", "base"),
    [(SPLIT, "original"), (SPLIT, "whole"), (FUSED, "diffusers"), (SPLIT, "diffusers"),
     (FUSED, "original")],
)  # fmt: skip
def test_fuse_and_verify(bases, tmp_path, kind, modules, base):  # noqa: F811
    path = tmp_path / "a.safetensors"
    wanted = in_diffusers(adapter(bases, kind, modules, path))
    fused = tmp_path / ("f" if base == "diffusers" else "f.safetensors")
    run("fuse", bases[base], path, "-o", fused)
    assert_same(added(bases, fused, base), wanted)
    assert "adapter: contained" in run("verify", fused, "--base", bases[base], "--adapter", path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("modules", "base"), [(SPLIT, "whole"), (FUSED, "diffusers")])
def test_made_plain_with_the_base(bases, tmp_path, kind, modules, base):  # noqa: F811
    path, out = tmp_path / "a.safetensors", tmp_path / "plain.safetensors"
    wanted = in_diffusers(adapter(bases, kind, modules, path))
    run("to-lora", path, "--base", bases[base], "--rank", 4 * H, "-o", out)
    read = lt.read(out)
    assert all(module.kind == "lora" for module in read.modules.values())
    assert_same(in_diffusers({name: lt.delta(read, name) for name in read.modules}), wanted)


@pytest.mark.parametrize(("modules", "base"), [(SPLIT, "whole"), (FUSED, "diffusers")])
def test_made_a_dora_with_the_base(bases, tmp_path, modules, base):  # noqa: F811
    path, out = tmp_path / "a.safetensors", tmp_path / "dora.safetensors"
    wanted = in_diffusers(adapter(bases, "lora", modules, path))
    run("to-dora", path, "--base", bases[base], "-o", out)
    assert all(module.is_dora for module in lt.read(out).modules.values())
    fused = tmp_path / ("f" if base == "diffusers" else "f.safetensors")
    run("fuse", bases[base], out, "-o", fused)
    assert_same(added(bases, fused, base), wanted)


@pytest.mark.parametrize(("modules", "base"), [(SPLIT, "whole"), (FUSED, "diffusers")])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_beside_the_base(bases, tmp_path, kind, modules, base):  # noqa: F811
    """Strengths of `spectrum`, and a merge of DoRAs, use the weight as the adapter divides it."""
    path, out = tmp_path / "a.safetensors", tmp_path / "m.safetensors"
    deltas = adapter(bases, kind, modules, path)
    found = lt.spectrum(path, base=bases[base])
    assert {matrix.name for matrix in found.matrices} == set(deltas)
    for matrix in found.matrices:
        share = np.linalg.norm(deltas[matrix.name]) / np.linalg.norm(weight(bases, matrix.name))
        assert matrix.base.relative_change == pytest.approx(share, rel=1e-5)
    lt.merge({path: 0.5}, base=bases[base], rank=4 * H, output=out)
    merged = lt.read(out)
    for name, delta in deltas.items():
        np.testing.assert_allclose(lt.delta(merged, name), 0.5 * delta, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("prefix", ["transformer.", "lora_transformer_", "", "diffusion_model."])
@pytest.mark.parametrize("module", ["transformer_blocks.0.attn.to_v", "norm_out.linear"])
def test_the_base_tells_a_name_of_several_architectures(bases, tmp_path, prefix, module):  # noqa: F811
    """One module's name fits several tables; the base is of one of them only."""
    path, fused = tmp_path / "a.safetensors", tmp_path / "f.safetensors"
    shape = SPLIT[f"transformer.{module}"]
    wanted = adapter(bases, "lora", {f"transformer.{module}": shape}, path)
    spelled = module.replace(".", "_") if prefix.endswith("_") else module
    save_file(
        {
            k.replace(f"transformer.{module}", prefix + spelled): t
            for k, t in load_file(path).items()
        },
        path,
    )
    run("fuse", bases["whole"], path, "-o", fused)
    found = added(bases, fused, "whole")
    assert_same({n: found[n] for n in found if n == module}, in_diffusers(wanted))
    assert set(found) == {module}


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_name_that_another_architecture_has_twice(tmp_path, kind):
    """Stable Diffusion 3's table has this name in two places, which FLUX.1's modules are not."""
    module, path = (
        "transformer.transformer_blocks.0.norm1_context.linear",
        tmp_path / "a.safetensors",
    )
    generator = np.random.default_rng(0)

    def draw(*shape):
        return generator.standard_normal(shape).astype(np.float32)

    leaves, wanted = change(kind, (6 * H, H), None, draw)
    save_file({f"{module}.{leaf}": tensor for leaf, tensor in leaves.items()}, path)
    adapter = lt.read(path)
    np.testing.assert_allclose(lt.delta(adapter, module), wanted, rtol=0, atol=CLOSE)
    run("to-lora", path, "-o", tmp_path / "plain.safetensors", "--rank", H)
    run("convert", path, "-o", tmp_path / "b.safetensors", "--to", "kohya", "--names", "flux1")
