"""What trainers add to PEFT's files: keys that change nothing are known, what changes is named."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from loratools.cli import cli
from loratools_formats import read_adapter
from loratools_formats.disk.errors import AdapterError

RNG = np.random.default_rng(7)
PREFIX = "base_model.model.model.layers.0."
PLAIN = {
    f"{PREFIX}self_attn.q_proj.lora_A.weight": (4, 16),
    f"{PREFIX}self_attn.q_proj.lora_B.weight": (16, 4),
}
EXPERTS, RANK = 3, 2
STACKED = {
    f"{PREFIX}mlp.experts.lora_A.weight": (EXPERTS * RANK, 8),
    f"{PREFIX}mlp.experts.lora_B.weight": (12, RANK * EXPERTS),
}


def folder(path, shapes, **config):
    path.mkdir()
    tensors = {name: RNG.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **config}
    (path / "adapter_config.json").write_text(json.dumps(values))
    return path


def stacked(path, **config):
    return folder(
        path,
        STACKED,
        r=RANK,
        target_modules=[],
        target_parameters=["experts.gate_up_proj"],
        **config,
    )


@pytest.mark.parametrize(
    "config",
    [
        {"lora_B_layout": "rank_major"},
        {"nvfp4_merge_aware": {"scale_mode": "fresh", "start_step": 10}},
        {"use_gradient_checkpointing": "unsloth", "random_state": 3407, "max_seq_length": 2048},
        {"lora_dtype": "float16", "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-6},
        {"loraplus_lr_ratio": 16.0},
        {"merge_weights": True},
    ],
)
def test_keys_that_change_nothing_are_known(tmp_path, config):
    adapter = read_adapter(folder(tmp_path / "lora", PLAIN, **config))
    assert adapter.caveats == ()
    assert adapter.config.items() >= config.items()  # and stay


def marked(layout):
    entry = {"lora_B_layout": layout, "num_experts": EXPERTS}
    return {"lora_A_layout": "grouped_by_expert", "parameters": {"gate_up_proj": entry}}


@pytest.mark.parametrize(
    ("config", "is_grouped"),
    [
        ({"lora_B_layout": "rank_major"}, False),
        ({"lora_B_layout": "grouped_by_expert"}, True),
        ({"unsloth_fused_expert_lora": marked("rank_major")}, False),
        ({"auto_mapping": {"unsloth_fused_expert_lora": marked("grouped_by_expert")}}, True),
        # The marker of each parameter precedes the one for all.
        (
            {
                "lora_B_layout": "grouped_by_expert",
                "unsloth_fused_expert_lora": marked("rank_major"),
            },
            False,
        ),
    ],
)
def test_packing_of_stacked_experts_counts_where_there_are_some(tmp_path, config, is_grouped):
    adapter = read_adapter(stacked(tmp_path / "moe", **config))
    assert adapter.caveats == ()
    codes = [each.code for each in adapter.findings]
    assert codes == ["experts-grouped"] * is_grouped
    assert read_adapter(folder(tmp_path / "dense", PLAIN, **config)).caveats == ()


def test_an_unknown_packing_of_stacked_experts_is_refused(tmp_path):
    path = stacked(tmp_path / "moe", unsloth_fused_expert_lora=marked("mixed"))
    with pytest.raises(AdapterError, match="got mixed; expected rank_major or grouped_by_expert"):
        read_adapter(path)


def loratools(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)))


@pytest.mark.parametrize("peft_type", ["LORA", "LOHA"])
def test_a_key_of_a_newer_peft_can_be_ignored_and_that_is_recorded(tmp_path, peft_type):
    if peft_type == "LORA":
        path = folder(tmp_path / "lora", PLAIN, new_key=1)
        command = ["squeeze", path, "-o", tmp_path / "out", "--rank", "2"]
    else:
        shapes = {"w1_a": (16, 4), "w1_b": (4, 16), "w2_a": (16, 4), "w2_b": (4, 16)}
        names = {f"{PREFIX}self_attn.q_proj.hada_{k}": shape for k, shape in shapes.items()}
        path = folder(
            tmp_path / "lora", names, peft_type="LOHA", lora_alpha=None, alpha=8, new_key=1
        )
        command = ["to-lora", path, "-o", tmp_path / "out"]
    refused = loratools(*command)
    assert "new_key" in str(refused.exception)
    assert "ignore_key=new_key" in str(refused.exception)
    done = loratools(*command, "--ignore-key", "new_key")
    assert done.exception is None
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())["predicate"]
    assert record["ignoredKeys"] == {"adapter": ["new_key"]}


def test_a_key_that_is_known_to_matter_cannot_be_ignored(tmp_path):
    path = folder(tmp_path / "lora", PLAIN, init_lora_weights="pissa")
    done = loratools(
        "squeeze", path, "--dry-run", "--rank", "2", "--ignore-key", "init_lora_weights"
    )
    assert "cannot be ignored" in str(done.exception)


def test_modules_of_sentence_transformers_stay_beside_the_adapter(tmp_path):
    path = folder(tmp_path / "lora", PLAIN)
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    (path / "modules.json").write_text(json.dumps(modules))
    for name in ("1_Pooling", "2_Dense"):
        (path / name).mkdir()
        (path / name / "config.json").write_text(f'{{"of": "{name}"}}')
    save_file({"weight": np.ones((2, 2), "f4")}, path / "2_Dense" / "model.safetensors")
    done = loratools("squeeze", path, "-o", tmp_path / "out", "--rank", "2")
    assert done.exception is None
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (path / name).read_bytes()
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert {"1_Pooling/config.json", "2_Dense/config.json"} < {s["name"] for s in record["subject"]}


@pytest.mark.parametrize("place", ["../elsewhere", "/etc"])
def test_modules_elsewhere_are_refused(tmp_path, place):
    path = folder(tmp_path / "lora", PLAIN)
    (path / "modules.json").write_text(json.dumps([{"path": place}]))
    with pytest.raises(AdapterError, match="elsewhere"):
        read_adapter(path)
