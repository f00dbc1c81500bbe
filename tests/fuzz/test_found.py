"""What once broke loratools is read or refused; so is a sample of mutations, and every prefix.

`make fuzz MINUTES=10` runs for longer, and adds to `found/`.
"""

import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("limits are Linux's", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))

from mutate import mutated
from run import one
from seeds import make

from loratools_formats.containers.gguf.container import read_gguf
from loratools_formats.containers.safetensors_read import read_safetensors
from loratools_formats.disk.errors import LoratoolsError

FOUND = sorted((Path(__file__).parent / "found").glob("*.json"))
SAMPLE = range(2)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("seeds")


@pytest.fixture(scope="module")
def seeds(root):
    return {seed.name: seed for seed in make(root)}


@pytest.fixture(scope="module")
def apart():
    """Return a function that runs a case from a process without threads, which can be forked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENBLAS_NUM_THREADS", "1")
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as executor:
            yield lambda *case: executor.submit(one, *case).result()


@pytest.mark.slow
@pytest.mark.parametrize("facts", FOUND, ids=lambda path: path.stem)
def test_what_was_found_is_mended(facts, seeds, root, apart):
    told = json.loads(facts.read_text())
    outcome = apart(seeds[told["seed"]], facts.with_suffix(".bin").read_bytes(), root)
    assert not outcome.is_fault, f"{outcome}; it was {told}"


@pytest.mark.slow
def test_a_sample_of_mutations(seeds, root, apart):
    by_format = {seed.format: seed for seed in seeds.values()}
    assert len(by_format) == 19
    for seed in by_format.values():
        sound = seed.mutated.read_bytes()
        for number in SAMPLE:
            outcome = apart(seed, mutated(sound, seed.name, number), root)
            assert not outcome.is_fault, f"{seed.name} {number}: {outcome}"
        assert seed.mutated.read_bytes() == sound


@pytest.mark.parametrize(
    ("name", "read"),
    [("single/xlabs.safetensors", read_safetensors), ("gguf/lora.gguf", read_gguf)],
)
def test_every_prefix_of_a_header_is_refused(name, read, seeds, tmp_path):
    data = seeds[name].mutated.read_bytes()
    file = tmp_path / Path(name).name
    for length in range(0, min(len(data), 6000), 3):
        file.write_bytes(data[:length])
        with pytest.raises(LoratoolsError):
            read(file)
