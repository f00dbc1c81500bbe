"""Every rule finds what it is about in a folder with one thing wrong, nothing in a sound one."""

import json
from pathlib import Path

import pytest
from faulty_adapters import CASES, made, patterned, wide_embedding
from handmade_adapters import MODULES, base, folder, tensors

import loratools as lt
import loratools_formats
from loratools.operations.check import targets as known
from loratools.operations.check.rules import OF_READERS, RULES, rules_named
from loratools.operations.check.targets import known_targets
from loratools_formats.core.findings import CODES
from loratools_formats.disk.errors import OptionError

READERS = Path(loratools_formats.__file__).parent / "formats"


def codes(result):
    return {finding.code for finding in result.findings}


def test_every_rule_has_a_case():
    assert set(CASES) == {rule.code for rule in RULES}


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
    of_writers = {
        "attachments-left-out",
        "dropout-left-out",
        "dtype-fallback",
        "experts-laid-out",
        "experts-lost",
        "head-alone",
    }
    assert made - set(OF_READERS) == of_writers & made


def test_codes_and_names_are_unique_and_grouped():
    assert len({rule.code for rule in RULES}) == len({rule.slug for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.group
        assert rule.summary.endswith(".")
        assert rule.why.endswith(".")


def test_what_a_refused_adapter_lacks_is_said_beside_the_refusal(tmp_path):
    found = codes(lt.check(CASES["LT101"](tmp_path / "a")))
    assert {"LT001", "LT101"} <= found


def test_statistical_rules_were_measured():
    """Both ways: on clean adapters, and on some with a plant."""
    record = json.loads(Path(__file__).with_name("statistics.json").read_text())
    for rule in (rule for rule in RULES if rule.statistical):
        clean, of = record[rule.code]["clean adapters"]
        assert clean < of >= 50
        (planted,) = (each for each in record[rule.code].values() if isinstance(each, dict))
        found = [hits / tries for hits, tries in planted.values()]
        assert found == sorted(found)
        assert found[-1] > 0.75
    assert set(record) == {"made"} | {rule.code for rule in RULES if rule.statistical}


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
    with pytest.raises(OptionError, match="no facts about this version"):
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


def test_a_whole_matrix_of_another_width_does_not_fit(tmp_path):
    path = wide_embedding(tmp_path / "a")
    found = lt.check(path, base=base(tmp_path / "base"), select=["LT407"]).findings
    assert [f.where for f in found] == ["model.embed_tokens.weight"]


def test_layers_that_peft_repeats_are_not_missing_from_the_base(tmp_path):
    """They were, with the advice to rename them; `to-lora`, which another rule named, refuses."""
    modules = tuple(name.replace(".1.", f".{i}.") for i in (1, 2, 3) for name in MODULES[2:])
    path = folder(tmp_path / "a", tensors(modules), layer_replication=[[0, 2], [0, 2]])
    options = {"base": base(tmp_path / "base"), "target": ["vllm"]}
    found = lt.check(path, **options).findings
    assert {"LT202", "LT514"} <= {each.code for each in found}
    assert "LT406" not in {each.code for each in found}
    assert not [each for each in found if "to-lora" in each.hint]
