"""What is a reference to the Hub, and what is a path."""

from pathlib import Path

import pytest

from loratools.cli.references import weighted_path
from loratools.hub.references import Reference, parse, path_of, with_revision
from loratools_formats.disk.errors import LoratoolsError, OptionError
from loratools_formats.disk.hub_cache import cached_place, shown_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "repo", "revision", "inside"),
    [
        ("me/tiny", "me/tiny", None, ""),
        ("me/tiny@v1.0", "me/tiny", "v1.0", ""),
        (f"me/tiny@{COMMIT}/sub/folder", "me/tiny", COMMIT, "sub/folder"),
        ("me/tiny/lora.safetensors", "me/tiny", None, "lora.safetensors"),
        ("hf://me/tiny", "me/tiny", None, ""),
        ("hf:/me/tiny", "me/tiny", None, ""),
        ("hf://models/me/tiny", "me/tiny", None, ""),
        ("hf://me/tiny@rev/sub/folder", "me/tiny", "rev", "sub/folder"),
        ("hf://me/tiny@rev/sub/", "me/tiny", "rev", "sub"),
        ("hf://me/tiny@refs/pr/12/sub", "me/tiny", "refs/pr/12", "sub"),
        ("hf://me/tiny@feature%2Fx", "me/tiny", "feature/x", ""),
        ("hf://gpt2", "gpt2", None, ""),
        ("https://huggingface.co/me/tiny", "me/tiny", None, ""),
        ("https://hf.co/me/tiny/", "me/tiny", None, ""),
        ("huggingface.co/me/tiny", "me/tiny", None, ""),
        ("https://huggingface.co/me/tiny/tree/v1/sub/folder", "me/tiny", "v1", "sub/folder"),
        ("https://huggingface.co/me/tiny/tree/refs%2Fpr%2F3/sub", "me/tiny", "refs/pr/3", "sub"),
        ("https://huggingface.co/me/tiny/blob/main/a%20b.bin?download=true", "me/tiny", "main",
         "a b.bin"),
        ("https://huggingface.co/me/tiny/resolve/main/x.gguf", "me/tiny", "main", "x.gguf"),
        ("https://huggingface.co/gpt2/tree/main", "gpt2", "main", ""),
    ],
)  # fmt: skip
def test_references_say_what_they_name(text, repo, revision, inside, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse(text, "adapter") == Reference("model", repo, revision, inside)
    assert parse(Path(text), "adapter") == Reference("model", repo, revision, inside)


@pytest.mark.parametrize(
    "text",
    ["", "lora", "./me/tiny", "../tiny", "/no/such/place", "~/lora", "out/lora.safetensors",
     "out/model.gguf", "https://example.com/me/tiny", "me/-tiny", "a b/c"],
)  # fmt: skip
def test_paths_are_no_references(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse(text, "adapter") is None


def test_what_is_here_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "tiny").mkdir(parents=True)
    (tmp_path / "gpt2").mkdir()
    assert parse("me/tiny", "adapter") is None
    assert parse("gpt2", "model") is None
    assert parse("me/other", "adapter") is None  # beside me/tiny it is rather a misspelt path
    assert parse("hf://me/tiny", "adapter") == Reference("model", "me/tiny")
    (tmp_path / "link").symlink_to("nothing")
    assert parse("link", "model") is None


def test_a_name_alone_is_a_model_where_one_is_wanted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse("gpt2", "model") == Reference("model", "gpt2")
    assert parse("gpt2@v1", "model") == Reference("model", "gpt2", "v1")
    assert parse("gpt2", "adapter") is None
    assert parse("gpt2.gguf", "model") is None


@pytest.mark.parametrize(
    ("text", "kind", "repo", "inside"),
    [
        ("hf://datasets/me/data", "dataset", "me/data", ""),
        ("hf://spaces/me/app/file", "space", "me/app", "file"),
        ("hf://buckets/me/store/runs/lora", "bucket", "me/store", "runs/lora"),
        ("https://huggingface.co/datasets/me/data/tree/main/x", "dataset", "me/data", "x"),
        ("https://huggingface.co/buckets/me/store/tree/runs", "bucket", "me/store", "runs"),
    ],
)
def test_other_kinds(text, kind, repo, inside):
    found = parse(text, "adapter")
    assert (found.kind, found.repo, found.inside) == (kind, repo, inside)


@pytest.mark.parametrize(
    "text",
    ["hf://", "hf://me/..", "hf://me/tiny@", "hf://me/tiny/../x", "hf://me/ti--ny",
     "hf://buckets/me/store@v1", "https://huggingface.co/me/tiny/discussions/3"],
)  # fmt: skip
def test_malformed_references_are_refused(text):
    with pytest.raises(OptionError):
        parse(text, "adapter")


@pytest.mark.parametrize(
    "text", ["hf://me/tiny@v1/sub/x", "hf://gpt2", "hf://me/tiny@refs/pr/3/x", "hf://me/t@a%2Fb/c"]
)
def test_the_text_of_a_reference_is_read_as_it(text):
    assert str(parse(text, "adapter")) == text


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("a/x:0.3", "a/x", 0.3),
        ("hf://a/x", "hf:/a/x", 1.0),
        ("hf://b/y:0.3", "hf:/b/y", 0.3),
        ("hf://b/y@v1/sub:-1", "hf:/b/y@v1/sub", -1.0),
        ("https://huggingface.co/a/x:2", "https:/huggingface.co/a/x", 2.0),
        ("./a/x:2", "a/x", 2.0),
    ],
)
def test_weights_follow_references(text, path, weight):
    assert weighted_path(text) == (Path(path), weight)


@pytest.mark.parametrize("want", ["adapter", "model", "file", "shelf"])
def test_what_begins_with_a_dot_is_here(want, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (path_of("./me/tiny"), weighted_path("./me/tiny:0.5")[0], path_of("./gpt2")):
        assert parse(path, want) is None
        assert parse(path / "inner", want) is None
    assert parse(path_of("me/tiny"), want) == parse("me/tiny", want) is not None
    (tmp_path / "me").mkdir()
    (tmp_path / "me" / "tiny").write_text("here")
    assert path_of("./me/tiny") == Path("me/tiny")
    assert path_of("./me/tiny").read_text() == "here"


def test_a_revision_goes_to_the_one_reference_without(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert with_revision("me/tiny", "v1", "adapter") == "hf://me/tiny@v1"
    assert with_revision({"me/tiny": 0.5, "local": 1.0}, "v1", "adapter") == {
        "hf://me/tiny@v1": 0.5,
        "local": 1.0,
    }
    assert with_revision(["me/tiny@v2", ("me/b", 2)], "v1", "adapter") == [
        "me/tiny@v2",
        ("hf://me/b@v1", 2),
    ]
    for given in ("local", "me/tiny@v2", ["me/a", "me/b"]):
        with pytest.raises(LoratoolsError, match="revision"):
            with_revision(given, "v1", "adapter")


def test_a_place_in_the_cache_says_where_it_is_from(tmp_path):
    folder = tmp_path / "hub" / "models--me--tiny" / "snapshots" / COMMIT
    place = cached_place(folder / "sub" / "x.safetensors")
    assert (place.repo, place.commit, place.inside) == ("me/tiny", COMMIT, "sub/x.safetensors")
    assert place.reference == f"hf://me/tiny@{COMMIT}/sub/x.safetensors"
    assert shown_name(folder) == "tiny"
    assert shown_name(folder / "sub") == "sub"
    assert cached_place(folder.parent) is None
    assert cached_place(tmp_path) is None
