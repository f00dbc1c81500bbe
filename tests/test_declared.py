"""Options are declared once, as dataclass fields, and every user of them reads the declaration."""

import dataclasses

import pytest

from loratools.algebra.ranks import Budget, RankRule
from loratools.lowrank.resize import ComputeOptions
from loratools.work.declared import HEADINGS, build, declared
from loratools.work.parallel import usable_cores
from loratools.work.requests import Reading, Reporting, Writing
from loratools.work.selection import Selection
from loratools_formats.disk.errors import OptionError

DECLARATIONS = [RankRule, ComputeOptions, Selection, Reading, Writing, Reporting]


@pytest.mark.parametrize("cls", DECLARATIONS)
def test_every_field_is_an_option_with_its_help(cls):
    options = declared(cls)
    assert [o.field for o in options] == [f.name for f in dataclasses.fields(cls)]
    for option in options:
        assert option.heading in HEADINGS
        assert option.help.endswith(".")


@pytest.mark.parametrize("spelling", ["f16", "FP16", "float16", "half", "torch.float16"])
def test_a_type_has_several_spellings(spelling):
    assert build(ComputeOptions, {"dtype": spelling}).dtype == "f16"


def test_text_and_values_mean_the_same():
    for energy in ("90%", "0.9", 0.9):
        assert build(RankRule, {"energy": energy}) == RankRule(energy=0.9)
    for patterns in ({"mlp": 4}, ["mlp=4"], "mlp=4", [("mlp", 4)]):
        assert build(RankRule, {"rank_pattern": patterns}) == RankRule(patterns=(("mlp", 4),))
    assert build(RankRule, {"budget": "25%", "rank": None}) == RankRule(budget=Budget(share=0.25))


def test_what_is_not_declared_is_refused():
    with pytest.raises(TypeError, match="no option ranks"):
        build(RankRule, {"ranks": 4})
    with pytest.raises(OptionError, match="dtype has no such value; got f8"):
        build(ComputeOptions, {"dtype": "f8"})


@pytest.mark.parametrize(
    ("files", "most"),
    [
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ({}, 64),
    ],
)
def test_the_quota_of_a_cgroup_bounds_the_workers(tmp_path, files, most, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(100)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cores(tmp_path) == most


@pytest.mark.parametrize("workers", [0, 65])
def test_workers_have_one_range(workers):
    with pytest.raises(OptionError, match="from 1 to 64"):
        ComputeOptions(workers=workers)
