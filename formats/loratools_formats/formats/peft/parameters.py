"""Changes of parameters rather than modules, such as stacked experts, in a PEFT folder.

Keys name the module only. Where several parameters of one module are adapted, their changes nest
(`experts.lora_A`, `experts.base_layer.lora_A`), innermost the one that the model class declares
first, so that a file alone does not say which is which. Ranks may: the rows of a factor are
rank · experts, and the parameters of one module have the same number of experts. Where they do not,
every parameter stays a candidate, for the shapes of a base to decide.

Source: `_inject_parameters` and `ParamWrapper` of peft 0.21.2; its conversion of adapters for
transformers 5, which gives the joined `gate_up_proj` twice the rank of `down_proj`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from loratools_formats.core.adapter import Layer, LowRank
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, UnsupportedError
from loratools_formats.formats.peft import keys
from loratools_formats.formats.peft.config import PeftConfig

_NESTED = ".base_layer"


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
    whole = frozenset(listed if isinstance(listed, list) else [])
    candidates = {path: _names(path, targets, whole) for path in rows}
    looked_up = {path: candidates[path] or (keys.setting_name(path),) for path in rows}
    found = config.alpha_and_rank(sorted({n for names in looked_up.values() for n in names}))
    remaining = _told_apart(candidates, rows, found, folder)
    return {
        path: Setting(remaining[path], *found[(remaining[path] or looked_up[path])[0]])
        for path in rows
    }


def _names(path: str, targets: Iterable[str], whole: frozenset[str]) -> tuple[str, ...]:
    module = _module(path)
    parts = module.split(".")
    if any(".".join(parts[start:]) in whole for start in range(len(parts))):
        return ()
    found = set()
    for target in targets:
        full = f"{module}.{target.rpartition('.')[2]}"
        if full == target or full.endswith(f".{target}"):
            found.add(full)
    return tuple(sorted(found))


def _module(path: str) -> str:
    while path.endswith(_NESTED):
        path = path.removesuffix(_NESTED)
    return path


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
            nests.setdefault(_module(path), []).append(path)
    result = dict(candidates)
    for paths in nests.values():
        names = candidates[paths[0]]
        if len({found[name] for name in names}) == 1:
            continue
        known = Counter(found[name][1] for name in names)
        ranks = _ranks({path: rows[path] for path in paths}, known, folder)
        for path in paths:
            result[path] = tuple(name for name in names if found[name][1] == ranks[path])
            if len({found[name] for name in result[path]}) > 1:
                raise _ambiguous(path, result[path], folder)
    return result


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
            raise AdapterError(
                "rank in the file and rank in the config differ",
                path=folder,
                tensor=path,
                got=f"{count} rows",
                expected=f"a multiple of {sorted(known)}",
            )
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


def _ambiguous(path: str, got: Iterable[str], folder: Path | None) -> UnsupportedError:
    return UnsupportedError(
        "several expert parameters of one module have different rank or alpha, and the file does "
        "not say which is which",
        path=folder,
        tensor=path,
        got=", ".join(got),
    )


def unstacked(
    config: PeftConfig,
    a: TensorRef,
    b: TensorRef,
    setting: Setting,
    folder: Path,
) -> LowRank:
    """Unstack experts: A (E·r, in) holds them expert by expert, B (out, r·E) rank by rank.

    Raises:
        AdapterError: the factors do not fit together, or the config's rank does not fit them.
    """
    names, alpha, rank = setting
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise AdapterError(
            "expert factors do not fit together",
            path=folder,
            tensor=a.key,
            got=f"{list(a.shape)} and {list(b.shape)}",
        )
    if a.shape[0] % rank:
        raise AdapterError(
            "rank in the file and rank in the config differ",
            path=folder,
            tensor=a.key,
            got=f"{a.shape[0]} rows",
            expected=f"a multiple of {rank}",
        )
    count = a.shape[0] // rank
    scale = config.scale(alpha, rank)
    if count == 1:
        return LowRank(a, b, scale, Layer("linear", parameters=names), alpha=alpha)
    out, in_ = b.shape[0], a.shape[1]
    layer = Layer("experts", parameters=names, transposed_if_square=_square_experts(config))
    stacked_b = b.reshaped((out, rank, count)).transposed((2, 0, 1))
    return LowRank(a.reshaped((count, rank, in_)), stacked_b, scale, layer, alpha=alpha)


def _square_experts(config: PeftConfig) -> bool | None:
    """PEFT before 0.19 read all expert parameters as (E, in, out); now it depends on the model.

    Development versions on the way to 0.19 may have done either.
    """
    text = str(config.values.get("peft_version") or "")
    version = text.split(".")
    released = len(version) >= 2 and all(part.isdecimal() for part in version[:2])
    if not released or len(text) > 20 or "dev" in text:
        return None
    return True if (int(version[0]), int(version[1])) < (0, 19) else None
