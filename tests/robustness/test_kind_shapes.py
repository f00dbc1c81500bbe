"""Files of every kind with one tensor of another shape, or one setting changed.

Each is refused with an error of ours, or holds a change that is read without one: no shape is
broadcast, and no error of NumPy's gets out.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import save_file

from loratools.algebra.ranks import RankRule
from loratools.cli import cli
from loratools.kinds import all_kinds
from loratools.operations.to_lora import to_lora
from loratools_formats import read_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.core.kind_shapes import SHAPES
from loratools_formats.disk.errors import LoratoolsError

KINDS = Path(__file__).parents[1] / "golden" / "kinds"
NAMES = sorted(
    folder.name
    for folder in KINDS.iterdir()
    if any(folder.glob("adapter*/*.safetensors")) or any(folder.glob("adapter*.safetensors"))
)
FREE = {
    "butterfly_oft": ("oft_blocks",),
    "frod": ("frod_s_size",),  # the size of a sparse matrix, which its diagonal states, too
    "full": ("diff",),
    "gated": ("lora_A", "lora_B"),
    "loldu": ("vector_z",),
    "loralib": ("lora_A",),
    "megatron": ("linear_in",),
    "middle": ("lora_A", "lora_B"),
    "miss_bat": ("miss_block",),  # a base of the other orientation has as many rows
    "randlora": ("randlora_A", "randlora_B"),  # bases of the largest module, larger than others
    "sparse": ("shira_indices",),
    "tucker": ("lora_down", "lora_mid", "lora_up"),
    "vera": ("vera_A", "vera_B"),
    "torchtune": ("lora_a", "lora_b"),
    "unscaled": ("lora_A", "lora_B"),
}
"""Parts with a side that neither another tensor nor a setting nor a base says."""

VALUES = (
    None, True, -1, 0, 10**9, 10**400, 0.5, 1e300, "x", [], ["x"], [10**30], {}, {"down": 10**9},
    {"(": 1},
)  # fmt: skip

COMMON = {"auto_mapping", "exclude_modules", "layers_pattern", "layers_to_transform", "revision"}
"""Keys that every configuration has and no change depends on."""


def shapes_near(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return shapes that a careless or hostile file may have in the place of one."""
    found = [(), (1,), (0,), (*shape, 1), (1, *shape), (*shape, 2), shape[::-1], shape[1:]]
    for axis, side in enumerate(shape):
        found += [(*shape[:axis], n, *shape[axis + 1 :]) for n in (0, 1, side - 1, side + 1)]
    return [near for near in dict.fromkeys(found) if near != shape]


def copied(name: str, folder: Path) -> tuple[Path, Path, dict]:
    """Return an adapter, its weights and its case, in a folder of their own."""
    case = json.loads((KINDS / name / "case.json").read_text())
    source = KINDS / name / "adapter"
    if source.exists():
        shutil.copytree(source, folder / "adapter")
        return folder / "adapter", next((folder / "adapter").glob("*.safetensors")), case
    source = KINDS / name / "adapter.safetensors"
    shutil.copy(source, folder / source.name)
    return folder / source.name, folder / source.name, case


def is_refused(name: str, adapter: Path, case: dict) -> bool:
    """Return whether a fold ends in one of our errors; any other is raised."""
    base = KINDS / name / "base.safetensors"
    try:
        to_lora(
            read_adapter(adapter, case.get("format")),
            RankRule(rank=2),
            base=read_checkpoint(base) if base.exists() else None,
            given=case.get("settings"),
        )
    except LoratoolsError:
        return True
    return False


def test_every_part_of_every_kind_has_a_shape():
    for kind in all_kinds():
        assert {*kind.parts, *kind.optional} <= SHAPES[kind.name].keys()
        assert all(kind.knows(part.partition(" if ")[0]) for part in SHAPES[kind.name])


@pytest.mark.parametrize("name", NAMES)
def test_tensors_of_other_shapes_are_refused_in_words(name, tmp_path):
    adapter, file, case = copied(name, tmp_path)
    with safe_open(file, "numpy") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    own = {key for key in tensors if "up." not in key or len(tensors) < 8}
    for key in own:
        values = tensors[key]
        for shape in shapes_near(values.shape):
            other = np.resize(values, shape).astype(values.dtype)
            save_file(tensors | {key: other}, file, metadata)
            refused = is_refused(name, adapter, case)
            is_same = sorted(n for n in shape if n > 1) == sorted(n for n in values.shape if n > 1)
            free = any(part in key for part in FREE.get(name, ()))
            assert refused or is_same or free, (key, values.shape, shape)


@pytest.mark.parametrize("name", [n for n in NAMES if (KINDS / n / "adapter").is_dir()])
def test_settings_of_other_values_are_refused_in_words(name, tmp_path):
    adapter, _, case = copied(name, tmp_path)
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    for key in sorted(config.keys() - COMMON):
        for value in VALUES:
            file.write_text(json.dumps(config | {key: value}))
            is_refused(name, adapter, case)


@pytest.mark.parametrize("kind", ["LN_TUNING", "PROMPT_TUNING", "XLORA", "LOHA", "LORA"])
@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "base_model_name_or_path"])
@pytest.mark.parametrize("value", [5, True, 1.5, {"a": 1}, [1], [[]]])
def test_values_that_all_kinds_share_have_their_types(tmp_path, kind, key, value):
    config = {"peft_type": kind, "target_modules": ["q"], "r": 2, "alpha": 2, "lora_alpha": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, key: value}))
    tensors = {"prompt_embeddings": np.ones((2, 4), "f4")}
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    done = CliRunner().invoke(cli, ["check", str(tmp_path), "--headers-only"])
    told = done.stdout + done.stderr + str(done.exception)
    assert f"config value {key} is wrong" in told


@pytest.mark.parametrize("kernel", [(3, 1), (1, 3, 1), (3,), (1, 1, 3), (1, 3, 1, 1)])
def test_two_kernels_of_one_product_have_the_same_axes(tmp_path, kernel):
    """3 × 1 and 1 × 3 have as many numbers, and their product is none of either."""
    rng = np.random.default_rng(0)
    shapes = {"w1_a": (2, 6), "w1_b": (2, 5), "t1": (2, 2, 1, 3)}
    shapes |= {"w2_a": (2, 6), "w2_b": (2, 5), "t2": (2, 2, *kernel)}
    module = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{module}.hada_{n}": rng.standard_normal(s).astype("f4") for n, s in shapes.items()}
    tensors[f"{module}.alpha"] = np.asarray(2, "f4")
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(LoratoolsError, match="does not fit the others"):
        read_adapter(tmp_path / "x.safetensors")
