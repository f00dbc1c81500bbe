"""Fleets of adapters on the Hub: an organisation's, and the folders of one repository."""

from __future__ import annotations

import json

import pytest
from hub_server import LORA, RSLORA

import loratools as lt
from loratools_formats.disk.errors import AdapterError, OptionError


def squeezed(sources, output):
    return lt.fleet("squeeze", sources, {"rank": 4}, output=output, workers=1)


@pytest.mark.slow
def test_an_organisation_is_a_fleet(here, tmp_path):
    here.add("team/chat", LORA)
    here.add("team/code", RSLORA)
    here.add("team/words", {"README.md": b"# no adapter"})
    here.add("other/chat", LORA)
    found = squeezed("hf://team/*", tmp_path / "out")
    assert [(one.name, one.state) for one in found.adapters] == [
        ("chat", "made"), ("code", "made"),
    ]  # fmt: skip
    (tmp_path / "single").mkdir()
    lt.squeeze("hf://team/chat", rank=4, output=tmp_path / "single" / "chat")
    for file in (tmp_path / "single" / "chat").iterdir():
        assert (tmp_path / "out" / "chat" / file.name).read_bytes() == file.read_bytes()
    assert squeezed("hf://team/*", tmp_path / "out").done == 2
    assert squeezed("hf://team/ch*", tmp_path / "out").total == 1
    here.add("team/chat", RSLORA)  # another commit is another input
    again = squeezed("hf://team/*", tmp_path / "out")
    assert (again.done, again.failed) == (1, 1)
    assert "other inputs" in str(again.adapters[0].error)


def test_what_is_done_is_known_on_another_machine_without_the_weights(here, tmp_path, monkeypatch):
    from huggingface_hub import constants

    weights = (LORA / "adapter_model.safetensors").read_bytes()
    header, more = 8 + int.from_bytes(weights[:8], "little"), 2 << 20
    text = json.loads(weights[8:header])
    last = max(text.values(), key=lambda entry: entry.get("data_offsets", [0, 0])[1])
    end = last["data_offsets"][1]
    text["unused"] = {"dtype": "F32", "shape": [more // 4], "data_offsets": [end, end + more]}
    start = json.dumps(text).encode()
    start += b" " * (-len(start) % 8)
    large = len(start).to_bytes(8, "little") + start + weights[header:] + bytes(more)
    config = (LORA / "adapter_config.json").read_bytes()
    here.add("team/large", {"adapter_config.json": config, "adapter_model.safetensors": large})
    settings = {"rank": 4, "carry_unknown": True}

    def run(verb, settings):
        here.seen.clear()
        given = {"output": tmp_path / verb, "workers": 1}
        (one,) = lt.fleet(verb, "hf://team/large", settings, **given).adapters
        assert one.error is None, one.error
        return one.state, here.served("adapter_model.safetensors") > more

    assert run("info", {"carry_unknown": True}) == ("made", False)
    assert run("squeeze", settings) == ("made", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another"))
    assert run("info", {"carry_unknown": True}) == ("done", False)
    assert run("squeeze", settings) == ("done", False)


@pytest.mark.slow
def test_adapters_of_an_organisation_are_indexed_and_shared(server, program, tmp_path):
    server.add("team/chat", LORA)
    server.add("team/code", RSLORA)
    server.add("team/words", {"README.md": b"# no adapter"})
    found = program.json("fleet", "index", "hf://team/*", "-o", "index.safetensors")
    assert (found["adapters"], found["failed"]) == (2, [])
    first, second = program.json("fleet", "similar", "hf://team/chat", "--index",
                                 "index.safetensors")["neighbours"]  # fmt: skip
    commit = server.repos["team/chat"].sha("main")
    assert (first["path"], round(first["cosine"], 6)) == (f"hf://team/chat@{commit}", 1.0)
    assert second["path"].startswith("hf://team/code@")
    assert program.json("fleet", "dedup", "index.safetensors")["unverified"] == []
    names = "# two of them\n" + "".join(f"{folder}\n" for folder in (LORA, RSLORA))
    (tmp_path / "names.txt").write_text(names)
    options = ("--rank", "16", "--clusters", "1")
    away = program.json("fleet", "share", "hf://team/*", "-o", "away.safetensors", *options)
    here = program.json("fleet", "share", "names.txt", "-o", "here.safetensors", *options)
    assert [one["name"] for one in away["adapters"]] == ["chat", "code"]
    assert [one["name"] for one in here["adapters"]] == ["lora", "rslora"]
    assert away["relative_error"] == here["relative_error"]
    partly = program("fleet", "index", "hf://team/chat", "hf://team/code@v9", "-o", "partly")
    assert partly.returncode == 1
    assert "failed: hf://team/code@v9" in partly.stderr


def test_the_folders_of_a_repository_are_a_fleet(here, tmp_path):
    files = {
        f"{name}/{file.name}": file.read_bytes()
        for name, folder in (("a/lora", LORA), ("b/lora", RSLORA))
        for file in folder.iterdir()
        if file.is_file()
    }
    here.add("team/shelf", files)
    found = squeezed("hf://team/shelf/*", tmp_path / "out")
    assert [(one.name, one.error) for one in found.adapters] == [("a/lora", None), ("b/lora", None)]
    assert squeezed("hf://team/shelf/b/*", tmp_path / "out").done == 1


def test_what_is_not_on_the_hub(here, tmp_path):
    with pytest.raises(AdapterError, match="nothing on the Hub matches"):
        squeezed("hf://nobody/*", tmp_path / "out")
    with pytest.raises(OptionError, match="wildcard"):
        squeezed("hf://te?m/chat*", tmp_path / "out")
