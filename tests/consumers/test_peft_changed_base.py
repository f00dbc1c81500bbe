"""Adapters whose initialisation changes the base: their true change against the original one.

PEFT subtracts the initial product from the base weights in float32, so what it merges differs from
the formula by that one rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft_oracle as oracle
import pytest
from click.testing import CliRunner
from peft_cases import Case

from loratools.algebra.ranks import RankRule
from loratools.cli import cli
from loratools.lowrank.initial import subtract_initial
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.squeeze import squeeze
from loratools_formats import read_adapter, write_adapter
from loratools_formats.disk.errors import OptionError, UnsupportedError

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in oracle.WARNINGS),
    pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern:UserWarning"),
]

ROUNDING = 2e-7

_LINEAR = {"target_modules": ["up", "square", "down"]}
_PATTERNS = {"rank_pattern": {"up": 3}, "alpha_pattern": {"down": 5.5}}
CASES = {
    "pissa": Case("linear", _LINEAR | {"init_lora_weights": "pissa"}),
    "pissa-patterns": Case("linear", _LINEAR | _PATTERNS | {"init_lora_weights": "pissa"}),
    "pissa-rslora": Case(
        "linear", _LINEAR | _PATTERNS | {"init_lora_weights": "pissa", "use_rslora": True}
    ),
    "pissa-niter": Case("linear", _LINEAR | {"init_lora_weights": "pissa_niter_4"}),
    "pissa-conv1d-layout": Case(
        "gpt2", {"target_modules": ["c_attn", "c_proj"], "init_lora_weights": "pissa"}
    ),
    "pissa-embedding": Case(
        "embedding", {"target_modules": ["embed", "head"], "init_lora_weights": "pissa"}
    ),
    "pissa-dora": Case("linear", _LINEAR | {"init_lora_weights": "pissa", "use_dora": True}),
    "olora": Case("linear", _LINEAR | {"init_lora_weights": "olora"}),
    "olora-patterns": Case("linear", _LINEAR | _PATTERNS | {"init_lora_weights": "olora"}),
}


@dataclass(frozen=True)
class Trained:
    """An adapter before and after training, and what the model had become.

    Attributes:
        initial: folder saved right after initialisation.
        folder: folder saved after training.
        converted: what PEFT makes of both, None where it cannot.
        weights: the merged weights, in float64.
        answers: the model's outputs before merging, in float64.
    """

    initial: Path
    folder: Path
    converted: Path | None
    weights: oracle.State
    answers: np.ndarray


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Callable[[str], Trained]:
    """Return a function from a case's name to its adapter, made once."""
    root = tmp_path_factory.mktemp("changed-base")
    made = {}

    def make(name: str) -> Trained:
        if name not in made:
            made[name] = train(root / name, CASES[name])
        return made[name]

    return make


def train(root: Path, case: Case) -> Trained:
    import torch
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(
            oracle.fresh(case), LoraConfig(**{"r": 4, "lora_alpha": 12, **case.config})
        )
    model.save_pretrained(str(root / "initial"))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(root / "trained"))
    converted = None
    if not case.config.get("use_rslora"):
        converted = root / "converted"
        start = oracle.copied(root / "initial", root / "start")  # PEFT rewrites its config
        model.save_pretrained(str(converted), path_initial_model_for_weight_conversion=str(start))
    model = model.double().eval()
    answers = oracle.outputs(model, case)
    weights = oracle.state(model.merge_and_unload())
    return Trained(root / "initial", root / "trained", converted, weights, answers)


def true_change(one: Trained):
    return subtract_initial(read_adapter(one.folder), read_adapter(one.initial))


@pytest.mark.parametrize("name", CASES)
def test_the_file_can_be_read_but_its_factors_are_not_taken_for_the_change(trained, name):
    adapter = read_adapter(trained(name).folder)
    assert [caveat.code for caveat in adapter.caveats] == ["mutated-base"]
    with pytest.raises(UnsupportedError, match="init_lora_weights"):
        squeeze(adapter, RankRule(rank=2))


@pytest.mark.parametrize("name", CASES)
def test_subtracting_the_initial_adapter_gives_the_trained_weights(trained, name):
    one, base = trained(name), oracle.base_state(CASES[name])
    adapter = true_change(one)
    weights = oracle.predicted(adapter, base, oracle.own_deltas(adapter, base))
    oracle.assert_states_equal(weights, one.weights, ROUNDING)
    wrong = read_adapter(one.folder)
    doubled = oracle.predicted(wrong, base, oracle.own_deltas(wrong, base))
    differing = oracle.changes(doubled, one.weights)
    assert max(oracle.distance(doubled[n], one.weights[n]) for n in differing) > 0.05


