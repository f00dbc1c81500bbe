"""Every operation that writes is done again from its statement alone, and gives the same bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools.cli import cli
from loratools.pipeline.functions import writing_functions
from loratools_formats.disk.errors import (
    AdapterError,
    LoratoolsError,
    MissingFileError,
    UnsupportedError,
)
from loratools_formats.disk.provenance import PROVENANCE_FILE, sha256_of

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "outputs"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Return a folder with the inputs of all cases, some of them made here."""
    folder = tmp_path_factory.mktemp("shelf")
    shutil.copytree(ROOT / "examples" / "tiny-llama", folder / "in")
    lt.fuse(folder / "in/model", folder / "in/lora", output=folder / "tuned")
    lt.quantize(folder / "in/model", output=folder / "nf4")
    lt.convert(folder / "in/lora", base=folder / "in/model", output=folder / "adapter.gguf")
    lt.fleet_share([folder / "in/lora"], rank=8, output=folder / "set.safetensors")
    (folder / "out").mkdir()
    return folder


TWO = "in/lora:0.75 in/rslora:0.5"

# What is called, with paths below the shelf; the name of the output comes last.
CASES = {
    "squeeze": ("squeeze in/lora --energy 0.9 --dtype f16 --include mlp", "small"),
    "squeeze, randomised": ("squeeze in/lora --svd rsvd --seed 7 --budget 40%", "small"),
    "squeeze, patterns": ("squeeze in/lora --rank 4 --rank-pattern q_proj=2", "small"),
    "squeeze, dropping": ("squeeze in/lora --rank 4 --drop mlp", "small"),
    "to-lora": ("to-lora in/dora --base in/model --rank 3", "plain"),
    "to-dora": ("to-dora in/lora --base in/model", "decomposed"),
    "repair": ("repair in/lora --base in/model --lambda 0.5 --rebalance --include mlp", "repaired"),
    "extract": ("extract in/model tuned --rank 4", "extracted"),
    "merge": ("merge in/lora:0.75 in/rslora:-0.5", "sum"),
    "merge, by entries": (
        f"merge {TWO} --method dare_ties -p density=0.5 --seed 3 --rank 4 --weight-pattern mlp=1,2",
        "ties",
    ),
    "merge, keeping": ("merge in/lora in/rslora:0.5 --keep self_attn --weight-pattern q=0", "kept"),
    "merge, with a base": ("merge in/lora in/dora --base in/model --rank 4", "with-dora"),
    "convert": ("convert in/lora --to mlx", "mlx"),
    "convert, to a file": ("convert in/lora --to gguf --base in/model", "adapter.gguf"),
    "convert, from a file": ("convert adapter.gguf --to peft --base in/model", "peft"),
    "fleet-share": ("fleet share in/lora in/rslora --rank 8 --cores diagonal", "set.safetensors"),
    "fleet-add": ("fleet add set.safetensors in/rslora --name more", "more.safetensors"),
    "fleet-unshare": ("fleet unshare set.safetensors lora --dtype f32", "member"),
    "fuse": ("fuse in/model in/lora:0.5 --dtype f32", "fused"),
    "fuse, several": ("fuse in/model in/lora:0.5 in/rslora:-1 --max-shard-size 300kB", "fused"),
    "quantize": ("quantize in/model --quant-type fp4 --blocksize 128", "four-bit"),
    "dequantize": ("dequantize nf4 --dtype f16", "sixteen-bit"),
}


def run(*words):
    done = CliRunner().invoke(cli, [*map(str, words)], standalone_mode=False)
    assert done.exception is None, done.exception
    return done.return_value or 0, done.stdout


def made(shelf, case, place="out"):
    command, name = CASES[case]
    words = [shelf / word if (shelf / word.partition(":")[0]).exists() else word
             for word in command.split()]  # fmt: skip
    output = shelf / place / f"{case.replace(' ', '-')}-{name}"
    shutil.rmtree(output, ignore_errors=True)
    run(*words, "-o", output, "--overwrite")
    return output


@pytest.fixture
def from_shelf(shelf, monkeypatch):
    monkeypatch.chdir(shelf)
    return shelf


