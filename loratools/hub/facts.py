"""What a model card says of an output: keys of the front matter, how it was made, how to use it.

Source of the keys: https://huggingface.co/docs/hub/model-cards and peft 0.21's `create_or_update_
model_card`, which writes `base_model`, `library_name` and the tag `base_model:adapter:<id>`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratools.hub.card import CardFacts, table
from loratools.hub.front_matter import Value
from loratools_formats.core.adapter import Adapter

_HUB_ID = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?", re.ASCII)
_LIBRARIES = {
    "peft": "peft",
    "mlx": "mlx",
    "gguf": "gguf",
    "diffusers": "diffusers",
    "kohya": "diffusers",
    "comfyui": "diffusers",
}
_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
_RELATIONS = {"fuse": "merge", "quantize": "quantized"}
_MOST_ROWS = 20
_OF_MACHINES = {"device", "workers"}


@dataclass(frozen=True)
class Subject:
    """What is published, and where.

    Attributes:
        repo: the repository.
        inside: the folder in it; empty for all of it.
        files: names of the files, the weights first.
        adapter: as it was read; None for a model.
        nbytes: size of all files.
        base_model: name of its base model, on the Hub or not; None if it is not known.
        licence: keys of its licence; empty if it is not known.
        records: how it was made: predicates of its statements, the oldest first.
        picture: name of its picture; None if there is none.
    """

    repo: str
    inside: str
    files: Sequence[str]
    adapter: Adapter | None
    nbytes: int
    base_model: str | None
    licence: Mapping[str, str]
    records: Sequence[Mapping[str, Any]]
    picture: str | None

    @property
    def operation(self) -> str | None:
        """The operation that made it; None if nothing says so."""
        return None if not self.records else str(self.records[-1].get("operation"))


def is_hub_name(name: str | None) -> bool:
    """Return whether a base model's name can be one on the Hub, and is no path of a machine.

    >>> is_hub_name("meta-llama/Llama-3.1-8B"), is_hub_name("/home/me/llama"), is_hub_name("./x")
    (True, False, False)
    """
    return name is not None and _HUB_ID.fullmatch(name) is not None and "--" not in name


def card_facts(subject: Subject) -> CardFacts:
    """Return what the card says."""
    title = subject.inside.rpartition("/")[2] or subject.repo.rpartition("/")[2]
    parts = [*_made(subject), *_what_it_is(subject), *_picture(subject), *_use(subject)]
    return CardFacts(title, _keys(subject), parts)


def _keys(subject: Subject) -> dict[str, Value]:
    relation = "adapter"
    if subject.adapter is None:
        relation = _RELATIONS.get(subject.operation or "", "")
    keys: dict[str, Value] = {}
    tags = ["lora"] if subject.adapter is not None else []
    if is_hub_name(subject.base_model):
        keys["base_model"] = subject.base_model or ""
        keys["base_model_relation"] = relation
        tags += [f"base_model:{relation}:{subject.base_model}"] if relation else []
    library = _library(subject)
    task = _task(subject)
    return {
        **keys,
        "library_name": library,
        "pipeline_tag": _PIPELINES.get(task, ""),
        **subject.licence,
        "tags": tags,
    }


def _library(subject: Subject) -> str:
    if subject.adapter is not None:
        return _LIBRARIES.get(subject.adapter.format, "")
    if subject.files[0].endswith(".gguf"):
        return "gguf"
    return "diffusers" if subject.files[0].startswith("diffusion_") else "transformers"


def _task(subject: Subject) -> str:
    task = None if subject.adapter is None else subject.adapter.config.get("task_type")
    return task if isinstance(task, str) else ""


def _made(subject: Subject) -> list[str]:
    if not subject.records:
        return []
    shown = subject.records[-_MOST_ROWS:]
    rows = []
    for number, record in enumerate(shown, len(subject.records) - len(shown) + 1):
        report = record.get("report", {})
        rows.append([
            str(number),
            f"`{record.get('operation')}`",
            _options(record.get("options", {})),
            _number(report.get("relativeError")),
            str(report.get("ranks") or "–"),
            _sizes(report),
        ])  # fmt: skip
    version = subject.records[-1].get("tool", {}).get("version", "")
    header = ["step", "operation", "options", "relative error", "ranks", "size"]
    text = (
        f"Made by loratools {version}. The error is "
        "‖ΔW − ΔW'‖/‖ΔW‖ of the stored, rounded weights against what the step asks for; "
        "of `quantize` and `dequantize` it is ‖W − W'‖/‖W‖; "
        "`provenance.json` has the digests of what it was made from."
    )
    return ["## How it was made", table(header, rows), text]


def _options(options: Mapping[str, Any]) -> str:
    pairs = list(_flat("", options))
    return ", ".join(f"{name} {value}" for name, value in pairs) or "–"


def _flat(name: str, value: Any) -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key in sorted(set(value) - _OF_MACHINES):
            yield from _flat(str(key), value[key])
    elif isinstance(value, list):
        yield name, " ".join(map(str, value))
    elif value is not None and value is not False:
        yield name, f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else "–"


def _sizes(report: Mapping[str, Any]) -> str:
    before, after = report.get("bytesIn"), _size(report.get("bytes"))
    return f"{_size(before)} → {after}" if isinstance(before, int) else after


def _size(value: Any) -> str:
    if not isinstance(value, int):
        return "–"
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value} B"


def _what_it_is(subject: Subject) -> list[str]:
    adapter = subject.adapter
    rows = [["size", _size(subject.nbytes)]]
    if adapter is not None:
        modules = list(adapter.modules.values())
        kinds = Counter(each.kind for each in modules)
        ranks = ranks_text(adapter)
        dtypes = sorted({tensor.dtype.code for tensor in adapter.tensors()})
        rows = [
            ["format", adapter.format],
            ["modules", ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))],
            ["ranks", ranks],
            ["stored as", ", ".join(dtypes)],
            *rows,
        ]
    if subject.base_model is not None and is_hub_name(subject.base_model):
        rows.insert(
            0,
            ["base model", f"[{subject.base_model}](https://huggingface.co/{subject.base_model})"],
        )
    return ["## What it is", table(["", ""], [row for row in rows if row[1]])]


def ranks_text(adapter: Adapter) -> str:
    """Return the ranks of an adapter's modules: `8`, or `4 to 32`; empty if it has none."""
    ranks = sorted({each.rank for each in adapter.modules.values() if each.rank is not None})
    if not ranks:
        return ""
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def _picture(subject: Subject) -> list[str]:
    if subject.picture is None:
        return []
    return ["## Spectrum", f"![The spectrum of each module's change]({subject.picture})"]


