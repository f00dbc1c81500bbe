"""PEFT to GGUF and back: the same ΔW, and PEFT computes the same with it."""

import gguf_models
import numpy as np
import pytest

from loratools.lowrank.matrices import loaded
from loratools.operations.convert.operation import prepare, write
from loratools_formats import Context, read_adapter
from loratools_formats.disk.errors import UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

CASES = [
    (name, title)
    for name in gguf_models.CONFIGS
    if name != "wide llama"
    for title in gguf_models.variants(name)
    if title in ("all", "embedding", "output", "experts", "router")
]


def dense(adapter):
    return {
        name: np.stack([delta.direction.scale * (b @ a) for b, a in loaded(delta.direction)])
        for name, delta in adapter.modules.items()
    }


@pytest.mark.parametrize(("name", "title"), CASES)
def test_deltas_and_predictions_survive(gguf_bases, tmp_path, name, title):
    from peft import PeftModel

    model = gguf_models.adapted(gguf_models.make_model(name), **gguf_models.variants(name)[title])
    wanted = gguf_models.expected(model)
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    context = Context(gguf_bases / name)
    first = read_adapter(tmp_path / "peft")
    write(prepare(first, "gguf", context), tmp_path / "lora.gguf")
    write(prepare(read_adapter(tmp_path / "lora.gguf"), "peft", context), tmp_path / "back")
    before, after = dense(first), dense(read_adapter(tmp_path / "back"))
    assert set(before) == set(after)
    for key, delta in before.items():
        assert np.linalg.norm(after[key] - delta) <= 1e-6 * np.linalg.norm(delta), key
    again = PeftModel.from_pretrained(gguf_models.make_model(name), tmp_path / "back")
    np.testing.assert_allclose(gguf_models.expected(again.eval()), wanted, atol=1e-4)


def test_reading_needs_no_base_where_no_rows_move(gguf_bases, tmp_path):
    for name, needs_base in (("qwen2", False), ("llama", True)):
        model = gguf_models.adapted(
            gguf_models.make_model(name), **gguf_models.variants(name)["plain"]
        )
        model.save_pretrained(tmp_path / name)
        context = Context(gguf_bases / name / "model.gguf")
        write(prepare(read_adapter(tmp_path / name), "gguf", context), tmp_path / f"{name}.gguf")
        adapter = read_adapter(tmp_path / f"{name}.gguf")
        if needs_base:
            with pytest.raises(UnsupportedError, match="`base`"):
                prepare(adapter, "peft")
        else:
            assert set(prepare(adapter, "peft").adapter.modules) == set(
                read_adapter(tmp_path / name).modules
            )


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_activated_adapters_survive_and_are_activated_in_llama_cpp(gguf_bases, tmp_path, name):
    from peft import PeftModel

    wanted = {}
    for start in (4, 5):
        config = {
            **gguf_models.variants(name)["plain"],
            "task_type": "CAUSAL_LM",
            "alora_invocation_tokens": gguf_models.PROMPT[start:7],
        }
        model = gguf_models.adapted(gguf_models.make_model(name), **config)
        wanted[start] = gguf_models.expected(model)
        model.save_pretrained(tmp_path / "peft")
    context = Context(gguf_bases / name)
    write(prepare(read_adapter(tmp_path / "peft"), "gguf", context), tmp_path / "lora.gguf")
    write(prepare(read_adapter(tmp_path / "lora.gguf"), "peft", context), tmp_path / "back")
    again = PeftModel.from_pretrained(gguf_models.make_model(name), tmp_path / "back").eval()
    assert again.peft_config["default"].alora_invocation_tokens == gguf_models.PROMPT[5:7]
    np.testing.assert_allclose(gguf_models.expected(again), wanted[5], atol=1e-4)
    base = gguf_bases / name / "model.gguf"
    (found,) = gguf_models.from_llama_cpp(base, [tmp_path / "lora.gguf"])
    # llama.cpp's server activates the adapter one token before the invocation tokens.
    np.testing.assert_allclose(found, wanted[4], atol=1e-4)
    plain = gguf_models.adapted(gguf_models.make_model(name), **gguf_models.variants(name)["plain"])
    assert np.abs(gguf_models.expected(plain) - wanted[4]).max() > 0.05
