"""Every kind of adapter, fused by the command, is what PEFT makes of it.

Two judges: `merge_and_unload`, tensor by tensor, and the adapter applied live, by what the model
answers. Both are PEFT in float64 on a base of float32, and the fused checkpoint is stored in
float32. So a tensor may differ by one rounding, 2^-24 of its norm at most; answers by some of
those, amplified by a few layers: at most 4.5e-7 was seen, and 2e-6 is allowed.
"""

from __future__ import annotations

import json
from pathlib import Path

import fuse_oracle
import numpy as np
import peft_oracle as oracle
import pytest
from peft_cases import CASES, SHARED, Case
from safetensors.numpy import load_file

from loratools_formats.checkpoints.checkpoint import read_checkpoint

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.WARNINGS]

ANSWERS = 2e-6

# What the type of the adapter's own tensors is does not matter here beyond one other than the base.
NAMES = [name for name in CASES if not name.endswith(("-float16", "-float64"))]


@pytest.fixture(scope="session")
def base_of(tmp_path_factory):
    """Return a function from a case to the checkpoint of its base; not to be changed."""
    root = tmp_path_factory.mktemp("bases")
    made = {}

    def folder(case: Case) -> Path:
        key = (case.model, case.prepare)
        if key not in made:
            made[key] = fuse_oracle.save_base(root / str(len(made)), oracle.fresh(case))
        return made[key]

    return folder


@pytest.mark.parametrize("name", NAMES)
def test_fused_is_what_peft_merges_and_what_it_answers(saved, base_of, tmp_path, name):
    case = CASES[name]
    fuse_oracle.fuse(base_of(case), saved(name), "-o", tmp_path / "out")
    fused = fuse_oracle.load(tmp_path / "out", case)
    live = oracle.loaded(saved(name), case)
    answers = oracle.outputs(live, case)
    assert oracle.distance(oracle.outputs(fused, case), answers) <= ANSWERS
    without = oracle.outputs(oracle.fresh(case).double(), case)
    assert oracle.distance(without, answers) > 1000 * ANSWERS, "the adapter hardly shows"
    if name not in SHARED:
        merged = oracle.state(live.merge_and_unload())
        oracle.assert_states_equal(oracle.state(fused), merged, fuse_oracle.ROUNDING)


@pytest.mark.parametrize("name", ["embedding-tied", "embedding-ensure-tying"])
def test_what_is_tied_parts_only_if_its_changes_do(saved, base_of, tmp_path, name):
    out = fuse_oracle.fuse(base_of(CASES[name]), saved(name), "-o", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in stored) == (not config["tie_word_embeddings"])
    if "lm_head.weight" in stored:
        assert "lm_head.weight were tied" in out
        before = load_file(base_of(CASES[name]) / "model.safetensors")
        same = [
            np.array_equal(stored[key], before["model.embed_tokens.weight"])
            for key in ("lm_head.weight", "model.embed_tokens.weight")
        ]
        assert same == [True, False]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [False, True])
def test_a_vocabulary_grows_with_the_adapter(saved, base_of, tmp_path, tied, rows):
    """The base has 48 tokens, the adapter 51: all of its matrices and the config follow."""
    name = {
        (False, False): "vocabulary-grown",
        (False, True): "vocabulary-grown-token-rows",
        (True, True): "vocabulary-grown-token-rows-tied",
        (True, False): "vocabulary-grown",
    }[tied, rows]
    case = CASES[name]
    small = Case("llama_tied" if tied else "llama", {})
    if tied and not rows:
        case = Case("llama_tied", case.config, prepare=case.prepare, save_options=case.save_options)
        adapter = oracle.save(tmp_path / "adapter", case)
    else:
        adapter = saved(name)
    out = fuse_oracle.fuse(base_of(small), adapter, "-o", tmp_path / "out")
    assert "51 entries" in out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == 51
    assert config["tie_word_embeddings"] is tied
    fused = fuse_oracle.load(tmp_path / "out", case)
    live = oracle.loaded(adapter, case)
    answers = oracle.outputs(live, case)
    assert answers.shape[-1] == 51
    assert oracle.distance(oracle.outputs(fused, case), answers) <= ANSWERS


