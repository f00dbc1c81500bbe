"""Write `docs/reference/*.md`, made from the code: what a person looks up.

    python tests/reference/make_reference.py

A test compares the files with what this makes.
"""

import dataclasses
import inspect
import json
import re
import textwrap
from pathlib import Path

import loratools
from loratools.cli import exits
from loratools.face.ran import Ran
from loratools.kinds import all_kinds
from loratools.operations.merge.methods import registered_methods
from loratools_formats.contract.registry import registered_formats

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "reference"
HELP = ROOT / "tests" / "help"
SCHEMAS = Path(loratools.__file__).parent / "schemas"
MADE = "Made by `tests/reference/make_reference.py` from the code; do not edit."
STATEMENT = {
    "_type": "the version of in-toto's Statement",
    "subject": "the output's files",
    "subject.name": "of a file",
    "subject.digest": "its SHA-256",
    "predicateType": "`urn:loratools:operation:v1`",
    "predicate.operation": "the operation, such as `squeeze`",
    "predicate.tool": "the program",
    "predicate.tool.name": "`loratools`",
    "predicate.tool.version": "of loratools",
    "predicate.options": "what decided the bytes, defaults included",
    "predicate.seed": "of what is random",
    "predicate.inputs": "every file that was read",
    "predicate.inputs.name": "of a file",
    "predicate.inputs.role": "what it was read as: `adapter`, `base`, `initial`, …",
    "predicate.inputs.digest": "its SHA-256, or that of its header where no more was read",
    "predicate.inputs.reference": "the reference to the Hub that named it",
    "predicate.inputs.commit": "the commit on the Hub",
    "predicate.call": "the call of the public function, which `replay` repeats",
    "predicate.call.function": "its name in Python",
    "predicate.call.arguments": "what it read, by parameter",
    "predicate.call.options": "the options that were not at their default",
    "predicate.environment": "what may change last bits: versions, BLAS, its kernel",
    "predicate.report": "what came out: error, ranks, size",
    "predicate.steps": "operations in memory that made an input",
    "predicate.history": "the statements of the inputs",
}
"""What each key of a statement means. A test compares it with statements of real outputs."""


def pages():
    """Return the text of each page by its file's name."""
    return {
        "commands.md": commands(),
        "python.md": python(),
        "json.md": json_objects(),
        "exit-codes.md": exit_codes(),
        "formats.md": formats(),
        "kinds.md": kinds(),
        "methods.md": methods(),
        "recipe.md": recipe(),
        "provenance.md": provenance(),
    }


def page(title, *parts):
    """Return a page with a title."""
    return "\n\n".join([f"# {title}", MADE, *parts]) + "\n"


def table(header, rows):
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def cell(text):
    """Return text that a cell can hold."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def commands():
    """Return what `--help` prints, of every command, as `tests/help/write_help.py` wrote it."""
    parts = []
    for path in sorted(HELP.glob("*.txt"), key=lambda path: (path.stem != "loratools", path.stem)):
        shown = "loratools" if path.stem == "loratools" else f"loratools {path.stem}"
        parts += [f"## {shown}", f"```text\n{path.read_text().rstrip()}\n```"]
    about = (
        "What `loratools COMMAND --help` prints. "
        "[The pages of the commands](../index.md) explain it."
    )
    return page("Commands", about, *parts)


def python():
    """Return the public functions with signatures and docstrings, and the fields of results."""
    parts = ["`import loratools as lt` gives these names. Options are keyword-only."]
    results = {}
    for name in sorted(loratools.__all__, key=str.lower):
        value = getattr(loratools, name)
        if not inspect.isfunction(value):
            continue
        signature = inspect.signature(value)
        words = ", ".join(signature.parameters)
        parts += [f"## lt.{name}", f"```text\nlt.{name}({words})\n```", markdown(value.__doc__)]
        for result in returned(value):
            results[result.__name__] = result
    about = (
        "Every result has `ran`, `to_dict()`, `html()` and `plot(path)`; those that are adapters "
        "have `adapter` and `write(path)`. The fields:"
    )
    parts += ["## Results", about]
    for name, result in sorted(results.items()):
        texts = attributes(result)
        rows = [[f"`{f.name}`", texts.get(f.name, "")] for f in dataclasses.fields(result)]
        parts += [
            f"### {name}",
            markdown(result.__doc__.split("\n\n")[0]),
            table(["field", ""], rows),
        ]
    return page("Python", *parts)


def returned(function):
    """Return the classes of results that a function returns."""
    hint = inspect.signature(function).return_annotation
    hints = getattr(hint, "__args__", (hint,))
    return [one for one in hints if dataclasses.is_dataclass(one) and hasattr(one, "to_dict")]


def attributes(of):
    """Return what docstrings say of each field."""
    found = {}
    for owner in reversed(of.__mro__):
        _, _, section = inspect.cleandoc(owner.__doc__ or "").partition("\nAttributes:\n")
        for entry in re.split(r"^ {4}(?=\w)", section, flags=re.MULTILINE)[1:]:
            name, _, text = entry.partition(":")
            found[name] = " ".join(text.split())
    return found


_SECTIONS = ("Args:", "Options:", "Raises:", "Attributes:")


def markdown(text):
    """Return a docstring of Google's style as Markdown."""
    parts, items, inside = [], [], False
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        head, _, rest = block.partition("\n")
        if block.startswith(">>>"):
            parts.append(f"```pycon\n{block}\n```")
        elif head == "Returns:":
            inside = True
            parts.append(f"**Returns**\n\n{' '.join(rest.split())}")
        elif head in _SECTIONS:
            inside = True
            items = re.split(r"^(?=\S)", textwrap.dedent(rest), flags=re.MULTILINE)
            lines = [f"- `{n}`: {' '.join(t.split())}" for n, _, t in
                     (one.partition(":") for one in items if one.strip())]  # fmt: skip
            parts.append(f"**{head.rstrip(':')}**\n\n" + "\n".join(lines))
        else:
            parts.append(block if not inside else textwrap.dedent(block))
    return "\n\n".join(parts)


