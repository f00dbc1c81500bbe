"""The documented fix of every rule makes it pass: commands are run, the rest is done by hand."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from faulty_adapters import CASES, made
from handmade_adapters import CARD, IN, MODULES, OUT, base, folder, tensors
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools.operations.check.rules import RULES

LLAMA = Path(__file__).parents[2] / "examples" / "tiny-llama"
GOLDEN = Path(__file__).parents[1] / "golden" / "kinds"


def removed(*names):
    def fix(path, _):
        for name in names:
            (path / name).unlink()
        return path

    return fix


def configured(**values):
    """Return what sets keys of the configuration, and removes those that are None."""

    def fix(path, _):
        file = path / "adapter_config.json"
        config = json.loads(file.read_text()) | values
        kept = {key: value for key, value in config.items() if value is not None}
        file.write_text(json.dumps(kept))
        return path

    return fix


def saved_again(path, _):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder(path.with_suffix(""))


def with_card(path, _):
    (path / "README.md").write_text(CARD)
    return path


def linked_in(path, _):
    (path / "notes.txt").unlink()
    (path / "notes.txt").write_text("x")
    return path


def renamed(path, _):
    next(path.glob("odd*")).rename(path / "plain.txt")
    return path


def child(path, _):
    return path / "checkpoint-1"


def with_tokenizer(path, _):
    (path / "tokenizer.json").write_text("{}")
    return path


def with_right_base(path, options):
    options["base"] = base(path.parent / "right")
    return path


def licensed_as_base(path, _):
    (path / "README.md").write_text(CARD.replace("apache-2.0", "cc-by-nc-4.0"))
    return path


def with_config(path, _):
    shutil.copy(path, path.with_name("adapter_model.safetensors"))
    made = folder(path.parent / "whole")
    shutil.move(path.with_name("adapter_model.safetensors"), made / "adapter_model.safetensors")
    return made


def taken_out(path, _):
    return lt.fleet_unshare(path, name="one", output=path.parent / "one") and path.parent / "one"


def squeezed(path, options):
    """A flag of the program, or this."""
    return lt.squeeze(path, rank=16, output=path.parent / "small") and path.parent / "small"


BY_HAND = {
    "LT001": saved_again,
    "LT003": removed("adapter_model.bin"),
    "LT004": removed("modeling.py"),
    "LT005": removed("optimizer.pt"),
    "LT006": linked_in,
    "LT007": configured(auto_mapping=None),
    "LT008": removed("chat_template.jinja"),
    "LT009": removed("holiday.jpg"),
    "LT010": child,
    "LT012": renamed,
    "LT014": removed("tokenizer.json"),
    "LT015": taken_out,
    "LT101": saved_again,
    "LT102": saved_again,
    "LT103": saved_again,
    "LT104": saved_again,
    "LT105": saved_again,
    "LT106": saved_again,
    "LT107": saved_again,
    "LT108": saved_again,
    "LT109": saved_again,
    "LT201": configured(brand_new_option=None),
    "LT203": configured(lora_alpha=8),
    "LT205": with_config,
    "LT208": saved_again,
    "LT211": configured(base_model_name_or_path="org/base"),
    "LT212": configured(base_model_name_or_path="org/base"),
    "LT213": configured(target_modules=["q_proj", "v_proj"]),
    "LT215": configured(target_modules=["q_proj", "v_proj"]),
    "LT216": configured(rank_pattern={}),
    "LT217": configured(target_modules=["q_proj", "v_proj"]),
    "LT301": saved_again,
    "LT302": saved_again,
    "LT401": configured(target_modules=["q_proj", "v_proj"]),
    "LT406": with_right_base,
    "LT407": with_right_base,
    "LT505": squeezed,
    "LT701": with_card,
    "LT702": with_card,
    "LT703": with_card,
    "LT704": licensed_as_base,
    "LT705": with_card,
    "LT706": with_card,
    "LT707": with_card,
    "LT708": with_tokenizer,
}  # fmt: skip
"""What the fix says, of rules whose fix is no command."""

ACCEPTED = {rule.code for rule in RULES if "in a baseline" in rule.fix}
COMMANDS = {
    rule.code: [] if rule.code in {*BY_HAND, *ACCEPTED}
    else re.findall(r"`(loratools [^`]*ADAPTER[^`]*)`", rule.fix)
    for rule in RULES
}  # fmt: skip


def test_every_fix_is_followed():
    of_commands = {code for code, commands in COMMANDS.items() if commands}
    assert of_commands | set(BY_HAND) | ACCEPTED == {rule.code for rule in RULES}


@pytest.mark.parametrize("code", BY_HAND)
def test_what_is_done_by_hand_makes_a_rule_pass(code, tmp_path):
    path, options = made(CASES[code], tmp_path)
    assert code in {f.code for f in lt.check(path, **options).findings}
    path = BY_HAND[code](path, options)
    options.pop("format", None)
    options.pop("carry_unknown", None)
    assert code not in {f.code for f in lt.check(path, **options).findings}


@pytest.mark.slow
@pytest.mark.parametrize("code", sorted(ACCEPTED))
def test_what_is_accepted_passes(code, tmp_path):
    path, options = made(CASES[code], tmp_path)
    given = [f"--target={name}" for name in options.get("target", ())]
    known = tmp_path / "known.json"
    loratools("check", path, *given, "--write-baseline", known, "--fail-on=never")
    assert loratools("check", path, *given, "--baseline", known, "--fail-on=note").returncode == 0


def loratools(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "loratools", *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, env=os.environ,
    )  # fmt: skip


FUSED = {code for code, commands in COMMANDS.items() if any(" fuse " in c for c in commands)}
INITIAL = {"LT204", "LT514"}
"""Rules of adapters whose initialisation changed the base; the fix needs the adapter before."""


def before_training(path):
    """Return PiSSA's start beside its end."""
    return folder(path, tensors(seed=7), init_lora_weights="pissa")


