"""Publishing: one commit or none, nobody's work overwritten, and a card that says what it is."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hub_server import ID_TOKEN, LORA, MODEL, RSLORA, TOKEN, environment
from huggingface_hub import ModelCard
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools.cli import cli
from loratools.face import push as pushing
from loratools.hub import upload
from loratools_formats.disk.errors import (
    HubError,
    LoratoolsError,
    MissingFileError,
    OptionError,
    UnfitError,
)

SCHEMAS = Path(lt.__file__).parent / "schemas"
WEIGHTS = "adapter_model.safetensors"
BASE = "loratools/tiny-llama"
DRAW = pushing.picture_of
NAMES = {"adapter_config.json", WEIGHTS, "README.md", "provenance.json", "spectrum.png"}


@pytest.fixture
def small(tmp_path):
    lt.squeeze(LORA, rank=4, output=tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def hub(here, monkeypatch):
    card = b"---\nlicense: apache-2.0\n---\n# Tiny\n"
    here.add(BASE, {**{p.name: p.read_bytes() for p in MODEL.iterdir()}, "README.md": card})
    monkeypatch.setattr(upload, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(pushing, "picture_of", _drawn)  # drawing takes longer than all the rest
    return here


def _drawn(adapter, name, folder):
    (folder / "spectrum.png").write_bytes(f"{name} {len(adapter.modules)}".encode())
    return folder / "spectrum.png"


def published(hub, repo="me/small", revision="main"):
    files = hub.repos[repo].files(revision)
    return {name: data for name, data in files.items() if name != ".gitattributes"}


@pytest.mark.slow
def test_a_repository_is_made_if_asked(hub, small):
    with pytest.raises(MissingFileError, match="Make it with `create=True`, or `private=True`"):
        lt.push(small, "me/small")
    assert "me/small" not in hub.repos
    done = lt.push(small, "me/small", private=True)
    assert done.created
    assert hub.repos["me/small"].private
    assert set(published(hub)) == NAMES
    assert published(hub)[WEIGHTS] == (small / WEIGHTS).read_bytes()
    assert done.commit == hub.repos["me/small"].sha("main")
    assert done.url == f"{hub.endpoint}/me/small/commit/{done.commit}"
    lt.push(small, "me/open", create=True)
    assert not hub.repos["me/open"].private


@pytest.mark.slow
def test_one_commit_and_none_if_nothing_changed(hub, small):
    first = lt.push(small, "me/small", create=True)
    repo = hub.repos["me/small"]
    assert len(repo.commits) == 2  # the one of the repository, and ours
    again = lt.push(small, "me/small")
    assert not again.changed
    assert again.commit == first.commit
    assert len(repo.commits) == 2
    assert {each.change for each in again.files} == {"same"}
    assert not hub.asked("/api/models/me/small/commit/", "POST")[1:]


@pytest.mark.slow
def test_only_what_changed_changes(hub, small, tmp_path):
    lt.push(small, "me/small", create=True)
    repo = hub.repos["me/small"]
    before = repo.files()
    lt.squeeze(LORA, rank=2, output=small, overwrite=True)
    done = lt.push(small, "me/small")
    after = repo.files()
    assert {n for n in after if after[n] != before.get(n)} == {
        each.path for each in done.files if each.change == "changed"
    }
    assert repo.parents[done.commit] == first_commit(repo, done.commit)
    assert set(after) == set(before)


def first_commit(repo, commit):
    return next(sha for sha in repo.commits if sha == repo.parents[commit])


@pytest.mark.slow
def test_strays_are_not_published(hub, small):
    (small / ".env").write_text("SECRET=1")
    (small / "optimizer.pt").write_bytes(b"x")
    (small / "notes.txt").write_text("mine")
    (small / "tokenizer.json").write_text("{}")
    done = lt.push(small, "me/small", create=True)
    assert set(published(hub)) == {*NAMES, "tokenizer.json"}
    assert set(done.left_out) == {".env", "notes.txt", "optimizer.pt"}
    assert any("notes.txt" in note for note in done.notes)


def test_what_the_repository_has_besides_stays(hub, small):
    hub.add("me/small", {"README.md": b"# Mine\n", "notes.md": b"stay"})
    lt.push(small, "me/small")
    files = published(hub)
    assert files["notes.md"] == b"stay"
    assert files["README.md"].count(b"# Mine\n") == 1


@pytest.mark.slow
def test_the_card_says_what_it_is(hub, small, monkeypatch):
    monkeypatch.setattr(pushing, "picture_of", DRAW)
    lt.push(small, "me/small", create=True)
    card = ModelCard(published(hub)["README.md"].decode())
    data = card.data.to_dict()
    assert data["base_model"] == BASE
    assert data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft"
    assert data["license"] == "apache-2.0"  # of the base model
    assert data["pipeline_tag"] == "text-generation"
    assert f"base_model:adapter:{BASE}" in data["tags"]
    error = lt.squeeze(LORA, rank=4).relative_error
    assert f"| 1 | `squeeze` | method exact, rank 4 | {error:.3g} | 4 |" in card.text
    assert 'PeftModel.from_pretrained(base, "me/small")' in card.text
    assert "![The spectrum of each module's change](spectrum.png)" in card.text
    assert published(hub)["spectrum.png"].startswith(b"\x89PNG")


def test_the_authors_card_stays_byte_for_byte(hub, small):
    theirs = b"---\r\nlicense: mit  # mine\r\ntags: [a, 'b']\r\n---\r\n# Title\r\n\r\nMy text.\r\n"
    hub.add("me/small", {"README.md": theirs})
    lt.push(small, "me/small")
    first = published(hub)["README.md"]
    assert first.startswith(b"---\r\nlicense: mit  # mine\r\ntags: [a, 'b'")
    assert b"\r\n---\r\n# Title\r\n\r\nMy text.\r\n" in first
    edited = first.replace(b"My text.", b"My new text.") + b"\r\nThe end.\r\n"
    hub.repos["me/small"].commit({**hub.repos["me/small"].files(), "README.md": edited})
    done = lt.push(small, "me/small")
    assert not done.changed
    assert published(hub)["README.md"] == edited
    assert not (small / "README.md").read_bytes().startswith(b"---\r\n")  # the folder is untouched


@pytest.mark.slow
def test_a_card_of_ones_own_and_none(hub, small, tmp_path):
    (tmp_path / "card.md").write_text("# Written here\n")
    lt.push(small, "me/small", create=True, card=tmp_path / "card.md")
    assert b"# Written here\n" in published(hub)["README.md"]
    lt.push(small, "me/bare", create=True, no_card=True)
    assert set(published(hub, "me/bare")) == NAMES - {"README.md", "spectrum.png"}
    with pytest.raises(OptionError):
        lt.push(small, "me/bare", no_card=True, card="x")


@pytest.mark.slow
def test_a_dry_run_shows_files_and_the_cards_diff(hub, small):
    hub.add("me/small", {"README.md": b"# Mine\n"})
    before = hub.repos["me/small"].sha("main")
    planned = lt.push(small, "me/small", dry_run=True)
    assert hub.repos["me/small"].sha("main") == before
    assert {each.path for each in planned.files} == NAMES
    assert "+base_model: loratools/tiny-llama\n" in planned.card_diff
    assert " # Mine\n" in planned.card_diff
    assert planned.changed
    assert not hub.asked("", "POST")
    assert not hub.asked("", "PUT")
    done = lt.push(small, "me/small")
    assert [each.path for each in done.files] == [each.path for each in planned.files]
    assert lt.push(small, "me/new", create=True, dry_run=True).commit is None
    assert "me/new" not in hub.repos


@pytest.mark.slow
def test_branches_and_pull_requests(hub, small):
    hub.add("me/small", {})
    main = hub.repos["me/small"].sha("main")
    done = lt.push(small, "me/small", branch="next")
    assert hub.repos["me/small"].refs["next"] == done.commit
    assert hub.repos["me/small"].refs["main"] == main
    assert not lt.push(small, "me/small@next").changed
    hub.add("team/adapter", {"README.md": b"# Theirs\n"})
    theirs = hub.repos["team/adapter"].sha("main")
    with pytest.raises(HubError, match=r"does not allow.*status 403"):
        lt.push(small, "team/adapter")
    done = lt.push(small, "team/adapter", create_pr=True)
    assert done.pull_request == f"{hub.endpoint}/team/adapter/discussions/1"
    assert hub.repos["team/adapter"].sha("main") == theirs
    assert WEIGHTS in hub.repos["team/adapter"].files("refs/pr/1")
    with pytest.raises(OptionError):
        lt.push(small, "team/adapter", create_pr=True, branch="x")


def test_a_folder_in_a_repository(hub, small):
    hub.add("me/many", {"README.md": b"# Many\n"})
    lt.push(small, "hf://me/many/runs/one")
    files = published(hub, "me/many")
    assert files["README.md"] == b"# Many\n"
    assert {f"runs/one/{name}" for name in NAMES} <= set(files)
    assert b'subfolder="runs/one"' in files["runs/one/README.md"]
    assert lt.info("hf://me/many/runs/one").modules[0].rank == 4


def test_the_check_comes_first(hub, small):
    tensors = load_file(small / WEIGHTS)
    tensors[next(iter(tensors))][0, 0] = np.nan
    save_file(tensors, small / WEIGHTS)
    with pytest.raises(UnfitError, match="nothing was published") as caught:
        lt.push(small, "me/small", create=True)
    assert caught.value.result.counts["error"]
    assert "me/small" not in hub.repos


@pytest.mark.slow
def test_severities_that_keep_from_publishing(hub, small):
    (small / "pytorch.py").write_text("import os")
    worst = lt.check(small)
    assert not worst.counts["error"]
    with pytest.raises(UnfitError):
        lt.push(small, "me/small", create=True, fail_on="note")
    lt.push(small, "me/small", create=True, fail_on="note", no_check=True)
    lt.push(small, "me/other", create=True)


# Other people, and the network.


@pytest.mark.slow
def test_a_commit_of_somebody_else_is_not_overwritten(hub, small):
    hub.add("me/small", {"README.md": b"# Old\n"})
    repo = hub.repos["me/small"]
    moved = []

    def somebody(handler, method, path):
        if method == "POST" and "/preupload/" in path and not moved:
            moved.append(repo.commit({**repo.files(), "README.md": b"# Theirs\n"}))
        return False

    hub.faults.append(somebody)
    with pytest.raises(HubError, match="somebody else has committed since") as caught:
        lt.push(small, "me/small")
    assert moved[0] in str(caught.value)
    assert repo.sha("main") == moved[0]
    hub.faults.clear()
    lt.push(small, "me/small")
    assert b"# Theirs\n" in published(hub)["README.md"]


def test_a_lost_reply_is_looked_for_and_not_repeated(hub, small):
    hub.add("me/small", {})
    hub.lose_reply("/api/models/me/small/commit/")
    done = lt.push(small, "me/small")
    repo = hub.repos["me/small"]
    assert done.changed
    assert done.commit == repo.sha("main")
    assert len(repo.commits) == 2
    assert len(hub.asked("/commit/main", "POST")) == 1


def test_a_lost_reply_of_a_pull_request(hub, small):
    hub.add("team/adapter", {})
    hub.lose_reply("/api/models/team/adapter/commit/")
    done = lt.push(small, "team/adapter", create_pr=True)
    assert hub.repos["team/adapter"].pulls == 1
    assert done.pull_request == f"{hub.endpoint}/team/adapter/discussions/1"


def test_a_lost_reply_with_somebody_elses_commit_behind_it(hub, small):
    hub.add("me/small", {})
    repo = hub.repos["me/small"]

    def other(handler, method, path):
        if method == "POST" and "/commit/main" in path:
            repo.commit({**repo.files(), "x.md": b"x"})
            return handler.hang_up()
        return False

    hub.faults.append(other)
    with pytest.raises(HubError, match="somebody else"):
        lt.push(small, "me/small")
    assert WEIGHTS not in repo.files()


@pytest.mark.slow
@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_repeated(hub, small, status):
    hub.add("me/small", {})
    hub.fail("/commit/main", status, method="POST", times=2, headers={"Retry-After": "0"})
    assert lt.push(small, "me/small").changed
    assert len(hub.repos["me/small"].commits) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "does not allow"), (403, "does not allow"), (409, "something else"), (429, "fewer"),
     (500, "fault")],
)  # fmt: skip
def test_what_does_not_pass_leaves_the_old_commit(hub, small, status, said):
    hub.add("me/small", {"README.md": b"# Old\n"})
    before = hub.repos["me/small"].sha("main")
    echo = {"X-Error-Message": f"no, {TOKEN}", "Retry-After": "0"}
    hub.fail("/commit/main", status, method="POST", times=99, headers=echo)
    with pytest.raises(HubError, match=said) as caught:
        lt.push(small, "me/small")
    assert caught.value.hint
    assert TOKEN not in str(caught.value)
    assert hub.repos["me/small"].sha("main") == before


@pytest.mark.slow
def test_a_cut_upload_is_taken_up_again(hub, small, monkeypatch):
    hub.add("me/small", {})
    hub.cut(r"/lfs/\w+", method="PUT", times=1)
    lt.push(small, "me/small")
    assert published(hub)[WEIGHTS] == (small / WEIGHTS).read_bytes()


def test_other_bytes_on_the_hub_are_found(hub, small, monkeypatch):
    hub.add("me/small", {})
    repo = hub.repos["me/small"]
    commit = type(repo).commit

    def broken(self, files, *rest):
        return commit(self, {**files, WEIGHTS: b"other"} if WEIGHTS in files else files, *rest)

    monkeypatch.setattr(type(repo), "commit", broken)
    with pytest.raises(HubError, match="other bytes"):
        lt.push(small, "me/small")


def test_without_a_login(hub, small, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(LoratoolsError, match="hf auth login"):
        lt.push(small, "me/small", create=True)
    assert "me/small" not in hub.repos


def test_names_that_are_no_repositories(hub, small):
    for name in ("small", "hf://datasets/me/x", "hf://buckets/me/x", "me/..", "a/b c"):
        with pytest.raises(OptionError):
            lt.push(small, name)


# Formats and models.


@pytest.mark.slow
def test_other_formats_are_used_in_their_own_way(hub, tmp_path):
    lt.convert(LORA, to="gguf", base=MODEL, output=tmp_path / "x.gguf")
    lt.push(tmp_path / "x.gguf", "me/gguf", create=True, base_model=BASE)
    files = published(hub, "me/gguf")
    assert set(files) == {"x.gguf", "x.gguf.provenance.json", "README.md", "spectrum.png"}
    assert b"llama-cli -m BASE_MODEL.gguf --lora x.gguf" in files["README.md"]
    assert ModelCard(files["README.md"].decode()).data.library_name == "gguf"
    lt.convert(LORA, to="mlx", output=tmp_path / "m-mlx", allow_lossy=True)
    lt.push(tmp_path / "m-mlx", "me/mlx", create=True)
    assert b"mlx_lm.generate --model loratools/tiny-llama" in published(hub, "me/mlx")["README.md"]


@pytest.mark.slow
def test_a_fused_model(hub, tmp_path):
    lt.fuse(MODEL, LORA, output=tmp_path / "fused")
    (tmp_path / "fused" / "stray.py").write_text("")
    done = lt.push(tmp_path / "fused", "me/fused", create=True, base_model=BASE)
    files = published(hub, "me/fused")
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)
    assert done.left_out == ("stray.py",)
    data = ModelCard(files["README.md"].decode()).data.to_dict()
    assert data["base_model_relation"] == "merge"
    assert data["library_name"] == "transformers"


def test_what_is_neither(hub, tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(LoratoolsError):
        lt.push(tmp_path / "x", "me/x", create=True)


@pytest.mark.slow
def test_an_adapter_in_memory(hub):
    done = lt.push(lt.squeeze(LORA, rank=2).adapter, "me/small", create=True)
    assert set(published(hub)) == NAMES
    assert done.changed


# Outputs that are references.


@pytest.mark.slow
def test_an_output_on_the_hub(hub, tmp_path):
    hub.add("me/a", LORA)
    hub.add("me/b", RSLORA)
    made = lt.merge({"hf://me/a": 1.0, "hf://me/b": 0.3}, rank=4, output="hf://me/z")
    assert hub.repos["me/z"].private
    assert made.published.commit == hub.repos["me/z"].sha("main")
    files = published(hub, "me/z")
    commit = hub.repos["me/a"].sha("main")
    assert f"hf://me/a@{commit}".encode() in files["recipe.yaml"]
    lt.merge({LORA: 1.0, RSLORA: 0.3}, rank=4, output=tmp_path / "z")
    place = lt.read("me/z").source
    here, there = (load_file(folder / WEIGHTS) for folder in (tmp_path / "z", place))
    assert all(np.array_equal(here[name], there[name]) for name in here)
    assert not [name for name, data in files.items() if str(tmp_path).encode() in data]
    again = lt.merge({"hf://me/a": 1.0, "hf://me/b": 0.3}, rank=4, output="hf://me/z")
    assert not again.published.changed
    assert "published" in again.to_dict()


@pytest.mark.slow
def test_a_recipe_with_local_paths_stays_here(hub, tmp_path):
    lt.merge({LORA: 1.0, RSLORA: 0.3}, rank=4, output=tmp_path / "z")
    done = lt.push(tmp_path / "z", "me/z", create=True)
    assert "recipe.yaml" not in published(hub, "me/z")
    assert done.left_out == ("recipe.yaml",)


@pytest.mark.slow
def test_files_on_the_hub_get_names(hub, tmp_path):
    lt.convert(LORA, to="gguf", base=MODEL, output="hf://me/g")
    assert "g.gguf" in published(hub, "me/g")
    lt.convert(LORA, to="gguf", base=MODEL, output="hf://me/g/sub/other.gguf")
    assert "sub/other.gguf" in published(hub, "me/g")
    lt.convert(LORA, to="safetensors", output=tmp_path / "k.safetensors", allow_lossy=True)
    lt.squeeze(tmp_path / "k.safetensors", rank=2, output="hf://me/k")
    assert "k.safetensors" in published(hub, "me/k")


@pytest.mark.slow
def test_a_model_on_the_hub(hub):
    lt.fuse(f"hf://{BASE}", LORA, output="hf://me/fused")
    files = published(hub, "me/fused")
    assert "model.safetensors" in files
    data = ModelCard(files["README.md"].decode()).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == (BASE, "merge")


def test_where_nothing_can_be_published_nothing_is_computed(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(LoratoolsError, match="hf auth login"):
        lt.squeeze(LORA, rank=2, output="hf://me/z")


# The command line.


@pytest.mark.slow
def test_the_command(server, program, small):
    done = program("push", small, "me/small", "--create")
    assert done.returncode == 0, done.stderr
    assert "published commit" in done.stderr
    assert f"/me/small/commit/{server.repos['me/small'].sha('main')}" in done.stdout
    result = program.json("push", small, "me/small")
    assert result["changed"] is False
    assert result["url"].endswith(server.repos["me/small"].sha("main"))
    planned = program("push", small, "me/other", "--private", "--dry-run")
    assert planned.returncode == 0
    assert "+++ README.md" in planned.stdout
    assert "nothing was published" in planned.stderr
    missing = program("push", small, "me/other")
    assert missing.returncode == 2
    assert "--create" in missing.stderr


@pytest.mark.slow
def test_the_function_returns_what_the_command_prints(hub, small):
    hub.add("me/small", {})
    returned = lt.push(small, "me/small", branch="next").to_dict()
    done = CliRunner().invoke(
        cli, ["push", str(small), "me/small", "--branch", "next", "--json"], standalone_mode=False
    )
    assert done.exception is None
    printed = json.loads(done.stdout)
    expected = json.loads(json.dumps(returned))
    assert printed["changed"] is False
    for one in (printed, expected):
        for key in ("changed", "files", "card_diff", "seconds", "written"):
            del one[key]
    assert printed == expected
    schema = json.loads((SCHEMAS / "push.json").read_text())
    assert set(schema["required"]) == set(returned)


def test_the_command_exits_with_1_for_findings(server, program, small):
    done = program("push", small, "me/small", "--create", "--fail-on", "note")
    assert done.returncode == 1
    assert "LT" in done.stdout
    assert "me/small" not in server.repos


@pytest.mark.slow
def test_any_writing_command(server, program):
    server.add("me/tiny", LORA)
    done = program("squeeze", "me/tiny", "--rank", "4", "-o", "hf://me/z")
    assert done.returncode == 0, done.stderr
    assert f"published {server.endpoint}/me/z/commit/" in done.stderr
    done = program("merge", "hf://me/tiny", "hf://me/z:0.3", "--rank", "4", "-o", "hf://me/y")
    assert done.returncode == 0, done.stderr
    assert WEIGHTS in server.repos["me/y"].files()
    done = program("info", "me/y", "--revision", "main")
    assert done.returncode == 0
    done = program("squeeze", "me/tiny", "--rank", "4", "-o", "hf://me/q", "--dry-run")
    assert done.returncode == 0
    assert "me/q" not in server.repos


@pytest.mark.slow
def test_a_token_that_the_hub_repeats_is_not_shown(server, program, small):
    server.add("me/small", {})
    echo = {"X-Error-Message": f"Bearer {TOKEN} may not"}
    server.fail("/commit/main", 403, method="POST", times=9, headers=echo, body={"error": TOKEN})
    done = program("push", small, "me/small")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    program.more = {"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug"}
    program("push", small, "me/small")


@pytest.mark.slow
def test_the_snippet_runs(server, program, small, tmp_path):
    pytest.importorskip("peft")
    server.add(BASE, MODEL)
    assert program("push", small, "me/small", "--create").returncode == 0
    card = server.repos["me/small"].files()["README.md"].decode()
    code = card.partition("```python\n")[2].partition("```")[0]
    code += "\nprint(sorted(model.peft_config['default'].target_modules))\n"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(server, tmp_path / "home"),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "q_proj" in done.stdout


@pytest.mark.slow
def test_nothing_is_left_in_the_temporary_folder(hub, small, tmp_path, monkeypatch):
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    lt.push(small, "me/small", create=True)
    lt.squeeze(LORA, rank=2, output="hf://me/z")
    assert os.listdir(folder) == []
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("minted", [True, False])
def test_trusted_publishing_needs_no_secret(server, program, small, minted):
    pytest.importorskip("huggingface_hub._oidc")
    server.add("me/small", {})
    server.trusted = "me/small"
    program.token = None
    program.more = {"HF_OIDC_RESOURCE": "me/small"}
    if minted:
        url = f"{server.endpoint}/id-token"
        of_job = {
            "ACTIONS_ID_TOKEN_REQUEST_URL": url,
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "of-the-job",
        }
        program.more |= {"GITHUB_ACTIONS": "true", **of_job}
    else:
        program.more |= {"HF_OIDC_ID_TOKEN": ID_TOKEN}
    done = program("push", small, "me/small")
    assert done.returncode == 0, done.stderr
    assert WEIGHTS in published(server)
    program.more["HF_OIDC_RESOURCE"] = "me/other"
    done = program("push", small, "me/other", "--create")
    assert done.returncode == 2
    assert ID_TOKEN not in done.stderr


@pytest.mark.slow
def test_weights_are_published_with_their_configuration(hub, small):
    lt.push(small / WEIGHTS, "me/small", create=True)
    assert set(published(hub)) == NAMES
    assert lt.info("me/small").modules


def test_a_repository_that_somebody_makes_meanwhile(hub, small):
    def somebody(handler, method, path):
        if path == "/api/repos/create" and "me/small" not in hub.repos:
            hub.add("me/small", {"README.md": b"# Theirs\n"})
        return False

    hub.faults.append(somebody)
    with pytest.raises(HubError, match="somebody has made the repository meanwhile"):
        lt.push(small, "me/small", create=True)
    assert published(hub) == {"README.md": b"# Theirs\n"}


@pytest.mark.slow
def test_a_server_whose_listings_have_no_hashes(hub, small):
    hub.hashes = False
    lt.push(small, "me/small", create=True)
    assert set(published(hub)) == NAMES
    assert not lt.push(small, "me/small").changed
    assert len(hub.repos["me/small"].commits) == 2


def steps_of(card):
    """Return the rows of the card's table of steps, by operation."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines()
            if line.startswith("| ") and "`" in line]  # fmt: skip
    return {row[1].strip("`"): row for row in rows if len(row) == 6}


