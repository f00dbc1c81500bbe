"""Square stacks without a sibling: no shape tells on which side A is once their layout is left.

Files of three dimensions say it, and so does a sibling that is taken out. What an operation writes
must not say otherwise; PEFT's own merge in float64 is what is right.
"""

import json

import pytest
import tiny_models
from expert_models import ROUNDING, Model, off

import loratools as lt
from loratools_formats.disk.errors import UnsupportedError

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Future", "User", "Runtime")
]
WIDTH = tiny_models.SIZES["hidden_size"]
CLASSES = ("Qwen3MoeForCausalLM", "Llama4ForCausalLM", "GptOssForCausalLM")


def stated(folder, release):
    """Write which release of PEFT made a folder, or none, and not the class that it is for."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {"auto_mapping": None}
    config.pop("peft_version", None)
    path.write_text(json.dumps(config if release is None else config | {"peft_version": release}))
    return folder


def made(which, source, base, out):
    if which == "squeeze":
        lt.squeeze(source, rank=4, output=out)
    elif which == "merge":
        lt.merge([(source, 0.5), (source, 0.5)], output=out)
    elif which == "merge with base":
        lt.merge([(source, 0.5), (source, 0.5)], base=base, output=out)
    else:
        lt.convert(source, to="peft", base=base, output=out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("leaf", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_side_that_three_dimensions_tell_is_kept(name, leaf, tmp_path):
    model = Model(name, WIDTH if leaf == "down_proj" else WIDTH // 2, tmp_path)
    adapter = model.adapter("a", [p for p in model.parameters if p.endswith(leaf)])
    wanted = model.change(adapter)
    for release in (None, "0.18.1", "0.19.0"):
        source = tmp_path / f"3d {release}"
        lt.convert(adapter, experts="3d", base=model.base, output=source)
        stated(source, release)
        for which in ("squeeze", "merge", "merge with base", "convert"):
            out = made(which, source, model.base, tmp_path / f"{which} {release}")
            assert off(model.fused(out), wanted) <= ROUNDING, (which, release)
            if lt.read(out).expert_layout.name == "stacked":
                assert off(model.change(out), wanted) <= ROUNDING, (which, release)
            else:  # which PEFT does not load, and which only Llama 4's place makes needed
                assert ".feed_forward.experts" in next(iter(lt.read(out).modules))
                assert which in ("squeeze", "merge")


@pytest.mark.parametrize("name", CLASSES)
def test_a_merge_with_the_base_has_the_side_that_peft_has_now(name, tmp_path):
    model = Model(name, WIDTH, tmp_path)
    adapter = model.adapter("a", [p for p in model.parameters if p.endswith("down_proj")])
    wanted = model.change(adapter)
    lt.convert(adapter, experts="stacked", peft_layout="0.18", base=model.base,
               output=tmp_path / "old")  # fmt: skip
    assert lt.read(tmp_path / "old").config["peft_version"] == "0.18.1"
    stated(tmp_path / "old", "0.18.1")
    assert off(model.fused(tmp_path / "old"), wanted) <= ROUNDING
    for index, pair in enumerate(([adapter, tmp_path / "old"], [tmp_path / "old", adapter])):
        out = tmp_path / f"m{index}"
        lt.merge(pair, base=model.base, output=out)
        assert off(model.change(out), wanted, wanted) <= 2.0**-48
        assert off(model.fused(out), wanted, wanted) <= ROUNDING


@pytest.mark.parametrize("release", [None, "0.18.1", "0.21.2"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_sibling_that_told_the_side_may_be_taken_out(name, release, tmp_path):
    """One parameter that is left also stands where PEFT looks for it."""
    model = Model(name, WIDTH // 2, tmp_path)
    adapter = model.adapter("a")
    if release is not None and release < "0.19":
        lt.convert(adapter, experts="stacked", peft_layout="0.18", base=model.base,
                   output=tmp_path / "old")  # fmt: skip
        adapter = tmp_path / "old"
    stated(adapter, release)
    lt.squeeze(adapter, rank=4, drop=r"experts$", output=tmp_path / "alone")
    found = model.fused(tmp_path / "alone")
    whole = model.fused(adapter)
    kept = {key: change for key, change in whole.items() if key.endswith("gate_up_proj")}
    assert off({key: found[key] for key in kept}, kept) <= ROUNDING
    assert not any(change.any() for key, change in found.items() if key not in kept)
    lt.convert(tmp_path / "alone", base=model.base, for_="peft", output=tmp_path / "peft")
    merged = model.change(tmp_path / "peft")
    assert off({key: merged[key] for key in kept}, kept) <= ROUNDING


def test_what_no_stacked_file_can_say_is_told(tmp_path):
    model = Model("Llama4ForCausalLM", WIDTH, tmp_path)
    adapter = model.adapter("a", [p for p in model.parameters if p.endswith("down_proj")])
    lt.convert(adapter, experts="3d", base=model.base, output=tmp_path / "3d")
    lt.squeeze(tmp_path / "3d", rank=4, output=tmp_path / "named")  # by PEFT's `auto_mapping`
    assert off(model.change(tmp_path / "named"), model.change(adapter)) <= ROUNDING
    stated(tmp_path / "3d", None)
    for asked in ({"to": "peft"}, {"experts": "stacked"}):
        with pytest.raises(UnsupportedError, match="on which side") as told:
            lt.convert(tmp_path / "3d", output=tmp_path / "no", **asked)
        assert "3d --to peft --base BASE " in told.value.hint
    done = lt.squeeze(tmp_path / "3d", rank=2, output=tmp_path / "small")
    assert "experts-laid-out" in {finding.code for finding in done.findings}
    written = lt.write(lt.read(tmp_path / "3d"), tmp_path / "written")
    (told,) = [finding for finding in written.findings if finding.code == "experts-laid-out"]
    assert "PEFT does not load" in told.message
    assert "3d --to peft --base BASE " in told.hint
    assert lt.read(tmp_path / "written").expert_layout.name == "3d"
    assert lt.read(tmp_path / "small").expert_layout.name == "3d"
    done = lt.convert(tmp_path / "3d", to="peft", base=model.base, output=tmp_path / "peft")
    assert any("it is on the outputs now" in finding.message for finding in done.findings)
    stated(adapter, None)
    codes = {
        folder: {found.code for found in lt.check(tmp_path / folder).findings}
        for folder in ("3d", "a")
    }
    assert "LT405" in codes["a"]
    assert "LT405" not in codes["3d"]
    squeezed = lt.squeeze(adapter, rank=2, output=tmp_path / "stacked")
    assert "experts-laid-out" not in {finding.code for finding in squeezed.findings}
