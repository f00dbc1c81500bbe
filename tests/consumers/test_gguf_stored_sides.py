"""Experts that published files hold as (E, in, out), and transformers 5 saves as (E, out, in).

llama.cpp's converter takes the published order only: of a folder that transformers 5 saved it makes
tensors that llama.cpp refuses. Adapters are of the layers, so both folders give one GGUF adapter.
"""

import gguf_models
import numpy as np
import pytest
from gguf_probes import as_published
from safetensors.numpy import load_file
from test_gguf_llama_cpp import EFFECT, SILU_TOLERANCE

import loratools as lt

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]

TEXT = gguf_models.SIZES | gguf_models.HEAD | gguf_models.EXPERTS | {
    "norm_topk_prob": True, "decoder_sparse_step": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 64, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 32,
    "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
}  # fmt: skip
STACKS = ["experts.gate_up_proj", "experts.down_proj"]


def model_of():
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3VLMoeConfig(
        text_config=TEXT, vision_config=VISION, tie_word_embeddings=False
    )
    for part in (config.text_config, config.vision_config):
        part.initializer_range = 0.15
    model = transformers.Qwen3VLMoeForConditionalGeneration(config).float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("mlp.gate.weight"):
                parameter.mul_(4.0)
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the folder that transformers 5 saved, the published one, and an adapter's folder."""
    root = tmp_path_factory.mktemp("qwen3_vl_moe")
    for order in ("saved", "published"):
        gguf_models.save(model_of(), root / order)
    as_published("Qwen3VLMoeForConditionalGeneration", root / "published")
    gguf_models.convert_bases([root / "published"])
    wrapped = gguf_models.adapted(
        model_of(), r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=STACKS
    )
    wrapped.save_pretrained(root / "adapter")
    np.save(root / "wanted.npy", gguf_models.expected(wrapped))
    np.save(root / "base.npy", gguf_models.expected(model_of()))
    return root


def test_the_folders_hold_the_same_model_in_two_orders(folders):
    import transformers

    cls = transformers.Qwen3VLMoeForConditionalGeneration
    one, other = (cls.from_pretrained(folders / order) for order in ("saved", "published"))
    for (key, values), (_, again) in zip(
        one.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert values.equal(again), key
    shapes = [
        {key: tensor.shape for key, tensor in load_file(path).items() if "experts" in key}
        for path in (folders / order / "model.safetensors" for order in ("saved", "published"))
    ]
    assert all(shape != shapes[1][key] for key, shape in shapes[0].items())


@pytest.mark.parametrize("order", ["saved", "published"])
def test_log_probabilities_equal_those_of_torch(order, folders, tmp_path):
    wanted, base = np.load(folders / "wanted.npy"), np.load(folders / "base.npy")
    gguf = folders / "published" / "model.gguf"
    assert np.abs(wanted - base).max() > EFFECT
    out = tmp_path / "a.gguf"
    lt.convert(folders / "adapter", to="gguf", base=folders / order, output=out)
    untouched, found = gguf_models.from_llama_cpp(gguf, [out], [[0.0], [1.0]])
    assert np.abs(untouched - base).max() < SILU_TOLERANCE
    assert np.abs(found - wanted).max() < SILU_TOLERANCE


@pytest.mark.parametrize("order", ["saved", "published"])
def test_a_fused_folder_is_what_peft_merges(order, folders, tmp_path):
    import transformers

    lt.fuse(folders / order, folders / "adapter", output=tmp_path / "fused")
    cls = transformers.Qwen3VLMoeForConditionalGeneration
    model = cls.from_pretrained(tmp_path / "fused").eval()
    found = gguf_models.expected(model)
    assert np.abs(found - np.load(folders / "wanted.npy")).max() < SILU_TOLERANCE
