"""Which table of names an adapter's modules are of: never one that is only possible.

A table must know every name, with the proportions of every weight and no more blocks than its
architecture has. What the file's metadata calls the architecture decides before everything else,
then a base that is given; where several tables are left and lead to other names, the one whose
blocks are all there. Architectures without a table compete by their names: a file that may be of
one of them is of no table for certain.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources

from loratools.naming.named_modules import UNKNOWN_SHAPE, NamedModules
from loratools.naming.places import (
    Target,
    is_located,
    located,
    module_key,
    schemes_of,
    target_scheme,
)
from loratools.naming.tables import Place, Table, bundled_tables
from loratools_formats.disk.errors import AdapterError, OptionError, and_more

_STATED = ("modelspec.architecture", "ss_base_model_version")
_SD2 = "sd_v2"
TABLES_KEY = "loratools.names"
"""Metadata of files of ours: the tables that their names were made by, all of which agree."""


def given_table(file: NamedModules, table: Table) -> Table:
    """Return a table that the user named, if it has all modules of a file.

    Raises:
        AdapterError: it lacks some.
    """
    missing = file.missing(table)
    if missing:
        raise _lacking(file, table, missing, f"the table of {table.title}")
    return table


def chosen_tables(
    files: Sequence[NamedModules], target: Target, base: Iterable[str] = ()
) -> list[Table]:
    """Return the bundled tables that have every module of some files, and agree on their names.

    Args:
        files: of one architecture, such as what is to be merged.
        target: the naming that is wanted.
        base: the names of the base's modules, with their component, if one is given.

    Raises:
        AdapterError: the metadata names an architecture whose table does not fit, or none has.
        OptionError: several tables fit, and they disagree.
    """
    stated, text = _stated(files)
    fitting = [table for table in stated if all(file.is_in(table) for file in files)]
    if not fitting and text is not None:
        raise _of_another_table(files, stated, text)
    own = [table for table in fitting if all(file.has_own_prefixes(table) for file in files)]
    fitting = own or fitting
    # To diffusers' names every table of diffusers' leads alike.
    decided = text is not None or all(target_scheme(target, t) == "diffusers" for t in fitting)
    others = [] if decided else [t for t in architectures_without_a_table() if _may_be(files, t)]
    known = frozenset(base)
    if known:
        fitting, others = _of_base(fitting, others, known)
    if not fitting:
        return []
    outcomes = {_outcomes(files, target, table) for table in fitting}
    if len(outcomes) == 1 and not others:
        return fitting
    complete = [table for table in (*fitting, *others) if _is_complete(files, table)]
    found = {_outcomes(files, target, table) for table in complete if table not in others}
    if len(found) != 1 or any(table in others for table in complete):
        raise OptionError(
            "the names fit several architectures",
            path=_source(files),
            got=", ".join(table.name for table in (*fitting, *others)),
            hint="Name one that has a table with `names`, or give the base with `base`",
        )
    return complete


def _outcomes(
    files: Sequence[NamedModules], target: Target, table: Table
) -> tuple[tuple[str, ...], ...]:
    return tuple(file.outcome(target, table) for file in files)


def _may_be(files: Sequence[NamedModules], neighbour: Table) -> bool:
    """Return whether all names are those of an architecture in diffusers.

    Nobody trains text encoders of one that has no table.
    """
    for file in files:
        for name, full in file.names.items():
            key = module_key(full)
            if key is None or schemes_of(key) != ("diffusers",):
                return False
            if file.place(name, neighbour) is None:
                return False
    return True


def may_have_no_table(names: Iterable[str]) -> bool:
    """Return whether names without a component may be of an architecture that has no table."""
    keys = [module_key(name) for name in names]
    paths = [key.path for key in keys if key is not None and not key.prefix]
    return len(paths) == len(keys) and any(
        all(table.locate(path, flat=False, schemes=("diffusers",)) for path in paths)
        for table in architectures_without_a_table()
    )


def kernel_of(name: str) -> tuple[int, ...] | None:
    """Return the kernel that tables give a module; None if none does, or they differ."""
    found = set()
    for table in bundled_tables():
        try:
            place = located(name, table)
        except OptionError:  # several modules of that table, which their shapes tell apart
            return None
        if isinstance(place, Place):
            found.add(place.row.kernel)
    return found.pop() if len(found) == 1 else None


def _of_base(
    fitting: list[Table], others: list[Table], base: frozenset[str]
) -> tuple[list[Table], list[Table]]:
    """Return the tables that know whatever any of them knows of the base's modules."""
    found = {
        table.name: {name for name in base if is_located(name, table)}
        for table in (*fitting, *others)
    }
    known = set().union(*found.values())
    return (
        [table for table in fitting if found[table.name] == known],
        [table for table in others if found[table.name] == known],
    )


def _is_complete(files: Sequence[NamedModules], table: Table) -> bool:
    places = [place for file in files for place in file.places(table)]
    return table.is_complete(place for place in places if isinstance(place, Place))


