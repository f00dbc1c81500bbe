"""State dicts that the real `loralib` saves, against the weights that it merges itself."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from whole_delta import effective_delta

from loratools.algebra.ranks import RankRule
from loratools.operations.squeeze import squeeze
from loratools.operations.to_lora import to_lora
from loratools_formats import find_format, read_adapter, write_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.disk.errors import AdapterError, UnsupportedError

ALPHA = 6
LINEAR = ("fc", "turned.c_fc", "wte", "c_attn", "all.c_attn", "point", "line", "block")
CONVOLUTIONS = ("conv", "big")


class Trained:
    """A model of every layer that loralib has, trained at random.

    Attributes:
        path: its state dict.
        deltas: what merging adds to the weight of every layer, by name.
        base: a checkpoint of the weights before.
    """

    def __init__(self, folder, names=LINEAR + CONVOLUTIONS):
        loralib = pytest.importorskip("loralib")
        import torch
        from torch import nn

        torch.manual_seed(1)
        rank = {"r": 2, "lora_alpha": ALPHA}
        layers = {
            "fc": loralib.Linear(24, 36, **rank),
            "turned.c_fc": loralib.Linear(24, 36, fan_in_fan_out=True, **rank),
            "wte": loralib.Embedding(40, 24, **rank),
            "c_attn": loralib.MergedLinear(
                24, 72, enable_lora=[True, False, True], fan_in_fan_out=True, **rank
            ),
            "all.c_attn": loralib.MergedLinear(24, 48, enable_lora=[True, True], **rank),
            "point": loralib.Conv2d(8, 12, 1, **rank),
            "line": loralib.Conv1d(8, 12, 1, **rank),
            "block": loralib.Conv3d(8, 12, 1, **rank),
            "conv": loralib.Conv2d(4, 6, 3, **rank),
            "big": loralib.Conv2d(3, 8, 5, **rank),
        }
        model = nn.Module()
        for name in names:
            place = model
            *parents, leaf = name.split(".")
            for parent in parents:
                place.add_module(parent, nn.Module())
                place = getattr(place, parent)
            place.add_module(leaf, layers[name])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_()
        self.path = folder / "lora.pt"
        torch.save(loralib.lora_state_dict(model, bias="all"), self.path)
        before = self._weights(layers, names)
        model.eval()
        after = self._weights(layers, names)
        self.deltas = {name: after[name] - before[name] for name in names}
        (folder / "base").mkdir()
        (folder / "base" / "config.json").write_text("{}")
        named = {f"{name}.weight": values.astype("f4") for name, values in before.items()}
        biases = {
            f"{name}.bias": np.zeros(len(values), "f4")
            for name, values in before.items()
            if name not in ("wte", "turned.c_fc", "c_attn")
        } | {"turned.c_fc.bias": np.zeros(36, "f4"), "c_attn.bias": np.zeros(72, "f4")}
        biases = {k: v for k, v in biases.items() if k.rpartition(".")[0] in names}
        save_file(
            {k: np.ascontiguousarray(v) for k, v in (named | biases).items()},
            folder / "base" / "model.safetensors",
        )
        self.base = folder / "base"

    @staticmethod
    def _weights(layers, names):
        found = {}
        for name in names:
            layer = getattr(layers[name], "conv", layers[name])
            found[name] = layer.weight.detach().double().numpy().copy()
        return found


def close(got, want, relative=1e-6):
    assert np.linalg.norm(got - want) <= relative * np.linalg.norm(want)


def folded(trained, **given):
    """Return the plain adapter of a model's state dict, its base at hand."""
    texts = {"alpha": str(ALPHA)} | given
    return to_lora(
        read_adapter(trained.path), RankRule(), base=read_checkpoint(trained.base), given=texts
    ).adapter


