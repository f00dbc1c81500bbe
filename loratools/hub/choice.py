"""Which files of a repository a reference needs, from their names alone.

The names are those of the formats' own files, and of what they keep beside adapters.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from loratools.hub.listing import Listing
from loratools.hub.references import Beside, Reference, Want
from loratools_formats.checkpoints.no_checkpoint import WEIGHT_SUFFIXES
from loratools_formats.core.attachments import ATTACHMENTS
from loratools_formats.core.file_names import (
    ADAPTER_CONFIG,
    CARD,
    MLX_WEIGHTS,
    MODEL_WEIGHTS,
    PEFT_WEIGHTS,
    WEIGHT_ENDINGS,
    WEIGHTS_OF_ADAPTERS,
    may_be_adapter,
)
from loratools_formats.disk.errors import HubError, LoratoolsError, MissingFileError

_WITH_CONFIG = (PEFT_WEIGHTS, MLX_WEIGHTS)
_MODEL_FACTS = re.compile(r"(?:config|.+\.safetensors\.index)\.json")
_SPLIT = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")
_LARGEST_LIST = 3
_SMALL_BYTES = 1 << 20


@dataclass(frozen=True)
class Choice:
    """What to bring here.

    Attributes:
        place: path of the folder or file that the reference names.
        now: paths of files to download.
        later: paths of weights to download when they are read.
    """

    place: str
    now: tuple[str, ...]
    later: tuple[str, ...] = ()


def choose(found: Listing, want: Want, beside: Beside) -> Choice:
    """Return what a reference needs.

    Args:
        found: what the repository holds.
        want: what the reference is to be.
        beside: what is wanted beside the adapter or the model.

    Raises:
        MissingFileError: nothing is at the reference's path.
        HubError: it is something else than what is wanted, or several things.
    """
    inside = found.reference.inside
    if inside in found.files:
        return _file(found, inside, want)
    names = found.below(inside)
    if inside and not names:
        raise _nothing(found)
    if want == "file":
        raise HubError(
            "is a folder, and a file is wanted", path=str(found.reference), hint=_such_as(found)
        )
    if want == "model":
        return _model(found, inside, names, beside)
    if want == "shelf":
        return _shelf(found, inside, names)
    return _adapter(found, inside, names, beside)


def with_weights_later(found: Listing, chosen: Choice) -> Choice:
    """Return a choice that leaves an adapter's weights on the Hub until they are read.

    Small files come all the same, since a header is asked for by its first 100 kB anyway, and so do
    files without a configuration beside them: a part of what these say is in their tensors.
    """
    later = tuple(
        name
        for name in chosen.now
        if name.rpartition("/")[2] in _WITH_CONFIG
        and _in(name.rpartition("/")[0], [ADAPTER_CONFIG])[0] in chosen.now
        and not 0 < found.files[name] <= _SMALL_BYTES
    )
    now = tuple(name for name in chosen.now if name not in later)
    return Choice(chosen.place, now, (*chosen.later, *later))


def _file(found: Listing, inside: str, want: Want) -> Choice:
    folder, _, name = inside.rpartition("/")
    here = set(found.below(folder))
    splits = _SPLIT.fullmatch(name)
    now = [name]
    if splits:
        now = sorted(n for n in here if (m := _SPLIT.fullmatch(n)) and m[1] == splits[1])
    if want == "model" and name.endswith(".safetensors"):
        return Choice(inside, (), (inside,))
    if want == "adapter" and ADAPTER_CONFIG in here and name.endswith(WEIGHT_ENDINGS):
        now.append(ADAPTER_CONFIG)  # it tells the scale of weights that lie beside it
    return Choice(inside, tuple(_in(folder, dict.fromkeys(now))))


def _adapter(found: Listing, inside: str, names: list[str], beside: Beside) -> Choice:
    own = [name for name in names if "/" not in name]
    if ADAPTER_CONFIG in own:
        weights = [name for name in own if name in WEIGHTS_OF_ADAPTERS]
        weights = weights or [name for name in own if may_be_adapter(name)]
        if not weights:
            raise _incomplete(found, f"{ADAPTER_CONFIG} is there, and no weights")
        others = [name for name in names if _is_beside_adapter(found, inside, name, beside)]
        needed = dict.fromkeys([ADAPTER_CONFIG, *weights, *others])
        return Choice(inside, tuple(_in(inside, needed)))
    if ".metadata" in own and any(name.endswith(".distcp") for name in own):
        return Choice(inside, tuple(_in(inside, own)))
    files = [name for name in own if may_be_adapter(name)]
    safe = [name for name in files if name.endswith(".safetensors")]
    chosen = safe if len(safe) == 1 else files
    if len(chosen) == 1 and not _is_model(own):
        return _file(found, _in(inside, chosen)[0], "adapter")
    raise _no_adapter(found, inside, names, own, files)


def _no_adapter(
    found: Listing, inside: str, names: list[str], own: list[str], files: list[str]
) -> LoratoolsError:
    path = str(found.reference)
    if _is_model(own) or "model_index.json" in own:
        return HubError(
            "is a model, not an adapter",
            path=path,
            hint=f"To put an adapter into it: loratools fuse {path} ADAPTER -o fused",
        )
    folders = sorted(_folders_with_config(names) - {""})
    places = _in(inside, folders) or _in(inside, files)
    if places:
        what = "folders" if folders else "files"
        return HubError(
            f"holds {len(places)} {what} that may be meant",
            path=path,
            got=_few(places),
            hint=f"Name one, such as {found.reference.at(places[0])}",
        )
    if found.is_cached:
        return _incomplete(found, "the cache holds no adapter of it")
    return MissingFileError(
        "holds no adapter",
        path=path,
        got=_few(own) or "no file",
        expected=f"{ADAPTER_CONFIG} with {PEFT_WEIGHTS}, or one file of weights",
    )


def _model(found: Listing, inside: str, names: list[str], beside: Beside) -> Choice:
    own = [name for name in names if "/" not in name]
    weights = [name for name in own if name.endswith(".safetensors")]
    facts = [name for name in own if _MODEL_FACTS.fullmatch(name)]
    if ADAPTER_CONFIG in own and not _is_model(own):
        raise HubError(
            "is an adapter, not a model",
            path=str(found.reference),
            hint=f"To put it into its model: loratools fuse MODEL {found.reference} -o fused",
        )
    if not weights and not facts:
        raise _no_model(found, inside, names, own)
    now = dict.fromkeys([*facts, *(name for name in names if _is_beside_model(name, beside))])
    return Choice(inside, tuple(_in(inside, now)), tuple(_in(inside, weights)))


def _no_model(found: Listing, inside: str, names: list[str], own: list[str]) -> LoratoolsError:
    inner = [name.split("/") for name in names if name.count("/") == 1]
    parts = sorted({folder for folder, name in inner if _is_model([name])})
    main = [part for part in parts if part in ("transformer", "unet")]
    files = [name for name in own if name.endswith(WEIGHT_ENDINGS)]
    places = _in(inside, main or parts or files)
    if places:
        what = "is a pipeline of several models" if parts else "holds files of weights"
        return HubError(
            what,
            path=str(found.reference),
            got=_few(places),
            hint=f"Name one, such as {found.reference.at(places[0])}",
        )
    if found.is_cached:
        return _incomplete(found, "the cache holds no model of it")
    return MissingFileError(
        "holds no model",
        path=str(found.reference),
        got=_few(own) or "no file",
        expected="config.json and model.safetensors",
    )


def _shelf(found: Listing, inside: str, names: list[str]) -> Choice:
    folders, own = _folders_with_config(names), (ADAPTER_CONFIG, *WEIGHTS_OF_ADAPTERS)
    kept = [
        name
        for name, (folder, _, leaf) in ((name, name.rpartition("/")) for name in names)
        if (folder in folders and leaf in own) or (not folder and may_be_adapter(leaf))
    ]
    if not kept:
        raise MissingFileError("holds no adapters", path=str(found.reference))
    return Choice(inside, tuple(_in(inside, kept)))


def _folders_with_config(names: Iterable[str]) -> set[str]:
    split = (name.rpartition("/") for name in names)
    return {folder for folder, _, leaf in split if leaf == ADAPTER_CONFIG}


def _is_beside_adapter(found: Listing, inside: str, name: str, beside: Beside) -> bool:
    if beside in ("nothing", "card"):
        return beside == "card" and name == CARD
    if "/" in name:  # modules of sentence-transformers: 1_Pooling/config.json
        return beside == "all" and name[0].isdigit()
    if beside == "all":
        return name in ATTACHMENTS
    is_small = found.files[_in(inside, [name])[0]] <= _SMALL_BYTES and not name.startswith(".")
    return is_small or name in ATTACHMENTS


def _is_beside_model(name: str, beside: Beside) -> bool:
    if beside != "all":
        return beside != "nothing" and name == CARD
    is_hidden = any(part.startswith(".") for part in name.split("/"))
    return not is_hidden and not name.endswith(WEIGHT_SUFFIXES)


def _is_model(names: Iterable[str]) -> bool:
    return any(MODEL_WEIGHTS.fullmatch(name) for name in names)


def _in(folder: str, names: Iterable[str]) -> list[str]:
    return [f"{folder}/{name}" if folder else name for name in names]


def _nothing(found: Listing) -> LoratoolsError:
    if found.is_cached:
        return _incomplete(found, "the cache does not hold that part of it")
    inside = found.reference.inside
    folders = {name[:end] for name in found.files for end, c in enumerate(name) if c == "/"}
    close = difflib.get_close_matches(inside, [*found.files, *folders], n=1, cutoff=0.4)
    return MissingFileError(
        "no such file or folder in the repository",
        path=str(found.reference),
        hint=f"Did you mean {found.reference.at(close[0])}?" if close else _such_as(found),
    )


def _such_as(found: Listing) -> str | None:
    files = [name for name in found.files if name.endswith(WEIGHT_ENDINGS)]
    return f"It holds {_few(files)}" if files else None


def _incomplete(found: Listing, what: str) -> HubError:
    where = "; the Hub cannot be reached" if found.is_cached else ""
    fetch: Reference = found.reference
    return HubError(
        f"{what}{where}",
        path=str(fetch),
        hint=f"Fetch it while online: hf download {fetch.repo}" if found.is_cached else None,
    )


def _few(names: list[str]) -> str:
    more = len(names) - _LARGEST_LIST
    return ", ".join(names[:_LARGEST_LIST]) + (f" and {more} more" if more > 0 else "")