def json_objects():
    """Return the envelope that all objects share, that of errors, and the keys of each command."""
    texts = attributes(Ran)
    shared = [["`schema`", "version of the schemas: 1"], ["`operation`", "the command"]]
    shared += [[f"`{f.name}`", texts[f.name]] for f in dataclasses.fields(Ran)]
    parts = [
        (
            "Every command prints one object with `--json`; several adapters in one call print an "
            "object on a line each. `to_dict()` of a result in Python is the same object. Equal "
            "runs print equal objects but for `seconds`. The schemas are in `loratools/schemas/`."
        ),
        "## In every object",
        table(["key", "value"], shared),
        "## Errors",
        (
            "A command that fails prints an object, too, on stdout, and the line for people on "
            "stderr. It has `error`; where something was found before (an error above "
            "`--max-error`, a loss that was not allowed), it has the result's keys beside it."
        ),
        table(["key of `error`", "value"], _rows(_schema("error")["properties"]["error"])),
        (
            "Sizes are `bytes`, `bytes_in` and `bytes_out`; ranks are `rank`, or `rank_in` and "
            "`rank_out`; modules and tensors have `name`; errors are `relative_error`."
        ),
    ]
    shared_keys = {*_schema("error")["properties"], "published"}
    for path in sorted(SCHEMAS.glob("*.json")):
        if path.stem in ("error", "recipe"):
            continue
        whole = json.loads(path.read_text())
        for shape in whole.get("oneOf", [whole]):
            rows = [row for row in _rows(shape) if row[0].strip("`") not in shared_keys]
            parts += [f"## {path.stem}" + ("" if shape is whole.get("oneOf", [whole])[0] else
                      " without a rule or an output"), shape["description"],
                      table(["key", "value"], rows)]  # fmt: skip
    return page("JSON objects", *parts)


def _schema(name):
    return json.loads((SCHEMAS / f"{name}.json").read_text())


def _rows(shape):
    return [[f"`{key}`", each.get("description", "")] for key, each in shape["properties"].items()]


def exit_codes():
    """Return the table of exit codes."""
    rows = [[code, text] for code, text in exits.MEANINGS.items()]
    return page("Exit codes", table(["code", "meaning"], rows), "The same for every command.")


def formats():
    """Return the formats."""
    rows = []
    for entry in registered_formats():
        one = entry.format
        can = "+".join(
            w for w, able in (("read", one.is_readable), ("write", one.is_writable)) if able
        )
        suffixes = " ".join(f"`{suffix}`" for suffix in one.suffixes)
        place = "folder" if one.is_folder else suffixes
        rows.append([f"`{entry.name}`", can, place, one.description])
    return page("Formats", table(["name", "can", "is a", "description"], rows))


def kinds():
    """Return the kinds of adapters."""
    rows = []
    for kind in all_kinds():
        tensors = ", ".join([*(f"`{p}`" for p in kind.parts), *(f"`{p}`?" for p in kind.optional)])
        exact = "exactly" if kind.low_rank else "up to a rank"
        rows.append([f"`{kind.name}`", kind.title, tensors, kind.needs, exact, kind.source])
    about = (
        "`lora` and `dora` have factors and need no declaration. Of the base, a kind needs "
        "nothing, the shape of the weight, or the weight itself. A `?` marks a tensor that a "
        "module may lack."
    )
    header = ["kind", "name", "tensors", "needs of the base", "becomes a LoRA", "source"]
    return page("Kinds", about, table(header, rows))


def methods():
    """Return the merge methods."""
    rows = []
    for entry in registered_methods():
        one = entry.method
        parameters = ", ".join(f"`{n.rstrip('_')}={v}`" for n, v in one.parameters.items())
        rows.append([f"`{entry.name}`", one.kind, parameters, one.summary, one.paper])
    about = "`loratools merge --method NAME --set PARAMETER=VALUE`."
    return page("Merge methods", about, table(
        ["method", "class", "parameters", "what it does", "source"], rows))  # fmt: skip


def recipe():
    """Return the steps of recipes, with their keys."""
    whole = _schema("recipe")
    steps = whole["$defs"]
    parts = [
        (
            "A recipe for [`loratools run`](../commands/run.md) is a YAML file with `version: 1`, "
            "`steps` and, if wanted, `variables`. A step has `name`, `do` and the keys below. "
            "The JSON Schema is `loratools/schemas/recipe.json`."
        ),
    ]
    for name in sorted(steps):
        if "do" not in steps[name].get("properties", {}):
            continue
        needed = set(steps[name].get("required", ()))
        rows = [
            [f"`{key}`", "yes" if key in needed else "", each.get("description", "")]
            for key, each in steps[name]["properties"].items()
            if key not in ("do", "name")
        ]
        parts += [f"## {name}", table(["key", "needed", "value"], rows)]
    return page("Recipe files", *parts)


def provenance():
    """Return the keys of statements."""
    about = (
        "Every output has a statement: `provenance.json` in a folder, `NAME.provenance.json` "
        "beside a file. It is an in-toto Statement v1 with these keys; a key may be absent where "
        "there is nothing to say. [`loratools provenance`](../commands/provenance.md) shows it."
    )
    rows = [[f"`{key}`", text] for key, text in STATEMENT.items()]
    return page("Provenance files", about, table(["key", "value"], rows))


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
