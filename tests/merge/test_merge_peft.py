"""Merged adapters in real PEFT: they load, and answer as the true combination does."""

from pathlib import Path

import numpy as np
import pytest
from merge_cases import (
    all_stacked,
    config_of,
    distance,
    linear,
    run,
    save,
    stacked,
    stored,
    total_distance,
    true_deltas,
    weighted_sum,
)
from merge_definitions import elected, iso_definition, knots_definition, trimmed, tsv_definition
from merge_models import DORA_KINDS, KINDS, loaded_by_peft, saved_base, saved_by_peft

from loratools.algebra.ranks import RankRule
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.merge.align import MergeInput
from loratools.operations.merge.operation import merge
from loratools.operations.merge.options import MergeOptions
from loratools_formats import read_adapter

EXAMPLES = Path(__file__).parents[2] / "examples" / "tiny-llama"
BASE, LORA, RSLORA, DORA = (EXAMPLES / name for name in ("model", "lora", "rslora", "dora"))
FULL = RankRule(rank=128)
F32 = ComputeOptions(dtype="f32")
Q0, Q1 = (f"model.layers.{i}.self_attn.q_proj" for i in range(2))
DOWN = "model.layers.2.mlp.down_proj"

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def llama():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BASE).double().eval()


def logits(model):
    import torch

    ids = torch.randint(0, 2048, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids).logits.numpy().copy()


