"""GGUF adapters: what is refused when read or made, and what is written."""

import json
import re
import subprocess
import sys
import tracemalloc
from dataclasses import replace

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loratools.lowrank.matrices import loaded
from loratools.operations.convert.operation import prepare, write
from loratools.operations.fuse.draft import FuseInput
from loratools.operations.fuse.gguf import GgufFuseOptions, GgufFusion
from loratools_formats import (
    Adapter,
    Context,
    Layer,
    LowRank,
    get_format,
    read_adapter,
    write_adapter,
)
from loratools_formats.containers.gguf.container import KeyValue, read_gguf
from loratools_formats.containers.gguf.splits import read_model
from loratools_formats.core.alora import ACTIVATED
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.tensors import in_memory
from loratools_formats.disk.errors import AdapterError, LoratoolsError, UnsupportedError
from loratools_formats.formats.gguf.base import read_base

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}
Q = "model.layers.0.self_attn.q_proj"
rng = np.random.default_rng(0)


def floats(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def lora(out=16, in_=16, rank=4, scale=2.0, layer=None, **options):
    a, b = in_memory("a", floats(rank, in_)), in_memory("b", floats(out, rank))
    return ModuleChange(LowRank(a, b, scale, layer or Layer("linear"), **options))


def with_parts(change, **parts):
    return change.with_direction(replace(change.direction, **parts))


def model_adapter(modules, **options):
    return Adapter(format="peft", source=None, modules=modules, **options)


@pytest.fixture
def base(tmp_path):
    """Return a function that writes a base model's config.json and returns its folder."""

    def make(**values):
        folder = tmp_path / "base"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(LLAMA | values))
        return folder

    return make


def made(modules, folder, dtype=None, **options):
    context = Context(folder, dtype)
    return get_format("gguf").from_model(model_adapter(modules, **options), context)


