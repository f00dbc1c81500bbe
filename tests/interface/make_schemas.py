"""Write `loratools/schemas/*.json`: JSON Schemas of what each command prints with `--json`.

`recipe.json` is that of the recipes that `loratools run` takes.

    python tests/interface/make_schemas.py

They are made from the results that the functions return. A test compares the files with what this
makes, and validates the output of every command.
"""

import collections.abc
import dataclasses
import inspect
import json
import re
import types
import typing
from pathlib import Path

import loratools
from loratools.face.check import CheckResult, RuleResult
from loratools.face.compare import BasesResult, CompareResult
from loratools.face.convert import ConvertResult, WriteResult
from loratools.face.dequantize import DequantizeResult
from loratools.face.extract import ExtractChoices, ExtractResult
from loratools.face.fleet_index import FleetDedupResult, FleetIndexResult, FleetSimilarResult
from loratools.face.fleet_share import FleetAddResult, FleetShareResult, FleetUnshareResult
from loratools.face.fuse import FusePlan, FuseResult
from loratools.face.fuse_parts import FusePart
from loratools.face.info import InfoResult
from loratools.face.info_base import BaseInfoResult
from loratools.face.lists import FormatsResult, MethodsResult
from loratools.face.merge import MergeResult
from loratools.face.plan_squeeze import PlanSqueezeResult
from loratools.face.provenance import ProvenanceResult
from loratools.face.push import PushResult
from loratools.face.quantize import QuantizeResult
from loratools.face.ran import Ran
from loratools.face.repair import RepairResult
from loratools.face.result import SCHEMA
from loratools.face.spectrum import SpectrumResult
from loratools.face.squeeze import SqueezeChoices, SqueezeResult
from loratools.face.to_dora import ToDoraResult
from loratools.face.to_lora import ToLoraChoices, ToLoraResult
from loratools.face.verify import VerifyResult
from loratools.pipeline.fleet.run import FleetResult
from loratools.pipeline.replay import ReplayResult
from loratools.pipeline.run import RunResult
from loratools.pipeline.schema import json_schema
from loratools.work.json_object import json_name, spread_types

FOLDER = Path(loratools.__file__).parent / "schemas"
RESULTS = {
    "check": (CheckResult,),
    "compare": (CompareResult,),
    "compare-bases": (BasesResult,),
    "convert": (ConvertResult,),
    "dequantize": (DequantizeResult,),
    "extract": (ExtractResult, ExtractChoices),
    "fleet": (FleetResult,),
    "fleet-add": (FleetAddResult,),
    "fleet-dedup": (FleetDedupResult,),
    "fleet-index": (FleetIndexResult,),
    "fleet-similar": (FleetSimilarResult,),
    "fleet-share": (FleetShareResult,),
    "fleet-unshare": (FleetUnshareResult,),
    "formats": (FormatsResult,),
    "fuse": (FuseResult, FusePlan, FusePart),
    "info": (InfoResult,),
    "info-base": (BaseInfoResult,),
    "merge": (MergeResult,),
    "methods": (MethodsResult,),
    "plan-squeeze": (PlanSqueezeResult,),
    "provenance": (ProvenanceResult,),
    "push": (PushResult,),
    "quantize": (QuantizeResult,),
    "repair": (RepairResult,),
    "replay": (ReplayResult,),
    "rule": (RuleResult,),
    "run": (RunResult,),
    "spectrum": (SpectrumResult,),
    "squeeze": (SqueezeResult, SqueezeChoices),
    "to-dora": (ToDoraResult,),
    "to-lora": (ToLoraResult, ToLoraChoices),
    "verify": (VerifyResult,),
    "write": (WriteResult,),
}
_SIMPLE = {str: "string", bool: "boolean", int: "integer", float: "number", Path: "string"}


def schemas() -> dict[str, str]:
    """Return the text of each schema by the command's name, and that of recipes."""
    recipe = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    return {name: _schema(name, results) for name, results in RESULTS.items()} | {
        "recipe": recipe,
        "error": _error_schema(),
    }


