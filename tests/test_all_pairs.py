"""Every output of every command, in every format that holds it, given to every command.

The adapter has a negative alpha, a scale that no float holds exactly, and two ranks. What a
command makes of what another wrote is ΔW again, by module, to rounding.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools_formats.disk.errors import LoratoolsError

SHAPES = {"q": (8, 8), "up": (24, 8)}
ALPHAS = {"q": -1.7, "up": 4.1}
NAMES = {
    "kohya": {"q": "lora_unet_blocks_0_self_attn_q", "up": "lora_unet_blocks_0_ffn_0"},
    "original": {"q": "blocks.0.self_attn.q", "up": "blocks.0.ffn.0"},
    "diffusers": {"q": "blocks.0.attn1.to_q", "up": "blocks.0.ffn.net.0.proj"},
    "llama": {"q": "model.layers.0.self_attn.q_proj", "up": "model.layers.0.mlp.up_proj"},
}
FORMATS = {
    "kohya": ("wan", "a.safetensors"), "comfyui": ("wan", "a.safetensors"),
    "diffusers": ("wan", "a.safetensors"), "peft of wan": ("wan", "a"),
    "peft": ("llama", "a"), "mlx": ("llama", "a"), "gguf": ("llama", "a.gguf"),
}  # fmt: skip
REFUSED = {
    # what cannot be, by the format, writer and reader, where one of the first two may be any
    ("gguf", "", "to_dora"): "no base tensor fits the module",  # a DoRA has no place in GGUF
    ("gguf", "", "fuse"): "is in llama.cpp's names, which the base",
    ("gguf", "", "verify"): "is in llama.cpp's names, which the base",
    ("", "to_dora", "to_dora"): "it is a DoRA already",
    ("", "to_dora", "convert to gguf"): "llama.cpp has no DoRA",
}
RANK = 8
CLOSE = 1e-5  # float32 factors, a few products of them


class World:
    """An adapter in one format, and the base that it changes."""

    def __init__(self, folder, title):
        self.folder, self.format = folder, title.partition(" ")[0]
        self.model, self.file = FORMATS[title]
        generator = np.random.default_rng(3)
        factors = {
            name: (generator.standard_normal((rank, SHAPES[name][1])).astype(np.float32),
                   generator.standard_normal((SHAPES[name][0], rank)).astype(np.float32))
            for name, rank in (("q", 2), ("up", 3))
        }  # fmt: skip
        self.changes = {
            name: ALPHAS[name] / len(a) * (b.astype(float) @ a.astype(float))
            for name, (a, b) in factors.items()
        }
        weights = {n: generator.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
        # A file of a denoiser has its own names, a PEFT folder those of the model in diffusers.
        own = "original" if self.model == "wan" and self.format != "peft" else None
        names = NAMES[own or ("llama" if self.model == "llama" else "diffusers")]
        self.keys = {name: f"{names[name]}.weight" for name in SHAPES}
        self.base = folder / "base"
        self.base.mkdir()
        save_file({self.keys[n]: w for n, w in weights.items()}, self.base / "model.safetensors")
        self.weights = weights
        values = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8,
                  "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1,
                  "intermediate_size": 24, "vocab_size": 4,
                  "tie_word_embeddings": False}  # fmt: skip
        if self.model == "wan":
            values = {"_class_name": "WanModel" if own else "WanTransformer3DModel"}
        (self.base / "config.json").write_text(json.dumps(values))
        self.first = self._written(factors)
        self.tuned = folder / "tuned"
        self.tuned.mkdir()
        tuned = {self.keys[n]: (w + self.changes[n]).astype("f4") for n, w in weights.items()}
        save_file(tuned, self.tuned / "model.safetensors")
        (self.tuned / "config.json").write_text(json.dumps(values))

    def _written(self, factors):
        """Write the adapter as its trainer would: as kohya's, or as PEFT's."""
        if self.model == "wan":
            tensors = {}
            for name, (a, b) in factors.items():
                flat = NAMES["kohya"][name]
                tensors |= {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b}
                tensors[f"{flat}.alpha"] = np.array(ALPHAS[name], np.float32)
            path = self.folder / "kohya.safetensors"
            save_file(tensors, path)
            return path
        path = self.folder / "peft"
        path.mkdir()
        tensors = {}
        for name, (a, b) in factors.items():
            full = f"base_model.model.{NAMES['llama'][name]}"
            tensors |= {f"{full}.lora_A.weight": a, f"{full}.lora_B.weight": b}
        save_file(tensors, path / "adapter_model.safetensors")
        leaves = {name: NAMES["llama"][name].rpartition(".")[2] for name in SHAPES}
        (path / "adapter_config.json").write_text(json.dumps({
            "peft_type": "LORA", "r": 2, "lora_alpha": ALPHAS["q"],
            "target_modules": [*leaves.values()],
            "rank_pattern": {leaves["up"]: 3}, "alpha_pattern": {leaves["up"]: ALPHAS["up"]},
        }))  # fmt: skip
        return path

    def out(self, title):
        folder = self.folder / title
        folder.mkdir()
        return folder / self.file

    def convert(self, source, to, output, *, of=None):
        words = {"base": self.base} if self.model == "llama" else {"names": "wan2"}
        if of == "peft" and self.model == "wan":
            words["component"] = "transformer"
        return lt.convert(source, to=to, output=output, **words)

    def is_true(self, path, factor=1.0, of=None):
        """Return whether a file has the changes; which module is which is told by its shape."""
        adapter = lt.read(path)
        found = {shape: d for d in (lt.delta(adapter, n) for n in adapter.modules)
                 if (shape := d.shape)}  # fmt: skip
        for name, change in self.changes.items():
            delta = found[SHAPES[name]]
            if (of or self.format) == "gguf" and name == "q":
                delta = delta.reshape(2, 2, 2, 8).swapaxes(1, 2).reshape(8, 8)  # rope's order
            np.testing.assert_allclose(delta, factor * change, rtol=0, atol=CLOSE)
        return len(adapter.modules) == len(SHAPES)

    def is_contained(self, path):
        assert lt.verify(self.tuned, base=self.base, adapters=path).contained is not False

    def is_fused(self, folder):
        files = [folder] if folder.is_file() else list(folder.glob("*.safetensors"))
        (tensors,) = map(load_file, files)
        for name, change in self.changes.items():
            wanted = self.weights[name] + change
            np.testing.assert_allclose(tensors[self.keys[name]], wanted, rtol=0, atol=CLOSE)


def writers(world):
    """Return what writes an adapter of the world's format, by the command's name."""
    base, first = world.base, world.out("convert")
    world.convert(world.first, world.format, first)
    yield "convert", first
    made = {
        "squeeze": lambda out: lt.squeeze(first, rank=RANK, output=out),
        "merge": lambda out: lt.merge({first: 1.0}, output=out),
        "to_lora": lambda out: lt.to_lora(first, rank=RANK, output=out),
        "repair": lambda out: lt.repair(first, keep_intruders=True, rebalance=True, output=out),
        "to_dora": lambda out: lt.to_dora(first, base=base, output=out),
    }  # fmt: skip
    for name, make in made.items():
        if (world.format, "", name) in REFUSED:
            continue
        out = world.out(name)
        make(out)
        yield name, out
    if world.format not in ("mlx", "gguf"):
        out = world.out("extract")
        lt.extract(base, world.tuned, rank=RANK, to=world.format, output=out)
        yield "extract", out


def readers(world, path, writer):
    """Yield the name of each command, and what it does with a file that another wrote."""
    base, is_dora = world.base, writer == "to_dora"
    yield "info", lambda _: lt.info(path)
    yield "check", lambda _: lt.check(path)
    yield "spectrum", lambda _: lt.spectrum(path, **({"base": base} if is_dora else {}))
    yield "compare", lambda _: lt.compare({"a": path, "b": world.folder / "convert" / world.file},
                                          base=base)  # fmt: skip
    yield "fuse", lambda out: (lt.fuse(base, path, output=out.parent / "f"),
                               world.is_fused(out.parent / "f"))  # fmt: skip
    yield "verify", lambda _: world.is_contained(path)
    steps = {
        "squeeze": lambda out: lt.squeeze(path, rank=RANK, output=out),
        "merge": lambda out: lt.merge(
            {path: 1.0}, output=out, **({"base": base} if is_dora else {})
        ),
        "to_lora": lambda out: lt.to_lora(path, rank=RANK, base=base, output=out),
        "repair": lambda out: lt.repair(path, keep_intruders=True, rebalance=True, output=out),
        "to_dora": lambda out: lt.to_dora(path, base=base, output=out),
    }  # fmt: skip
    for name, step in steps.items():
        stays = (is_dora and name in ("squeeze", "repair")) or name == "to_dora"
        yield name, lambda out, step=step, stays=stays: (step(out), stays or world.is_true(out))
    for title, (model, file) in FORMATS.items():
        to = title.partition(" ")[0]
        if model == world.model:
            yield (
                f"convert to {to}",
                lambda out, to=to, file=file: (
                    world.convert(path, to, out.parent / file, of=world.format),
                    is_dora or world.is_true(out.parent / file, of=to),
                ),
            )


@pytest.mark.slow
@pytest.mark.parametrize("title", FORMATS)
def test_every_output_is_read_by_every_command(title, tmp_path):
    world, wrong = World(tmp_path, title), {}
    for writer, path in writers(world):
        assert writer == "to_dora" or world.is_true(path)
        for reader, read in readers(world, path, writer):
            out = world.out(f"{writer} {reader}")
            keys = ((fmt, by, reader) for fmt in ("", world.format) for by in ("", writer))
            reason = next((REFUSED[key] for key in keys if key in REFUSED), None)
            if reason is not None:
                with pytest.raises(LoratoolsError, match=reason):
                    read(out)
                continue
            try:
                read(out)
            except (AssertionError, LookupError, LoratoolsError, TypeError, Warning) as error:
                wrong[writer, reader] = f"{type(error).__name__}: {str(error)[:300]}"
    assert not wrong, json.dumps({" → ".join(k): v for k, v in wrong.items()}, indent=1)