def file_with(path, tensors=None, keys=None, kind="adapter", adapter="lora"):
    """Write an adapter with the gguf package; keys are functions on the writer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(kind)
    writer.add_string("adapter.type", adapter)
    if keys is not None:
        keys(writer)
    if tensors is None:
        tensors = {"blk.0.attn_q.weight.lora_a": floats(4, 16)}
        tensors["blk.0.attn_q.weight.lora_b"] = floats(16, 4)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


A, B = "blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"
UNREADABLE = {
    "a model": ({"kind": "model"}, "not a LoRA adapter.*`base`"),
    "another adapter": ({"adapter": "control_vector"}, "not a LoRA adapter"),
    "no type": ({"kind": ""}, "not a LoRA adapter; got general.type None"),
    "no type of adapter": ({"adapter": ""}, "not a LoRA adapter; got adapter.type None"),
    "experts share a": (
        {"tensors": {A.replace("q", "k"): floats(1, 4, 16), B.replace("q", "k"): floats(3, 16, 4)}},
        "do not fit together",
    ),
    "alpha is a whole number": (
        {"keys": lambda w: w.add_uint32("adapter.lora.alpha", 8)},
        "adapter.lora.alpha has the wrong type; got u32; expected f32",
    ),
    "alpha has 64 bits": (
        {"keys": lambda w: w.add_float64("adapter.lora.alpha", 8)},
        "got f64; expected f32",
    ),
    "alpha is infinite": (
        {"keys": lambda w: w.add_float32("adapter.lora.alpha", float("inf"))},
        "alpha is not finite",
    ),
    "tokens are signed": (
        {"keys": lambda w: w.add_array("adapter.alora.invocation_tokens", [1, 2])},
        "got array i32; expected array of u32",
    ),
    "no b": ({"tensors": {A: floats(4, 16)}}, "lacks one of its two factors.*got lora_a"),
    "no a": ({"tensors": {B: floats(16, 4)}}, "lacks one of its two factors.*got lora_b"),
    "b is turned": ({"tensors": {A: floats(4, 16), B: floats(4, 16)}}, "do not fit together"),
    "ranks differ": ({"tensors": {A: floats(4, 16), B: floats(16, 3)}}, "do not fit together"),
    "whole numbers": (
        {"tensors": {A: np.ones((4, 16), np.int8), B: floats(16, 4)}},
        "crashes on adapter factors of this type.*got I8",
    ),
    "64 bits": (
        {"tensors": {A: floats(4, 16), B: floats(16, 4).astype(np.float64)}},
        "crashes on adapter factors of this type.*got F64",
    ),
    "a bias": ({"tensors": {"blk.0.attn_q.bias": floats(16)}}, "no factor of an adapter"),
    "a whole weight": ({"tensors": {"token_embd.weight": floats(8, 16)}}, "no factor"),
    "a magnitude": ({"tensors": {"blk.0.attn_q.weight.lora_magnitude": floats(16)}}, "no factor"),
    "embedding not flipped": (
        {
            "tensors": {
                "token_embd.weight.lora_a": floats(4, 50),
                "token_embd.weight.lora_b": floats(16, 4),
            }
        },
        "do not fit together",
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_llama_cpp_refuses_or_crashes_on_is_refused(tmp_path, name):
    options, message = UNREADABLE[name]
    path = file_with(tmp_path / "file.gguf", **options)
    with pytest.raises(LoratoolsError, match=message):
        read_adapter(path)


@pytest.mark.parametrize(
    ("keys", "scale"),
    [
        (None, 1.0),
        (lambda w: w.add_float32("adapter.lora.alpha", 0.0), 1.0),
        (lambda w: w.add_float32("adapter.lora.alpha", 6.0), 1.5),
    ],
)
def test_scale_is_alpha_by_rank_or_one(tmp_path, keys, scale):
    adapter = read_adapter(file_with(tmp_path / "file.gguf", keys=keys))
    assert adapter.modules["blk.0.attn_q"].direction.scale == scale


def test_norms_are_carried_with_a_note(tmp_path):
    tensors = {A: floats(4, 16), B: floats(16, 4), "output_norm.weight": floats(16)}
    adapter = read_adapter(file_with(tmp_path / "file.gguf", tensors))
    assert set(adapter.carried) == {"output_norm.weight"}
    assert "ignores" in adapter.remarks[0]


def test_quantised_factors_are_read_as_what_they_stand_for(tmp_path):
    path, values = tmp_path / "file.gguf", floats(32, 64)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    stored = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor(A, stored, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor(B, floats(16, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    delta = read_adapter(path).modules["blk.0.attn_q"].direction
    wanted = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(delta.a.load(), wanted)


def test_keys_have_the_types_of_the_packages_own_methods(base, tmp_path):
    adapter = made({Q: lora(), "lm_head": lora(50)}, base(), base_model="some/model")
    write_adapter(adapter, tmp_path / "ours.gguf", "gguf")
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_float32("adapter.lora.alpha", 8.0)
    writer.add_string("adapter.type", "lora")
    writer.add_base_model_name(0, "model")
    writer.add_base_model_organization(0, "some")
    writer.add_base_model_repo_url(0, "https://huggingface.co/some/model")
    writer.add_base_model_count(1)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_type("adapter")
    for name, delta in adapter.modules.items():
        writer.add_tensor(f"{name}.weight.lora_a", np.array(delta.direction.a.load()))
        writer.add_tensor(f"{name}.weight.lora_b", np.array(delta.direction.b.load()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_keys_of_all_types_survive_a_rewrite(tmp_path):
    def keys(writer):
        writer.add_array("general.tags", ["a", "é"])
        writer.add_key_value("some.bytes", b"\1\2", gguf.GGUFValueType.ARRAY)
        writer.add_uint64("some.large", 1 << 63)
        writer.add_bool("some.truth", True)
        writer.add_float64("some.half", 0.5)

    adapter = read_adapter(file_with(tmp_path / "file.gguf", keys=keys))
    empty = KeyValue("array", [], "string", 0)
    adapter = replace(
        adapter, config={**adapter.config, "keys": {**adapter.config["keys"], "some.empty": empty}}
    )
    write_adapter(adapter, tmp_path / "out.gguf", "gguf")
    first, second = read_gguf(tmp_path / "file.gguf"), read_gguf(tmp_path / "out.gguf")
    for key, entry in first.keys.items():
        assert second.load(second.keys[key]) == first.load(entry)
        assert (second.keys[key].type, second.keys[key].item) == (entry.type, entry.item)
    assert "some.empty" not in second.keys  # gguf writes none, and none says as much


@pytest.mark.slow
def test_many_values_in_keys_are_refused_before_they_are_loaded(tmp_path):
    """Each array is within the limit for one; as Python numbers all would take gigabytes."""
    numbers = bytes(1 << 20)
    path = file_with(
        tmp_path / "o.gguf", keys=lambda w: [w.add_array(f"a{i}", numbers) for i in range(5)]
    )
    tracemalloc.start()
    with pytest.raises(AdapterError, match=r"too many values .* at most 4194304"):
        read_adapter(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


def test_surrogates_in_keys_are_refused(base, tmp_path):
    adapter = made({Q: lora()}, base(), metadata={"note": "\udc80"})
    with pytest.raises(AdapterError, match="lone surrogates"):
        write_adapter(adapter, tmp_path / "out.gguf", "gguf")
    assert list(tmp_path.glob("*out*")) == []


def test_without_the_gguf_package_the_way_to_it_is_named(make_folder, base, tmp_path):
    folder = make_folder(modules={Q: (16, 16, 8)}, target_modules=["q_proj"])
    code = "import sys; sys.modules['gguf'] = None; from loratools.cli import main; main()"
    command = [sys.executable, "-c", code]
    arguments = ["convert", folder, tmp_path / "o.gguf", "--base", base()]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert 'pip install "loratools[gguf]"' in done.stderr
    path = file_with(tmp_path / "file.gguf")
    subprocess.run([*command, "info", path], check=True, capture_output=True)


SCALES = [
    ([(4, 2.0), (8, 1.0)], 8.0),  # one alpha, two ranks
    ([(4, 2.0), (4, 1.0)], None),
    ([(3, 1 / 3)], 1.0),
    ([(7, 0.1)], None),  # 0.7 is no 32-bit number
    ([(4, 0.0)], None),  # llama.cpp takes alpha 0 for none
    ([(4, 2.0**130)], None),  # beyond 32 bits
]


@pytest.mark.parametrize(("settings", "alpha"), SCALES)
def test_alpha_is_stated_only_where_it_says_everything(base, tmp_path, settings, alpha):
    paths = [f"model.layers.{i}.self_attn.v_proj" for i in range(len(settings))]
    deltas = {
        path: lora(8, rank=rank, scale=scale)
        for path, (rank, scale) in zip(paths, settings, strict=True)
        if scale < 1e30
    }
    if not deltas:
        tiny = floats(8, 4) * np.float32(2.0**-120)
        deltas = {paths[0]: with_parts(lora(8), b=in_memory("b", tiny), scale=settings[0][1])}
    adapter = made(deltas, base())
    write_adapter(adapter, tmp_path / "out.gguf", "gguf")
    assert read_gguf(tmp_path / "out.gguf").get("adapter.lora.alpha", "f32") == alpha
    again = read_adapter(tmp_path / "out.gguf")
    for name, delta in adapter.modules.items():
        found = again.modules[name].direction
        ((b, a),), ((new_b, new_a),) = loaded(delta.direction), loaded(found)
        wanted = delta.direction.scale * (b @ a)
        error = np.linalg.norm(found.scale * (new_b @ new_a) - wanted)
        assert error <= 1e-6 * np.linalg.norm(wanted)


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
def test_file_type_is_the_number_llama_cpp_has_for_it(base, tmp_path, outtype):
    write_adapter(made({Q: lora(16, 32, 32)}, base(), outtype), tmp_path / "out.gguf", "gguf")
    names = {"f32": "ALL_F32", "q8_0": "MOSTLY_Q8_0"}
    wanted = gguf.LlamaFileType[names.get(outtype, f"MOSTLY_{outtype.upper()}")]
    assert read_gguf(tmp_path / "out.gguf").get("general.file_type", "u32") == wanted


def test_rows_that_are_no_whole_block_fall_back_to_16_bits(base, tmp_path):
    delta = with_parts(lora(), a=in_memory("a", floats(8, 64)), b=in_memory("b", floats(16, 8)))
    path = "model.layers.0.mlp.gate_proj"
    adapter = made({path: delta}, base(), "q8_0")
    assert adapter.remarks == (
        "1 of 2 factors are F16, since their rows are no whole blocks of Q8_0",
    )
    write_adapter(adapter, tmp_path / "out.gguf", "gguf")
    kinds = {t.name: t.kind.name for t in read_gguf(tmp_path / "out.gguf").tensors.values()}
    assert kinds == {
        "blk.0.ffn_gate.weight.lora_a": "Q8_0",
        "blk.0.ffn_gate.weight.lora_b": "F16",
    }


@pytest.mark.parametrize(
    ("value", "dtype"), [(np.nan, None), (np.inf, None), (1e6, "f16"), (1e39, "f32")]
)
def test_values_that_are_not_finite_are_refused(base, tmp_path, value, dtype):
    bad = np.full((16, 4), value)
    delta = with_parts(lora(), b=in_memory("the b", bad), scale=1.0)
    with pytest.raises(AdapterError, match=r"NaN or infinite.*the b"):
        write_adapter(made({Q: delta}, base(), dtype), tmp_path / "out.gguf", "gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_long_names_are_refused(tmp_path):
    path = file_with(tmp_path / "file.gguf")
    adapter = read_adapter(path)
    delta = adapter.modules["blk.0.attn_q"]
    renamed = replace(adapter, modules={"blk.0." + "x" * 46: delta})
    with pytest.raises(UnsupportedError, match=r"names this long.*at most 63 bytes"):
        write_adapter(renamed, tmp_path / "out.gguf", "gguf")


def refusal(modules, folder, **options):
    with pytest.raises(LoratoolsError) as caught:
        made(modules, folder, **options)
    return str(caught.value)


def test_kinds_that_llama_cpp_has_not_are_refused(base):
    dora = replace(lora(), magnitude=in_memory("m", floats(16)))
    assert "to-lora" in refusal({Q: dora}, base())
    with_bias = lora(bias=in_memory("bias", floats(16)))
    assert re.search(r"\(lora_bias\).*Fuse this adapter into", refusal({Q: with_bias}, base()))
    conv = lora(layer=Layer("conv", kernel=(1,)))
    assert "convolutions" in refusal({Q: conv}, base())


@pytest.mark.parametrize(
    ("path", "config", "message"),
    [
        ("model.embed_tokens", {"tie_word_embeddings": True}, "aborts"),
        ("lm_head", {"tie_word_embeddings": True}, "no tensor for it"),
        ("model.layers.0.input_layernorm", {}, "applies no adapter"),
        ("model.vision_tower.layers.0.self_attn.q_proj", {}, "applies no adapter"),
        ("transformer.wpe", {"architectures": ["GPT2LMHeadModel"]}, "applies no adapter"),
        (Q, {"architectures": ["MptForCausalLM"]}, "got MptForCausalLM"),
        (Q, {"architectures": []}, "names no architecture"),
        (Q, {"num_attention_heads": 3}, "expected 3 heads of 5"),
        (Q, {"head_dim": 4}, "expected 2 heads of 4"),
        (Q, {"hidden_size": 32, "num_attention_heads": 4}, "expected 4 heads of 8"),
        (Q, {"num_attention_heads": True}, "num_attention_heads is wrong"),
        (Q, {"hidden_size": -1}, "hidden_size is wrong"),
    ],
)
def test_modules_without_a_safe_place_are_refused(base, path, config, message):
    kind = "embedding" if path.endswith(("embed_tokens", "wpe")) else "linear"
    assert message in refusal({path: lora(layer=Layer(kind))}, base(**config))


@pytest.mark.parametrize(
    "path", ["layers.0.self_attn.v_proj", "layers.0.block_sparse_moe.experts.1.w2"]
)
def test_two_modules_that_become_one_tensor_are_refused(base, path):
    folder = base(architectures=["MixtralForCausalLM"], num_local_experts=2)
    modules = {path: lora(8), f"model.{path}": lora(8)}
    assert "become the same GGUF tensor" in refusal(modules, folder)


def test_a_base_is_asked_for(tmp_path):
    with pytest.raises(UnsupportedError, match="`base`"):
        made({Q: lora()}, None)
    with pytest.raises(FileNotFoundError):
        made({Q: lora()}, tmp_path)


def test_replacements_are_losses(make_folder, base, tmp_path):
    folder = make_folder(
        modules={Q: (16, 16, 8)},
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
        extra={"base_model.model.lm_head.weight": floats(50, 16)},
    )
    adapter = read_adapter(folder)
    with pytest.raises(UnsupportedError, match=r"lm_head\.weight replaces a tensor"):
        prepare(adapter, "gguf", Context(base()))
    conversion = prepare(adapter, "gguf", Context(base()), allow_lossy=True)
    assert write(conversion, tmp_path / "out.gguf").relative_error < 1e-7
    assert [loss.name for loss in conversion.losses] == ["base_model.model.lm_head.weight"]


@pytest.mark.parametrize(
    "prefix", ["", "model.", "model.language_model.", "language_model.model.", "language_model."]
)
def test_prefixes_of_wrappers_are_known(base, prefix):
    adapter = made({f"{prefix}layers.0.self_attn.v_proj": lora()}, base())
    assert list(adapter.modules) == ["blk.0.attn_v"]


def test_multimodal_configurations_name_their_text_model(base):
    text = {key: LLAMA[key] for key in ("hidden_size", "num_attention_heads")}
    folder = base(
        architectures=["Gemma3ForConditionalGeneration"],
        text_config=text | {"num_key_value_heads": 1},
    )
    path = "model.language_model.layers.3.mlp.up_proj"
    adapter = made({path: lora()}, folder)
    assert list(adapter.modules) == ["blk.3.ffn_up"]
    back = get_format("gguf").to_model(adapter, Context(folder))
    assert list(back.modules) == [path]


def test_a_stack_of_another_number_of_experts_is_refused(base):
    """It ends llama.cpp with a segmentation fault."""
    folder = base(architectures=["MixtralForCausalLM"], num_local_experts=2, intermediate_size=24)
    path = "model.layers.0.mlp.experts"
    layer = Layer("experts", parameters=(f"{path}.down_proj",))
    a, b = in_memory("a", floats(3, 4, 24)), in_memory("b", floats(3, 16, 4))
    refused = refusal({path: ModuleChange(LowRank(a, b, 1.0, layer))}, folder)
    assert "3 experts; expected a weight of shape [2, 16, 24]" in refused


def test_single_experts_are_stacked_and_the_others_zero(base):
    folder = base(architectures=["MixtralForCausalLM"], num_local_experts=3, intermediate_size=24)
    path = "model.layers.0.block_sparse_moe.experts.{}.w2"
    deltas = {path.format(expert): lora(16, 24) for expert in (0, 2)}
    (name, stacked), *_ = made(deltas, folder).modules.items()
    assert (name, stacked.direction.experts, stacked.shape) == ("blk.0.ffn_down_exps", 3, (16, 24))
    found = [b @ a for b, a in loaded(stacked.direction)]
    assert not found[1].any()
    for expert in (0, 2):
        ((b, a),) = loaded(deltas[path.format(expert)].direction)
        np.testing.assert_array_equal(found[expert], b @ a)
    different = deltas | {path.format(1): lora(16, 24, rank=2, scale=3.0)}
    (name, stacked), *_ = made(different, folder).modules.items()
    found = [stacked.direction.scale * b @ a for b, a in loaded(stacked.direction)]
    for expert in range(3):
        single = different[path.format(expert)].direction
        ((b, a),) = loaded(single)
        np.testing.assert_allclose(found[expert], single.scale * b @ a, rtol=2**-20, atol=2**-20)
    assert "fewer experts" in refusal({path.format(3): lora(16, 24)}, folder)


@pytest.mark.parametrize("size", [1e-6, 2e4])
def test_powers_of_two_between_scales_lose_nothing_at_the_ends_of_float16(base, size):
    folder = base(architectures=["MixtralForCausalLM"], num_local_experts=2, intermediate_size=24)
    path = "model.layers.0.block_sparse_moe.experts.{}.w2"
    deltas = {}
    for expert, (rank, scale) in enumerate([(4, 8.0), (4, 0.125)]):
        a = in_memory("a", floats(rank, 24).astype(np.float16))
        b = in_memory("b", (size * np.clip(floats(16, rank), -3, 3)).astype(np.float16))
        deltas[path.format(expert)] = ModuleChange(LowRank(a, b, scale))
    ((_, stacked),) = made(deltas, folder).modules.items()
    found = [stacked.direction.scale * b @ a for b, a in loaded(stacked.direction)]
    for change, got in zip(deltas.values(), found, strict=True):
        ((b, a),) = loaded(change.direction)
        np.testing.assert_array_equal(got, change.direction.scale * b @ a)


def test_invocation_tokens_are_kept(make_folder, base, tmp_path):
    folder = make_folder(
        modules={Q: (16, 16, 8)},
        target_modules=["q_proj"],
        alora_invocation_tokens=[5, 4_000_000_000],
    )
    write(prepare(read_adapter(folder), "gguf", Context(base())), tmp_path / "out.gguf")
    field = gguf.GGUFReader(tmp_path / "out.gguf").get_field("adapter.alora.invocation_tokens")
    assert field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32]
    assert field.contents() == [5, 4_000_000_000]
    adapter = read_adapter(tmp_path / "out.gguf")
    with pytest.raises(UnsupportedError, match="invocation tokens"):
        adapter.require_true_delta("squeeze")
    back = prepare(adapter, "peft", Context(base())).adapter
    assert back.config["alora_invocation_tokens"] == [5, 4_000_000_000]
    with pytest.raises(UnsupportedError, match="invocation tokens"):
        prepare(adapter, "mlx", Context(base()))


@pytest.mark.parametrize("tokens", [None, [], "5", [-1], [1 << 32], [True]])
def test_invocation_tokens_that_are_none_are_refused(base, tokens):
    config = {"alora_invocation_tokens": tokens}
    message = refusal({Q: lora()}, base(), config=config, findings=(ACTIVATED,))
    assert "alora_invocation_tokens is wrong" in message


def test_texts_are_added_to_the_keys(make_folder, base, tmp_path):
    folder = make_folder(
        modules={Q: (16, 16, 8)}, target_modules=["q_proj"], base_model_name_or_path="/home/me/tiny"
    )
    command = [sys.executable, "-c", "from loratools.cli import main; main()", "convert", folder]
    options = ["--base", base(), "--metadata", "adapter.lora.task_name=poems"]
    subprocess.run([*command, tmp_path / "out.gguf", *options], check=True, capture_output=True)
    file = read_gguf(tmp_path / "out.gguf")
    assert file.get("adapter.lora.task_name", "string") == "poems"
    assert file.get("general.base_model.0.name", "string") == "tiny"
    assert "general.base_model.0.repo_url" not in file.keys
    clash = ["--base", base(), "--metadata", "general.type=model"]
    done = subprocess.run(
        [*command, tmp_path / "no.gguf", *clash], capture_output=True, text=True, check=False
    )
    assert (done.returncode, (tmp_path / "no.gguf").exists()) == (2, False)
    assert done.stderr.count("\n") == 1


def test_neither_half_imports_torch_or_scipy(make_folder, base, tmp_path):
    folder = make_folder(modules={Q: (16, 16, 8)}, target_modules=["q_proj"])
    code = (
        "import sys; from loratools.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'scipy'} & set(sys.modules)"
    )
    for arguments in (
        ["convert", folder, tmp_path / "o.gguf", "--base", base()],
        ["convert", tmp_path / "o.gguf", tmp_path / "back", "--base", base()],
    ):
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)


def test_file_with_a_shape_of_another_base_is_refused(base, tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_embedding_length(16)
    writer.add_tensor("blk.0.attn_q.weight", floats(16, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "expected [16, 32]" in refusal({Q: lora()}, path)
    key = "model.layers.0.self_attn.k_proj"
    assert "expected no such tensor" in refusal({key: lora(8)}, path)
    assert "its embedding" in refusal({"lm_head": lora(50)}, path)


def written_model(path, tensors=(), **numbers):
    """Write a GGUF model with these numbers under its architecture's keys."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in numbers.items():
        writer.add_uint32(f"llama.{key.replace('__', '.')}", value)
    for name in tensors:
        writer.add_tensor(name, floats(16, 16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"attention__head_count": 0}, "head_count is missing or wrong"),
        ({"attention__head_count_kv": 0}, "head_count_kv is missing or wrong"),
        ({"embedding_length": 0}, "embedding_length is missing or wrong"),
        ({"attention__head_count": 4}, "expected 4 heads of 8"),
        ({"attention__key_length": 4}, "expected 2 heads of 4"),
    ],
)
def test_rows_must_be_the_heads_of_the_base(tmp_path, numbers, message):
    """Of another model they would be put into a wrong order, which nobody would notice."""
    sound = {"attention__head_count": 2, "attention__head_count_kv": 1, "embedding_length": 16}
    if "expected 4 heads" in message:
        sound["embedding_length"] = 32
    path = written_model(tmp_path / "m.gguf", ["blk.0.attn_q.weight"], **(sound | numbers))
    assert message in refusal({Q: lora()}, path)
    read = read_adapter(file_with(tmp_path / "lora.gguf"))
    with pytest.raises(AdapterError, match=message):
        get_format("gguf").to_model(read, Context(path))