def test_every_writing_operation_has_a_case():
    cases = {name.partition(",")[0].replace("-", "_") for name in CASES}
    assert cases == set(writing_functions())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_replay_gives_the_same_bytes(case, from_shelf):
    output = made(from_shelf, case)
    code, text = run("replay", output, "--json")
    found = json.loads(text)
    assert found["identical"], found
    assert code == 0
    assert found["changed"] == found["differences"] == []
    assert found["files"]
    for one in found["files"]:
        file = output / one["name"] if output.is_dir() else output
        assert one["sha256"] == one["sha256_again"] == sha256_of(file)
    weights = [one["name"] for one in found["files"]]
    assert any(name.endswith((".safetensors", ".gguf")) for name in weights)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_statement_holds_no_folder_of_the_machine(case, from_shelf):
    output = made(from_shelf, case)
    place = output / PROVENANCE_FILE if output.is_dir() else Path(f"{output}.{PROVENANCE_FILE}")
    text = place.read_text()
    assert str(from_shelf) not in text
    assert "../../" not in text
    assert "environment" in json.loads(text)["predicate"]


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith(("fuse", "quant", "deq"))])
def test_metadata_of_adapters_tells_the_operation(case, from_shelf):
    output = made(from_shelf, case)
    if case.startswith("convert"):
        return_if_gguf(output)
    if output.suffix == ".gguf":
        return
    (file, *_) = [output] if output.is_file() else sorted(output.rglob("*.safetensors"))
    with safe_open(file, "np") as opened:
        told = opened.metadata()
    assert told["loratools.operation"] == case.partition(",")[0]
    assert told["loratools.version"] == lt.__version__
    assert json.loads(told["loratools.inputs"])
    header = file.read_bytes()
    text = header[8 : 8 + int.from_bytes(header[:8], "little")]
    keys = list(json.loads(text)["__metadata__"])
    assert keys == sorted(keys)


def return_if_gguf(output):
    if output.suffix == ".gguf":
        assert b"loratools.operation" in output.read_bytes()


def test_equal_runs_give_equal_statements(from_shelf):
    first = (made(from_shelf, "merge, by entries") / PROVENANCE_FILE).read_bytes()
    assert first == (made(from_shelf, "merge, by entries") / PROVENANCE_FILE).read_bytes()


def test_a_seed_is_recorded_and_decides(from_shelf):
    output = made(from_shelf, "merge, by entries")
    place = output / PROVENANCE_FILE
    statement = json.loads(place.read_text())
    assert statement["predicate"]["seed"] == statement["predicate"]["call"]["options"]["seed"] == 3
    statement["predicate"]["call"]["options"]["seed"] = 4
    place.write_text(json.dumps(statement))
    code, text = run("replay", output)
    assert code == 1
    assert "differs, most in" in text
    found = lt.replay(output)
    weights = next(one for one in found.files if one.name.endswith(".safetensors"))
    assert 0 < weights.difference < 10
    assert weights.tensor in load_file(output / weights.name)


def test_a_changed_output_differs_and_is_said_to_be_changed(from_shelf):
    output = made(from_shelf, "squeeze")
    file = output / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors, file, {"format": "pt"})
    found = lt.replay(output)
    assert not found.identical
    assert found.changed == ("adapter_model.safetensors",)
    weights = next(one for one in found.files if one.name.endswith(".safetensors"))
    assert weights.difference == 0  # metadata alone
    assert lt.provenance(output).changed == ("adapter_model.safetensors",)


def test_a_machine_that_differs_is_told(from_shelf):
    output = made(from_shelf, "squeeze")
    place = output / PROVENANCE_FILE
    statement = json.loads(place.read_text())
    statement["predicate"]["environment"] |= {"kernel": "Katmai", "numpy": "1.0"}
    statement["predicate"]["call"]["options"]["energy"] = 0.8
    place.write_text(json.dumps(statement))
    done = CliRunner().invoke(cli, ["replay", str(output)], standalone_mode=False)
    assert done.return_value == 1
    assert "BLAS kernel, which the processor decides: Katmai then" in done.stderr
    assert "numpy: 1.0 then" in done.stderr