def logits_in_peft(folder):
    """Load an adapter over the base by PEFT, which must know every tensor, and run it."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(llama(), str(folder)).double().eval()
    loaded = {name for name in model.state_dict() if ".lora_" in name}
    assert len(loaded) == len(stored(folder))
    return logits(model)


def logits_of(changes):
    """Run the base with ΔW added to its weights."""
    import torch

    model = llama()
    weights = model.state_dict()
    with torch.no_grad():
        for name, change in changes.items():
            weights[f"{name}.weight"].add_(torch.from_numpy(change))
    return logits(model)


@pytest.fixture(scope="module")
def base_logits():
    return logits(llama())


@pytest.fixture(scope="module")
def dora_changes():
    """What the DoRA does to the base, by PEFT."""
    from peft import PeftModel

    before = llama().state_dict()
    after = PeftModel.from_pretrained(llama(), str(DORA)).double().merge_and_unload().state_dict()
    return {
        name.removesuffix(".weight"): (after[name] - before[name]).numpy()
        for name in before
        if not np.array_equal(after[name].numpy(), before[name].numpy())
    }


def assert_answers(folder, changes, base_logits, limit):
    """The difference that the adapter makes is that of the changes."""
    want = logits_of(changes) - base_logits
    assert distance(logits_in_peft(folder) - base_logits, want) <= limit


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -0.5)])
def test_linear_of_lora_and_rslora(tmp_path, base_logits, weights):
    pairs = list(zip([LORA, RSLORA], weights, strict=True))
    run(tmp_path / "out", pairs, compute=F32)
    assert_answers(tmp_path / "out", weighted_sum(pairs), base_logits, 1e-6)


def test_linear_in_the_type_of_its_inputs(tmp_path, base_logits):
    pairs = [(LORA, 0.7), (RSLORA, 0.3)]
    result, _ = run(tmp_path / "out", pairs)
    # Factors of 8 bits: what is lost in ΔW shows in the answers at the same size.
    assert 1e-4 < result.relative_error < 4e-3
    assert_answers(tmp_path / "out", weighted_sum(pairs), base_logits, 2 * result.relative_error)


def test_ranks_chosen_by_energy_load_with_their_patterns(tmp_path, base_logits):
    pairs = [(LORA, 0.7), (RSLORA, 0.3)]
    result, got = run(tmp_path / "out", pairs, rule=RankRule(energy=0.9), compute=F32)
    assert len({module.rank_out for module in result.modules}) > 3
    assert config_of(tmp_path / "out")["rank_pattern"]
    assert_answers(tmp_path / "out", got, base_logits, 1e-9)


def test_ties(tmp_path, base_logits):
    pairs = [(LORA, 0.7), (RSLORA, 0.5)]
    parameters = {"density": 0.3}
    run(tmp_path / "out", pairs, "ties", parameters=parameters, rule=FULL, compute=F32)
    want = {}
    for name, deltas in all_stacked(pairs).items():
        x = trimmed(deltas.astype(np.float32), 0.3)
        # The definition for whole arrays, for speed; compared with it on a corner.
        winner = np.where(x.sum(axis=0) >= 0, 1, -1)
        agree = np.sign(x) == winner
        total = (np.array([0.7, 0.5])[:, None, None] * x * agree).sum(axis=0)
        want[name] = total / np.maximum(agree.sum(axis=0), 1)
    corner = x[:, :9, :9]
    assert distance(elected(corner, (0.7, 0.5), "total", "peft"), want[name][:9, :9]) <= 1e-12
    assert_answers(tmp_path / "out", want, base_logits, 1e-6)


@pytest.mark.parametrize("method", ["tsv", "iso", "knots"])
def test_core_methods(tmp_path, base_logits, method):
    pairs = [(LORA, 1.0), (RSLORA, 1.0)]
    parameters = {"density": 0.3} if method == "knots" else {}
    _, got = run(tmp_path / "out", pairs, method, parameters=parameters, compute=F32)
    deltas = stacked(pairs, DOWN)
    want = {
        "tsv": lambda: tsv_definition(deltas, (1.0, 1.0)),
        "iso": lambda: iso_definition(deltas, (1.0, 1.0)),
        "knots": lambda: knots_definition(deltas, (1.0, 1.0), 0.3, "total", "peft"),
    }[method]()
    assert distance(got[DOWN], want) <= 1e-6
    assert_answers(tmp_path / "out", got, base_logits, 1e-9)


def test_dora_through_its_base(tmp_path, base_logits, dora_changes):
    result, got = run(tmp_path / "out", [(DORA, 1.0)], base=BASE, rule=FULL, compute=F32)
    assert total_distance(got, dora_changes) <= 1e-6
    assert config_of(tmp_path / "out")["use_dora"] is False
    assert_answers(tmp_path / "out", dora_changes, base_logits, 1e-6)
    assert_that_it_is_the_dora(base_logits, tmp_path / "out")
    assert result.energy == pytest.approx(1.0)


def assert_that_it_is_the_dora(base_logits, folder):
    from peft import PeftModel

    dora = logits(PeftModel.from_pretrained(llama(), str(DORA)).double().eval()) - base_logits
    assert distance(logits_in_peft(folder) - base_logits, dora) <= 1e-6


def test_dora_with_lora_and_rslora(tmp_path, base_logits, dora_changes):
    pairs = [(LORA, 0.5), (DORA, 0.4), (RSLORA, -0.2)]
    run(tmp_path / "out", pairs, base=BASE, rule=FULL, compute=F32)
    want = weighted_sum([(LORA, 0.5), (RSLORA, -0.2)])
    want = {name: want[name] + 0.4 * change for name, change in dora_changes.items()}
    assert_answers(tmp_path / "out", want, base_logits, 1e-6)


def test_peft_gets_this_wrong_and_we_do_not(tmp_path, base_logits):
    # add_weighted_adapter of one rsLoRA at weight 1 is not that adapter (peft 0.21.2, issue 3761).
    from peft import PeftModel

    model = PeftModel.from_pretrained(llama(), str(RSLORA), adapter_name="one")
    model.add_weighted_adapter(["one"], [1.0], "two", combination_type="cat")
    model.set_adapter("two")
    want = logits_of(true_deltas(RSLORA)) - base_logits
    assert distance(logits(model.double()) - base_logits, want) > 0.1
    run(tmp_path / "out", [(RSLORA, 1.0)])
    assert distance(logits_in_peft(tmp_path / "out") - base_logits, want) <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_every_kind_loads_and_changes_the_base_as_told(tmp_path, kind, method):
    one, first = saved_by_peft(tmp_path / "one", kind, 1)
    two, second = saved_by_peft(tmp_path / "two", kind, 2, use_rslora=kind != "experts", r=3)
    pairs = [(one, 0.7), (two, -0.4)]
    rule = FULL if method == "ties" else RankRule()
    _, got = run(tmp_path / "out", pairs, method, rule=rule)
    found = loaded_by_peft(tmp_path / "out", kind)
    assert total_distance(found, got) <= 1e-9
    if method == "linear":
        want = {name: 0.7 * first[name] - 0.4 * second[name] for name in first}
        assert total_distance(found, want) <= 1e-6


@pytest.mark.parametrize("kind", DORA_KINDS)
def test_a_merged_dora_of_every_kind_loads_as_a_plain_adapter(tmp_path, kind):
    one, first = saved_by_peft(tmp_path / "one", kind, 1, use_dora=True)
    two, second = saved_by_peft(tmp_path / "two", kind, 2, use_dora=True)
    base = saved_base(tmp_path / "base", kind)
    run(tmp_path / "out", [(one, 0.7), (two, 0.3)], base=base, rule=FULL)
    want = {name: 0.7 * first[name] + 0.3 * second[name] for name in first}
    assert total_distance(loaded_by_peft(tmp_path / "out", kind), want) <= 1e-6


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 1 LoRA tensor:UserWarning")
def test_factor_biases_load(tmp_path):
    import torch
    from merge_models import base_model
    from peft import PeftModel

    one, _ = saved_by_peft(tmp_path / "one", "linear", 1, lora_bias=True, target_modules=["up"])
    two, _ = saved_by_peft(tmp_path / "two", "linear", 2, target_modules=["up"])
    run(tmp_path / "out", [(one, 0.7), (two, 0.3)])

    def merged_bias(folder):
        model = PeftModel.from_pretrained(base_model("linear"), str(folder)).double()
        with torch.no_grad():
            after = model.merge_and_unload().state_dict()["up.bias"]
            return (after - base_model("linear").state_dict()["up.bias"]).numpy()

    assert np.linalg.norm(merged_bias(one)) > 0.1
    assert distance(merged_bias(tmp_path / "out"), 0.7 * merged_bias(one)) <= 1e-6


def llama_modules(*names):
    shapes = {"q_proj": (128, 128), "k_proj": (64, 128), "down_proj": (128, 352)}
    return {name: linear(*shapes[name.rpartition(".")[2]], 4) for name in names}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (
            ([Q0, DOWN], {"target_modules": ["q_proj", "down_proj"]}),
            ([Q0, Q1], {"target_modules": "model.*q_proj"}),
        ),
        (
            ([Q0], {"target_modules": ["q_proj"], "layers_to_transform": [0]}),
            ([Q0, Q1], {"target_modules": ["q_proj"], "layers_to_transform": [0, 1]}),
        ),
        (
            ([Q0], {"target_modules": ["q_proj"], "exclude_modules": [Q1]}),
            ([Q0, Q1], {"target_modules": ["q_proj"]}),
        ),
    ],
    ids=["target_modules", "layers_to_transform", "exclude_modules"],
)
def test_adapters_with_other_targets_load_whole(tmp_path, base_logits, first, second):
    pairs = [
        (
            save(
                tmp_path / f"a{index}",
                llama_modules(*names),
                seed=index,
                task_type="CAUSAL_LM",
                **config,
            ),
            0.1,
        )
        for index, (names, config) in enumerate([first, second])
    ]
    for index, given in enumerate([pairs, pairs[::-1]]):
        out = tmp_path / f"out{index}"
        run(out, given)
        model = peft_model(out)
        adapted = {
            name.partition(".lora_A.")[0].removeprefix("base_model.model.")
            for name in model.state_dict()
            if ".lora_A." in name
        }
        assert adapted >= set(true_deltas(out))
        want = logits_of(weighted_sum(pairs)) - base_logits
        assert distance(logits(model) - base_logits, want) <= 1e-6


def peft_model(folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(llama(), str(folder)).double().eval()


def test_merging_in_memory_is_merging_files(tmp_path):
    # The result's tensors can be read before it is written, and hold what is written.
    inputs = [
        MergeInput(read_adapter(LORA), 0.7, "lora"),
        MergeInput(read_adapter(RSLORA), 0.3, "rslora"),
    ]
    result = merge(inputs, MergeOptions())
    _, got = run(tmp_path / "out", [(LORA, 0.7), (RSLORA, 0.3)])
    for name, change in result.adapter.modules.items():
        delta = change.direction
        product = delta.scale * delta.b.load(np.float64) @ delta.a.load(np.float64)
        assert np.array_equal(product, got[name])
