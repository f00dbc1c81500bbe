"""Write `loratools/__init__.pyi`, the signatures that type checkers and editors see.

    python tests/interface/make_stub.py

The functions of the face get their options from declarations, and are imported when first used;
neither shows to a type checker. A test compares the file with what this makes.
"""

import collections.abc
import inspect
import subprocess
import sys
import types
import typing
from pathlib import Path

import loratools

PATH = Path(loratools.__file__).parent / "__init__.pyi"


def stub() -> str:
    """Return the text of the stub, formatted."""
    imports: dict[str, set[str]] = {}
    functions, classes = [], []
    for module, names in loratools._HOMES.items():
        for name in names:
            value = getattr(loratools, name)
            if inspect.isfunction(value):
                functions.append(_function(name, value, imports))
            else:
                classes.append(name)
                imports.setdefault(module, set()).add(f"{name} as {name}")
    lines = [
        "# Made by tests/interface/make_stub.py; do not edit.",
        "",
        "import os",
        "from collections.abc import Callable, Mapping, Sequence",
        "from typing import Any, Literal, overload",
        "",
        "import numpy as np",
        "",
        "from loratools import training as training",
        *(f"from {module} import {', '.join(sorted(imports[module]))}" for module in imports),
        "",
        "__version__: str",
        "",
        *functions,
    ]
    return _formatted("\n".join(lines) + "\n")


def _function(name: str, function: typing.Any, imports: dict[str, set[str]]) -> str:
    signature = inspect.signature(function)
    if not hasattr(function, "__wrapped__"):
        hints = typing.get_type_hints(function)
        signature = signature.replace(return_annotation=hints["return"])
    result = signature.return_annotation
    results = typing.get_args(result) if name == "fuse" else ()
    if not results:
        return _definition(name, signature, {}, _text(result, imports), imports)
    written, planned, part = results

    def given(option: str) -> typing.Any:
        hint = signature.parameters[option].annotation
        return typing.Union[tuple(a for a in typing.get_args(hint) if a is not type(None))]  # noqa: UP007

    cases = (
        ({"output": given("output"), "shard": None}, written),
        ({"output": given("output"), "shard": given("shard")}, written | part),
        ({"output": None}, planned),
    )
    return "\n".join(
        "@overload\n" + _definition(name, signature, narrowed, _text(to, imports), imports)
        for narrowed, to in cases
    )


def _definition(
    name: str,
    signature: inspect.Signature,
    narrowed: dict[str, typing.Any],
    result: str,
    imports: dict[str, set[str]],
) -> str:
    parts, keyword_only = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            parts.append("*")
            keyword_only = True
        hint = narrowed.get(parameter.name, parameter.annotation)
        required = parameter.default is parameter.empty or (
            parameter.name in narrowed and narrowed[parameter.name] is not None
        )
        default = "" if required else f" = {_default(parameter.default)}"
        parts.append(f"{parameter.name}: {_text(hint, imports)}{default}")
    return f"def {name}({', '.join(parts)}) -> {result}: ..."


def _default(value: object) -> str:
    plain = value is None or value == () or isinstance(value, bool | int | float | str)
    return repr(value) if plain else "..."


def _text(hint: typing.Any, imports: dict[str, set[str]]) -> str:
    if hint is None or hint is type(None):
        return "None"
    if hint is typing.Any or hint is Ellipsis:
        return "..." if hint is Ellipsis else "Any"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return f"Literal[{', '.join(map(repr, arguments))}]"
    texts = [_text(argument, imports) for argument in arguments if not isinstance(argument, list)]
    if origin in (typing.Union, types.UnionType):
        return " | ".join(sorted(dict.fromkeys(texts), key=lambda text: text == "None"))
    if origin is collections.abc.Callable:
        taken = ", ".join(_text(argument, imports) for argument in arguments[0])
        return f"Callable[[{taken}], {texts[-1]}]"
    if origin is not None:
        return f"{_text(origin, imports)}[{', '.join(texts)}]"
    if hint.__module__ == "numpy":
        return f"np.{hint.__name__}"
    if hint.__module__ in ("os", "builtins", "collections.abc"):
        return f"os.{hint.__name__}" if hint.__module__ == "os" else hint.__name__
    imports.setdefault(hint.__module__, set()).add(f"{hint.__name__} as {hint.__name__}")
    return hint.__name__


def _formatted(text: str) -> str:
    for command in (["check", "--fix", "--select", "I,F401", "-q"], ["format", "-q"]):
        arguments = [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(PATH), "-"]
        done = subprocess.run(arguments, input=text, capture_output=True, text=True, check=True)
        text = done.stdout
    return text


if __name__ == "__main__":
    PATH.write_text(stub())