@pytest.fixture
def chain(tmp_path):
    """Return a folder with an adapter that was made in three steps."""
    shutil.copytree(ROOT / "examples" / "tiny-llama", tmp_path / "in")
    lt.squeeze(tmp_path / "in/lora", rank=6, output=tmp_path / "small")
    lt.to_lora(tmp_path / "in/dora", base=tmp_path / "in/model", rank=4, output=tmp_path / "plain")
    lt.merge({tmp_path / "small": 0.7, tmp_path / "plain": 0.3}, rank=4, output=tmp_path / "both")
    return tmp_path


def test_the_chain_leads_back_to_the_originals(chain):
    shutil.rmtree(chain / "small")
    shutil.rmtree(chain / "plain")
    found = lt.provenance(chain / "both")
    assert [step.operation for step in found.steps] == ["squeeze", "to-lora", "merge"]
    squeezed, plain, merged = found.steps
    assert {(one.role, one.step) for one in merged.inputs} == {("0", 1), ("1", 2)}
    assert {one.given for one in squeezed.inputs} == {"lora"}
    assert {one.role for one in plain.inputs} == {"adapter", "base"}
    assert all(one.step is None for one in (*squeezed.inputs, *plain.inputs))
    digests = {one.digest.get("sha256") for one in squeezed.inputs}
    assert sha256_of(chain / "in/lora/adapter_model.safetensors") in digests
    assert found.changed == ()


def test_inputs_that_are_gone_are_made_again(chain):
    shutil.rmtree(chain / "small")
    shutil.rmtree(chain / "plain")
    found = lt.replay(chain / "both")
    assert found.identical
    assert sorted(found.done) == ["merge", "squeeze", "to-lora"]
    (chain / "in").rename(chain / "elsewhere")
    with pytest.raises(MissingFileError, match=r"lora, whose adapter_model.safetensors has sha256"):
        lt.replay(chain / "both")
    found = lt.replay(chain / "both", input=[chain / "elsewhere"], output=chain / "again")
    assert found.identical
    assert (chain / "again" / PROVENANCE_FILE).exists()
    again = sha256_of(chain / "again/adapter_model.safetensors")
    assert again == sha256_of(chain / "both/adapter_model.safetensors")


def test_an_input_that_was_changed_is_not_taken(chain):
    file = chain / "in/lora/adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: value * 2 for key, value in tensors.items()}, file)
    with pytest.raises(MissingFileError, match="is not where it was"):
        lt.replay(chain / "small")
    done = CliRunner().invoke(cli, ["replay", str(chain / "small")])
    assert done.exit_code != 0


def test_what_was_made_in_memory_is_made_again_in_memory(tmp_path):
    shutil.copytree(ROOT / "examples" / "tiny-llama", tmp_path / "in")
    plain = lt.to_lora(tmp_path / "in/dora", base=tmp_path / "in/model", rank=4).adapter
    lt.squeeze(plain, rank=2, output=tmp_path / "small")
    assert lt.replay(tmp_path / "small").done == ("to-lora", "squeeze")
    assert lt.replay(tmp_path / "small").identical
    steps = lt.provenance(tmp_path / "small").steps
    assert [step.operation for step in steps] == ["to-lora", "squeeze"]
    assert [one.step for one in steps[1].inputs] == [1]


def test_what_is_written_later_is_recorded_too(chain):
    lt.fuse(chain / "in/model", chain / "in/lora").write(chain / "fused")
    lt.quantize(chain / "in/model").write(chain / "nf4")
    lt.squeeze(chain / "in/lora", rank=2).write(chain / "later")
    for name in ("fused", "nf4", "later"):
        assert lt.replay(chain / name).identical


def test_a_merge_from_a_recipe_is_recorded_as_the_merge_it_stands_for(chain):
    recipe = chain / "both" / "recipe.yaml"
    run("merge", "--recipe", recipe, "-o", chain / "again")
    found = lt.replay(chain / "again")
    assert found.identical
    assert found.left_out == ("recipe.yaml",)


@pytest.mark.parametrize("version", sorted(folder.name for folder in GOLDEN.iterdir()))
def test_statements_of_earlier_versions_are_shown_and_cannot_be_replayed(version):
    for place in sorted((GOLDEN / version).rglob(f"*{PROVENANCE_FILE}")):
        found = lt.provenance(place)
        assert found.changed == ()
        assert found.steps[-1].version == version
        assert lt.provenance(found.path).steps == found.steps
        if version == "0.1.0":
            with pytest.raises(UnsupportedError, match="does not say how it was called"):
                lt.replay(found.path)