def test_every_layer_folds_to_what_loralib_merges(tmp_path):
    trained = Trained(tmp_path)
    assert find_format(trained.path).name == "loralib"
    plain = folded(trained, groups="101")
    assert set(plain.modules) == set(trained.deltas)
    for name, want in trained.deltas.items():
        # The orientation of a square weight is the base's matter; these show theirs.
        close(effective_delta(name, plain.modules[name], want.shape), want)
    assert plain.modules["conv"].rank == 2 * 3**2
    assert plain.modules["point"].layer.kernel == (1, 1)
    biases = {replacement.target for replacement in plain.replacements.values()}
    assert {"conv.bias", "fc.bias"} <= biases
    assert not any(".conv.bias" in target for target in biases)


def test_peft_takes_its_convolutions(tmp_path):
    import torch
    from peft import PeftModel
    from torch import nn

    trained = Trained(tmp_path, ("conv", "big", "point"))
    write_adapter(folded(trained), tmp_path / "out", "peft")
    model = nn.Module()
    model.conv, model.big, model.point = (
        nn.Conv2d(4, 6, 3), nn.Conv2d(3, 8, 5), nn.Conv2d(8, 12, 1)
    )  # fmt: skip
    model.load_state_dict({k: torch.from_numpy(v) for k, v in weights(trained.base).items()})
    merged = PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload()
    for name, want in trained.deltas.items():
        now = merged.get_submodule(name).weight.detach().double().numpy()
        close(now - weights(trained.base)[f"{name}.weight"], want, 1e-5)


def weights(base):
    return load_file(base / "model.safetensors")


def test_a_kernel_may_be_given_instead_of_the_base(tmp_path):
    trained = Trained(tmp_path, ("conv",))
    adapter = read_adapter(trained.path)
    with pytest.raises(UnsupportedError, match="kernel"):
        to_lora(adapter, RankRule(), given={"alpha": str(ALPHA)})
    with pytest.raises(AdapterError, match="kernel 5"):
        to_lora(adapter, RankRule(), given={"alpha": str(ALPHA), "kernel": "5"})
    result = to_lora(adapter, RankRule(), given={"alpha": str(ALPHA), "kernel": "3"})
    close(
        effective_delta("conv", result.adapter.modules["conv"], (6, 4, 3, 3)),
        trained.deltas["conv"],
    )


def test_a_convolution_is_never_taken_for_a_linear_layer(tmp_path):
    trained = Trained(tmp_path, ("conv",))
    base = read_checkpoint(trained.base)
    result = to_lora(
        read_adapter(trained.path), RankRule(), base=base, given={"alpha": "6", "kernel": "1"}
    )
    assert result.adapter.modules["conv"].layer.kernel == (3, 3)
    with pytest.raises(UnsupportedError, match="alpha"):
        squeeze(read_adapter(trained.path), RankRule(rank=2))


def test_convolutions_of_several_groups_are_refused(tmp_path):
    import torch

    loralib = pytest.importorskip("loralib")
    layer = loralib.Conv2d(8, 12, 3, r=2, lora_alpha=ALPHA, groups=2)
    model = torch.nn.Module()
    model.mixed = layer
    torch.save(loralib.lora_state_dict(model), tmp_path / "lora.pt")
    named = {"mixed.weight": layer.conv.weight.detach().numpy()}
    save_file(named, tmp_path / "base.safetensors")
    base = read_checkpoint(tmp_path / "base.safetensors")
    adapter = read_adapter(tmp_path / "lora.pt")
    with pytest.raises(UnsupportedError, match="one group"):
        to_lora(adapter, RankRule(), base=base, given={"alpha": "6"})
    with pytest.raises(AdapterError):
        to_lora(adapter, RankRule(), base=base, given={"alpha": "6", "kernel": "3"})


def test_weights_that_evaluation_has_merged_are_refused(tmp_path):
    """A whole state dict after `eval()` holds ΔW twice, which nothing in it shows."""
    import torch

    loralib = pytest.importorskip("loralib")
    model = torch.nn.Module()
    model.fc = loralib.Linear(24, 36, r=2, lora_alpha=ALPHA)
    model.eval()
    torch.save(model.state_dict(), tmp_path / "lora.pt")
    with pytest.raises(AdapterError, match="unknown tensor"):
        read_adapter(tmp_path / "lora.pt")
