"""References in place of paths: what is fetched, what is not, and what is said when it fails."""

import json
import shutil

import numpy as np
import pytest
from hub_server import LORA, MODEL, RSLORA, TOKEN
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools_formats.disk.errors import HubError, LoratoolsError, MissingFileError
from loratools_formats.disk.hub_cache import cached_place


@pytest.fixture
def repos(here):
    here.add("me/tiny", LORA)
    here.add("me/other", RSLORA)
    here.add("me/model", MODEL)
    return here


def assert_equal(one, other):
    """Compare tensors; the metadata of one names commits."""
    here, there = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    assert list(here) == list(there)
    assert all(here[name].tobytes() == there[name].tobytes() for name in here)


def bytes_of(path):
    return (path / "adapter_model.safetensors").read_bytes()


def test_a_result_from_the_hub_is_that_of_the_folder(repos, tmp_path):
    lt.squeeze(LORA, rank=4, output=tmp_path / "local")
    lt.squeeze("me/tiny", rank=4, output=tmp_path / "hub")
    assert_equal(tmp_path / "hub", tmp_path / "local")
    assert (tmp_path / "hub" / "README.md").exists()  # it was kept beside, as from a folder


@pytest.mark.parametrize(
    "text", ["me/tiny", "hf://me/tiny@main", "{endpoint}/me/tiny/tree/main", "me/tiny@{commit}"]
)
def test_all_spellings_reach_the_same(repos, text):
    commit = repos.repos["me/tiny"].sha("main")
    adapter = lt.read(text.format(endpoint=repos.endpoint, commit=commit))
    assert cached_place(adapter.source).reference == f"hf://me/tiny@{commit}"


def test_what_is_cached_is_not_fetched_again(repos):
    lt.info("me/tiny")
    repos.seen.clear()
    lt.info("me/tiny")
    assert [each.path for each in repos.seen] == ["/api/models/me/tiny?blobs=true"]


def test_only_what_is_needed_is_fetched(repos):
    files = dict(repos.repos["me/tiny"].files())
    files |= {"optimizer.pt": bytes(1 << 16), "checkpoint-9/adapter_model.safetensors": b"x",
              "model.gguf": b"y", "tokenizer.json": b"{}"}  # fmt: skip
    repos.repos["me/tiny"].commit(files)
    lt.info("me/tiny")
    asked = {each.path.rpartition("/")[2] for each in repos.asked("/resolve/", "GET")}
    assert asked == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_file_and_a_folder_in_a_repository(repos):
    lora = {p.name: p.read_bytes() for p in LORA.iterdir()}
    repos.add("me/many", {f"runs/last/{name}": data for name, data in lora.items()})
    assert lt.info("hf://me/many/runs/last").modules
    assert lt.info("hf://me/many/runs/last/adapter_model.safetensors").modules
    with pytest.raises(HubError, match="hf://me/many/runs/last"):
        lt.info("me/many")
    with pytest.raises(MissingFileError, match=r"Did you mean hf://me/many/runs/last\?"):
        lt.info("hf://me/many/runs/las")


def test_a_single_file_is_the_adapter_of_its_repository(repos, tmp_path):
    lt.convert(LORA, to="safetensors", output=tmp_path / "k.safetensors", allow_lossy=True)
    content = (tmp_path / "k.safetensors").read_bytes()
    repos.add("me/kohya", {"style.safetensors": content, "README.md": b"# x\n"})
    assert lt.info("me/kohya").format == "safetensors"
    repos.add("me/styles", {"a.safetensors": content, "b.safetensors": content})
    with pytest.raises(HubError, match=r"Name one, such as hf://me/styles/a\.safetensors"):
        lt.info("me/styles")


def test_revisions(repos):
    repo = repos.repos["me/tiny"]
    first = repo.sha("main")
    repo.commit({**repo.files(), **{p.name: p.read_bytes() for p in RSLORA.iterdir()}}, "next")
    here, there = (lt.info(path).modules[0].scale for path in (LORA, RSLORA))
    assert here != there
    assert lt.info("me/tiny", revision="next").modules[0].scale == there
    assert lt.info("me/tiny@next").modules[0].scale == there
    assert lt.info("me/tiny", revision=first).modules[0].scale == here
    repo.refs["refs/pr/1"] = repo.refs["next"]
    assert lt.info("me/tiny@refs/pr/1").modules[0].scale == there
    with pytest.raises(MissingFileError, match="no such revision"):
        lt.info("me/tiny@nope")


def test_names_of_old_models(repos):
    repos.add("openai-community/gpt2", MODEL)
    repos.aliases["gpt2"] = "openai-community/gpt2"
    assert lt.to_dora(LORA, base="gpt2").modules
    with pytest.raises(MissingFileError, match="no such file or folder"):
        lt.info("gpt2")


