"""What releases of PEFT load of the stacked experts that `convert` writes for them.

    python tests/golden/make_experts_loaded.py write
    PYTHONPATH=FOLDER python tests/golden/make_experts_loaded.py load

The first writes `tests/golden/experts_written/<layout>-<class>-<inner width>/` from the file that
PEFT 0.21.2 wrote (`make_experts.py`), in the two layouts of `--peft-layout`. The second, with a
release in FOLDER, loads those that the release reads into the model of `make_experts.py` and adds
`loaded-<release>.safetensors`: the ΔW that it merges, (E, out, in) in float64.
"""

import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
WRITTEN = HERE / "experts_written"
CLASSES = {"out-in": "qwen3_moe", "in-out": "gpt_oss"}
READ_BY = {
    ("0.17.1", "out-in"): "0.18", ("0.17.1", "in-out"): "0.18",
    ("0.18.1", "out-in"): "0.18", ("0.18.1", "in-out"): "0.18",
    ("0.19.0", "out-in"): "0.18",  # and in-out as no other release
    ("0.19.1", "out-in"): "0.19.1", ("0.19.1", "in-out"): "0.19.1",
    ("0.21.2", "out-in"): "0.19.1", ("0.21.2", "in-out"): "0.19.1",
}  # fmt: skip
"""The layout that a release reads, by itself and the class of the model."""


def base(folder, kind, inner):
    """Write the model of `make_experts.py` as a checkpoint; returns the folder."""
    import numpy as np
    from safetensors.numpy import save_file

    shapes = {"gate_up_proj": (3, 2 * inner, 4), "down_proj": (3, 4, inner)}
    if kind == "in-out":
        shapes = {name: (e, in_, out) for name, (e, out, in_) in shapes.items()}
    tensors = {f"mlp.experts.{n}": np.zeros(s, np.float32) for n, s in shapes.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": CLASSES[kind], "num_experts": 3, "hidden_size": 4}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write():
    import loratools

    with tempfile.TemporaryDirectory() as scratch:
        for kind in CLASSES:
            for inner in (2, 3, 4):
                model = base(Path(scratch) / f"{kind}-{inner}", kind, inner)
                for layout in ("0.18", "0.19.1"):
                    loratools.convert(
                        HERE / "experts" / f"0.21.2-{kind}-{inner}",
                        base=model,
                        peft_layout=layout,
                        output=WRITTEN / f"{layout}-{kind}-{inner}",
                        overwrite=True,
                    )
                    (WRITTEN / f"{layout}-{kind}-{inner}" / "provenance.json").unlink()


def load():
    import peft
    from make_experts import Block
    from safetensors.torch import save_file

    for kind in CLASSES:
        layout = READ_BY.get((peft.__version__, kind))
        for inner in (2, 3, 4) if layout else ():
            folder = WRITTEN / f"{layout}-{kind}-{inner}"
            model = Block(inner, transposed=kind == "in-out")
            for parameter in model.parameters():
                parameter.data.zero_()  # so that what is merged is ΔW itself
            loaded = peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
            turned = {
                name: (p.transpose(1, 2) if kind == "in-out" else p).detach().contiguous()
                for name, p in loaded.named_parameters()
            }
            save_file(turned, folder / f"loaded-{peft.__version__}.safetensors")
            print(folder.name)


if __name__ == "__main__":
    {"write": write, "load": load}[sys.argv[1]]()