def _use(subject: Subject) -> list[str]:
    code = _code(subject)
    return [] if code is None else ["## Use", code]


def _code(subject: Subject) -> str | None:
    base = subject.base_model if is_hub_name(subject.base_model) else "BASE_MODEL"
    weights = subject.files[0]
    place = f"{subject.inside}/{weights}" if subject.inside else weights
    if subject.adapter is None:
        return _model_code(subject, place)
    kind = subject.adapter.format
    if kind == "peft":
        auto = _AUTO_CLASSES.get(_task(subject), "AutoModelForCausalLM")
        within = f', subfolder="{subject.inside}"' if subject.inside else ""
        return _python(f"""
            from peft import PeftModel
            from transformers import {auto}

            base = {auto}.from_pretrained("{base}")
            model = PeftModel.from_pretrained(base, "{subject.repo}"{within})
        """)
    if kind in ("kohya", "diffusers", "comfyui"):
        return _python(f"""
            from diffusers import DiffusionPipeline

            pipeline = DiffusionPipeline.from_pretrained("{base}")
            pipeline.load_lora_weights("{subject.repo}", weight_name="{place}")
        """)
    if kind == "gguf":
        return _shell(f"""
            hf download {subject.repo} {place} --local-dir .
            llama-cli -m BASE_MODEL.gguf --lora {place} -p "Once upon a time"
        """)
    if kind == "mlx":
        folder = f"adapter/{subject.inside}" if subject.inside else "adapter"
        return _shell(f"""
            hf download {subject.repo} --local-dir adapter
            mlx_lm.generate --model {base} --adapter-path {folder} --prompt "Once upon a time"
        """)
    return _shell(f"""
        loratools to-lora hf://{subject.repo}/{place} -o plain
    """)


def _model_code(subject: Subject, place: str) -> str | None:
    if place.endswith(".gguf"):
        return _shell(f"""
            hf download {subject.repo} {place} --local-dir .
            llama-cli -m {place} -p "Once upon a time"
        """)
    if place.rpartition("/")[2].startswith("diffusion_"):
        return None
    within = f', subfolder="{subject.inside}"' if subject.inside else ""
    return _python(f"""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained("{subject.repo}"{within})
    """)


def _python(text: str) -> str:
    return _fenced("python", text)


def _shell(text: str) -> str:
    return _fenced("shell", text)


def _fenced(language: str, text: str) -> str:
    lines = text.strip("\n").rstrip().split("\n")
    indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    return "\n".join([f"```{language}", *(line[indent:] for line in lines), "```"])
