"""Seeds: which are taken, that each makes other numbers, and that statements hold them."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import loratools as lt
from loratools.work.seeds import seed_of_64_bits, seed_of_matrix

LORA = Path(__file__).parents[1] / "examples" / "tiny-llama" / "lora"
LONG = 123_456_789_012_345_678_901_234_567_890
WEIGHTS, STATEMENT = "adapter_model.safetensors", "provenance.json"


@given(st.integers(0, 2**64 - 1))
def test_a_seed_of_64_bits_stands_for_itself(seed):
    assert seed_of_64_bits(seed) == seed


@given(st.integers(2**64, 10**4000))
def test_a_longer_one_stands_for_one_of_64_bits(seed):
    short = seed_of_64_bits(seed)
    assert 0 <= short < 2**64
    assert seed_of_64_bits(short) == short != seed_of_64_bits(seed + 1)


def test_every_seed_and_every_matrix_has_numbers_of_its_own():
    seeds = [0, 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
    found = {seed_of_matrix(seed, label) for seed in seeds for label in ("q#0", "q#1", "k#0")}
    assert len(found) == 18


def test_a_long_seed_is_taken_recorded_and_replayed(tmp_path):
    shutil.copytree(LORA, tmp_path / "in")
    made = {}
    for name, seed in (("long", LONG), ("short", seed_of_64_bits(LONG)), ("other", 7)):
        how = {"svd": "rsvd", "power_iterations": 0, "rank": 2, "seed": seed}
        lt.squeeze(tmp_path / "in", output=tmp_path / name, **how)
        made[name] = (tmp_path / name / WEIGHTS).read_bytes()
    assert made["long"] == made["short"] != made["other"]
    statement = json.loads((tmp_path / "long" / STATEMENT).read_text())
    assert statement["predicate"]["seed"] == seed_of_64_bits(LONG)
    assert lt.replay(tmp_path / "long").identical


@pytest.mark.parametrize("call", [lt.squeeze, lambda path, seed: lt.compare([path], seed=seed)])
def test_a_negative_seed_is_refused(call):
    with pytest.raises(lt.LoratoolsError, match="seed is negative"):
        call(LORA, seed=-1)
