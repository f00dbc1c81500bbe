"""Next steps in errors about experts: a pasted command repeats all that was given, and works."""

import shlex

import pytest
from expert_files import Change, base, each, save, stacked
from safetensors.numpy import load_file

import loratools as lt
from loratools.cli import cli
from loratools_formats.disk.errors import LoratoolsError

CASES = {
    "layout": (stacked, ["--experts", "each"]),
    "type and text": (stacked, ["--experts", "each", "--dtype", "bf16", "--set", "note=a b"]),
    "one projection": (each, ["--experts", "stacked", "--keep", "up_proj|gate_proj"]),
    "Tinker": (stacked, ["--to", "tinker"]),
    "program": (stacked, ["--for", "vllm"]),
    "release": (each, ["--experts", "stacked", "--peft-layout", "0.18"]),
}


@pytest.mark.parametrize("case", CASES)
def test_command_of_a_hint_does_what_was_asked_for(case, tmp_path):
    from click.testing import CliRunner

    make, options = CASES[case]
    change = Change(width=8, inner=8)
    tensors, config = make(change)
    config["base_model_name_or_path"] = "somebody/model"  # tells nothing
    folder = save(tmp_path / "a b", (tensors, config))
    model = base(tmp_path / "base", change, stacks=True)
    given = ["convert", str(folder), *options, "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, given)
    error = done.exception
    assert isinstance(error, LoratoolsError), done.output
    command = error.hint.rpartition("Give the base: ")[2]
    words = [str(model) if word == "BASE" else word for word in shlex.split(command)]
    assert words[0] == "loratools"
    assert set(options) <= set(words)
    done = CliRunner().invoke(cli, words[1:], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    lt.convert(folder, base=model, output=tmp_path / "wanted", **_keywords(options))
    made, wanted = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "wanted")
    )
    assert made.keys() == wanted.keys()
    assert all(made[key].tobytes() == wanted[key].tobytes() for key in wanted)


def _keywords(options):
    found = {}
    for flag, value in zip(options[::2], options[1::2], strict=True):
        name = flag.removeprefix("--").replace("-", "_")
        found["for_" if name == "for" else name] = (
            dict([value.split("=")]) if name == "set" else value
        )
    return found


@pytest.mark.parametrize("asked", [{"experts": "stacked"}, {"experts": "3d"}, {"to": "tinker"}])
def test_a_number_of_experts_that_only_the_file_tells_is_told(asked, tmp_path):
    change = Change(width=8, inner=6)
    tensors, config = each(change)
    config["base_model_name_or_path"] = "Qwen/Qwen3-30B-A3B"
    folder = save(tmp_path / "a", (tensors, config))
    told = lt.convert(folder, output=tmp_path / "b", **asked).notes
    assert any("taken to have as many experts as the file adapts, 3" in note for note in told)
    config["exclude_modules"] = r".*experts\.[3-7]\..*"
    partial = save(tmp_path / "partial", (tensors, config))
    with pytest.raises(LoratoolsError, match="the number of experts in the layer"):
        lt.convert(partial, output=tmp_path / "c", **asked)


@pytest.mark.parametrize(
    ("program", "says", "hint"),
    [
        ("lorax", "reads no factors of experts", "loratools fuse"),
        ("tensorrt-llm", "is not known here", "`experts=each`"),
        ("vllm@0.26", "is not known here", "`experts=each`"),
    ],
)
def test_what_nobody_looked_up_is_not_said_to_be_refused(program, says, hint, tmp_path):
    folder = save(tmp_path / "a", stacked(Change()))
    with pytest.raises(LoratoolsError, match=says) as told:
        lt.convert(folder, for_=program, output=tmp_path / "b")
    assert hint in told.value.hint
