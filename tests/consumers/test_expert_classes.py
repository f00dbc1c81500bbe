"""The table of expert classes against the installed transformers."""

import runpy
from pathlib import Path

from loratools_formats.checkpoints import expert_classes
from loratools_formats.checkpoints.facts import model_types
from loratools_formats.core.peft_on_load import not_converted


def test_the_table_is_that_of_the_installed_transformers():
    script = runpy.run_path(str(Path(__file__).parents[1] / "golden/make_expert_classes.py"))
    found = script["table"]()
    assert len(found) > 50
    assert Path(expert_classes.__file__).read_text(encoding="utf-8") == script["source"](found)


def test_single_experts_are_lost_where_peft_has_no_way_to_stacks():
    """For each model type that transformers builds: what PEFT asks is its own, not of its parts."""
    from peft.utils import transformers_weight_conversion as peft
    from transformers import CONFIG_MAPPING

    moved = {
        name
        for name, pattern in peft._MODEL_TO_CONVERSION_PATTERN.items()
        if pattern in peft._MOE_TARGET_MODULE_MAPPING
    }
    parts = {"glm4v_moe_text", "qwen3_omni_moe_talker_text"}  # whose wholes PEFT knows
    seen = set()
    for name in CONFIG_MAPPING:
        try:
            types = model_types(CONFIG_MAPPING[name]().to_dict())
        except Exception:  # noqa: BLE001 - a configuration without defaults tells nothing here
            continue
        if name not in parts and types & (expert_classes.TRANSPOSED | expert_classes.STRAIGHT):
            assert (not_converted(types) is None) == (name in moved), name
            seen.add(name in moved)
    assert seen == {True, False}
