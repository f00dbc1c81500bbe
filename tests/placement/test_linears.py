"""Which weights are quantised, against what transformers quantises of the same models."""

import placed_models
import pytest
from placed_peft import save_base

from loratools.base.linears import linear_weights
from loratools.base.placement.names import Names
from loratools_formats.checkpoints.checkpoint import read_checkpoint


def quantised_by_transformers(model):
    """Return the paths of the layers that transformers would convert, by its own functions."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    left_out = get_keys_to_not_convert(model)
    return {
        path
        for path, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and should_convert_module(path, left_out)
    }


@pytest.mark.parametrize("name", placed_models.BUILDERS)
def test_the_weights_that_transformers_quantises(tmp_path, name):
    model = placed_models.build(name).float()
    base = read_checkpoint(save_base(model, tmp_path / "base"))
    names = Names(base)
    theirs = {names.find(f"{path}.weight") for path in quantised_by_transformers(model)}
    found = linear_weights(base, {})
    # A layer with as many outputs as the vocabulary has entries is taken for an output layer.
    vocabulary = model.config.get_text_config().vocab_size
    alike = {key for key in theirs if base.tensors[key].shape[0] == vocabulary}
    assert theirs - alike <= set(found.weights) <= theirs
    kept = {f"{kept.name}.weight" for kept in found.kept}
    matrices = {k for k, ref in base.tensors.items() if len(ref.shape) == 2}
    assert kept | set(found.weights) == {k for k in matrices if k.endswith(".weight")}
