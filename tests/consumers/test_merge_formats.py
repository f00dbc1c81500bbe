"""One change of experts in several formats, merged: the first gives the format, the base the way.

Every pair is compared with PEFT's own merge in float64.
"""

import itertools

import pytest
from expert_models import ROUNDING, Model, off

import loratools as lt
from loratools_formats.disk.errors import AdapterError, UnsupportedError

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Future", "User", "Runtime")
]
SPELLINGS = {
    "mlx": {"to": "mlx"}, "gguf": {"to": "gguf"}, "each": {"experts": "each"},
    "3d": {"experts": "3d"},
}  # fmt: skip


def in_spellings(model, folder):
    found = {"peft": model.adapter("a", target_modules=["q_proj", "o_proj"])}
    for name, asked in SPELLINGS.items():
        found[name] = folder / (f"{name}.gguf" if name == "gguf" else name)
        lt.convert(found["peft"], base=model.base, output=found[name], **asked)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "MixtralForCausalLM", "GptOssForCausalLM"])
def test_every_pair_of_formats_is_merged_with_the_base(name, tmp_path):
    model = Model(name, 24, tmp_path)
    spelled = in_spellings(model, tmp_path)
    wanted = model.change(spelled["peft"])
    for first, second in itertools.permutations(spelled, 2):
        format_name = first if first in ("mlx", "gguf") else "peft"
        out = tmp_path / f"{first} {second}{'.gguf' if first == 'gguf' else ''}"
        pair = [spelled[first], spelled[second]]
        done = lt.merge(pair, base=model.base, output=out)
        assert done.adapter.format == format_name, (first, second)
        if format_name == "gguf":  # which fuse takes for GGUF models only
            lt.convert(out, to="peft", base=model.base, output=tmp_path / f"{second} back")
            out = tmp_path / f"{second} back"
        assert off(model.fused(out), wanted, wanted) <= 2 * ROUNDING, (first, second)


def test_without_a_base_the_hint_names_convert(tmp_path):
    model = Model("GptOssForCausalLM", 24, tmp_path)
    spelled = in_spellings(model, tmp_path)
    for first, second in itertools.permutations(("peft", "mlx", "gguf"), 2):
        for more in ({}, {"allow_missing": True}):
            with pytest.raises(AdapterError) as told:
                lt.merge([spelled[first], spelled[second]], output=tmp_path / "no", **more)
            assert "`base`" in told.value.hint
            if "gguf" in (first, second):
                source = spelled[second]
                ending = ".gguf" if first == "gguf" else ""
                command = (
                    f"loratools convert {source} --to {first} --base BASE -o converted{ending}"
                )
                assert told.value.hint.endswith(command), (first, second)
                asked = {"to": first, "base": model.base}
                out = tmp_path / f"{first} of {second} {len(more)}{ending}"
                lt.convert(source, output=out, **asked)


def test_nemotron_of_mlx_goes_to_gguf(tmp_path):
    """mlx-lm calls its layers as the model's files do: `backbone.layers`."""
    model = Model("NemotronHForCausalLM", 24, tmp_path)
    adapter = model.adapter("a", target_modules=["q_proj", "o_proj"])
    wanted = model.change(adapter)
    for name in ("mlx", "four"):
        asked = {"to": "mlx"} if name == "mlx" else {"names_of": "4"}
        lt.convert(adapter, base=model.base, output=tmp_path / name, **asked)
        assert any(path.startswith("backbone.") for path in lt.read(tmp_path / name).modules)
        lt.convert(tmp_path / name, base=model.base, output=tmp_path / f"{name}.gguf")
        lt.convert(tmp_path / f"{name}.gguf", base=model.base, to="peft",
                   output=tmp_path / f"{name} back")  # fmt: skip
        assert off(model.fused(tmp_path / f"{name} back"), wanted) <= ROUNDING


def test_experts_of_mlx_beside_modules_of_peft_alone_need_the_base(tmp_path):
    """No module of PEFT's has a name that would clash, and PEFT finds none of mlx-lm's."""
    model = Model("MixtralForCausalLM", 24, tmp_path)
    experts = model.adapter("a", target_modules=["o_proj"])
    held, others, out = tmp_path / "mlx", tmp_path / "others", tmp_path / "out"
    lt.convert(experts, to="mlx", base=model.base, output=held)
    lt.convert(experts, to="peft", drop="experts", output=others)
    with pytest.raises(AdapterError, match="has other modules"):
        lt.merge([others, held], output=out)
    lt.merge([others, held], base=model.base, output=out)
    wanted = [model.change(each) for each in (experts, others)]
    assert off(model.change(out), *wanted) <= ROUNDING
    with pytest.raises(UnsupportedError, match="one rank") as told:
        lt.merge([held, others], base=model.base, output=tmp_path / "uneven")
    assert told.value.hint == "Add `uniform=True`"
    lt.merge([held, others], base=model.base, uniform=True, output=tmp_path / "even")