def test_merged_adapters_must_be_of_one_architecture(tmp_path):
    one = read_adapter(file_with(tmp_path / "one.gguf"))
    two = replace(one, config={**one.config, "architecture": "qwen2"})
    with pytest.raises(AdapterError, match="llama, qwen2"):
        get_format("gguf").merged_config([one, two])


FITTING = {A: (4, 16), B: (16, 4)}
UNFITTING = {
    "input": {A: (4, 8), B: (16, 4)},
    "output": {A: (4, 16), B: (8, 4)},
    "stack": {A: (2, 4, 16), B: (2, 16, 4)},
    "norm": {"output_norm.weight.lora_a": (4, 16), "output_norm.weight.lora_b": (1, 4)},
    "absent": {"blk.9.attn_q.weight.lora_a": (4, 16), "blk.9.attn_q.weight.lora_b": (16, 4)},
}
TIED = {
    "aborts on": {"token_embd.weight.lora_a": (50, 4), "token_embd.weight.lora_b": (16, 4)},
    "no tensor for it": {"output.weight.lora_a": (4, 16), "output.weight.lora_b": (50, 4)},
}


@pytest.mark.parametrize("message", TIED)
def test_gguf_adapters_of_an_output_layer_are_not_fused_into_tied_models(tmp_path, message):
    path = file_with(tmp_path / "model.gguf", {"token_embd.weight": floats(50, 16)}, kind="model")
    shapes = TIED[message]
    lora = file_with(tmp_path / "lora.gguf", {key: floats(*s) for key, s in shapes.items()})
    with pytest.raises(UnsupportedError, match=message):
        GgufFusion(
            read_model(path), [FuseInput(read_adapter(lora), 1.0, "lora")], GgufFuseOptions()
        )


