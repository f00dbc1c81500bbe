"""`verify` on checkpoints that PEFT merged, in each type and each of its ways."""

from pathlib import Path

import peft_oracle as oracle
import pytest

from loratools.operations.fuse.draft import FuseInput
from loratools.operations.verify import verify
from loratools_formats import read_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.WARNINGS]

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-llama"


def checked(fused, base, weight=1.0, adapter="dora"):
    folder = EXAMPLE / adapter
    inputs = [FuseInput(read_adapter(folder), weight, adapter)]
    return verify(read_checkpoint(fused), read_checkpoint(base), inputs)


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """Return a function from a type to the example's base in it."""
    root = tmp_path_factory.mktemp("bases")

    def folder(dtype):
        import torch
        from transformers import AutoModelForCausalLM

        if not (root / dtype).exists():
            model = AutoModelForCausalLM.from_pretrained(
                EXAMPLE / "model", dtype=getattr(torch, dtype)
            )
            model.save_pretrained(root / dtype)
        return root / dtype

    return folder


def merge(base, adapter, target, dtype, *, safely, in_f32):
    """Merge by PEFT, the factors in float32 as it loads them or in the type of the file."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    live = PeftModel.from_pretrained(model, EXAMPLE / adapter, autocast_adapter_dtype=in_f32)
    live.merge_and_unload(safe_merge=safely).save_pretrained(target)


@pytest.mark.parametrize("in_f32", [True, False], ids=["float32 factors", "stored factors"])
@pytest.mark.parametrize("safely", [False, True], ids=["at once", "safely"])
@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_peft_merges_contains_the_adapter(base_of, tmp_path, dtype, adapter, safely, in_f32):
    base = base_of(dtype)
    merge(base, adapter, tmp_path / "merged", dtype, safely=safely, in_f32=in_f32)
    result = checked(tmp_path / "merged", base, adapter=adapter)
    assert set(result.counts) <= {"exact", "within rounding"}
    assert result.contained is True
    for weight in (0.9, 1.1, -1.0):
        assert checked(tmp_path / "merged", base, weight, adapter).contained is False
    assert checked(base, base, adapter=adapter).contained is False