@pytest.mark.slow
def test_every_step_of_the_card_has_its_error_and_sizes(hub, tmp_path):
    fused = lt.fuse(MODEL, LORA, output=tmp_path / "fused")
    small = lt.quantize(tmp_path / "fused", output=tmp_path / "nf4")
    plain = lt.dequantize(tmp_path / "nf4", output=tmp_path / "plain")
    lt.push(tmp_path / "plain", "me/plain", create=True)
    rows = steps_of(hub.repos["me/plain"].files()["README.md"].decode())
    assert rows["fuse"][3] == f"{fused.lost_to_rounding:.3g}"
    assert rows["quantize"][3] == f"{small.relative_error:.3g}"
    assert rows["dequantize"][3] == f"{plain.relative_error:.3g}"
    assert rows["quantize"][5] == f"{small.bytes_in / 1e6:.1f} MB → {small.bytes_out / 1e6:.1f} MB"
    assert all("→" in row[5] for row in rows.values())

    done = lt.convert(LORA, to="peft", dtype="bf16", output=tmp_path / "half")
    lt.to_dora(tmp_path / "half", base=MODEL, output=tmp_path / "dora")
    lt.push(tmp_path / "dora", "me/dora", create=True, no_check=True)
    rows = steps_of(hub.repos["me/dora"].files()["README.md"].decode())
    assert rows["convert"][3:5] == [f"{done.relative_error:.3g}", "32"]
    assert rows["to-dora"][4] == "32"
    assert all("B" in row[5] for row in rows.values())


