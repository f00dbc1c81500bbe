"""A tensor of a PEFT file that is no weight or bias: PEFT loads it over the base's of its name."""

from __future__ import annotations

import numpy as np
import peft_oracle
import pytest
import tiny_models
from safetensors.numpy import load_file, save_file

import loratools as lt

pytestmark = [pytest.mark.filterwarnings(line) for line in peft_oracle.WARNINGS]

TOKEN = "vit.embeddings.cls_token"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a ViT, and an adapter of it that PEFT saved, with a class token put into its file."""
    import peft
    import torch

    root = tmp_path_factory.mktemp("vit")
    model = tiny_models.made("ViTForImageClassification")
    model.save_pretrained(root / "base")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    peft.get_peft_model(model, config).save_pretrained(root / "lora")
    file = root / "lora" / "adapter_model.safetensors"
    token = np.random.default_rng(3).standard_normal((1, 1, 32), np.float32)
    save_file({**load_file(file), f"base_model.model.{TOKEN}": token}, file)
    return root / "base", root / "lora", token, type(model)


def assert_as_peft(found, folders):
    base, lora, token, cls = folders
    wanted = tiny_models.merged(base, lora, cls)
    np.testing.assert_array_equal(wanted[TOKEN].detach(), token)
    for key, weight in wanted.items():
        np.testing.assert_allclose(found[key].detach(), weight.detach(), atol=1e-6, err_msg=key)


def test_fuse_puts_it_there_and_verify_sees_it(folders, tmp_path):
    base, lora, _, cls = folders
    lt.fuse(base, lora, output=tmp_path / "fused")
    found = dict(cls.from_pretrained(tmp_path / "fused").named_parameters())
    assert_as_peft(found, folders)
    assert lt.verify(tmp_path / "fused", base=base, adapters=lora).contained
    lt.fuse(base, lora, drop="embeddings", output=tmp_path / "without")
    assert lt.verify(tmp_path / "without", base=base, adapters=lora).contained is False


@pytest.mark.parametrize(
    "command",
    [
        lambda lora, base, out: lt.squeeze(lora, energy=1.0, output=out),
        lambda lora, base, out: lt.merge([lora], output=out),
        lambda lora, base, out: lt.to_lora(lora, output=out),
        lambda lora, base, out: lt.convert(lora, to="peft", base=base, output=out),
    ],
    ids=["squeeze", "merge", "to-lora", "convert"],
)
def test_what_is_written_has_it(command, folders, tmp_path):
    base, lora, _, cls = folders
    command(lora, base, tmp_path / "out")
    assert_as_peft(tiny_models.merged(base, tmp_path / "out", cls), folders)


def test_one_that_the_base_lacks_is_left_out_with_a_note(folders, tmp_path):
    base, lora, token, _ = folders
    other = tmp_path / "other"
    lt.squeeze(lora, energy=1.0, output=other)
    file = other / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.vit.embeddings.factor": token}, file)
    result = lt.fuse(base, other, output=tmp_path / "fused")
    (told,) = (each for each in result.findings if each.code == "tensor-dropped")
    assert "vit.embeddings.factor: not in the base" in told.message
