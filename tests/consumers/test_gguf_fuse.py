"""Fused GGUF models in the real llama.cpp: as base and adapter apart, up to what is reported."""

import json

import gguf_models
import numpy as np
import pytest

from loratools.lowrank.matrices import loaded
from loratools.operations.convert.operation import prepare, write
from loratools.operations.fuse.draft import FuseInput
from loratools.operations.fuse.gguf import GgufFuseOptions, GgufFusion
from loratools_formats import Context, get_format, read_adapter
from loratools_formats.containers.gguf.container import read_gguf
from loratools_formats.containers.gguf.model import decoded
from loratools_formats.containers.gguf.splits import read_model
from loratools_formats.disk.errors import AdapterError, LoratoolsError, UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

NAME = "wide llama"
TARGETS = ["q_proj", "k_proj", "down_proj", "embed_tokens", "lm_head"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Return a PEFT folder for the wide llama, and what torch predicts with it."""
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    options = {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": TARGETS}
    model = gguf_models.adapted(gguf_models.make_model(NAME), std=0.05, **options)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder, gguf_models.expected(model)


@pytest.fixture(scope="module")
def bases(gguf_bases, tmp_path_factory):
    """Return a function from a type to the wide llama with its matrices in that type."""
    root = tmp_path_factory.mktemp("bases")

    def base(kind):
        if kind == "F32":
            return gguf_bases / NAME / "model.gguf"
        path = root / f"{kind}.gguf"
        if not path.exists():
            gguf_models.quantised_base(gguf_bases / NAME / "model.gguf", path, kind)
        return path

    return base


def fuse(base, out, *inputs, **options):
    given = [FuseInput(read_adapter(path), weight, path.name) for path, weight in inputs]
    return GgufFusion(read_model(base), given, GgufFuseOptions(**options)).write(out)


def dense(path):
    return {name: decoded(t).load(np.float64) for name, t in read_gguf(path).tensors.items()}


# How far fused and unfused may differ: the type's rounding of weights, and of activations, which
# llama.cpp rounds to the type of the weights.
CASES = [
    ("F32", "keep", "F32", 1e-4),
    ("F16", "keep", "F16", 0.02),
    ("Q8_0", "keep", "Q8_0", 0.15),
    ("Q8_0", "f32", "F32", 0.15),
    ("Q4_K", "keep", "F16", 0.3),
    ("Q4_K", "q8_0", "Q8_0", 0.3),
    ("F32", "q8_0", "Q8_0", 0.15),
    ("Q4_0", "q5_1", "Q5_1", 0.5),
]


@pytest.mark.parametrize(("kind", "outtype", "stored", "tolerance"), CASES)
def test_fused_says_what_base_and_adapter_say(
    bases, adapter, tmp_path, kind, outtype, stored, tolerance
):
    base, (folder, _) = bases(kind), adapter
    result = fuse(base, tmp_path / "fused.gguf", (folder, 1.0), outtype=outtype)
    write(prepare(read_adapter(folder), "gguf", Context(base)), tmp_path / "lora.gguf")
    (apart,) = gguf_models.from_llama_cpp(base, [tmp_path / "lora.gguf"])
    (fused,) = gguf_models.from_llama_cpp(tmp_path / "fused.gguf", [], [[]])
    (untouched,) = gguf_models.from_llama_cpp(base, [], [[]])
    assert np.abs(fused - apart).max() < tolerance
    assert np.abs(apart - untouched).max() > 3 * tolerance
    assert {report.dtype for report in result.tensors} == {stored}
    assert len(result.tensors) == 8


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_split_models_fuse_to_the_same_bytes_as_whole_ones(bases, adapter, tmp_path, kind):
    folder, wanted = adapter
    first = gguf_models.split_base(bases(kind), tmp_path / "split.gguf", most=5)
    for base, name in ((bases(kind), "whole.gguf"), (first, "joined.gguf")):
        result = fuse(base, tmp_path / name, (folder, 1.0))
    (finding,) = result.findings
    assert finding.message == "the 5 parts of the model became one file"
    whole, joined = read_gguf(tmp_path / "whole.gguf"), read_gguf(tmp_path / "joined.gguf")
    for name, tensor in whole.tensors.items():
        assert bytes(joined.tensors[name].raw()) == bytes(tensor.raw())
    write(prepare(read_adapter(folder), "gguf", Context(first)), tmp_path / "lora.gguf")
    (apart,) = gguf_models.from_llama_cpp(first, [tmp_path / "lora.gguf"])
    (fused,) = gguf_models.from_llama_cpp(tmp_path / "joined.gguf", [], [[]])
    tolerance = 1e-4 if kind == "F32" else 0.15
    assert np.abs(fused - apart).max() < tolerance
    assert np.abs(apart - wanted).max() < tolerance


KINDS = {
    "LoHa": ("LoHaConfig", {"r": 4, "alpha": 8}),
    "LoKr": ("LoKrConfig", {"r": 4, "alpha": 8}),
    "OFT": ("OFTConfig", {"oft_block_size": 8, "r": 0}),
    "IA3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "DoRA": ("LoraConfig", {"r": 4, "lora_alpha": 8, "use_dora": True}),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 40, "scaling": 20.0}),
}


def adapted_by(kind, model, targets):
    """Return a model with an adapter of another kind, all of its tensors moved off their start."""
    import peft
    import torch

    name, options = KINDS[kind]
    config = getattr(peft, name)(target_modules=targets, **options)
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ["q_proj", "k_proj", "down_proj"]),  # rows of q and k lie in another order
        ("qwen2", ["o_proj", "down_proj"]),
    ],
)
def test_other_kinds_are_folded_as_into_safetensors(gguf_bases, tmp_path, name, targets, kind):
    model = adapted_by(kind, gguf_models.make_model(name), targets)
    wanted = gguf_models.expected(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    base, out = gguf_bases / name / "model.gguf", tmp_path / "fused.gguf"
    fuse(base, out, (tmp_path / "adapter", 1.0))
    (found,) = gguf_models.from_llama_cpp(out, [], [[]])
    (untouched,) = gguf_models.from_llama_cpp(base, [], [[]])
    tolerance = 5e-3 if name in gguf_models.GELU else 1e-4
    assert np.abs(found - wanted).max() < tolerance
    assert np.abs(untouched - wanted).max() > 3 * tolerance


def test_a_dora_of_conv1d_layers(gguf_bases, tmp_path):
    options = {"r": 4, "lora_alpha": 8, "use_dora": True, "fan_in_fan_out": True}
    targets = ["attn.c_attn", "mlp.c_fc"]
    model = gguf_models.adapted(gguf_models.make_model("gpt2"), target_modules=targets, **options)
    model.save_pretrained(tmp_path / "dora", save_embedding_layers=False)
    fuse(gguf_bases / "gpt2/model.gguf", tmp_path / "fused.gguf", (tmp_path / "dora", 1.0))
    (found,) = gguf_models.from_llama_cpp(tmp_path / "fused.gguf", [], [[]])
    assert np.abs(found - gguf_models.expected(model)).max() < 5e-3


def test_other_kinds_for_which_there_is_no_place_are_refused(gguf_bases, tmp_path):
    model = adapted_by("IA3", gguf_models.make_model("qwen2"), ["k_proj", "down_proj"])
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(UnsupportedError, match="change of a bias"):
        fuse(gguf_bases / "qwen2/model.gguf", tmp_path / "out.gguf", (tmp_path / "a", 1.0))
    model = adapted_by("DoRA", gguf_models.make_model("mixtral"), ["embed_tokens"])
    model.save_pretrained(tmp_path / "b", save_embedding_layers=False)
    with pytest.raises(UnsupportedError, match="not fused into embedding"):
        fuse(gguf_bases / "mixtral/model.gguf", tmp_path / "out.gguf", (tmp_path / "b", 1.0))
    assert not (tmp_path / "out.gguf").exists()


def test_fused_into_floats_says_what_torch_says(bases, adapter, tmp_path):
    folder, wanted = adapter
    fuse(bases("F32"), tmp_path / "fused.gguf", (folder, 1.0))
    (found,) = gguf_models.from_llama_cpp(tmp_path / "fused.gguf", [], [[]])
    assert np.abs(found - wanted).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "title"),
    [("qwen3moe", "experts"), ("mixtral", "experts"), ("phi3", "all"), ("gpt2", "plain")],
)
def test_other_layouts_fuse_to_what_torch_says(gguf_bases, tmp_path, name, title):
    model = gguf_models.adapted(gguf_models.make_model(name), **gguf_models.variants(name)[title])
    wanted = gguf_models.expected(model)
    model.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    out = tmp_path / "fused.gguf"
    fuse(gguf_bases / name / "model.gguf", out, (tmp_path / "lora", 1.0))
    (found,) = gguf_models.from_llama_cpp(out, [], [[]])
    assert np.abs(found - wanted).max() < (5e-3 if name in gguf_models.GELU else 1e-4)


@pytest.mark.parametrize(("kind", "outtype"), [("F32", "f16"), ("Q4_K", "keep"), ("Q8_0", "keep")])
def test_report_is_true_and_the_rest_is_verbatim(bases, adapter, tmp_path, kind, outtype):
    base, (folder, _) = bases(kind), adapter
    out = tmp_path / "fused.gguf"
    result = fuse(base, out, (folder, 0.5), (folder, -0.25), outtype=outtype)
    target = get_format("gguf")
    translated = target.from_model(read_adapter(folder), Context(base))
    before, after = dense(base), dense(out)
    reports = {report.key: report for report in result.tensors}
    for module, delta in translated.modules.items():
        ((b, a),) = loaded(delta.direction)
        change = 0.25 * delta.direction.scale * (b @ a)
        change = change.T if module == "token_embd" else change
        report, new = reports[f"{module}.weight"], after[f"{module}.weight"]
        old = before[f"{module}.weight"]
        assert report.base_norm == pytest.approx(np.linalg.norm(old), rel=1e-6)
        assert report.delta_norm == pytest.approx(np.linalg.norm(change), rel=1e-6)
        rounding = np.linalg.norm(new - (old + change))
        assert report.rounding_norm == pytest.approx(rounding, rel=1e-3)
        if report.surviving is not None:
            share = np.vdot(new - old, change) / np.vdot(change, change)
            assert report.surviving == pytest.approx(share, rel=1e-6)
    first, second = read_gguf(base), read_gguf(out)
    assert list(first.tensors) == list(second.tensors)
    for name in set(first.tensors) - set(reports):
        assert bytes(first.tensors[name].raw()) == bytes(second.tensors[name].raw())
    size = list(first.keys.values())[-1].end
    assert base.read_bytes()[24:size] == out.read_bytes()[24:size]
    assert result.copied == len(first.tensors) - len(reports)


def test_bytes_do_not_depend_on_threads_and_inputs_stay(bases, adapter, tmp_path):
    base, (folder, _) = bases("Q8_0"), adapter
    before = base.read_bytes()
    for workers in (1, 2):
        fuse(base, tmp_path / f"{workers}.gguf", (folder, 1.0), workers=workers)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()
    assert base.read_bytes() == before
    record = json.loads((tmp_path / "1.gguf.provenance.json").read_text())
    assert [i["role"] for i in record["predicate"]["inputs"]] == ["base", "adapter 1", "adapter 1"]


def test_types_that_cannot_be_written_become_another_with_a_note(bases, adapter, tmp_path):
    base, (folder, _) = bases("Q4_K"), adapter
    result = fuse(base, tmp_path / "out.gguf", (folder, 1.0), fallback="q8_0")
    assert {report.dtype for report in result.tensors} == {"Q8_0"}
    assert tuple(each.message for each in result.findings) == (
        "8 tensors of type Q4_K became Q8_0, since Q4_K cannot be written again",
    )
    result = fuse(bases("F32"), tmp_path / "same.gguf", (folder, 1.0), fallback="q8_0")
    assert (result.findings, {report.dtype for report in result.tensors}) == ((), {"F32"})


def test_gguf_adapters_fuse_like_the_folders_they_come_from(bases, adapter, tmp_path):
    base, (folder, _) = bases("F32"), adapter
    write(prepare(read_adapter(folder), "gguf", Context(base)), tmp_path / "lora.gguf")
    for name, source in (("a", folder), ("b", tmp_path / "lora.gguf")):
        fuse(base, tmp_path / f"{name}.gguf", (source, 1.0))
    first, second = dense(tmp_path / "a.gguf"), dense(tmp_path / "b.gguf")
    for name, values in first.items():
        np.testing.assert_allclose(second[name], values, atol=1e-6)


def test_erased_changes_are_refused(bases, adapter, tmp_path):
    base, (folder, _) = bases("Q4_0"), adapter
    with pytest.raises(UnsupportedError, match="erase most of the change"):
        fuse(base, tmp_path / "out.gguf", (folder, 1e-3))
    assert list(tmp_path.iterdir()) == []
    result = fuse(base, tmp_path / "out.gguf", (folder, 1e-3), allow_lossy=True)
    assert result.surviving < 0.5


def test_what_does_not_fit_is_refused(gguf_bases, bases, adapter, tmp_path):
    folder, _ = adapter
    out = tmp_path / "out.gguf"
    with pytest.raises(AdapterError, match="does not fit the base model"):
        fuse(gguf_bases / "llama" / "model.gguf", out, (folder, 1.0))
    with pytest.raises(LoratoolsError, match="output layer is its embedding"):
        fuse(gguf_bases / "gemma3" / "model.gguf", out, (folder, 1.0))
    write(prepare(read_adapter(folder), "gguf", Context(bases("F32"))), tmp_path / "lora.gguf")
    with pytest.raises(AdapterError, match="another architecture"):
        fuse(gguf_bases / "qwen2" / "model.gguf", out, (tmp_path / "lora.gguf", 1.0))
    assert not out.exists()


def test_saved_embeddings_that_repeat_the_base_are_left_out(gguf_bases, bases, tmp_path):
    options = {"r": 8, "lora_alpha": 16, "target_modules": TARGETS}
    model = gguf_models.adapted(gguf_models.make_model(NAME), std=0.05, **options)
    wanted = gguf_models.expected(model)
    lora = tmp_path / "lora"
    model.save_pretrained(lora, save_embedding_layers=True)
    assert len(read_adapter(lora).replacements) == 2
    base = bases("F32")
    fuse(base, tmp_path / "fused.gguf", (lora, 1.0))
    (found,) = gguf_models.from_llama_cpp(tmp_path / "fused.gguf", [], [[]])
    assert np.abs(found - wanted).max() < 1e-4
    for number, known in enumerate((base, gguf_bases / NAME)):
        prepared = prepare(read_adapter(lora), "gguf", Context(known))
        assert prepared.losses == ()
        assert "base-values" in [finding.code for finding in prepared.findings]
        write(prepared, tmp_path / f"{number}.gguf")
        (apart,) = gguf_models.from_llama_cpp(base, [tmp_path / f"{number}.gguf"])
        assert np.abs(apart - wanted).max() < 1e-4
    with pytest.raises(UnsupportedError, match="loratools fuse"):
        prepare(read_adapter(lora), "gguf", Context(bases("Q8_0")))
    with pytest.raises(UnsupportedError, match="replaces a tensor"):
        fuse(bases("Q8_0"), tmp_path / "other.gguf", (lora, 1.0))