def test_a_statement_about_other_weights_is_neither_told_nor_published(hub, small, tmp_path):
    """Somebody has put other weights into the folder, or an edited configuration."""
    config = small / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"inference_mode": True}))
    made = lt.push(small, "me/edited", create=True)
    assert "provenance.json" in {file.path for file in made.files}
    assert not [each for each in made.findings if each.code == "stale-statement"]
    for name in ("adapter_config.json", WEIGHTS):
        shutil.copyfile(RSLORA / name, small / name)
    made = lt.push(small, "me/other", create=True, no_check=True)
    assert "provenance.json" not in published(hub, "me/other")
    assert "squeeze" not in published(hub, "me/other")["README.md"].decode()
    (told,) = [each for each in made.findings if each.code == "stale-statement"]
    assert told.where == WEIGHTS
    lt.convert(LORA, to="gguf", base=MODEL, output=tmp_path / "x.gguf")
    (tmp_path / "y.gguf").write_bytes((tmp_path / "x.gguf").read_bytes())
    lt.convert(RSLORA, to="gguf", base=MODEL, output=tmp_path / "x.gguf", overwrite=True)
    shutil.copyfile(tmp_path / "y.gguf", tmp_path / "x.gguf")
    made = lt.push(tmp_path / "x.gguf", "me/gguf", create=True, no_check=True)
    assert {file.path for file in made.files} == {"x.gguf", "README.md", "spectrum.png"}


def test_rewritten_weights_tell_of_their_last_operation_alone(tmp_path):
    from safetensors import safe_open

    lt.fuse(MODEL, {LORA: 0.5}, output=tmp_path / "fused")
    lt.quantize(tmp_path / "fused", output=tmp_path / "nf4", quant_type="fp4")
    for name, operation in (("fused", "fuse"), ("nf4", "quantize")):
        file = tmp_path / name / "model.safetensors"
        with safe_open(file, "numpy") as opened:
            found = opened.metadata()
        assert found["loratools.operation"] == operation
        assert found["loratools.version"] == lt.__version__
        raw = file.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
        assert list(header) == sorted(header)
        statement = json.loads((tmp_path / name / "provenance.json").read_text())
        inputs = {f"{i['role']}/{i['name']}" for i in statement["predicate"]["inputs"]}
        assert set(json.loads(header["loratools.inputs"])) == inputs
        assert json.loads(header["loratools.options"]) == statement["predicate"]["options"]
    merged = lt.merge([LORA], method="dare_linear", density=0.5, seed=7).adapter
    assert merged.metadata["loratools.seed"] == "7"
    assert "loratools.seed" not in lt.convert(merged, to="peft").adapter.metadata