def test_metadata_tells_where_no_statement_is(chain):
    (chain / "both" / PROVENANCE_FILE).unlink()
    (chain / "small" / PROVENANCE_FILE).unlink()
    (step,) = lt.provenance(chain / "both").steps
    assert step.told_by == "metadata"
    assert step.operation == "merge"
    lt.merge({chain / "small": 0.7, chain / "plain": 0.3}, rank=4, output=chain / "more")
    steps = lt.provenance(chain / "more").steps
    assert [(one.operation, one.told_by) for one in steps] == [
        ("squeeze", "metadata"), ("to-lora", "statement"), ("merge", "statement"),
    ]  # fmt: skip


HOSTILE = [
    lambda p: p["call"].update(function="os.system"),
    lambda p: p["call"].update(function="write"),
    lambda p: p["call"].update(function=7),
    lambda p: p["call"].update(options={"output": "/elsewhere/x"}),
    lambda p: p["call"].update(options={"rnk": 4}),
    lambda p: p["call"].update(options={"rank": "many"}),
    lambda p: p["call"].update(options=[1]),
    lambda p: p["call"].update(arguments={"progress": {"path": "x", "roles": []}}),
    lambda p: p["call"].update(arguments={}),
    lambda p: p["call"].update(arguments={"source": 5}),
    lambda p: p["call"].update(arguments={"source": {"roles": "x"}}),
    lambda p: p["call"].update(arguments={"source": {"made": "adapter"}}),
    lambda p: p["call"].update(arguments={"source": {"made": None}}),
    lambda p: p.update(inputs=7),
    lambda p: p.update(inputs=[7]),
    lambda p: p.update(call=None),
    lambda p: p["inputs"][0].update(digest={"sha256": "0" * 64}),
    lambda p: p["inputs"][0].update(digest={"sha3": "0" * 64}),
]


@pytest.mark.slow
@pytest.mark.parametrize("spoil", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_statements_are_refused_in_one_line(spoil, chain):
    place = chain / "small" / PROVENANCE_FILE
    statement = json.loads(place.read_text())
    spoil(statement["predicate"])
    place.write_text(json.dumps(statement))
    with pytest.raises(LoratoolsError) as caught:
        lt.replay(chain / "small")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in chain.iterdir()) == ["both", "in", "plain", "small"]


def test_a_file_that_was_made_from_itself_is_refused(chain):
    place = chain / "both" / PROVENANCE_FILE
    statement = json.loads(place.read_text())
    first = statement["predicate"]["history"][0]
    assert first["subject"][1]["name"].endswith(".safetensors")
    first["predicate"]["inputs"][0]["digest"] = first["subject"][1]["digest"]
    place.write_text(json.dumps(statement))
    for folder in ("small", "plain"):
        shutil.rmtree(chain / folder)
    with pytest.raises(AdapterError, match="made from itself"):
        lt.provenance(chain / "both")
    with pytest.raises(AdapterError, match="made from itself"):
        lt.replay(chain / "both")


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"predicateType": "x"}', b"\xff", b"[" * 100_000,
     b'{"predicateType": "urn:loratools:operation:v1", "predicate": 1, "subject": []}',
     b'{"predicateType": "urn:loratools:operation:v1", "predicate": {}, "subject": [1]}',
     b'{"predicateType": "urn:loratools:operation:v1", "predicate": {"inputs": 1}, "subject": []}',
     ],
)  # fmt: skip
def test_files_that_are_no_statements(content, chain):
    (chain / "small" / PROVENANCE_FILE).write_bytes(content)
    with pytest.raises(AdapterError) as caught:
        lt.provenance(chain / "small")
    assert "\n" not in str(caught.value)
    # As an input's statement it says nothing, and hinders nothing.
    lt.squeeze(chain / "small", rank=2, output=chain / "smaller")
    assert lt.replay(chain / "smaller").identical


def test_no_statement(chain):
    with pytest.raises(MissingFileError, match="nothing says how it was made"):
        lt.provenance(chain / "in" / "lora")
    with pytest.raises(MissingFileError, match="no such file"):
        lt.provenance(chain / "nowhere")