_LLAMA = {"target_modules": ["q_proj", "down_proj"]}
_TOGETHER = {
    "llama": [
        Case("llama", _LLAMA),
        Case("llama", _LLAMA | {"use_rslora": True, "rank_pattern": {"q_proj": 7}}),
        Case("llama", {"target_modules": ["v_proj", "q_proj", "lm_head", "embed_tokens"]}),
    ],
    "gpt2": [
        Case("gpt2", {"target_modules": ["c_attn", "c_fc"]}),
        Case("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
        Case("gpt2", {"target_modules": ["c_attn", "c_fc"], "use_dora": True}),
    ],
    "conv": [
        Case("conv", {"target_modules": ["wide", "solid"]}),
        Case("conv", {"target_modules": ["wide", "line"], "use_dora": True}),
    ],
    "mixtral": [
        Case("mixtral", {"target_modules": ["q_proj"],
                         "target_parameters": ["mlp.experts.gate_up_proj"]}),
        Case("mixtral", {"target_modules": ["gate"], "r": 2,
                         "target_parameters": ["mlp.experts.gate_up_proj",
                                               "mlp.experts.down_proj"]}),
    ],
}  # fmt: skip


@pytest.mark.parametrize("model", _TOGETHER)
def test_several_adapters_at_once_are_the_sum_of_their_changes(base_of, tmp_path, model):
    """Each change is taken against the unmerged base, also a DoRA's: as PEFT takes each alone."""
    cases = _TOGETHER[model]
    weights = [-0.5, 0.25, 1.0][-len(cases) :]
    base, given = oracle.base_state(cases[0]), []
    want = {name: array.copy() for name, array in base.items()}
    for number, (case, weight) in enumerate(zip(cases, weights, strict=True)):
        folder = oracle.save(tmp_path / f"a{number}", case, seed=number)
        alone = oracle.state(oracle.loaded(folder, case).merge_and_unload())
        for name, array in oracle.changes(alone, base).items():
            want[name] += weight * array
        given.append(f"{folder}:{weight}")
    fuse_oracle.fuse(base_of(cases[0]), *given, "-o", tmp_path / "out")
    fused = oracle.state(fuse_oracle.load(tmp_path / "out", cases[0]))
    oracle.assert_states_equal(fused, want, fuse_oracle.ROUNDING)


def test_several_at_once_are_what_peft_answers_and_merges_together(base_of, tmp_path):
    """PEFT scales what came before a DoRA by it, so that its order matters; ours does not.

    With the DoRA first both mean the same.
    """
    from peft import PeftModel

    plain, _, dora = _TOGETHER["gpt2"]
    cases = [dora, plain, _plain_again(plain)]
    folders = [oracle.save(tmp_path / f"a{i}", case, seed=i) for i, case in enumerate(cases)]
    fuse_oracle.fuse(base_of(plain), *folders, "-o", tmp_path / "out")
    fuse_oracle.fuse(base_of(plain), *folders[::-1], "-o", tmp_path / "backwards")
    model = PeftModel.from_pretrained(oracle.fresh(plain), str(folders[0]), "a0")
    for number in (1, 2):
        model.load_adapter(str(folders[number]), f"a{number}")
    names = ["a0", "a1", "a2"]
    model = model.double().eval()
    model.base_model.set_adapter(names)
    answers = oracle.outputs(model, plain)
    merged = oracle.state(model.merge_and_unload(adapter_names=names))
    for folder in ("out", "backwards"):
        fused = fuse_oracle.load(tmp_path / folder, plain)
        oracle.assert_states_equal(oracle.state(fused), merged, fuse_oracle.ROUNDING)
        assert oracle.distance(oracle.outputs(fused, plain), answers) <= ANSWERS


def _plain_again(case: Case) -> Case:
    return Case(case.model, case.config | {"use_rslora": True, "r": 3})


@pytest.mark.parametrize("name", ["linear", "conv1d-layout", "dora", "experts-mixtral"])
def test_float32_is_as_peft_in_float32(saved, base_of, tmp_path, name):
    """PEFT rounds its product and its sum in float32; ours differs from it by no more than that."""
    from peft import PeftModel

    case = CASES[name]
    fuse_oracle.fuse(base_of(case), saved(name), "-o", tmp_path / "out")
    fused = oracle.state(fuse_oracle.load(tmp_path / "out", case))
    model = PeftModel.from_pretrained(oracle.fresh(case), str(saved(name))).eval()
    merged = oracle.state(model.merge_and_unload())
    exact = oracle.state(oracle.loaded(saved(name), case).merge_and_unload())
    oracle.assert_states_equal(fused, merged, 5e-7)
    ours = max(oracle.distance(fused[key], exact[key]) for key in exact)
    theirs = max(oracle.distance(merged[key], exact[key]) for key in exact)
    assert ours <= theirs


def test_a_fused_adapter_taken_out_again_leaves_the_base_up_to_rounding(saved, base_of, tmp_path):
    case = CASES["rslora"]
    fuse_oracle.fuse(base_of(case), saved("rslora"), "-o", tmp_path / "in")
    out = fuse_oracle.fuse(tmp_path / "in", f"{saved('rslora')}:-1", "-o", tmp_path / "out")
    assert "up to rounding, not bit for bit" in out
    before, within, after = (
        {key: ref.load() for key, ref in read_checkpoint(folder).tensors.items()}
        for folder in (base_of(case), tmp_path / "in", tmp_path / "out")
    )
    changed = [key for key in before if not np.array_equal(before[key], within[key])]
    assert sorted(changed) == ["down.weight", "square.weight", "up.weight"]
    for key, array in before.items():
        step = np.spacing(np.abs(within[key])) / 2 + np.spacing(np.abs(array)) / 2
        assert (np.abs(after[key] - array) <= step * 1.001).all(), key
