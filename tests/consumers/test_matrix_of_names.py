"""Classes × names × commands: ΔW by PEFT's own load equals ours, or the class is listed.

For a tiny model of a class, an adapter is extracted. Under today's names, those of transformers 4
and mlx-lm's it goes through `fuse`, `merge`, `convert` and `squeeze --budget`. What a command does
not do for a class stands in docs/classes.md with the reason. `make test` takes a sample,
`make test-matrix` all classes; one that its library does not build tiny, save and load is skipped.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import peft_oracle
import pytest
import tiny_models

import loratools as lt
from loratools.base.placement import model_class
from loratools_formats.disk.errors import LoratoolsError

pytestmark = [pytest.mark.filterwarnings(line) for line in peft_oracle.WARNINGS]

SAMPLE = (
    "Qwen3MoeForCausalLM", "Gemma3ForConditionalGeneration", "RobertaForSequenceClassification",
    "Qwen3VLMoeModel", "IdeficsModel", "ClvpDecoder", "GteModel",
)  # fmt: skip
LISTED = Path(__file__).parents[2] / "docs" / "classes.md"
TOLERANCE = 1e-6


def pytest_generate_tests(metafunc):
    names = SAMPLE
    if metafunc.config.getoption("models"):
        table = Path(model_class.__file__).parent / "data" / "class_names.json"
        names = tuple(json.loads(table.read_text(encoding="utf-8"))["classes"])
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", names)


def listed():
    """Return the cells of docs/classes.md: what is refused for which class."""
    row = re.compile(r"^\| `(\w+)` \| ([\w ,-]+) \| .+ \|$", re.MULTILINE)
    rows = row.findall(LISTED.read_text(encoding="utf-8"))
    return {(name, cell.strip()) for name, cells in rows for cell in cells.split(",")}


def prepared(name, folder):
    """Save a tiny model before and after a change; return its class and what changed."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    tiny_models.made(name).save_pretrained(folder / "base")
    cls = getattr(transformers, name)
    model = cls.from_pretrained(folder / "base").float()
    old = {key: weight.detach().clone() for key, weight in model.named_parameters()}
    if not tiny_models.changed(model):
        pytest.skip("no linear layers")
    model.save_pretrained(folder / "tuned")
    again = dict(cls.from_pretrained(folder / "tuned").float().named_parameters())
    assert all(torch.equal(again[key], weight) for key, weight in model.named_parameters())
    return cls, {key: weight.detach() - old[key] for key, weight in model.named_parameters()}


class Matrix:
    """One class: its base, the wanted change, and a way to see what PEFT or a folder holds."""

    def __init__(self, cls, wanted, folder):
        self.cls, self.wanted, self.folder = cls, wanted, folder
        self.base = folder / "base"
        model = cls.from_pretrained(self.base).float()
        self.old = {key: weight.detach().clone() for key, weight in model.named_parameters()}

    def off(self, weights, times=1.0, wanted=None):
        """Return the relative distance of weights from the base's with the change."""
        wanted = self.wanted if wanted is None else wanted
        got = {key: weights[key].detach() - self.old[key] for key in wanted}
        off = sum(float((got[key] - times * change).norm() ** 2) for key, change in wanted.items())
        return (off / sum(float((times * c).norm() ** 2) for c in wanted.values())) ** 0.5

    def by_peft(self, adapter):
        return tiny_models.merged(self.base, adapter, self.cls)

    def folded(self, adapter, out):
        lt.fuse(self.base, adapter, output=out)
        return dict(self.cls.from_pretrained(out).float().named_parameters())

    def extract(self, out):
        lt.extract(self.base, self.folder / "tuned", rank=4, output=out)
        assert self.off(self.by_peft(out)) <= TOLERANCE

    def fuse(self, source, out):
        assert self.off(self.folded(source, out)) <= TOLERANCE

    def merge(self, source, out):
        lt.merge([self.folder / "now", source], base=self.base, output=out)
        assert self.off(self.by_peft(out), 2.0) <= TOLERANCE

    def convert(self, source, out):
        lt.convert(source, to="peft", base=self.base, output=out)
        assert self.off(self.by_peft(out)) <= TOLERANCE

    def squeeze(self, source, out):
        lt.squeeze(source, budget="75%", output=out)
        again = out.with_name("again")
        lt.convert(out, to="peft", base=self.base, output=again)
        new = self.by_peft(again)
        change = {key: new[key].detach() - self.old[key] for key in self.wanted}
        folded = self.folded(out, out.with_name("folded"))
        assert self.off(folded, wanted=change) <= 2 * TOLERANCE


def names_of_mlx(matrix, out):
    if not in_mlx(matrix.base):
        return False
    lt.convert(matrix.folder / "now", to="mlx", base=matrix.base, output=out)
    return True


def names_of_4(matrix, out):
    lt.convert(matrix.folder / "now", to="peft", base=matrix.base, names_of="4", output=out)
    return True


def in_mlx(base):
    from importlib.util import find_spec

    config = json.loads((base / "config.json").read_text())
    kind = config.get("model_type", "").replace("-", "_")
    causal = config["architectures"][0].endswith("ForCausalLM")
    return causal and find_spec(f"mlx_lm.models.{kind}") is not None


@pytest.mark.slow
def test_every_command_keeps_the_change_under_every_naming(name, tmp_path, request):
    try:
        matrix = Matrix(*prepared(name, tmp_path), tmp_path)
    except Exception as error:  # not of ours to judge
        if not request.config.getoption("models"):
            raise
        pytest.skip(f"{type(error).__name__}: {str(error)[:80]}")
    known, failed = listed(), {}

    def cell(title, work, *given):
        try:
            return work(*given) is not False
        except (LoratoolsError, AssertionError, UserWarning, ValueError, RuntimeError,
                NotImplementedError) as error:  # fmt: skip
            failed[title] = f"{type(error).__name__}: {str(error)[:200]}"
            return False

    if cell("extract", matrix.extract, tmp_path / "now"):
        spelled = {"now": tmp_path / "now"}
        if cell("names of 4", names_of_4, matrix, tmp_path / "four"):
            spelled["4"] = tmp_path / "four"
        if cell("mlx", names_of_mlx, matrix, tmp_path / "mlx"):
            spelled["mlx"] = tmp_path / "mlx"
        for naming, source in spelled.items():
            for command in ("fuse", "merge", "convert", "squeeze"):
                out = tmp_path / f"{naming}-{command}" / "out"
                out.parent.mkdir()
                cell(f"{command} {naming}", getattr(matrix, command), source, out)
    unlisted = {title: why for title, why in failed.items() if (name, title) not in known}
    assert not unlisted, unlisted
    assert not {cell for listed_name, cell in known if listed_name == name} - set(failed)