def _failure() -> dict[str, typing.Any]:
    """Return the schema of the object under `error`."""
    texts = {
        "kind": "the class of the error",
        "text": "the line that stderr shows",
        "message": "what is wrong",
        "path": "the file or folder concerned",
        "tensor": "the tensor or module concerned",
        "got": "what was found",
        "expected": "what would have been right",
        "hint": "the next step",
    }
    always = ("kind", "text")
    properties: dict[str, typing.Any] = {
        name: {"description": text, "type": "string" if name in always else ["string", "null"]}
        for name, text in texts.items()
    }
    properties["exit_code"] = {"description": "of the command", "type": "integer"}
    return {
        "type": "object",
        "description": "What the command ended in; absent if all went well.",
        "properties": properties,
        "required": sorted(properties),
        "additionalProperties": False,
    }


def _error_schema() -> str:
    """Return the schema of what every command prints if it ends in an error and found nothing."""
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "loratools --json of an error",
        "type": "object",
    }
    properties = {
        "schema": {"const": SCHEMA},
        "operation": {"type": ["string", "null"], "description": "the command"},
        **_object(Ran)["properties"],
        "error": _failure(),
    }
    body = {"properties": properties, "required": list(properties), "additionalProperties": False}
    return json.dumps(head | body, indent=2, ensure_ascii=False) + "\n"


def _schema(name: str, results: tuple[type, ...]) -> str:
    shapes = [_object(result, top=True) for result in results]
    body = shapes[0] if len(shapes) == 1 else {"oneOf": shapes}
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"loratools {name} --json",
    }
    return json.dumps(head | body, indent=2, ensure_ascii=False) + "\n"


def _object(of: type, *, top: bool = False) -> dict[str, typing.Any]:
    hints, texts = typing.get_type_hints(of), _texts(of)
    properties: dict[str, typing.Any] = {}
    if top:
        properties |= {"schema": {"const": SCHEMA}, "operation": {"const": of.operation}}
        properties |= _object(Ran)["properties"]
    inner = spread_types(of)
    for field in dataclasses.fields(of):
        name = json_name(field)
        if field.name in inner:
            within = _object(inner[field.name])["properties"]
            properties |= {key: _or_null(shape) for key, shape in within.items()}
        elif name is not None:
            text = texts.get(field.name)
            described = {} if text is None else {"description": text}
            properties[name] = described | _of(hints[field.name])
    required = list(properties)
    if top:
        text = "What push says, if the output was a repository on the Hub."
        properties["published"] = {"type": "object", "description": text}
        properties["error"] = _failure()
    return {
        "type": "object",
        "description": inspect.cleandoc(of.__doc__ or "").splitlines()[0],
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _or_null(shape: dict[str, typing.Any]) -> dict[str, typing.Any]:
    described = {key: text for key, text in shape.items() if key == "description"}
    rest = {key: value for key, value in shape.items() if key != "description"}
    return described | {"anyOf": [rest, {"type": "null"}]}


def _of(hint: typing.Any) -> dict[str, typing.Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is typing.Any:
        return {}
    if origin in (typing.Union, types.UnionType):
        shapes = [_of(argument) for argument in arguments if argument is not types.NoneType]
        return {"anyOf": [*shapes, {"type": "null"}]}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin is tuple and arguments[-1] is not Ellipsis:
        items = [_of(argument) for argument in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "items": False}
    if origin is tuple:
        return {"type": "array", "items": _of(arguments[0])}
    if origin in (dict, collections.abc.Mapping):
        return {"type": "object", "additionalProperties": _of(arguments[1])}
    if dataclasses.is_dataclass(hint):
        return _object(hint)
    return {"type": _SIMPLE[hint]}


def _texts(of: type) -> dict[str, str]:
    """Return what docstrings say of each field, a derived class's over its base's."""
    found: dict[str, str] = {}
    for owner in reversed(of.__mro__):
        _, _, section = inspect.cleandoc(owner.__doc__ or "").partition("\nAttributes:\n")
        for entry in re.split(r"^ {4}(?=\w)", section, flags=re.MULTILINE)[1:]:
            name, _, text = entry.partition(":")
            found[name] = " ".join(text.split())
    return found


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in schemas().items():
        (FOLDER / f"{name}.json").write_text(text, encoding="utf-8")