@pytest.mark.parametrize("name", UNFITTING)
def test_gguf_adapters_of_other_shapes_are_not_fused(tmp_path, name):
    path = tmp_path / "model.gguf"
    tensors = {"blk.0.attn_q.weight": floats(16, 16), "output_norm.weight": floats(16)}
    file_with(path, tensors, kind="model")
    for shapes in (FITTING, UNFITTING[name]):
        lora = file_with(tmp_path / "lora.gguf", {key: floats(*s) for key, s in shapes.items()})
        given = [FuseInput(read_adapter(lora), 1.0, "lora")]
        if shapes is FITTING:
            GgufFusion(read_model(path), given, GgufFuseOptions())
            continue
        with pytest.raises(AdapterError, match="does not fit the base model"):
            GgufFusion(read_model(path), given, GgufFuseOptions())


def test_norms_that_llama_cpp_ignores_are_named_when_fusing(tmp_path):
    tensors = {"blk.0.attn_q.weight": floats(16, 16), "output_norm.weight": floats(16)}
    model = file_with(tmp_path / "model.gguf", tensors, kind="model")
    factors = {A: floats(4, 16), B: floats(16, 4), "output_norm.weight": floats(16)}
    lora = file_with(tmp_path / "lora.gguf", factors)
    given = [FuseInput(read_adapter(lora), 1.0, "lora")] * 2
    fusion = GgufFusion(read_model(model), given, GgufFuseOptions())
    (finding,) = fusion.preview.findings
    assert finding.message == "llama.cpp ignores trained norms: output_norm.weight"