@pytest.mark.slow
@pytest.mark.parametrize("code", [code for code, found in COMMANDS.items() if found])
def test_the_command_makes_a_rule_pass(code, tmp_path):
    path, options = made(CASES[code], tmp_path)
    if code in ("LT502", "LT503"):  # whose fix needs a whole model
        path = LLAMA / {"LT502": "lora", "LT503": "dora"}[code]
        options |= {"base": LLAMA / "model"}
    found = next(f for f in lt.check(path, **options).findings if f.code == code)
    command = found.command or COMMANDS[code][-1]
    words = {
        "ADAPTER": str(path), "NEW": "new", "PLAIN": "new", "FUSED": "new", "R": "4",
        "NEW.safetensors": "new.safetensors", "MODEL": model_of(code, path, options),
        "BASE": model_of(code, path, options),
        "lora_B_layout=ORDER": "lora_B_layout=grouped_by_expert", "PROGRAM": "unsloth",
    }  # fmt: skip
    if "INITIAL" in command:
        words["INITIAL"] = str(before_training(tmp_path / "initial"))
    program, *arguments = [words.get(word, word) for word in shlex.split(command)]
    assert program == "loratools"
    done = loratools(*arguments, cwd=tmp_path)
    assert done.returncode == 0, (command, done.stderr)
    if code in FUSED and " fuse " in command:
        assert (tmp_path / "new" / "config.json").exists()  # and no adapter is needed any more
        return
    output = tmp_path / arguments[arguments.index("-o") + 1]
    given = {k: v for k, v in options.items() if k not in ("format", "carry_unknown")}
    assert code not in {f.code for f in lt.check(output, **given).findings}


def of_experts(path):
    """Return a model with two experts and a shared one in its first layer."""
    block = "model.layers.0.mlp"
    names = [f"experts.{e}" for e in range(2)] + ["shared_expert"]
    modules = [f"{block}.{name}.{leaf}_proj" for name in names for leaf in ("gate", "up")]
    model = base(path, modules=[*MODULES, *modules])
    turned = {f"{block}.{name}.down_proj.weight": np.ones((IN, OUT), np.float32) for name in names}
    save_file(load_file(model / "model.safetensors") | turned, model / "model.safetensors")
    config = {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "num_experts": 2,
              "hidden_size": IN, "moe_intermediate_size": OUT}  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    return model


def with_linear_attention(path):
    """Return a model whose first layer has q, k and v of a linear attention in one projection."""
    fused = "model.layers.0.linear_attn.in_proj_qkv"
    model = base(path, modules=[*MODULES, fused])
    tensors = load_file(model / "model.safetensors")
    tensors[f"{fused}.weight"] = np.ones((3 * OUT, IN), np.float32)
    save_file(tensors, model / "model.safetensors")
    config = {"model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"],
              "hidden_size": IN, "linear_num_key_heads": 1, "linear_key_head_dim": OUT,
              "linear_num_value_heads": 1, "linear_value_head_dim": OUT}  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    return model


def model_of(code, path, options):
    """Return the base that a case has, or one that it fits."""
    if "base" in options:
        return str(options["base"])
    if code == "LT207":
        return str(GOLDEN / "frod" / "base.safetensors")
    if code == "LT115":
        return str(with_linear_attention(path.parent / "base"))
    if code in ("LT405", "LT411", "LT517"):
        return str(of_experts(path.parent / "base"))
    modules = [
        name.replace("q_proj", "c_attn" if code == "LT512" else "q_proj") for name in MODULES
    ]
    model = base(path.parent / "base", modules=modules)
    more = {f"{MODULES[0]}.bias": np.ones(OUT, np.float32),
            "model.layers.0.mlp.experts.down_proj": np.ones((2, IN, OUT), np.float32)}  # fmt: skip
    save_file(load_file(model / "model.safetensors") | more, model / "model.safetensors")
    return str(model)
