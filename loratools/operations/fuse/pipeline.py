"""Fusing into a diffusers pipeline: every component that adapters change, and all of the rest.

A pipeline is a folder with a `model_index.json` and a folder for each component. Each module of an
adapter goes to its component, and each component is fused as a checkpoint of its own; components
that no adapter changes, and everything else, are copied as they are. The folder appears whole.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratools.base.pipelines import read_base
from loratools.naming.base_components import DENOISER, FOLDERS
from loratools.naming.for_base import by_component, has_all
from loratools.operations.fuse.draft import FuseInput
from loratools.operations.fuse.operation import Fusion
from loratools.operations.fuse.options import FuseOptions
from loratools.operations.fuse.result import FusePreview, FuseResult
from loratools.operations.reported import report
from loratools.work.call import kept
from loratools.work.provenance import operation_record
from loratools.work.requests import Progress
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.checkpoints.checkpoint_write import shard_digest
from loratools_formats.checkpoints.pipelines import component_folders
from loratools_formats.checkpoints.shards import check_space
from loratools_formats.contract.files import check_target
from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter
from loratools_formats.disk.errors import AdapterError, UnsupportedError
from loratools_formats.disk.files import RegularFile, copy_whole, inside
from loratools_formats.disk.provenance import PROVENANCE_FILE, statement
from loratools_formats.disk.publish import publish_folder, resolved


def by_folder(path: Path, inputs: Sequence[FuseInput]) -> dict[str, list[FuseInput]]:
    """Return the changes of each component of a pipeline, by its folder.

    Args:
        path: the pipeline.
        inputs: adapters with their weights.

    Raises:
        AdapterError: a module is of a component that the pipeline has not.
        UnsupportedError: it is not known which component an adapter belongs to.
    """
    folders = {name: FOLDERS[name] for name in component_folders(path)}
    parts: dict[str, list[FuseInput]] = {}
    for item in inputs:
        for name, adapter in _split(item.adapter, path, folders).items():
            parts.setdefault(name, []).append(replace(item, adapter=adapter))
    return parts


def _split(adapter: Adapter, path: Path, folders: Mapping[str, str]) -> dict[str, Adapter]:
    if get_format(adapter.format).naming is not None:
        names = {role: name for name, role in folders.items()}
        parts = by_component(adapter, list(names))
        if DENOISER in parts and "transformer_2" in names and _is_of_either(adapter):
            raise _of_one(adapter, path, ["transformer", "transformer_2"])
        return {names[role]: part for role, part in parts.items()}
    fitting = [name for name in folders if has_all(adapter, read_checkpoint(path / name))]
    if len(fitting) != 1:
        raise _of_one(adapter, path, fitting or list(folders))
    return {fitting[0]: adapter}


class PipelineFusion:
    """A planned fusion into a pipeline, ready to be written.

    Args:
        path: the pipeline's folder.
        inputs: adapters with their weights.
        options: how.

    Raises:
        LoratoolsError: as `Fusion` does; a module is of a component that the pipeline has not.
    """

    def __init__(self, path: Path, inputs: Sequence[FuseInput], options: FuseOptions) -> None:
        self.path = path
        self.inputs = tuple(inputs)
        self._record = kept(self._recorded)
        parts = by_folder(path, inputs)
        self._fusions = {
            name: Fusion(read_checkpoint(path / name), parts[name], options)
            for name in component_folders(path)
            if name in parts
        }
        self._carried, self._left_out = _others(path, set(self._fusions))

    @property
    def preview(self) -> FusePreview:
        """What would be written."""
        previews = {name: fusion.preview for name, fusion in self._fusions.items()}
        return FusePreview(
            tuple(
                replace(plan, key=f"{name}/{plan.key}")
                for name, preview in previews.items()
                for plan in preview.touched
            ),
            {
                f"{name}/{key}": dtype
                for name, preview in previews.items()
                for key, dtype in preview.dtypes.items()
            },
            sum(preview.total for preview in previews.values()),
            sum(preview.nbytes for preview in previews.values()),
            sum(preview.files for preview in previews.values()),
            tuple(dict.fromkeys(f for each in previews.values() for f in each.findings)),
        )

    def write(
        self,
        output: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> FuseResult:
        """Write the fused pipeline, whole or not at all, and say what it did.

        Raises:
            OutputExistsError: the output exists and `overwrite` is false.
            OutputError: not enough space, or writing failed; nothing was changed.
            AdapterError: an input is malformed, or values are not finite.
        """
        sources = [item.adapter.source for item in self.inputs if item.adapter.source is not None]
        check_target(output, [self.path, *sources], overwrite=overwrite)
        total = sum(fusion.new.nbytes for fusion in self._fusions.values())
        check_space(
            resolved(output).parent, total + sum(p.stat().st_size for _, p in self._carried)
        )
        done: dict[str, FuseResult] = {}
        before = 0
        with publish_folder(output, overwrite=overwrite) as folder:
            for name, path in self._carried:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                copy_whole(path, folder / name)
            for name, fusion in self._fusions.items():
                counted = _after(progress, before, total)
                done[name] = fusion.write(folder / name, progress=counted)
                before += fusion.new.nbytes
                # One component alone cannot be made again: the call was about all of them.
                (folder / name / PROVENANCE_FILE).unlink()
            result = self._result(done, total)
            files = [folder / each for each in sorted(result.shards)]
            record = self._provenance(result)
            told = statement(record, files, shard_digest, folder=folder, output=Path(output))
            (folder / PROVENANCE_FILE).write_bytes(told)
        return result

    def _recorded(self) -> Mapping[str, Any]:
        names = {f"adapter {i}": item.adapter for i, item in enumerate(self.inputs, 1)}
        each = [dict(fusion.recorded_options) for fusion in self._fusions.values()]
        modes = [own["base_mode"] for own in each if own["base_mode"] is not None]
        weights = [item.weight for item in self.inputs]
        options = {**each[0], "weights": weights, "base_mode": modes[0] if modes else None}
        return operation_record("fuse", names, options, read_base(self.path))

    def _provenance(self, result: FuseResult) -> Mapping[str, Any]:
        sizes = [fusion.nbytes_in for fusion in self._fusions.values()]
        return {**self._record(), "report": report(result.lost, result.nbytes, sum(sizes))}

    def _result(self, done: Mapping[str, FuseResult], total: int) -> FuseResult:
        return FuseResult(
            tensors=tuple(
                replace(tensor, key=f"{name}/{tensor.key}")
                for name, each in done.items()
                for tensor in each.tensors
            ),
            copied=sum(each.copied for each in done.values()),
            converted=sum(each.converted for each in done.values()),
            nbytes=total,
            shards=tuple(f"{n}/{shard}" for n, each in done.items() for shard in each.shards),
            findings=tuple(dict.fromkeys(f for each in done.values() for f in each.findings)),
            left_out=(
                *self._left_out,
                *(f"{name}/{file}" for name, each in done.items() for file in each.left_out),
            ),
        )


def _after(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Return what counts one component's bytes as a part of all."""
    return None if progress is None else lambda count, _: progress(before + count, total)


