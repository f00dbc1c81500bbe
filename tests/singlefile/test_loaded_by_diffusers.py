"""diffusers' own loaders on every architecture that has a table: ΔW of all modules of small models.

`make test` leaves out the largest models, and relatives of others; `pytest --models` has them all.
"""

from __future__ import annotations

import numpy as np
import pytest
import tiny_diffusion as tiny
from safetensors.numpy import load_file, save_file
from test_diffusers import run

from loratools.naming.tables import bundled_tables

pytestmark = pytest.mark.filterwarnings("ignore")

LEFT_OUT = ("sd1", "sd2", "sdxl", "kolors", "anyflow", "anyflow_far", "chronoedit", "skyreels2")
NOT_IN_TABLES = {
    # Relatives of an architecture have modules whose original names are not known.
    "anyflow": {"condition_embedder.delta_embedder"},
    "anyflow_far": {"condition_embedder.delta_embedder", "far_patch_embedding"},
    "cosmos2": {"crossattn_proj", "img_context_proj", "k_img", "q_img", "v_img"},
    "ideogram4": {"adaln_proj", "final_layer", "input_proj", "llm_cond_proj", "t_embedding"},
}
OTHER_LOADERS = {
    # The naming of ours that diffusers takes, too, and parts of names of modules that it leaves
    # out. Other architectures it does not take in another naming, or in their real sizes only.
    "sd1": ("kohya", ()),
    "sd2": ("kohya", ()),
    "sdxl": ("kohya", ()),
    "kolors": ("kohya", ("encoder_hid_proj",)),
    "anima": ("comfyui", ()),
    "flux2": ("comfyui", ("norm_out.linear",)),  # its halves are not swapped there
    "hidream": ("comfyui", ()),
    "ideogram4": ("comfyui", ()),
    "krea2": ("comfyui", ()),
    "ltx2": ("comfyui", ()),
    "ltx_video": ("comfyui", ("proj_in", "time_embed")),
    "qwen_image": ("kohya", ()),
    "z_image": ("kohya", ("all_final_layer", "all_x_embedder")),
}


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        every = metafunc.config.getoption("models")
        is_own = metafunc.function is test_diffusers_own_conversion_agrees
        names = OTHER_LOADERS if is_own else tiny.CLASSES
        metafunc.parametrize("name", [n for n in names if every or n not in LEFT_OUT])


@pytest.fixture(autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)


def test_every_table_is_loaded():
    assert {table for table, *_ in tiny.CLASSES.values()} == {t.name for t in bundled_tables()}
    assert {kind for _, kind, *_ in tiny.CLASSES.values()} == {
        "UNet2DConditionModel", *(kind for table in bundled_tables() for kind in table.classes)
    }  # fmt: skip


def without(changes, parts):
    return {path: c for path, c in changes.items() if not any(part in path for part in parts)}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for path, change in wanted.items():
        assert np.abs(change).max() > 1e-3, path
        np.testing.assert_allclose(found[path], change, rtol=0, atol=1e-6, err_msg=path)


def test_diffusers_loads_what_we_convert(name, tmp_path):
    """From kohya's naming with scales in the factors, from ComfyUI's with scales in metadata."""
    shapes = tiny.layers(tiny.make_model(name))
    for naming, option in (("kohya", "--fold-alpha"), ("comfyui", "--keep-alpha")):
        tensors, wanted = tiny.adapter(tiny.CLASSES[name][0], shapes, naming)
        left_out = {path for path in shapes if path not in wanted}
        assert left_out == shapes.keys() - without(shapes, NOT_IN_TABLES.get(name, ())).keys()
        source, output = tmp_path / f"{naming}.safetensors", tmp_path / f"{naming}-d.safetensors"
        save_file(tensors, source)
        run("convert", source, output, "--to", "diffusers", option)
        assert_same(tiny.loaded(name, tiny.make_model(name), output), wanted)


def test_diffusers_own_conversion_agrees(name, tmp_path):
    """Our files of other namings, where a loader of diffusers takes them; with no alpha."""
    naming, parts = OTHER_LOADERS[name]
    table, shapes = tiny.CLASSES[name][0], tiny.layers(tiny.make_model(name))
    # For attention in UNets, diffusers takes the commonest alpha of a kohya file, not the module's:
    # `get_peft_kwargs` looks for names without the `processor` that its own converter puts in.
    ranks = (2,) if table in ("sd1", "sdxl") else (2, 3)
    tensors, changes = tiny.adapter(table, shapes, "comfyui", ranks=ranks)
    source, middle, output = (tmp_path / f"{step}.safetensors" for step in "abc")
    save_file(tensors, source)
    run("convert", source, middle, "--to", "diffusers")
    run("convert", middle, output, "--to", naming, "--names", table, "--fold-alpha")
    found = tiny.loaded(name, tiny.make_model(name), output)
    assert_same(without(found, parts), without(changes, parts))


def test_two_spellings_merge_to_their_sum(name, tmp_path):
    """kohya's names and diffusers', of other values; the first file's spelling comes out."""
    table, shapes = tiny.CLASSES[name][0], tiny.layers(tiny.make_model(name))
    source, other, merged, output = (tmp_path / f"{step}.safetensors" for step in "abcd")
    tensors, first = tiny.adapter(table, shapes, "kohya", seed=1)
    save_file(tensors, source)
    save_file(tiny.adapter(table, shapes, "comfyui", seed=2)[0], tmp_path / "comfyui.safetensors")
    _, second = tiny.adapter(table, shapes, "comfyui", seed=2)
    run("convert", tmp_path / "comfyui.safetensors", other, "--to", "diffusers")
    run("merge", f"{source}:0.75", f"{other}:-0.5", "-o", merged)
    spelled = {key.partition(".")[0] for key in load_file(merged)}
    assert spelled == {key.partition(".")[0] for key in tensors}
    run("convert", merged, output, "--to", "diffusers", "--names", table)
    wanted = {path: 0.75 * change - 0.5 * second[path] for path, change in first.items()}
    assert_same(tiny.loaded(name, tiny.make_model(name), output), wanted)
