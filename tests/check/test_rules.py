"""Every rule finds what it is about in a folder with one thing wrong, nothing in a sound one."""

import json
from pathlib import Path

import numpy as np
import pytest
from handmade_adapters import CARD, IN, MODULES, OUT, base, folder, tensors
from safetensors.numpy import save_file

import loratools as lt
import loratools_formats
from loratools.operations.check import targets as known
from loratools.operations.check.rules import OF_READERS, RULES, rules_named
from loratools.operations.check.targets import known_targets
from loratools_formats.core.findings import CODES
from loratools_formats.disk.errors import OptionError

READERS = Path(loratools_formats.__file__).parent / "formats"
FIRST = f"base_model.model.{MODULES[0]}"
A, B = f"{FIRST}.lora_A.weight", f"{FIRST}.lora_B.weight"


def changed(**arrays):
    return {**tensors(), **{{"a": A, "b": B}[name]: array for name, array in arrays.items()}}


def renamed(old, new):
    return {key.replace(old, new): array for key, array in tensors().items()}


def with_file(path, name, content=b"x"):
    folder(path)
    (path / name).write_bytes(content)
    return path


def linked(path):
    folder(path)
    (path.parent / "outside.txt").write_text("x")
    (path / "notes.txt").symlink_to(path.parent / "outside.txt")
    return path


def nested(path):
    folder(path / "checkpoint-1")
    return folder(path)


def pickled(path):
    torch = pytest.importorskip("torch")
    folder(path)
    (path / "adapter_model.safetensors").unlink()
    torch.save({k: torch.from_numpy(v) for k, v in tensors().items()}, path / "adapter_model.bin")
    return path


def truncated(path):
    folder(path)
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    return path


def described(path):
    folder(path)
    metadata = {"format": "pt", "notes": "x" * 70_000}
    save_file(tensors(), path / "adapter_model.safetensors", metadata)
    return path


def experts(path, **config):
    name = "base_model.model.model.layers.0.mlp.experts"
    weights = {f"{name}.lora_A.weight": np.ones((8, IN), np.float32),
               f"{name}.lora_B.weight": np.ones((OUT, 8), np.float32)}  # fmt: skip
    values = {"target_parameters": ["mlp.experts.down_proj"], "target_modules": [], "r": 4}
    return folder(path, weights, **(values | config))


def embedding(path, name="model.embed_tokens"):
    key = f"base_model.model.{name}"
    weights = tensors() | {
        f"{key}.lora_embedding_A": np.ones((4, 16), np.float32),
        f"{key}.lora_embedding_B": np.ones((IN, 4), np.float32),
    }
    return folder(path, weights, target_modules=["embed_tokens", "q_proj", "v_proj"])


def trained_embedding(path):
    weights = tensors() | {
        "base_model.model.model.embed_tokens.weight": np.ones((20, IN), np.float32)
    }
    return folder(path, weights, modules_to_save=["embed_tokens"])


def card(**values):
    lines = CARD.splitlines()
    for key, value in values.items():
        lines = [f"{key}: {value}" if line.startswith(f"{key}:") else line for line in lines]
    return "\n".join(line for line in lines if not line.endswith(": -"))


def dora(path):
    weights = tensors() | {
        f"base_model.model.{name}.lora_magnitude_vector": np.ones(OUT, np.float32)
        for name in MODULES
    }
    return folder(path, weights, use_dora=True)


def patterned(path):
    name = f"base_model.model.{MODULES[0]}"
    weights = tensors() | {f"{name}.lora_A.weight": np.ones((2, IN), np.float32),
                           f"{name}.lora_B.weight": np.ones((OUT, 2), np.float32)}  # fmt: skip
    return folder(path, weights, rank_pattern={MODULES[0]: 2})


def outlying(path):
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(9)]
    weights = tensors(names)
    weights["base_model.model.model.layers.4.mlp.up_proj.lora_B.weight"] *= 1000
    return folder(path, weights, target_modules=["up_proj"])


def biased(path):
    weights = tensors() | {f"{FIRST}.base_layer.bias": np.ones(OUT, np.float32)}
    return folder(path, weights, bias="lora_only")


def large(path):
    return folder(path, tensors(rank=1024), r=1024)