@pytest.mark.slow
def test_merging_references_names_them_in_its_recipe(repos, tmp_path):
    made = lt.merge({"me/tiny": 0.5, "hf://me/other": 0.5}, rank=8, output=tmp_path / "both")
    assert [each.name for each in made.adapters] == ["tiny", "other"]
    commit = repos.repos["me/tiny"].sha("main")
    recipe = tmp_path / "both" / "recipe.yaml"
    assert f"hf://me/tiny@{commit}" in recipe.read_text()
    lt.merge(recipe, output=tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "both")
    repos.add("me/recipes", {"both.yaml": recipe.read_bytes()})
    lt.merge("hf://me/recipes/both.yaml", output=tmp_path / "third")
    assert bytes_of(tmp_path / "third") == bytes_of(tmp_path / "both")


@pytest.mark.slow
def test_other_parameters_that_name_adapters(repos):
    assert lt.compare(["me/tiny", "me/other"]).names == ("tiny", "other")
    adapter = lt.read("me/tiny")
    name = next(iter(adapter.modules))
    assert lt.delta(adapter, name, base="me/model").shape == (128, 352)
    files = {f"{n}/{p.name}": p.read_bytes() for n in "abc" for p in LORA.iterdir()}
    repos.add("me/shelf", files)
    assert lt.spectrum(LORA, against="hf://me/shelf").matrices


def test_writing_over_what_is_on_the_hub_is_refused(repos):
    with pytest.raises(LoratoolsError, match="on the Hub"):
        lt.squeeze("me/tiny", rank=4, in_place=True)


# A base model: headers by ranges, weights when they are read.


def big_model(hub, tmp_path, shards=3, wide=2048):
    """Put a model on the Hub whose headers are a small part of its shards."""
    folder = tmp_path / "big"
    folder.mkdir()
    tensors = load_file(MODEL / "model.safetensors")
    names, index = sorted(tensors), {}
    for at in range(shards):
        file = f"model-{at + 1:05}-of-{shards:05}.safetensors"
        mine = {name: tensors[name] for name in names[at::shards]}
        mine[f"extra.{at}"] = np.zeros((wide, 1024), np.float32)
        save_file(mine, folder / file)
        index |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    shutil.copy(MODEL / "config.json", folder)
    hub.add("me/big", folder)
    return folder


def test_header_work_fetches_headers_only(repos, tmp_path):
    folder = big_model(repos, tmp_path)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    found = lt.check(LORA, base="me/big", headers_only=True)
    assert found.complete
    assert not [each for each in found.findings if each.rule == "no-such-module"]
    headers = repos.asked(r"\.safetensors$", "GET")
    assert len(headers) == 3
    assert all(each.status == 206 for each in headers)
    assert repos.served() < 400_000 < size / 50


