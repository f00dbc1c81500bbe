"""What an operation records about itself in its output: name, options, version, input digests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loratools import __version__
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.containers.safetensors_read import header_digest
from loratools_formats.core.adapter import Adapter
from loratools_formats.disk import strict_json
from loratools_formats.disk.files import RegularFile


def operation_record(
    operation: str,
    inputs: Mapping[str, Adapter],
    options: Mapping[str, Any],
    base: Checkpoint | None = None,
    tuned: Checkpoint | None = None,
) -> dict[str, Any]:
    """Return the record of an operation: everything that determines its output's bytes.

    Args:
        operation: the command's name.
        inputs: adapters by their role. Their files are named without folders.
        options: the options that differ from nothing, as JSON values.
        base: a checkpoint that was changed or read; its shards are known by their headers.
        tuned: another that it was compared with.
    """
    checkpoints = {"base": base, "tuned": tuned}
    ignored = {
        role: [each.where for each in adapter.findings if each.code == "ignored-config-key"]
        for role, adapter in inputs.items()
    }
    made = {role: adapter.provenance for role, adapter in inputs.items() if adapter.provenance}
    return {
        "tool": {"name": "loratools", "version": __version__},
        "operation": operation,
        "options": dict(options),
        "inputs": [
            {"role": role, "name": shard.file.path.name, "digest": header_digest(shard)}
            for role, checkpoint in checkpoints.items()
            for shard in (() if checkpoint is None else checkpoint.files)
        ]
        + [
            {"role": role, "name": file.path.name, "digest": {"sha256": file.sha256()}}
            for role, files in _files_by_role(inputs)
            for file in files
        ],
        **(
            {"ignoredKeys": {r: k for r, k in ignored.items() if k}}
            if any(ignored.values())
            else {}
        ),
        # Inputs that operations made in memory: how, since the files are those they began with.
        **({"steps": made} if made else {}),
    }


def _files_by_role(
    inputs: Mapping[str, Adapter],
) -> Iterator[tuple[str, tuple[RegularFile, ...]]]:
    for role, adapter in inputs.items():
        yield role, adapter.inputs
        yield from adapter.other_inputs.items()


def record_metadata(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the record as string metadata for a safetensors header."""

    def compact(value: Any) -> str:
        return strict_json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    return {
        "loratools.version": record["tool"]["version"],
        "loratools.operation": record["operation"],
        "loratools.options": compact(record["options"]),
        "loratools.inputs": compact(
            {f"{i['role']}/{i['name']}": _hash(i["digest"]) for i in record["inputs"]}
        ),
    }


def _hash(digest: Mapping[str, str]) -> str:
    return digest["sha256"] if "sha256" in digest else digest["headerSha256"]
