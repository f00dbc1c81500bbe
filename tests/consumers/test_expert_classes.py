"""The table of expert classes against the installed transformers."""

import runpy
from pathlib import Path

from loratools_formats.checkpoints import expert_classes


def test_the_table_is_that_of_the_installed_transformers():
    script = runpy.run_path(str(Path(__file__).parents[1] / "golden/make_expert_classes.py"))
    found = script["table"]()
    assert len(found) > 50
    assert Path(expert_classes.__file__).read_text(encoding="utf-8") == script["source"](found)
