"""What all formats of bare state dicts have in common, from a sample of each."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file
from statedicts import close, saved
from whole_delta import effective_delta

from loratools.algebra.ranks import RankRule
from loratools.cli import cli
from loratools.kinds import get_kind
from loratools.operations.to_lora import to_lora
from loratools.work.collection import adapters_in
from loratools_formats import find_format, get_format, read_adapter, registered_formats
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.disk.errors import AdapterError, LoratoolsError, UnsupportedError

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
from make_statedicts import HIDDEN, KINDS, all_golden

RNG = np.random.default_rng(0)
Z = "layers.0.q.parametrizations.weight.0.vector_z"


def random(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def pair(first, second):
    return {first: random(4, 24), second: random(36, 4)}


SAMPLES = {
    "loldu": {Z: random(4)},
    "lorafactory": pair("layers.0.q.weight_a", "layers.0.q.weight_b"),
    "loralib": pair("layers.0.q.lora_A", "layers.0.q.lora_B"),
    "lorat": pair("blocks.0.attn.qkv.q.lora.A", "blocks.0.attn.qkv.q.lora.B")
    | {"lora_alpha": random(), "use_rslora": np.array(True), "head.weight": random(3)},
    "megatron": pair(
        "decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight",
        "decoder.layers.0.self_attention.linear_qkv.adapter.linear_out.weight",
    ),
    "peft-weights": pair("base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"),
    "randlora": {
        "h.0.c_fc.randlora_lambda": random(3, 4),
        "h.0.c_fc.randlora_gamma": random(3, 12),
        "h.0.c_fc.basis_a": random(1, 4, 16),
        "h.0.c_fc.basis_b": random(3, 40, 4),
    },
    "torchtune": pair("layers.0.attn.q_proj.lora_a.weight", "layers.0.attn.q_proj.lora_b.weight")
    | {"layers.0.attn.q_proj.magnitude": random(36)},
    "unilora": {
        f"layers.0.q.{name}": values
        for name, values in (
            ("project_params_A", np.zeros((24, 4), np.int64)),
            ("project_params_B", np.zeros((4, 36), np.int64)),
            ("norm_factor_A", random(24, 4)),
            ("norm_factor_B", random(4, 36)),
            ("vector_bank", random(9)),
        )
    },
    "vblora": {
        "layers.0.q.logits_A": random(4, 4, 10),
        "layers.0.q.logits_B": random(6, 4, 10),
        "layers.0.q.vector_bank": random(10, 6),
    },
}
GIVEN = {
    "lorafactory": {"alpha": "8", "variant": "lora"},
    "lorat": {},
    "megatron": {"alpha": "8", "num_attention_heads": "4", "num_key_value_heads": "1"},
    "peft-weights": {"alpha": "8", "variant": "lora"},
    "randlora": {"alpha": "8"},
    "torchtune": {"alpha": "8", "rope": "interleaved", "num_attention_heads": "2"},
    "unilora": {},
    "vblora": {"topk": "2"},
}
NOT_AS_SAFETENSORS = ("loralib",)


def sample(name, folder):
    suffix = ".pt" if name in NOT_AS_SAFETENSORS else ".safetensors"
    return saved(folder / f"adapter_model{suffix}", SAMPLES[name])


def test_every_format_of_state_dicts_has_a_sample():
    read_only = {e.name for e in registered_formats() if e.format and not e.format.is_writable}
    assert read_only - {"nemo"} == set(SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
class TestStateDict:
    def test_it_is_recognised_and_every_tensor_is_in_one_place(self, tmp_path, name):
        path = sample(name, tmp_path)
        before = hashlib.sha256(path.read_bytes()).digest()
        assert find_format(path).name == name
        adapter = read_adapter(path)
        found = [tensor.key for tensor in adapter.tensors()]
        assert len(found) == len(set(found))
        assert set(found) == set(SAMPLES[name])
        for tensor in adapter.tensors():
            tensor.load()
        assert hashlib.sha256(path.read_bytes()).digest() == before

    def test_other_files_are_not(self, tmp_path, name):
        form = get_format(name)
        for content in (b"", b"{}", bytes(range(256)), b"PK\x03\x04", b"\x80\x02X"):
            for suffix in ("", ".safetensors", *form.suffixes):
                path = tmp_path / f"other{suffix}"
                path.write_bytes(content)
                assert not form.sniff(path)
        assert not form.sniff(tmp_path)
        assert not form.sniff(tmp_path / "missing.pt")

    def test_files_cut_short_are_an_error(self, tmp_path, name):
        path = sample(name, tmp_path)
        content = path.read_bytes()
        for share in (0.0, 0.5, 0.99):
            path.write_bytes(content[: int(len(content) * share)])
            with pytest.raises(LoratoolsError):
                read_adapter(path, name)

    def test_empty_tensors_are_an_error(self, tmp_path, name):
        for key, values in SAMPLES[name].items():
            if key == "head.weight":
                continue
            empty = np.zeros((0, *values.shape[1:]), values.dtype)
            path = saved(tmp_path / "empty.safetensors", SAMPLES[name] | {key: empty})
            with pytest.raises(LoratoolsError):
                to_lora(read_adapter(path, name), RankRule(), given=GIVEN.get(name, {"alpha": "8"}))

    @pytest.mark.parametrize(
        "sibling", ["lora_diag", "coefficients", "lora_A_rho", "gate_of_ranks", "{}_rho", "{}.more"]
    )
    def test_a_tensor_beside_its_own_is_never_passed_over(self, tmp_path, name, sibling):
        """The names of its tensors are matched whole, and what else a module has is refused."""
        own = next(key for key in SAMPLES[name] if not key.startswith(("lora_alpha", "head")))
        parent, _, leaf = own.rpartition(".")
        key = f"{parent}.{sibling.format(leaf)}"
        path = saved(tmp_path / "more.safetensors", SAMPLES[name] | {key: random(4, 24)})
        with pytest.raises(AdapterError, match=re.escape(key)):
            read_adapter(path, name)

    def test_no_setting_is_ever_assumed(self, tmp_path, name):
        path = saved(tmp_path / "sample.safetensors", SAMPLES[name])
        given = GIVEN.get(name, {"alpha": "8"})
        for lost in given:
            rest = {key: value for key, value in given.items() if key != lost}
            with pytest.raises(UnsupportedError, match=lost):
                to_lora(read_adapter(path, name), RankRule(), given=rest)

    def test_info_shows_it(self, tmp_path, name):
        done = CliRunner().invoke(cli, ["info", str(sample(name, tmp_path)), "-v"])
        assert done.exit_code == 0, done.output
        assert f"format      {name}" in done.output


@pytest.mark.parametrize("name", ["vblora", "unilora", "randlora"])
def test_copies_of_what_modules_share_must_be_equal(tmp_path, name):
    tensors = dict(SAMPLES[name])
    second = {key.replace(".0.", ".1."): values for key, values in tensors.items()}
    assert len(read_adapter(saved(tmp_path / "a.safetensors", tensors | second), name).modules) == 2
    shared = next(key for key in second if "bank" in key or "basis" in key)
    second[shared] = second[shared] + 1
    with pytest.raises(AdapterError, match="that all share"):
        read_adapter(saved(tmp_path / "b.safetensors", tensors | second), name)


def test_parts_of_a_folder_are_the_folders(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    for name in ("torchtune", "megatron"):
        path = saved(tmp_path / "adapter_model.safetensors", SAMPLES[name])
        assert not get_format(name).sniff(path)


@pytest.mark.parametrize("name", sorted(all_golden()))
def test_golden_fixtures_are_read_as_their_definitions_say(name):
    golden, folder = all_golden()[name], KINDS / name
    path = folder / f"adapter{golden.suffix}"
    assert find_format(path).name == golden.format
    adapter = read_adapter(path)
    assert {delta.kind for delta in adapter.modules.values()} == {name}
    stored = {tensor.key: tensor.load() for tensor in adapter.tensors()}
    assert set(stored) == set(golden.tensors)
    base = read_checkpoint(folder / "base.safetensors") if golden.base else None
    rule = RankRule() if get_kind(name).low_rank else RankRule(rank=HIDDEN)
    result = to_lora(adapter, rule, base=base, given=golden.given)
    expected = load_file(folder / "expected.safetensors")
    assert {f"{module}.weight" for module in result.adapter.modules} == set(expected)
    for module, want in golden.deltas.items():
        close(expected[f"{module}.weight"], want)
        close(effective_delta(module, result.adapter.modules[module], want.shape), want, 1e-5)


def test_a_folder_means_pickled_adapters_below_it_too(tmp_path):
    place = tmp_path / "below" / "lora.ckpt"
    place.parent.mkdir()
    tensors = {"layers.0.q.lora_A": np.ones((2, 8)), "layers.0.q.lora_B": np.ones((8, 2))}
    saved(place, tensors)
    (place.parent / "optimizer.pt").write_bytes(place.read_bytes())
    (place.parent / "pytorch_model.bin").write_bytes(b"PK\3\4 a model")
    assert adapters_in([tmp_path]) == [place]
