"""Results whose base was a whole pipeline are replayed, and `repair` and `check` take one."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_diffusers import pipelines  # noqa: F401
from test_pipelines import fused, weights  # noqa: F401

import loratools as lt
from loratools_formats.disk.errors import UncheckedError
from loratools_formats.disk.provenance import PROVENANCE_FILE

pytestmark = pytest.mark.filterwarnings("ignore")


def changed(pipe, other):
    """Copy a pipeline with other weights of its text encoder; everything else is the same."""
    shutil.copytree(pipe, other)
    file = next((other / "text_encoder").glob("*.safetensors"))
    save_file({key: tensor * 1.5 for key, tensor in load_file(file).items()}, file)
    return other


@pytest.mark.parametrize("fused", ["sd1", "sdxl"], indirect=True)
def test_replay_finds_the_pipeline_that_it_was_and_no_other(fused, tmp_path):  # noqa: F811
    pipe, path, tuned = fused
    out = {name: tmp_path / f"{name}.safetensors" for name in ("dora", "plain", "merged", "x", "d")}
    lt.to_dora(path, base=pipe, output=out["dora"])
    lt.to_lora(out["dora"], base=pipe, rank=32, output=out["plain"])
    lt.merge([out["dora"], path], base=pipe, rank=32, output=out["merged"])
    lt.extract(pipe, tuned, to="diffusers", rank=8, output=out["x"])
    lt.convert(path, to="diffusers", base=pipe, output=out["d"])
    results = [*out.values(), tuned]
    for made in results:
        assert lt.replay(made).identical, made
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    changed(pipe, elsewhere / "another")
    shutil.move(pipe, elsewhere / "moved")
    changed(elsewhere / "moved", pipe)
    for made in results:
        with pytest.raises(UncheckedError, match="is not where it was"):
            lt.replay(made, input=[elsewhere / "another"])
        assert lt.replay(made, input=[elsewhere]).identical, made


@pytest.mark.parametrize("fused", ["sdxl"], indirect=True)
def test_a_fused_pipeline_tells_of_all_components_and_of_what_it_was_made_of(fused, tmp_path):  # noqa: F811
    pipe, path, tuned = fused
    said = json.loads((tuned / PROVENANCE_FILE).read_text())
    files = {f.relative_to(tuned).as_posix() for f in tuned.glob("*/*.safetensors")}
    assert {one["name"] for one in said["subject"]} == files
    assert list(tuned.rglob(PROVENANCE_FILE)) == [tuned / PROVENANCE_FILE]
    read = {one["name"] for one in said["predicate"]["inputs"]}
    assert files | {path.name} <= read
    lt.fuse(tuned, {path: -1.0}, output=tmp_path / "back")
    chain = lt.provenance(tmp_path / "back")
    assert [step.operation for step in chain.steps] == ["fuse", "fuse"]
    assert not chain.changed
    assert lt.replay(tmp_path / "back").identical
    again = weights(tmp_path / "back")
    for key, tensor in weights(pipe).items():
        np.testing.assert_allclose(again[key], tensor, rtol=0, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("fused", ["sd1", "sdxl"], indirect=True)
def test_check_and_repair_with_a_pipeline(fused, tmp_path):  # noqa: F811
    pipe, path, _ = fused
    found = lt.check(path, base=pipe)
    assert not [f for f in found.findings if f.severity == "error"]
    # A module that the pipeline has not, and one of another shape.
    odd, tensors = tmp_path / "odd.safetensors", load_file(path)
    name = next(k for k in tensors if k.startswith("lora_te") and "fc1.lora_down" in k)
    save_file(tensors | {name: np.ones((4, 5), np.float32)}, odd)
    assert [f for f in lt.check(odd, base=pipe).findings if f.severity == "error"]
    up = [key for key in tensors if key.endswith("lora_up.weight")]
    strong = tensors | {key: tensors[key] * 100 for key in up}
    results = {}
    for title, base in (("of the pipeline", pipe), ("of the component", pipe / "unet")):
        own = tmp_path / f"{title}.safetensors"
        save_file({k: v for k, v in strong.items() if k.startswith("lora_unet")}, own)
        results[title] = lt.repair(own, base=base)
    one, other = (result.adapter for result in results.values())
    assert one.modules.keys() == other.modules.keys()
    for module in one.modules:
        np.testing.assert_array_equal(lt.delta(one, module), lt.delta(other, module))
    save_file(strong, tmp_path / "whole.safetensors")
    out = tmp_path / "repaired.safetensors"
    assert lt.repair(tmp_path / "whole.safetensors", base=pipe, output=out).change > 0.01
    repaired = lt.read(out)
    for module in one.modules:
        np.testing.assert_allclose(
            lt.delta(repaired, module), lt.delta(one, module), rtol=0, atol=1e-5
        )
    assert lt.replay(out).identical
