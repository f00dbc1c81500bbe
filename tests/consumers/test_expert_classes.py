"""The table of expert classes against the installed transformers."""

import runpy
from pathlib import Path

from loratools_formats.checkpoints import expert_classes
from loratools_formats.checkpoints.facts import model_types
from loratools_formats.core.peft_on_load import _NOT_CONVERTED, not_converted


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
    without_defaults = {"gemma4_assistant", "nougat"}
    seen = {}
    for name in {*CONFIG_MAPPING} - parts - without_defaults:
        types = model_types(CONFIG_MAPPING[name]().to_dict())
        if types & (expert_classes.TRANSPOSED | expert_classes.STRAIGHT):
            seen[name] = not_converted(types) is None
    assert seen == {name: name in moved for name in seen}
    assert {name for name, is_moved in seen.items() if not is_moved} >= _NOT_CONVERTED
    assert any(seen.values())
