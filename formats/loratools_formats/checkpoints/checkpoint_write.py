"""Publishing a changed checkpoint: shards, index, configuration, and everything else beside them.

Weights of the base that no index lists, and weights in other formats, are left out, since they
would be stale, and so are hidden and linked folders, and files that say how weights are quantised
if they are not any more; every other file is carried over. The folder appears whole or
not at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratools_formats.checkpoints.checkpoint import CONFIG_FILE, Checkpoint
from loratools_formats.checkpoints.no_checkpoint import WEIGHT_SUFFIXES
from loratools_formats.checkpoints.quantization import QUANTISATION_FILES
from loratools_formats.checkpoints.shard_plan import NewTensor, Shard, new_nbytes
from loratools_formats.checkpoints.shards import check_space, write_shards
from loratools_formats.containers.safetensors_read import (
    SafetensorsFile,
    header_digest,
    read_safetensors,
)
from loratools_formats.contract.files import check_target
from loratools_formats.core.adapter import Adapter
from loratools_formats.disk import strict_json
from loratools_formats.disk.errors import AdapterError, OptionError
from loratools_formats.disk.files import RegularFile, copy_whole, inside
from loratools_formats.disk.provenance import (
    PREDICATE_TYPE,
    PROVENANCE_FILE,
    statement,
    statement_of_one,
    with_record,
)
from loratools_formats.disk.publish import publish_folder, publish_with, resolved

_WEIGHT_INDEX_SUFFIX = ".index.json"


@dataclass(frozen=True)
class NewCheckpoint:
    """A checkpoint to be written.

    Attributes:
        base: what it was made from.
        shards: its weights.
        config: its `config.json`; None to copy the base's.
        provenance: returns how it was made; called when the weights are written.
        adapters: what else took part in making it.
    """

    base: Checkpoint
    shards: Sequence[Shard]
    config: Mapping[str, Any] | None
    provenance: Callable[[], Mapping[str, Any]]
    adapters: tuple[Adapter, ...] = ()

    def sources(self) -> list[Path]:
        """Return the paths that it is made from."""
        given = [adapter.source for adapter in self.adapters if adapter.source is not None]
        return [self.base.path, *given]

    def check_unchanged(self) -> None:
        """Raise `AdapterError` if an input was written to since it was opened."""
        self.base.check_unchanged()
        for adapter in self.adapters:
            adapter.check_unchanged()

    @property
    def nbytes(self) -> int:
        """Size of the weight files in bytes."""
        return sum(shard.nbytes for shard in self.shards)


def grouped(
    base: Checkpoint,
    parts: Mapping[str, NewTensor],
    *,
    max_shard_bytes: int | None = None,
    metadata: Mapping[str, str] | None = None,
    places: Mapping[str, str] | None = None,
) -> list[Shard]:
    """Return shards for parts, grouped as the base's files are or by a largest size.

    Args:
        base: the checkpoint that is changed.
        parts: what to write, by the base tensor that it takes the place of; a new tensor has a
            name of its own and goes where the part before it goes.
        max_shard_bytes: fill shards up to this many bytes of tensors, in the base's order.
        metadata: of the headers that are not used again; the base's own by default.
        places: for parts of new names, the base tensor that each takes the place of.

    Raises:
        OptionError: a single file cannot be split.
    """
    home = {key: file for file in base.files for key in file.tensors}
    home |= {new: home[old] for new, old in (places or {}).items()}
    if max_shard_bytes is None:
        return _as_in_base(base, parts, home, metadata)
    if not base.is_folder:
        raise OptionError("a single file cannot be split", hint="Leave out `max_shard_size`")
    groups: list[list[NewTensor]] = []
    room = 0
    for part in _in_base_order(base, parts, places or {}):
        nbytes = new_nbytes(part)
        if not groups or nbytes > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(part)
        room -= nbytes
    kept = base.files[0].metadata if metadata is None else metadata
    names = _names(base.stem, len(groups))
    return [Shard(name, group, None, kept) for name, group in zip(names, groups, strict=True)]


def _names(stem: str, count: int) -> list[str]:
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _in_base_order(
    base: Checkpoint, parts: Mapping[str, NewTensor], places: Mapping[str, str]
) -> list[NewTensor]:
    """Return the parts in the order of the base's files and bytes, new ones after their anchor."""
    order = {
        key: (number, ref.offset)
        for number, file in enumerate(base.files)
        for key, ref in file.tensors.items()
    }
    place = (0, 0)
    keyed = []
    for key, part in parts.items():
        place = order.get(places.get(key, key), place)
        keyed.append((place, part))
    return [part for _, part in sorted(keyed, key=lambda pair: pair[0])]


def _as_in_base(
    base: Checkpoint,
    parts: Mapping[str, NewTensor],
    home: Mapping[str, SafetensorsFile],
    metadata: Mapping[str, str] | None,
) -> list[Shard]:
    groups: dict[Path, list[NewTensor]] = {file.file.path: [] for file in base.files}
    place = base.files[-1].file.path
    for key, part in parts.items():
        place = home[key].file.path if key in home else place
        groups[place].append(part)
    return [
        Shard(
            file.file.path.name,
            groups[file.file.path],
            template=file,
            metadata=file.metadata if metadata is None else metadata,
        )
        for file in base.files
        if groups[file.file.path]
    ]


def recorded(shards: Iterable[Shard], record: Mapping[str, str]) -> list[Shard]:
    """Return shards whose metadata tells how they were made.

    A shard that is copied whole keeps its header, and so every byte.
    """
    return [
        shard
        if _is_copy(shard)
        else replace(shard, template=None, metadata=with_record(shard.metadata, record))
        for shard in shards
    ]


