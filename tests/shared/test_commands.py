"""The commands over shared sets: what they print, and how they end."""

import json
import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from shared_fleets import fleet, matrices, write
from told import found

import loratools as lt
from loratools.cli import cli
from loratools.cli.errors import run

SCHEMAS = Path(lt.__file__).parent / "schemas"


def command(*arguments):
    return CliRunner().invoke(cli, [str(one) for one in arguments], standalone_mode=False)


def as_printed(result):
    return json.loads(json.dumps(result.to_dict()))


def test_commands_print_what_functions_return(tmp_path):
    import jsonschema  # slow to import

    paths = fleet(tmp_path, 3)
    shared = tmp_path / "shared.safetensors"
    results = [lt.fleet_share(paths, budget="95%", output=shared)]
    results.append(lt.fleet_add(shared, paths[0], name="new"))
    results.append(lt.fleet_unshare(shared, all=True))
    lines = [
        ["share", *paths, "--budget=95%", "--dry-run"],
        ["add", shared, paths[0], "--name=new", "--dry-run"],
        ["unshare", shared, "--all", "--dry-run"],
    ]
    for result, line in zip(results, lines, strict=True):
        printed = json.loads(command("fleet", *line, "--json").stdout)
        place = ("output", "written")  # a dry run has none
        assert found(json.dumps(printed), *place) == found(json.dumps(as_printed(result)), *place)
        schema = SCHEMAS / f"{result.operation}.json"
        jsonschema.validate(printed, json.loads(schema.read_text(encoding="utf-8")))


def test_wildcards_stand_for_adapters(tmp_path):
    fleet(tmp_path, 3)
    for given in (tmp_path / "adapter-*", tmp_path):
        done = command("fleet", "share", given, "--rank=4", "--dry-run", "--json")
        assert len(json.loads(done.stdout)["adapters"]) == 3


def test_reports_tell_the_errors(tmp_path):
    paths = fleet(tmp_path, 3)
    shared = tmp_path / "shared.safetensors"
    done = command("fleet", "share", *paths, "-o", shared, "--rank=4", "-v")
    assert re.search(r"^adapter-2 +0 +\S+ kB +0\.\d+ +0\.\d+$", done.stdout, re.MULTILINE)
    assert re.search(
        r"^each squeezed alone to the same size: at least 0\.", done.stdout, re.MULTILINE
    )
    done = command("fleet", "unshare", shared, "adapter-1", "-o", tmp_path / "one")
    assert re.search(r"^adapter-1 +4 ", done.stdout, re.MULTILINE)
    assert lt.read(tmp_path / "one").modules


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        (["share", "{0}", "{1}", "-o", "{out}"], "--rank 64"),
        (["share", "{0}", "{other}", "-o", "{out}", "--rank=4"], "--force-base"),
        (["share", "{0}", "{1}", "--rank=4"], "--output"),
        (["share", "{0}", "{1}", "--rank=4", "-o", "{out}.d"], "--output"),
        (["unshare", "{set}", "-o", "{out}"], "adapter-0"),
        (["unshare", "{set}", "nobody", "-o", "{out}"], "adapter-0"),
        (["add", "{set}", "{0}", "-o", "{out}"], "--name"),
        (["add", "{0}", "{1}", "-o", "{out}"], "fleet share"),
    ],
)
def test_refusals_end_with_2_and_a_hint_and_write_nothing(
    line, hint, tmp_path, capsys, monkeypatch
):
    paths = fleet(tmp_path, 2)
    other = write(tmp_path / "other", matrices(1)[0], base_model_name_or_path="another/base")
    shared = tmp_path / "set.safetensors"
    lt.fleet_share(paths, rank=4, output=shared)
    out = tmp_path / "out.safetensors"
    places = {"other": other, "set": shared, "out": out}
    arguments = [one.format(*paths, **places) for one in line]
    before = sorted(tmp_path.iterdir())

    monkeypatch.setattr(sys, "argv", ["loratools", "fleet", *arguments])
    with pytest.raises(SystemExit) as ended:
        run(cli)
    assert ended.value.code == 2
    assert hint in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_an_error_above_the_limit_ends_with_1(tmp_path):
    paths = fleet(tmp_path, 3)
    out = tmp_path / "set.safetensors"
    done = command("fleet", "share", *paths, "-o", out, "--rank=2", "--max-error=0.01")
    assert done.return_value == 1
    assert "is above --max-error 0.01" in done.stderr
    assert not out.exists()