def _stated(files: Sequence[NamedModules]) -> tuple[tuple[Table, ...], str | None]:
    """Return the tables that metadata allows, and the text that it names them by.

    Raises:
        AdapterError: it names an architecture of which there is no table.
    """
    tables, said = bundled_tables(), None
    for file in files:
        made_by = file.metadata.get(TABLES_KEY, "").split(", ")
        own = tuple(table for table in tables if table.name in made_by)
        if own:
            tables, said = own, ", ".join(table.name for table in own)
        texts = [text for key in _STATED if (text := file.metadata.get(key, "").strip())]
        if not texts and file.metadata.get("ss_v2", "").lower() == "true":
            texts = [_SD2]
        named = [
            (text, {t.name for t in bundled_tables() if t.is_known_as(text)}) for text in texts
        ]
        known = [(text, names) for text, names in named if names]
        if texts and not known:
            raise _without_table(file, texts[0])
        if not texts and file.base_model is not None:
            # A name that people give says something only if a table is known by it.
            of_base = {t.name for t in bundled_tables() if t.is_known_as(file.base_model)}
            known = [(file.base_model, of_base)] if of_base else []
        for text, names in known:
            tables, said = tuple(table for table in tables if table.name in names), text
        if said is not None and not tables:
            raise _without_table(file, said)
    return tables, said


def _without_table(file: NamedModules, text: str) -> AdapterError:
    return AdapterError(
        "the file's metadata names an architecture of which there is no table of names",
        path=str(file.source) if file.source else None,
        got=text,
        hint="If its names are those of one of the tables, give it with `names`",
    )


def _of_another_table(
    files: Sequence[NamedModules], stated: Sequence[Table], text: str
) -> AdapterError:
    table = min(stated, key=lambda table: sum(len(file.missing(table)) for file in files))
    file = next(file for file in files if file.missing(table))
    where = f"the table of {table.title}, as which the metadata has it ({text})"
    return _lacking(file, table, file.missing(table), where)


def in_no_table(file: NamedModules, missing: Sequence[str]) -> AdapterError:
    """Return the refusal of a file that no table has: what the nearest one lacks, if one is near.

    Args:
        file: its modules.
        missing: what they are called that a table is needed for.
    """
    table = min(bundled_tables(), key=lambda table: len(file.missing(table)))
    lacking = file.missing(table)
    if len(lacking) < len(file.names):
        where = f"the table of {table.title}, which has the others"
        return _lacking(file, table, lacking, where)
    for table in bundled_tables():
        if all(is_located(name, table) for name in file.names.values()):
            return _lacking(file, table, lacking, f"the table of {table.title}")
    return unresolved(missing, "any bundled table", file.source)


def _lacking(file: NamedModules, table: Table, missing: list[str], where: str) -> AdapterError:
    name = missing[0]
    shape = file.shapes.get(name, UNKNOWN_SHAPE)
    if is_located(file.names[name], table) and None in shape:
        return AdapterError(
            f"several modules have this name in {where}, and the file has no shape of its "
            "weight, which would tell them apart",
            path=str(file.source) if file.source else None,
            tensor=file.names[name],
            hint="Make it a plain LoRA first: "
            "loratools to-lora ADAPTER --base MODEL --rank RANK -o plain",
        )
    if is_located(file.names[name], table):
        rows, columns = shape
        count = f", nor have {len(missing) - 1} others" if len(missing) > 1 else ""
        return AdapterError(
            f"a weight does not have the proportions that it has in {where}{count}",
            path=str(file.source) if file.source else None,
            tensor=file.names[name],
            got=f"{rows} rows and {columns} columns",
            hint="Is it of another architecture? Name its table with `names`",
        )
    others = missing if len(missing) < len(file.names) else []
    return unresolved([file.names[name] for name in missing], where, file.source, drop=others)


def unresolved(
    missing: Sequence[str], where: str, source: object, *, drop: Sequence[str] = ()
) -> AdapterError:
    """Return the refusal of names that nothing resolves.

    Args:
        missing: the names, with their component.
        where: what they are not in.
        source: the file, for the message.
        drop: the names as the adapter has them, if the file could go without.
    """
    count = "1 module name is" if len(missing) == 1 else f"{len(missing)} module names are"
    only = f"; to go without, leave out with `drop`: {_pattern_of(drop)}" if drop else ""
    return AdapterError(
        f"{count} not in {where}",
        path=str(source) if source else None,
        got=and_more(missing, 5),
        hint="Give a list of names with `base` or `names_from`, or a table with `names`; if only "
        "the prefix differs, `component` puts another" + only,
    )


def _pattern_of(names: Sequence[str]) -> str:
    """Return the regular expression, quoted for a shell, that finds these modules and no other."""
    return shlex.quote("|".join(f"^{re.escape(name)}$" for name in names))


def _source(files: Sequence[NamedModules]) -> str | None:
    return next((str(file.source) for file in files if file.source), None)


@functools.cache
def architectures_without_a_table() -> tuple[Table, ...]:
    """Return the architectures without a table, whose names in diffusers are known."""
    import tomllib

    text = resources.files("loratools.naming").joinpath("data/neighbours.toml")
    classes = tomllib.loads(text.read_text(encoding="utf-8"))
    return tuple(_as_table(name, entry) for name, entry in classes.items())


def _as_table(name: str, entry: Mapping[str, list[str]]) -> Table:
    return Table(
        name,
        {
            "title": name,
            "diffusers": "transformer",
            "kohya": "diffusers",
            "blocks": entry["blocks"],
            "modules": [{"pairs": [[path, path] for path in entry["paths"]]}],
        },
    )