def _is_copy(shard: Shard) -> bool:
    file = shard.template
    if file is None:
        return False
    copied = {part.key: part for part in shard.copied if part.file is file.file}
    return len(copied) == len(shard.parts) and copied == file.tensors


def write_checkpoint(
    new: NewCheckpoint,
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
    accept: Callable[[], None] | None = None,
    ready: Path | None = None,
) -> tuple[str, ...]:
    """Write a checkpoint so that it appears whole or not at all, with its provenance beside it.

    A base that is a bare file makes a bare file; a folder makes a folder.

    Args:
        new: what to write.
        output: where.
        overwrite: replace an existing output.
        workers: threads.
        progress: called with (bytes done, bytes in all).
        accept: called when all weights are written; what it raises keeps the output from appearing.
        ready: folder that holds the weight files already, on the same file system as the output.

    Returns:
        Names of the base's files that were left out.

    Raises:
        OutputExistsError: the output exists and `overwrite` is false, or is in or around the base.
        OutputError: not enough space, or writing failed; nothing was changed.
        AdapterError: an input is truncated or changed meanwhile.
    """
    check_target(output, new.sources(), overwrite=overwrite)
    carried, left_out = _others(new) if new.base.is_folder else ([], [])
    needed = new.nbytes + sum(path.stat().st_size for _, path in carried)
    check_space(resolved(output).parent, needed)
    if not new.base.is_folder:
        _write_file(
            new, output, overwrite=overwrite, workers=workers, progress=progress, accept=accept
        )
        return ()
    with publish_folder(output, overwrite=overwrite) as folder:
        if ready is None:
            write_shards(folder, new.shards, workers=workers, progress=progress)
        else:
            for shard in new.shards:
                _link(ready / shard.name, folder / shard.name)
        if accept is not None:
            accept()
        for name, path in carried:
            _copy(path, folder / name)
        if [shard.name for shard in new.shards] != [f"{new.base.stem}.safetensors"]:
            _write_json(folder / new.base.index_file, _index(new, folder), sort_keys=True)
        if new.config is not None:
            _write_json(folder / CONFIG_FILE, new.config)
        new.check_unchanged()
        files = sorted(folder / shard.name for shard in new.shards)
        record = statement(new.provenance(), files, shard_digest, output=Path(output))
        (folder / PROVENANCE_FILE).write_bytes(record)
    return tuple(left_out)


def _write_file(
    new: NewCheckpoint,
    output: str | os.PathLike[str],
    *,
    overwrite: bool,
    workers: int,
    progress: Callable[[int, int], None] | None,
    accept: Callable[[], None] | None,
) -> None:
    (shard,) = new.shards
    marks = {PROVENANCE_FILE: PREDICATE_TYPE.encode()}
    with publish_with(output, marks, overwrite=overwrite) as (temporary, beside):
        shard = replace(shard, name=temporary.name)
        write_shards(temporary.parent, [shard], workers=workers, progress=progress)
        if accept is not None:
            accept()
        new.check_unchanged()
        beside[PROVENANCE_FILE] += statement_of_one(
            new.provenance(), Path(output), temporary, shard_digest
        )


def shard_digest(path: Path) -> dict[str, str]:
    """Return what a statement says of a weight file that was written: its header's digest."""
    return header_digest(read_safetensors(path))


def _others(new: NewCheckpoint) -> tuple[list[tuple[str, Path]], list[str]]:
    """Return the files to carry over, by their path in the folder, and those to leave out."""
    base = new.base
    own = {file.file.path.name for file in base.files} | {base.index_file, PROVENANCE_FILE}
    is_plain = new.config is not None and "quantization_config" not in new.config
    stale = set(QUANTISATION_FILES) if is_plain else set()
    carried, left_out = [], []
    for root, folders, names in os.walk(base.path, onerror=_refuse_unlisted):
        place = os.path.relpath(root, base.path)
        skipped = [f for f in folders if f.startswith(".") or os.path.islink(f"{root}/{f}")]
        left_out += [os.path.normpath(f"{place}/{f}") for f in skipped]
        folders[:] = sorted(set(folders) - set(skipped))
        for name in (os.path.normpath(f"{place}/{n}") for n in sorted(names)):
            if name in own:
                continue
            if name in stale or name.endswith((*WEIGHT_SUFFIXES, _WEIGHT_INDEX_SUFFIX)):
                left_out.append(name)
            else:
                carried.append((name, inside(base.path, name)))
                RegularFile(carried[-1][1]).close()  # no pipe, no device, no link to nothing
    return carried, sorted(left_out)


def _refuse_unlisted(error: OSError) -> None:
    raise AdapterError(f"folder cannot be listed: {error.strerror}", path=error.filename) from error


def _link(source: Path, target: Path) -> None:
    """Give a file a second name; copy it where the file system has only one for each."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        copy_whole(source, target)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    copy_whole(source, target)


def _index(new: NewCheckpoint, folder: Path) -> dict[str, Any]:
    """Return the index of the shards as they have been written."""
    written = {shard.name: read_safetensors(folder / shard.name).tensors for shard in new.shards}
    old = (new.base.index or {}).get("metadata")
    metadata = dict(old) if isinstance(old, dict) else {}
    tensors = [ref for refs in written.values() for ref in refs.values()]
    metadata["total_size"] = sum(ref.nbytes for ref in tensors)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(ref.numel for ref in tensors)
    return {
        "metadata": metadata,
        "weight_map": {k: name for name in written for k in written[name]},
    }


def _write_json(path: Path, value: Mapping[str, Any], *, sort_keys: bool = False) -> None:
    text = strict_json.dumps(value, indent=2, sort_keys=sort_keys)
    path.write_text(text + "\n", encoding="utf-8")
