"""Files of one architecture that spell its modules differently, brought into one spelling.

Kohya's and OneTrainer's names of one module, or fused and split ones, lie side by side in a merged
file, and a loader takes one of the two. Modules are the same where a table puts them in the same
place, or where one is a part of the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from loratools.naming.choice import chosen_tables
from loratools.naming.named_modules import NamedModules
from loratools.naming.places import FileSpelling, TextPlace, module_key
from loratools.naming.rename import respelled_as
from loratools.naming.tables import Place, Scheme, Table, bundled_tables
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.single_file_keys import Naming

_Spot = tuple[str, tuple[str, ...], str, int]


def in_one_spelling(adapters: Sequence[Adapter]) -> list[Adapter] | None:
    """Return single files with modules as the first spells them; None if there is no need.

    There is one where namings differ, or a module has two names. Without a table that has all
    modules of all files nothing can be told, and None is returned too.

    Raises:
        AdapterError: some modules have two spellings, and no table has all of the others.
        OptionError: several tables have them, and they disagree.
        UnsupportedError: kinds that cannot be split or joined.
    """
    files = [NamedModules.of(adapter) for adapter in adapters]
    if len({adapter.format for adapter in adapters}) == 1 and not any(
        _has_two_spellings(files, table) for table in bundled_tables()
    ):
        return None
    for table in bundled_tables():
        spelling = _spelling(files[0], table)
        if spelling is None or not all(file.is_in(table) for file in files):
            continue
        if table in chosen_tables(files, spelling):
            return [
                adapter
                if file.outcome(spelling, table) == tuple(sorted(file.names))
                else respelled_as(adapter, spelling, table)
                for adapter, file in zip(adapters, files, strict=True)
            ]
    return None


def _has_two_spellings(files: Sequence[NamedModules], table: Table) -> bool:
    """Return whether two files call one module differently by a table."""
    found: dict[_Spot, str] = {}
    for file in files:
        for name in file.names:
            for spot in _spots(file, name, table):
                if found.setdefault(spot, name) != name:
                    return True
    return False


def _spots(file: NamedModules, name: str, table: Table) -> Iterator[_Spot]:
    """Yield every part of a row, or the place in a text encoder, that a name stands for."""
    place = file.place(name, table)
    if isinstance(place, TextPlace):
        yield place.path, (), place.role, 0
    elif place is not None:
        component = place.component or table.component
        for part in place.covered:
            yield place.row.original, place.numbers, component, part


def _spelling(file: NamedModules, table: Table) -> FileSpelling | None:
    """Return how a file spells its modules, as most of them are; None if a table has none."""
    found: Counter[tuple[Naming, Scheme, str, bool]] = Counter()
    text: dict[str, str] = {}
    for name in file.names:
        key, place = module_key(name), file.place(name, table)
        if key is None or place is None:
            continue
        if isinstance(place, Place):
            # A name that both namings have tells least.
            telling = place.row.diffusers != (place.row.original,)
            found[key.naming, place.scheme, key.prefix, key.flat] += 1000 if telling else 1
        else:
            text.setdefault(place.role, key.prefix)
    if not found:
        return None
    naming, scheme, prefix, flat = found.most_common(1)[0][0]
    if scheme == "original" and any(other == "trained" for _, other, _, _ in found):
        scheme = "trained"  # which has the original names, too, where there is no other
    return FileSpelling(naming, scheme, prefix, flat, tuple(sorted(text.items())))