def _is_of_either(adapter: Adapter) -> bool:
    """Return whether names do not tell which of two denoisers they are of, as diffusers' do."""
    return not any(name.startswith(("transformer.", "transformer_2.")) for name in adapter.modules)


def _of_one(adapter: Adapter, path: Path, names: Sequence[str]) -> UnsupportedError:
    return UnsupportedError(
        "the adapter does not say which component of the pipeline it is of",
        path=adapter.source,
        expected=" or ".join(names),
        hint=f"Fuse it into the component itself, such as {path / names[0]}",
    )


def _others(path: Path, fused: set[str]) -> tuple[list[tuple[str, Path]], tuple[str, ...]]:
    """Return the files to copy, by their path in the pipeline, and the folders to leave out."""
    found: list[tuple[str, Path]] = []
    left_out: list[str] = []
    for root, folders, names in os.walk(path, onerror=_refuse_unlisted):
        place = Path(os.path.relpath(root, path))
        skipped = [f for f in folders if f.startswith(".") or os.path.islink(f"{root}/{f}")]
        left_out += [str(place / name) for name in skipped]
        gone = fused if place == Path() else set()
        folders[:] = sorted(set(folders) - set(skipped) - gone)
        for name in (str(place / n) for n in sorted(names) if n != PROVENANCE_FILE):
            found.append((name, inside(path, name)))
            RegularFile(found[-1][1]).close()  # no pipe, no device, no link to nothing
    return found, tuple(sorted(left_out))


def _refuse_unlisted(error: OSError) -> None:
    raise AdapterError(f"folder cannot be listed: {error.strerror}", path=error.filename) from error