def large_adapter(hub, tmp_path):
    """Put an adapter of megabytes on the Hub, and return its folder."""
    folder = tmp_path / "large"
    shutil.copytree(LORA, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    wide = {name: np.tile(each.astype(np.float32), (1, 8) if "lora_A" in name else (8, 1))
            for name, each in tensors.items()}  # fmt: skip
    save_file(wide, folder / "adapter_model.safetensors", {"format": "pt"})
    hub.add("me/large", folder)
    return folder


@pytest.mark.parametrize("inside", ["", "/adapter_model.safetensors"])
def test_what_reads_headers_of_an_adapter_fetches_them_only(repos, tmp_path, inside):
    folder = large_adapter(repos, tmp_path)
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert size > 4_000_000
    for look in (lt.info, lambda path: lt.check(path, headers_only=True)):
        repos.seen.clear()
        found = look(f"hf://me/large{inside}")
        weights = repos.asked(r"adapter_model\.safetensors$", "GET")
        assert {each.status for each in weights} == {206}
        assert [each.range for each in weights].count("bytes=0-99999") == 1
        assert len(weights) <= 4
        assert repos.served() < 300_000 < size / 15
        here = look(folder / inside.strip("/"))
        assert getattr(found, "nbytes", size) == size
        if hasattr(found, "modules"):
            assert found.modules == here.modules
        else:
            assert found.complete
            if not inside:  # the card comes with a folder alone
                codes = [{each.code for each in one.findings} for one in (found, here)]
                assert codes[0] == codes[1]


@pytest.mark.slow
def test_many_references_are_checked_by_their_headers_too(repos, tmp_path, monkeypatch):
    monkeypatch.setattr("loratools.operations.check.children.FEWEST", 2)
    folder = large_adapter(repos, tmp_path)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    repos.add("me/lot", {f"{n}/{name}": data for n in range(4) for name, data in files.items()})
    found = lt.check([f"hf://me/lot/{n}" for n in range(4)], headers_only=True, workers=2)
    assert found.complete
    assert len(found.adapters) == 4


def test_weights_of_an_adapter_come_when_they_are_read_after_all(repos, tmp_path):
    folder = large_adapter(repos, tmp_path)
    lt.info("me/large")
    lt.squeeze("me/large", rank=4, output=tmp_path / "hub")
    lt.squeeze(folder, rank=4, output=tmp_path / "local")
    assert_equal(tmp_path / "hub", tmp_path / "local")
    repos.seen.clear()
    assert lt.info("me/large").modules
    assert not repos.asked(r"\.safetensors$", "GET")


@pytest.mark.slow
def test_a_header_beyond_the_first_range_is_completed(repos, tmp_path):
    tensors = {f"block.{i}.weight": np.zeros((1,), np.float32) for i in range(4000)}
    save_file(tensors, tmp_path / "model.safetensors")
    repos.add("me/deep", {"model.safetensors": (tmp_path / "model.safetensors").read_bytes(),
                          "config.json": b"{}"})  # fmt: skip
    lt.check(LORA, base="me/deep", headers_only=True)
    ranges = [each.range for each in repos.asked(r"me/deep.*\.safetensors$", "GET")]
    assert ranges[0] == "bytes=0-99999"
    assert ranges[1].startswith("bytes=100000-")
    assert len(ranges) == 2


def test_a_server_without_ranges_serves_too(repos, tmp_path):
    repos.ranges = False
    big_model(repos, tmp_path, wide=64)
    assert lt.check(LORA, base="me/big", headers_only=True).complete


def test_weights_are_fetched_when_they_are_read(repos, tmp_path):
    folder = big_model(repos, tmp_path, wide=16)
    lt.fuse(folder, LORA, output=tmp_path / "local")
    lt.fuse("me/big", LORA, output=tmp_path / "hub")
    for path in folder.glob("model*"):
        # The metadata of one names a commit.
        if path.suffix == ".json":
            continue
        ours, local = (load_file(tmp_path / name / path.name) for name in ("hub", "local"))
        assert list(ours) == list(local)
        assert all(ours[name].tobytes() == local[name].tobytes() for name in ours)


def test_fusing_keeps_the_files_of_the_model(repos, tmp_path):
    lt.fuse("me/model", "me/tiny", output=tmp_path / "hub")
    lt.fuse(MODEL, LORA, output=tmp_path / "local")
    names = {path.name for path in (tmp_path / "local").iterdir()}
    assert {path.name for path in (tmp_path / "hub").iterdir()} == names


# What goes wrong.


def test_wrong_things_are_named(repos):
    repos.datasets.add("me/data")
    repos.add("me/empty", {"README.md": b"# nothing"})
    for text, said in {
        "me/nothing": "no such file or folder here; taken for a name on the Hub, no such model",
        "hf://me/data": "is a dataset on the Hub, not a model",
        "hf://datasets/me/data": "is a dataset, not a model",
        "me/model": "is a model, not an adapter. To put an adapter into it: loratools fuse",
        "me/empty": "holds no adapter",
    }.items():
        with pytest.raises(LoratoolsError, match=said):
            lt.info(text)
    with pytest.raises(HubError, match="is an adapter, not a model"):
        lt.to_dora(LORA, base="me/tiny")


def test_gated_and_private_repositories(repos, monkeypatch):
    repos.add("big/gated", LORA, gated=True, readers=())
    with pytest.raises(HubError, match=r"gated.*Ask for access at .*/big/gated"):
        lt.info("big/gated")
    repos.add("big/secret", LORA, private=True, readers=())
    with pytest.raises(MissingFileError, match="or it is private"):
        lt.info("big/secret")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    with pytest.raises(HubError, match="Log in: hf auth login") as caught:
        lt.info("me/tiny")
    assert "x" * 34 not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "said"),
    [(403, "does not allow"), (429, "fewer requests"), (500, "has a fault"), (503, "has a fault")],
)
def test_statuses_have_a_next_step(repos, status, said):
    echo = {"X-Error-Message": f"refused for {TOKEN}"}
    repos.fail("/api/models/me/tiny", status, headers=echo, times=99)
    with pytest.raises(HubError, match=said) as caught:
        lt.info("me/tiny")
    assert caught.value.hint
    assert TOKEN not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_offline_the_cache_serves(repos, monkeypatch):
    from huggingface_hub import constants

    lt.info("me/tiny")
    commit = repos.repos["me/tiny"].sha("main")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repos.seen.clear()
    assert lt.info("me/tiny").modules
    assert lt.info(f"me/tiny@{commit}").modules
    with pytest.raises(HubError, match=r"offline mode is on.*hf download me/other"):
        lt.info("me/other")
    with pytest.raises(HubError, match="offline"):
        lt.to_dora(LORA, base="gpt2")
    assert not repos.seen