# PEFT cannot convert rank-stabilised patterns, and loses embeddings and magnitudes.
CONVERTED = sorted(set(CASES) - {"pissa-rslora", "pissa-embedding", "pissa-dora"})


@pytest.mark.parametrize("name", CONVERTED)
def test_the_difference_is_the_one_peft_converts_to(trained, name):
    one, case, base = trained(name), CASES[name], oracle.base_state(CASES[name])
    got = oracle.own_deltas(true_change(one), base)
    want = oracle.peft_deltas(oracle.loaded(one.converted, case))
    oracle.assert_states_equal(got, want, 1e-12)
    assert read_adapter(one.converted).caveats == ()
    oracle.assert_states_equal(oracle.own_deltas(read_adapter(one.converted), base), want, 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_the_difference_written_and_loaded_on_the_original_base_is_the_trained_model(
    trained, tmp_path, name
):
    one, case = trained(name), CASES[name]
    write_adapter(true_change(one), tmp_path / "out", "peft")
    model = oracle.loaded(tmp_path / "out", case)
    assert oracle.distance(oracle.outputs(model, case), one.answers) <= 10 * ROUNDING
    merged = oracle.state(model.merge_and_unload())
    oracle.assert_states_equal(merged, one.weights, ROUNDING)


@pytest.mark.parametrize("name", CASES)
def test_it_squeezes_to_the_best_approximation_of_the_true_change(trained, tmp_path, name):
    one, case, base = trained(name), CASES[name], oracle.base_state(CASES[name])
    adapter = true_change(one)
    deltas = oracle.own_deltas(adapter, base)
    result = squeeze(adapter, RankRule(rank=5))
    write_adapter(result.adapter, tmp_path / "out", "peft")
    after = oracle.peft_deltas(oracle.loaded(tmp_path / "out", case))
    want = {weight: oracle.truncated(delta, 5, is_stack=False) for weight, delta in deltas.items()}
    oracle.assert_states_equal(after, want, 1e-5)
    lost = {weight: after[weight] - deltas[weight] for weight in deltas}
    true_error = oracle.norm(lost) / oracle.norm(deltas)
    assert result.relative_error == pytest.approx(true_error, rel=1e-9)


def test_the_command_takes_the_initial_adapter(trained, tmp_path):
    one, case = trained("pissa"), CASES["pissa"]
    command = ["squeeze", str(one.folder), "-o", str(tmp_path / "out"), "--energy", "1.0"]
    refused = CliRunner().invoke(cli, command)
    assert isinstance(refused.exception, UnsupportedError)
    assert "`initial`" in str(refused.exception)
    done = CliRunner().invoke(cli, [*command, "--initial", str(one.initial)])
    assert done.exit_code == 0, done.output
    answers = oracle.outputs(oracle.loaded(tmp_path / "out", case), case)
    assert oracle.distance(answers, one.answers) <= 10 * ROUNDING


def test_an_initial_adapter_for_a_plain_one_is_an_error(trained):
    one = trained("pissa")
    with pytest.raises(OptionError, match="changed base"):
        subtract_initial(read_adapter(one.converted), read_adapter(one.initial))


def test_the_nominal_alpha_doubles_with_the_rank_as_peft_does_it(trained, tmp_path):
    one = trained("pissa-patterns")
    result = squeeze(true_change(one), RankRule(rank=100), ComputeOptions(keep_alpha=True))
    write_adapter(result.adapter, tmp_path / "out", "peft")
    alphas = [
        {path: delta.direction.alpha for path, delta in read_adapter(folder).modules.items()}
        for folder in (tmp_path / "out", one.converted)
    ]
    assert alphas[0] == alphas[1] == {"up": 24, "square": 24, "down": 11}


@pytest.mark.parametrize("name", ["pissa", "pissa-rslora"])
def test_it_becomes_a_dora_of_the_original_base(trained, tmp_path, name):
    from safetensors.torch import save_file

    one, case = trained(name), CASES[name]
    base = tmp_path / "base.safetensors"
    save_file({k: v.contiguous().clone() for k, v in oracle.fresh(case).state_dict().items()}, base)
    command = ["to-dora", str(one.folder), "--base", str(base), "-o", str(tmp_path / "out")]
    refused = CliRunner().invoke(cli, command)
    assert "`initial`" in str(refused.exception)
    done = CliRunner().invoke(cli, [*command, "--initial", str(one.initial)])
    assert done.exit_code == 0, done.output
    answers = oracle.outputs(oracle.loaded(tmp_path / "out", case), case)
    assert oracle.distance(answers, one.answers) <= 10 * ROUNDING
