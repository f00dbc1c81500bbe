"""Changes of parameters rather than modules, such as stacked experts, in a PEFT folder.

Keys name the module only. Where several parameters of one module are adapted, their changes nest
(`experts.lora_A`, `experts.base_layer.lora_A`), innermost the one that the model class declares
first. The order in which classes declare the known names is the same everywhere, and tells which is
which where all of them are adapted and one number of experts results. Else ranks may tell: the rows
of a factor are rank · experts, and the parameters of one module have the same number of experts.
Where they do not, every parameter stays a candidate, for the shapes of a base to decide.

Source: `_inject_parameters` and `ParamWrapper` of peft 0.21.2; its conversion of adapters for
transformers 5, which gives the joined `gate_up_proj` twice the rank of `down_proj`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from loratools_formats.core.peft_facts import owner
from loratools_formats.disk.errors import AdapterError, UnsupportedError
from loratools_formats.formats.peft import keys
from loratools_formats.formats.peft.config import PeftConfig

_DECLARED = (
    ("gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias"),
    ("w1", "v1", "w2"),
    ("gate_proj", "up_proj", "down_proj"),
)
"""Parameters of stacked experts in the order in which classes of transformers 5 declare them."""


class Setting(NamedTuple):
    """What a configuration says of one module.

    Attributes:
        names: parameters that it may stand for; none for an ordinary module.
        alpha: lora_alpha.
        rank: r, for each expert.
    """

    names: tuple[str, ...]
    alpha: float
    rank: int


def settings(
    config: PeftConfig, rows: Mapping[str, int], folder: Path | None
) -> dict[str, Setting]:
    """Return the setting of each module.

    A module that `target_modules` lists is adapted as a whole: a bare entry of
    `target_parameters`, such as `down_proj`, would fit any module otherwise.

    Args:
        config: of the folder.
        rows: of the first factor of each module, r or E·r.
        folder: for messages.

    Raises:
        AdapterError: ranks of parameters fit no number of experts.
        UnsupportedError: they fit several, or a rank fits parameters of different alpha.
    """
    targets = config.values.get("target_parameters") or []
    listed = config.values.get("target_modules")
    whole = tuple(f".{each}" for each in (listed if isinstance(listed, list) else []))
    candidates = {path: _names(path, targets, whole) for path in rows}
    looked_up = {path: candidates[path] or (keys.setting_name(path),) for path in rows}
    found = config.alpha_and_rank(sorted({n for names in looked_up.values() for n in names}))
    remaining = _told_apart(candidates, rows, found, folder)
    return {
        path: Setting(remaining[path], *found[(remaining[path] or looked_up[path])[0]])
        for path in rows
    }


def _names(path: str, targets: Collection[str], whole: tuple[str, ...]) -> tuple[str, ...]:
    if not targets:
        return ()
    module = owner(path)
    if f".{module}".endswith(whole):
        return ()
    found = set()
    for target in targets:
        full = f"{module}.{target.rpartition('.')[2]}"
        if full == target or full.endswith(f".{target}"):
            found.add(full)
    return tuple(sorted(found))


def _told_apart(
    candidates: Mapping[str, tuple[str, ...]],
    rows: Mapping[str, int],
    found: Mapping[str, tuple[float, int]],
    folder: Path | None,
) -> dict[str, tuple[str, ...]]:
    """Return the candidates that remain for each module, all of one alpha and rank."""
    nests: dict[str, list[str]] = {}
    for path, names in candidates.items():
        if names:
            nests.setdefault(owner(path), []).append(path)
    result = dict(candidates)
    for paths in nests.values():
        names = candidates[paths[0]]
        declared = _by_declaration({path: rows[path] for path in paths}, names, found)
        if declared:
            result |= {path: (name,) for path, name in declared.items()}
            continue
        if len({found[name] for name in names}) == 1:
            continue
        known = Counter(found[name][1] for name in names)
        ranks = _ranks({path: rows[path] for path in paths}, known, folder)
        for path in paths:
            result[path] = tuple(name for name in names if found[name][1] == ranks[path])
            if len({found[name] for name in result[path]}) > 1:
                raise _ambiguous(path, result[path], folder)
        if len({name for path in paths for name in result[path]}) < len(paths):
            raise _misfit(paths[0], rows[paths[0]], known, folder)
    return result


def _by_declaration(
    rows: Mapping[str, int], names: Collection[str], found: Mapping[str, tuple[float, int]]
) -> dict[str, str]:
    """Return which parameter each change of one module is of, by its depth; empty if not told."""
    leaves = {name.rpartition(".")[2]: name for name in names}
    order = next((each for each in _DECLARED if set(leaves) <= set(each)), None)
    if order is None or len(rows) != len(names) or len(leaves) != len(names):
        return {}
    ordered = [leaves[leaf] for leaf in order if leaf in leaves]
    paths = sorted(rows, key=len, reverse=True)
    told = dict(zip(paths, ordered, strict=True))
    experts = {divmod(rows[path], found[name][1]) for path, name in told.items()}
    return told if len(experts) == 1 and experts.pop()[1] == 0 else {}


def _ranks(rows: Mapping[str, int], known: Counter[int], folder: Path | None) -> dict[str, int]:
    """Return the rank of each of one module's changes: all have one number of experts.

    If there is no such number, one of them may be of a matrix, and each is looked at alone.

    Args:
        rows: of each change's lora_A.
        known: how many of the parameters have which rank.
        folder: for messages.
    """
    together = _readings(rows, known)
    if len(together) == 1:
        return together[0]
    result: dict[str, int] = {}
    for path, count in rows.items():
        alone = together or _readings({path: count}, known)
        if not alone:
            raise _misfit(path, count, known, folder)
        if len(alone) > 1:
            raise _ambiguous(path, [f"r = {reading[path]}" for reading in alone], folder)
        result |= alone[0]
    return result


def _readings(rows: Mapping[str, int], known: Counter[int]) -> list[dict[str, int]]:
    """Return the ranks that changes of one module can have, once for each number of experts."""
    first = next(iter(rows.values()))
    found = []
    for experts in sorted({first // rank for rank in known if first and first % rank == 0}):
        ranks = {path: count // experts for path, count in rows.items() if count % experts == 0}
        if len(ranks) == len(rows) and Counter(ranks.values()) <= known:
            found.append(ranks)
    return found


def _misfit(path: str, rows: int, known: Collection[int], folder: Path | None) -> AdapterError:
    return AdapterError(
        "rank in the file and rank in the config differ",
        path=folder,
        tensor=path,
        got=f"{rows} rows",
        expected=f"a multiple of {sorted(known)}",
    )


def _ambiguous(path: str, got: Iterable[str], folder: Path | None) -> UnsupportedError:
    return UnsupportedError(
        "several expert parameters of one module have different rank or alpha, and the file does "
        "not say which is which",
        path=folder,
        tensor=path,
        got=", ".join(got),
    )