CASES = {
    "LT001": truncated,
    "LT002": pickled,
    "LT003": lambda p: with_file(p, "adapter_model.bin"),
    "LT004": lambda p: with_file(p, "modeling.py"),
    "LT005": lambda p: with_file(p, "optimizer.pt"),
    "LT006": linked,
    "LT007": lambda p: folder(p, auto_mapping={"parent_library": "evil"}),
    "LT008": lambda p: with_file(p, "chat_template.jinja"),
    "LT009": lambda p: with_file(p, "holiday.jpg"),
    "LT010": nested,
    "LT011": described,
    "LT012": lambda p: with_file(p, "odd\u202ename.txt"),
    "LT101": lambda p: folder(p, {k: v for k, v in tensors().items() if k != B}),
    "LT102": lambda p: folder(p, changed(b=np.ones((OUT, 3), np.float32))),
    "LT104": lambda p: folder(
        p,
        tensors() | {k.replace("q_proj", "Q_proj"): v for k, v in tensors().items()},
        target_modules=["Q_proj", "q_proj", "v_proj"],
    ),
    "LT105": lambda p: folder(p, {}),
    "LT201": lambda p: folder(p, brand_new_option=3),
    "LT202": lambda p: folder(p, layer_replication=[[0, 1]]),
    "LT203": lambda p: folder(p, lora_alpha=0),
    "LT204": lambda p: folder(p, init_lora_weights="pissa"),
    "LT206": lambda p: folder(p, alora_invocation_tokens=[1, 2]),
    "LT211": lambda p: folder(p, base_model_name_or_path="/home/me/base"),
    "LT212": lambda p: folder(p, base_model_name_or_path=None),
    "LT213": lambda p: folder(p, target_modules=["v_proj", "q_proj"]),
    "LT214": lambda p: folder(p, lora_alpha=1000),
    "LT215": lambda p: folder(p, target_modules=["k_proj", "q_proj", "v_proj"]),
    "LT216": lambda p: folder(p, rank_pattern={"o_proj": 2}),
    "LT217": lambda p: folder(p, target_modules="(((q_proj"),
    "LT301": lambda p: folder(p, changed(a=np.full((4, IN), np.nan, np.float32))),
    "LT302": lambda p: folder(p, {k: v * ("lora_A" in k) for k, v in tensors().items()}),
    "LT303": lambda p: folder(p, changed(b=np.zeros((OUT, 4), np.float32))),
    "LT304": lambda p: folder(p, changed(b=np.full((OUT, 4), 1e6, np.float32))),
    "LT305": lambda p: folder(p, changed(b=np.ones((OUT, 4), np.float16))),
    "LT306": outlying,
    "LT307": lambda p: folder(p, changed(b=np.full((OUT, 4), 1e5, np.float32))),
    "LT308": lambda p: folder(p, changed(b=np.float32([[1, 1, 0, 0]] * OUT))),
    "LT401": lambda p: folder(p, target_modules=["q_proj"]),
    "LT402": lambda p: folder(
        p, renamed("self_attn", "_orig_mod.self_attn"), target_modules=["q_proj", "v_proj"]
    ),
    "LT403": lambda p: folder(p, renamed(".weight", ".default.weight")),
    "LT404": lambda p: folder(p, renamed("base_model.model.", "")),
    "LT405": lambda p: experts(p, peft_version="0.18.0"),
    "LT406": (folder, {"base": lambda p: base(p, modules=MODULES[:2])}),
    "LT407": (folder, {"base": lambda p: base(p, shape=(OUT, IN + 1))}),
    "LT408": (embedding, {"base": base}),
    "LT501": (folder, {"target": ["ollama"]}),
    "LT502": (folder, {"target": ["llamacpp"]}),
    "LT503": (dora, {"target": ["vllm"]}),
    "LT504": (large, {"target": ["vllm"]}),
    "LT505": (lambda p: folder(p, tensors(rank=32), r=32), {"target": ["vllm"]}),
    "LT506": (patterned, {"target": ["vllm"]}),
    "LT507": (patterned, {"target": ["lorax"]}),
    "LT509": (trained_embedding, {"target": ["vllm"]}),
    "LT510": (biased, {"target": ["vllm"]}),
    "LT511": (embedding, {"target": ["lorax"]}),
    "LT512": (
        lambda p: folder(p, renamed("q_proj", "c_attn"), target_modules=["c_attn", "v_proj"]),
        {"target": ["fireworks"]},
    ),
    "LT513": (pickled, {"target": ["together"]}),
    "LT701": lambda p: folder(p, card=None),
    "LT702": lambda p: folder(p, card="---\na: *b\n---\n"),
    "LT703": lambda p: folder(p, card=card(license="-")),
    "LT704": (
        folder, {"base": lambda p: base(p, card="---\nlicense: cc-by-nc-4.0\n---\n")},
    ),
    "LT705": lambda p: folder(p, card=card(base_model="org/other")),
    "LT706": lambda p: folder(p, card=card(base_model_relation="merge")),
    "LT707": lambda p: folder(p, card=card(pipeline_tag="-")),
    "LT708": trained_embedding,
}  # fmt: skip
"""Rule → what makes a folder that it is about; with options where it needs any."""