def test_without_a_connection_the_cache_serves_and_says_so(repos, monkeypatch):
    from huggingface_hub import constants

    lt.info("me/tiny")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.warns(UserWarning, match="cannot be reached; hf://me/tiny is read from the cache"):
        assert lt.info("me/tiny").modules
    with pytest.raises(HubError, match="cannot be reached"):
        lt.info("me/other")


def test_offline_weights_that_are_not_cached_are_missed(repos, tmp_path, monkeypatch):
    from huggingface_hub import constants

    big_model(repos, tmp_path, wide=16)
    lt.check(LORA, base="me/big", headers_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LoratoolsError, match="cache does not hold"):
        lt.to_dora(LORA, base="me/big")


@pytest.mark.slow
def test_a_cut_download_leaves_nothing_behind(repos, tmp_path):
    repos.cut(r"/resolve/.*adapter_model\.safetensors", method="GET", times=99, after=1000)
    with pytest.raises(HubError):
        lt.squeeze("me/tiny", rank=4, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    repos.faults.clear()
    lt.squeeze("me/tiny", rank=4, output=tmp_path / "out")
    lt.squeeze(LORA, rank=4, output=tmp_path / "local")
    assert_equal(tmp_path / "out", tmp_path / "local")


def test_check_tells_of_references_it_could_not_look_at(repos):
    found = lt.check(["me/tiny", "me/nothing", LORA])
    assert [each.adapter for each in found.adapters] == ["hf://me/tiny", str(LORA)]
    assert [each.adapter for each in found.unchecked] == ["me/nothing"]
    assert "no such model on the Hub" in found.unchecked[0].reason


def test_without_the_library_the_extra_is_named(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(LoratoolsError, match=r"pip install 'loratools\[hub\]'"):
        lt.info("me/tiny")
    with pytest.raises(LoratoolsError, match=r"nowhere.*pip install 'loratools\[hub\]'"):
        lt.to_dora(LORA, base="nowhere")


def test_buckets(repos):
    from huggingface_hub import HfApi

    if not hasattr(HfApi, "list_bucket_tree"):
        pytest.skip("this huggingface_hub knows no buckets")
    repos.buckets["me/store"] = {f"runs/{p.name}": p.read_bytes() for p in LORA.iterdir()}
    first = lt.read("hf://buckets/me/store/runs")
    assert lt.info("hf://buckets/me/store/runs").modules[0].rank == 32
    assert cached_place(first.source).reference == "hf://buckets/me/store/runs"
    repos.buckets["me/store"] |= {f"runs/{p.name}": p.read_bytes() for p in RSLORA.iterdir()}
    second = lt.read("hf://buckets/me/store/runs")
    assert second.source != first.source  # another state, and the first stays whole
    assert first.inputs[0].sha256() != second.inputs[0].sha256()
    with pytest.raises(MissingFileError, match="bucket"):
        lt.info("hf://buckets/me/nothing")


def test_models_in_ggufs_and_pipelines(repos):
    content = b"GGUF" + bytes(60)
    repos.add("me/quants", {"a-q4.gguf": content, "a-q8.gguf": content})
    with pytest.raises(HubError, match=r"Name one, such as hf://me/quants/a-q4\.gguf"):
        lt.to_dora(LORA, base="me/quants")
    part = {f"transformer/{p.name}": p.read_bytes() for p in MODEL.iterdir()}
    repos.add("me/pipeline", {"model_index.json": b"{}", **part})
    with pytest.raises(HubError, match="Name one, such as hf://me/pipeline/transformer"):
        lt.to_dora(LORA, base="me/pipeline")
    assert lt.to_dora(LORA, base="hf://me/pipeline/transformer").modules
    with pytest.raises(HubError, match="is a model, not an adapter"):
        lt.info("me/pipeline")


@pytest.mark.slow
def test_the_command_records_what_its_base_was(repos, program):
    repos.aliases["tiny"] = "me/model"
    done = program("convert", "me/tiny", "-o", "x.gguf", "--base", "tiny", "-q")
    assert done.returncode == 0, done.stderr
    statement = json.loads((program.folder / "x.gguf.provenance.json").read_text())
    arguments = statement["predicate"]["call"]["arguments"]
    commits = {name: one["commit"] for name, one in arguments.items()}
    assert commits == {
        "source": repos.repos["me/tiny"].sha("main"),
        "base": repos.repos["me/model"].sha("main"),
    }
    assert arguments["base"]["reference"] == f"hf://tiny@{commits['base']}"
    assert len(repos.asked("/api/models/tiny")) == 1
    done = program("squeeze", "me/tiny", "--rank", "2", "--in-place")
    assert "on the Hub" in done.stderr
