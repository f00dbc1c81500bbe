"""An adapter's modules under the names of another naming.

First flattened names are looked up, where a list or an embedded map is there; then a table brings
modules from one scheme into the other, fusing and splitting them; last, prefixes are put before
paths, which are flattened if need be. Each step happens only where the target asks for it, and a
name that no step resolves is an error: none is ever guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from loratools.naming.choice import (
    TABLES_KEY,
    chosen_tables,
    given_table,
    may_have_no_table,
)
from loratools.naming.crossing import Crossing
from loratools.naming.lists import MAP_KEY, as_metadata, embedded_map, looked_up
from loratools.naming.named_modules import NamedModules, all_names
from loratools.naming.places import (
    FileSpelling,
    Target,
    is_located,
    module_key,
    target_scheme,
)
from loratools.naming.prefixes import is_of, other_prefix, without_table
from loratools.naming.tables import Place, Table, bundled_tables
from loratools_formats.core.adapter import Adapter, Addition, Replacement
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.findings import Finding
from loratools_formats.core.single_file_keys import COMPONENTS, Naming
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import (
    AdapterError,
    LoratoolsError,
    OptionError,
    UnsupportedError,
)

_SHAPE = ".reshape_weight"
_DENOISERS = {"transformer.", "unet."}


@dataclass(frozen=True)
class NamingOptions:
    """What a user gives to resolve names.

    Attributes:
        table: names of the architecture; None to find the bundled one that fits.
        dotted: a list of dotted names, components included.
        base: those of them that are of the base, which a table must know.
        component: what to put before paths that have no component.
    """

    table: Table | None = None
    dotted: tuple[str, ...] = ()
    base: tuple[str, ...] = ()
    component: str | None = None


@dataclass(frozen=True)
class Renamed:
    """An adapter under other names.

    Attributes:
        adapter: with modules, keys of additions and metadata as the target has them.
        findings: how the names were found.
        left_out: modules of other components than the one asked for, if the target holds one.
        split: modules that are pieces of what was one.
        exact: in float64, the modules whose values the adapter has rounded.
    """

    adapter: Adapter
    findings: tuple[Finding, ...] = ()
    left_out: tuple[str, ...] = ()
    split: frozenset[str] = frozenset()
    exact: Mapping[str, ModuleChange] = field(default_factory=dict)


def renamed(adapter: Adapter, target: Target, options: NamingOptions | None = None) -> Renamed:
    """Return an adapter with the names of another naming.

    Args:
        adapter: of any format.
        target: the naming.
        options: what the user gives to resolve names.

    Raises:
        AdapterError: names that nothing resolves, or that fall together.
        UnsupportedError: deltas that would have to be fused or split and cannot be.
        OptionError: several tables fit, and they disagree.
    """
    options = options or NamingOptions()
    if target == "bare":
        return _bare(adapter, options)
    return _in_class(adapter, target, options)


def _bare(adapter: Adapter, options: NamingOptions) -> Renamed:
    """Return the modules of one component, by their dotted paths in it."""
    by_diffusers = _in_class(adapter, "bare", options)
    adapter = by_diffusers.adapter
    prefixes = {name: key.prefix for name in adapter.modules if (key := module_key(name))}
    wanted = {options.component + "."} if options.component else set(prefixes.values())
    if wanted <= _DENOISERS and set(prefixes.values()) == {"diffusion_model."}:
        wanted = {"diffusion_model."}  # what no table knows, and has one component
    wanted &= {*prefixes.values(), *(() if options.component else ("",))}
    if len(wanted) > 1:
        raise UnsupportedError(
            "the target format holds one component of a pipeline, and the file has several",
            path=adapter.source,
            got=", ".join(sorted(prefix.rstrip(".") or "none" for prefix in wanted)),
            hint="Take one with `component`, and leave out the others with `allow_lossy=True`",
        )
    prefix = next(iter(wanted), "")
    kept = {n: d for n, d in adapter.modules.items() if prefixes.get(n, "") == prefix}
    if not kept:
        raise OptionError(
            "the adapter has no module of that component",
            path=adapter.source,
            got=options.component,
        )
    modules = {name.removeprefix(prefix): delta for name, delta in kept.items()}
    left_out = tuple(sorted(set(adapter.modules) - set(kept)))
    split = frozenset(name.removeprefix(prefix) for name in by_diffusers.split & set(kept))
    exact = {n.removeprefix(prefix): d for n, d in by_diffusers.exact.items() if n in kept}
    return Renamed(replace(adapter, modules=modules), by_diffusers.findings, left_out, split, exact)


def _in_class(adapter: Adapter, target: Target, options: NamingOptions) -> Renamed:
    names = _with_component(adapter, options, target)
    if target == "safetensors":
        return Renamed(adapter)
    known = embedded_map(adapter)
    flat = {new for new in names.values() if (key := module_key(new)) is not None and key.flat}
    if target != "kohya":
        dotted = looked_up(flat, options.dotted, known)
        names = {old: dotted.get(new, new) for old, new in names.items()}
    file = NamedModules.of(adapter, names)
    if all(is_of(new, target) for new in names.values()):
        return _in_own_class(adapter, file, target, options)
    if options.table is not None:
        tables = [given_table(file, options.table)]
    else:
        tables = chosen_tables([file], target, options.base)
    if not tables:
        exchanged = other_prefix(names, target, options.component)
        if exchanged is not None:
            return Renamed(_moved(adapter, exchanged, target))
        return Renamed(_moved(adapter, without_table(adapter, names, target), target, names))
    return _crossed(adapter, file, target, tables, options)


def _in_own_class(
    adapter: Adapter, file: NamedModules, target: Target, options: NamingOptions
) -> Renamed:
    """Return a file that is of the class, its modules as most files of the class spell them.

    Names stay where no table is certain.
    """
    if target in ("kohya", "comfyui") or file.has_foreign_prefixes():
        try:
            if options.table is not None:
                tables = [given_table(file, options.table)]
            else:
                tables = chosen_tables([file], target, options.base)
        except LoratoolsError as error:
            if options.table is not None:
                raise
            found = ", ".join(error.got.split(", ")[:4]) if isinstance(error.got, str) else ""
            text = f"names stay as they are: {error.message}" + (f" ({found})" if found else "")
            finding = Finding("names-stay", "note", None, text)
            return Renamed(_moved(adapter, file.names, target), (finding,))
        if tables and file.outcome(target, tables[0]) != tuple(sorted(file.names.values())):
            return _crossed(adapter, file, target, tables, options)
    return Renamed(_moved(adapter, file.names, target))


def respelled_as(adapter: Adapter, spelling: FileSpelling, table: Table) -> Adapter:
    """Return an adapter of single files as another file spells its modules.

    Args:
        adapter: all of whose modules the table has.
        spelling: of the other file.
        table: of their architecture.

    Raises:
        AdapterError: two modules become one, or rows do not divide.
        UnsupportedError: kinds that cannot be split or joined.
    """
    file = NamedModules.of(adapter)
    return _crossed(adapter, file, spelling, [table], NamingOptions()).adapter


def _crossed(
    adapter: Adapter,
    file: NamedModules,
    target: Target,
    tables: list[Table],
    options: NamingOptions,
) -> Renamed:
    adapter, left_out = _one_expert(adapter, file, target, tables[0], options)
    expert = options.component if options.component in tables[0].components else None
    crossing = Crossing(adapter, file, target, tables[0], expert)
    modules, additions = crossing.modules(), crossing.additions()
    done = _finished(adapter, modules, additions, target, crossing.dotted)
    if options.table is None or options.table in bundled_tables():
        made_by = ", ".join(table.name for table in tables)
        done = replace(done, metadata={**done.metadata, TABLES_KEY: made_by})
    titles = " or ".join(table.title for table in tables)
    findings = (Finding("names-by-table", "note", None, f"names by the table of {titles}"),)
    return Renamed(done, findings, left_out, frozenset(crossing.split), crossing.exact)


def _one_expert(
    adapter: Adapter,
    file: NamedModules,
    target: Target,
    table: Table,
    options: NamingOptions,
) -> tuple[Adapter, tuple[str, ...]]:
    """Return the modules of one expert, where the target names all experts alike, and the others.

    Raises:
        UnsupportedError: there are several, and none was chosen.
    """
    places = {name: file.place(name, table) for name in file.names}
    own = next((c for c in table.components if c == options.component), table.component)
    experts = {
        old: p.component or own
        for old, p in places.items()
        if isinstance(p, Place) and not p.row.component
    }
    found = sorted(set(experts.values()))
    if target_scheme(target, table) == "diffusers" or len(found) < 2:
        return adapter, ()
    if options.component not in found:
        raise UnsupportedError(
            f"{_naming(target)} files name all experts alike, and the adapter has several",
            path=adapter.source,
            got=", ".join(found),
            hint="Take one with `component`, and leave out the others with `allow_lossy=True`",
        )
    others = {old for old, component in experts.items() if component != options.component}
    kept = {
        key: addition
        for key, addition in adapter.additions.items()
        if addition.target.rpartition(".")[0] not in others
    }
    modules = {name: delta for name, delta in adapter.modules.items() if name not in others}
    return replace(adapter, modules=modules, additions=kept), tuple(sorted(others))


def _with_component(adapter: Adapter, options: NamingOptions, target: Target) -> dict[str, str]:
    """Return what each module is called with its component before it."""
    result = {}
    names = all_names(adapter)
    is_told = options.table is not None or bool(options.base) or not may_have_no_table(names)
    for name in names:
        key = module_key(name)
        if key is not None and key.prefix:
            result[name] = name
        elif options.component is not None and target != "bare":
            result[name] = f"{options.component}.{name}"
        elif target in ("bare", "safetensors") or (is_told and _is_in_a_table(name, options)):
            result[name] = name
        else:
            raise OptionError(
                "the module's name does not say which component of a pipeline it is of",
                path=adapter.source,
                got=name,
                hint=f"Pass `component`, one of {', '.join(COMPONENTS)} or diffusion_model",
            )
    return result


def _is_in_a_table(name: str, options: NamingOptions) -> bool:
    tables = (options.table,) if options.table else bundled_tables()
    return any(is_located(name, table) for table in tables)


def _moved(
    adapter: Adapter,
    names: Mapping[str, str],
    target: Target,
    before: Mapping[str, str] | None = None,
) -> Adapter:
    """Return the adapter with other names and nothing else changed.

    Args:
        adapter: of any format.
        names: what each module is to be called.
        target: the naming.
        before: what each is called with its component, if that is not to be its name.
    """
    falling: dict[str, str] = {}
    for old, new in names.items():
        if new in falling:
            raise AdapterError(
                "two names are the same when flattened",
                path=adapter.source,
                tensor=new,
                got=f"{falling[new]} and {old}",
            )
        falling[new] = old
    modules = {names[name]: delta for name, delta in adapter.modules.items()}
    additions = {}
    for addition in adapter.additions.values():
        module, _, leaf = addition.target.rpartition(".")
        name = f"{names[module]}.{leaf}"
        additions[name] = replace(addition, target=name)
    pairs = [(names[old], full) for old, full in (before or {}).items()]
    dotted = {new: full for new, full in pairs if "." in full and "." not in new}
    return _finished(adapter, modules, additions, target, dotted)


def _finished(
    adapter: Adapter,
    modules: Mapping[str, ModuleChange],
    additions: Mapping[str, Addition],
    target: Target,
    dotted: Mapping[str, str],
) -> Adapter:
    """Return the adapter with its new contents, and the map back if names were flattened."""
    target = _naming(target)
    metadata = {k: v for k, v in adapter.metadata.items() if k != MAP_KEY}
    there = {*modules, *(name.rpartition(".")[0] for name in additions)}
    known = {name: full for name, full in dotted.items() if name in there}
    if target == "kohya" and not known and MAP_KEY in adapter.metadata:
        metadata[MAP_KEY] = adapter.metadata[MAP_KEY]
    elif target == "kohya" and known:
        metadata |= as_metadata(known)
    return replace(
        adapter,
        modules=dict(sorted(modules.items())),
        additions=dict(sorted(additions.items())),
        replacements=_of_original(adapter) if target == "comfyui" else adapter.replacements,
        carried={
            key: tensor
            for key, tensor in adapter.carried.items()
            if key.removesuffix(_SHAPE) in there or not _states_own_shape(key, tensor, adapter)
        },
        metadata=metadata,
    )


def _states_own_shape(key: str, tensor: TensorRef, adapter: Adapter) -> bool:
    """Return whether a tensor states the shape of a module's weight that its factors show, too."""
    change = adapter.modules.get(key.removesuffix(_SHAPE)) if key.endswith(_SHAPE) else None
    if change is None or tensor.numel != 2:
        return False
    return tuple(tensor.load().reshape(-1).tolist()) == change.shape


def _naming(target: Target) -> Naming | Literal["bare"]:
    return target.naming if isinstance(target, FileSpelling) else target


def _of_original(adapter: Adapter) -> dict[str, Replacement]:
    """Return replacements with their component, as BFL's control adapters leave it out."""
    return {
        key: replace(replacement, target=f"diffusion_model.{replacement.target}")
        if replacement.target.startswith(("double_blocks.", "single_blocks."))
        else replacement
        for key, replacement in adapter.replacements.items()
    }