OF_OTHER_READERS = {
    # Found by readers, whose own tests make such files.
    "LT103", "LT107", "LT108", "LT109", "LT110", "LT111", "LT112", "LT113", "LT205", "LT207",
    "LT208", "LT209", "LT210", "LT013", "LT014", "LT218", "LT409",
    # Tensors that no module of a PEFT folder has: they are refused there, and carried elsewhere.
    "LT106",
    # No target of the table passes over it.
    "LT508",
}  # fmt: skip


def made(case, tmp_path):
    make, options = case if isinstance(case, tuple) else (case, {})
    options = dict(options)
    if "base" in options:
        options["base"] = options["base"](tmp_path / "base")
    return make(tmp_path / "adapter"), options


def codes(result):
    return {finding.code for finding in result.findings}


def test_every_rule_has_a_case():
    assert set(CASES) | OF_OTHER_READERS == {rule.code for rule in RULES}
    assert not set(CASES) & OF_OTHER_READERS
    assert {r.code for r in RULES if r.of_readers} >= OF_OTHER_READERS - {"LT106", "LT508"}


@pytest.mark.parametrize("code", CASES)
def test_a_rule_finds_what_it_is_about(code, tmp_path):
    path, options = made(CASES[code], tmp_path)
    result = lt.check(path, **options)
    (found,) = {f.code: f for f in result.findings if f.code == code}.values()
    rule = next(iter(rules_named([code])))
    assert (found.severity, found.rule) == (rule.severity, rule.slug)
    assert found.hint
    assert lt.check(path, ignore=[code], **options).counts != result.counts or code == "LT001"


# Programs of other modules than a language model's, of files that need a base, or of none.
ELSEWHERE = {"comfyui", "llamacpp", "ollama"}


@pytest.mark.parametrize("target", [None, *(t for t in known_targets() if t not in ELSEWHERE)])
def test_no_rule_finds_anything_in_a_sound_adapter(target, tmp_path):
    path = folder(tmp_path / "adapter")
    if target == "mlx":
        lt.convert(path, to="mlx", output=tmp_path / "mlx")
        path = tmp_path / "mlx"
    options = {} if target is None else {"target": [target]}
    result = lt.check(path, base=base(tmp_path / "base"), **options)
    assert [(f.code, f.message) for f in result.findings] == []
    assert result.passed


def test_findings_of_readers_have_a_rule_each():
    """Readers live in one package; what operations note is of their results, and no rule's."""
    text = "".join(path.read_text() for path in READERS.rglob("*.py"))
    made = {code for code in CODES if f'"{code}"' in text}
    assert set(OF_READERS) <= set(CODES)
    assert made - set(OF_READERS) == {"attachments-left-out"} & made


def test_codes_and_names_are_unique_and_grouped():
    assert len({rule.code for rule in RULES}) == len({rule.slug for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.group
        assert rule.summary.endswith(".")
        assert rule.why.endswith(".")


def test_what_a_refused_adapter_lacks_is_said_beside_the_refusal(tmp_path):
    found = codes(lt.check(CASES["LT101"](tmp_path / "a")))
    assert {"LT001", "LT101"} <= found


def test_no_word_calls_an_adapter_safe():
    for rule in RULES:
        text = f"{rule.summary} {rule.why} {rule.fix}".lower()
        assert "safe " not in text.replace("safetensors", "")
        assert "malicious" not in text


def test_a_target_is_known_with_version_and_source():
    for target in known_targets().values():
        assert target.version
        assert target.source
        assert target.checked.startswith("20")
    assert known.target_named("vLLM@0.26").name == "vllm"
    assert known.target_named("llama.cpp").name == "llamacpp"
    with pytest.raises(OptionError, match="of another version"):
        known.target_named("vllm@0.5")
    with pytest.raises(OptionError, match="Did you mean 'vllm'"):
        known.target_named("vlm")


def test_scales_that_agree_need_no_pattern(tmp_path):
    """Of scale 2 everywhere, whatever the ranks: α and r of the configuration say the same."""
    path = patterned(tmp_path / "a")
    values = json.loads((path / "adapter_config.json").read_text())
    values["alpha_pattern"] = {MODULES[0]: 4}
    (path / "adapter_config.json").write_text(json.dumps(values))
    assert "LT506" not in codes(lt.check(path, target=["vllm"]))