def test_an_adapter_is_no_model(tmp_path):
    with pytest.raises(AdapterError, match=r"is not a model; got general\.type adapter"):
        read_model(file_with(tmp_path / "lora.gguf"))


def test_base_values_that_are_not_finite_are_not_fused(tmp_path):
    for outtype in ("keep", "q8_0"):
        values = floats(32, 32)
        values[3, 5] = np.nan
        model = file_with(tmp_path / "model.gguf", {"blk.0.attn_q.weight": values}, kind="model")
        lora = file_with(tmp_path / "lora.gguf", {A: floats(4, 32), B: floats(32, 4)})
        given = [FuseInput(read_adapter(lora), 1.0, "lora")]
        fusion = GgufFusion(read_model(model), given, GgufFuseOptions(outtype))
        with pytest.raises(AdapterError, match="NaN or infinite"):
            fusion.write(tmp_path / "out.gguf")
        assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(("outtype", "stored"), [("keep", "F32"), ("f16", "F16"), ("q8_0", "Q8_0")])
@pytest.mark.parametrize("weight", [1e30, 1e300])
def test_results_beyond_their_type_are_not_fused(tmp_path, outtype, stored, weight):
    weights = {"blk.0.attn_q.weight": floats(32, 32)}
    model = file_with(tmp_path / "model.gguf", weights, kind="model")
    lora = file_with(tmp_path / "lora.gguf", {A: 1e10 * floats(4, 32), B: floats(32, 4)})
    given = [FuseInput(read_adapter(lora), weight, "lora")]
    fusion = GgufFusion(read_model(model), given, GgufFuseOptions(outtype))
    with pytest.raises(AdapterError, match=f"does not fit {stored}: values overflow.*`dtype`"):
        fusion.write(tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_weights_with_a_scale_of_their_own_are_not_fused_into(tmp_path):
    adapter = read_adapter(file_with(tmp_path / "lora.gguf"))
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.attn_q.weight", floats(16, 16))
    writer.add_tensor("blk.0.attn_q.scale", floats(1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match="keeps a scale beside"):
        GgufFusion(read_model(path), [FuseInput(adapter, 1.0, "lora")], GgufFuseOptions())


@pytest.mark.slow
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    half=st.integers(1, 5),
    rank=st.integers(1, 4),
    scale=st.floats(-8, 8).filter(lambda value: abs(value) > 1e-3),
)
def test_rows_are_interleaved_and_put_back(base, tmp_path, kv_heads, group, half, rank, scale):
    heads, width = kv_heads * group, 2 * half
    folder = base(
        num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=8, head_dim=width
    )
    k = Q.replace("q_proj", "k_proj")
    modules = {
        Q: lora(heads * width, 8, rank, scale),
        k: lora(kv_heads * width, 8, rank + 1, scale),
    }
    conversion = prepare(model_adapter(modules), "gguf", Context(folder))
    write(conversion, tmp_path / "out.gguf", overwrite=True)
    read = read_adapter(tmp_path / "out.gguf")
    for path, name, count in ((Q, "blk.0.attn_q", heads), (k, "blk.0.attn_k", kv_heads)):
        b = modules[path].direction.b.load()
        wanted = b.reshape(count, 2, half, -1).swapaxes(1, 2).reshape(b.shape)
        found = read.modules[name].direction
        np.testing.assert_allclose(found.scale * found.b.load(), scale * wanted, rtol=1e-6)
    back = get_format("gguf").to_model(read, Context(folder))
    for path, change in modules.items():
        again, delta = back.modules[path].direction, change.direction
        np.testing.assert_allclose(again.scale * again.b.load(), scale * delta.b.load(), rtol=1e-6)
        np.testing.assert_array_equal(again.a.load(), delta.a.load())


def test_a_width_for_each_layer_is_no_width_of_experts(tmp_path):
    """Gemma 3n has a list of widths, and no experts."""
    config = {
        "architectures": ["Gemma3nForCausalLM"],
        "model_type": "gemma3n_text",
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": [48, 48],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    sizes = read_base(tmp_path).sizes
    assert (sizes.hidden, sizes.experts, sizes.expert_width) == (32, 0, 0)


@pytest.mark.parametrize("ratio", [1e-3, 1.0])
@pytest.mark.parametrize("stored", ["F16", "Q8_0"])
def test_large_matrices_are_fused_as_in_float64(tmp_path, stored, ratio):
    """They are computed in float32; the sum in float64 is rounded once, beside it."""
    own, key = np.random.default_rng(1), "blk.0.ffn_down.weight"
    kind = gguf.GGMLQuantizationType[stored]
    weights, a, b = (
        own.standard_normal(shape).astype(np.float32) for shape in ((640, 512), (4, 512), (640, 4))
    )
    weights, b = gguf.quants.quantize(weights, kind), np.float32(ratio / 2) * b
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor(key, weights, raw_dtype=None if stored == "F16" else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    lora = file_with(tmp_path / "lora.gguf", {f"{key}.lora_a": a, f"{key}.lora_b": b})
    given = [FuseInput(read_adapter(lora), 0.5, "lora")]
    options = GgufFuseOptions(allow_lossy=True)
    fusion = GgufFusion(read_model(tmp_path / "model.gguf"), given, options)
    (report,) = fusion.write(tmp_path / "out.gguf").tensors

    old = gguf.quants.dequantize(weights, kind).astype(np.float64)
    (module,) = read_adapter(lora).modules.values()
    delta = 0.5 * module.require_factors().scale * (b.astype(np.float64) @ a.astype(np.float64))
    (tensor,) = gguf.GGUFReader(tmp_path / "out.gguf").tensors
    found = np.array(tensor.data).view(np.float16 if stored == "F16" else np.uint8)
    total = old + delta
    is_half = stored == "F16"  # gguf-py goes by way of float32 and so rounds it twice
    wanted = total.astype(np.float16) if is_half else gguf.quants.quantize(np.float32(total), kind)
    # A float32 sum is a tie of float16 in one of 2^13 entries, of which half go the wrong way; the
    # largest changes that float32 computes add about as many again.
    assert (found.reshape(wanted.shape) != wanted).mean() <= 2 * 2.0**-14 * 1.25
    new = gguf.quants.dequantize(found.reshape(wanted.shape), kind).astype(np.float64)
    norm, lost = np.linalg.norm(delta), np.linalg.norm(new - old - delta)
    assert report.relative_change == pytest.approx(norm / np.linalg.norm(old), rel=1e-5)
    assert report.lost == pytest.approx(lost / norm, rel=1e-3)
    survives = float(np.vdot(new - old, delta)) / norm**2
    told = report.rounded if stored == "F16" else report.surviving
    assert told == pytest.approx(survives, abs=1e-3)
