"""Provenance as a CycloneDX bill of materials: models, their digests, and what was made from what.

One component of type `machine-learning-model` for each output and each original, with the way it
was made as its properties, and a dependency on each of its inputs. The document holds no time and
no random number, unless `SOURCE_DATE_EPOCH` gives a time: equal chains give equal bytes.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from loratools.operations.provenance import ChainInput, ChainStep
from loratools_formats.core.file_names import WRITTEN_ENDINGS
from loratools_formats.disk.errors import MissingDependencyError, OptionError

if TYPE_CHECKING:
    from cyclonedx.model.component import Component

_PREFIX = "loratools:"
_SPACE = uuid.UUID("6f0f7b0e-6f52-5c5c-9a3f-2f4a2d0c9b1e")


def bill_of_materials(name: str, steps: Sequence[ChainStep]) -> str:
    """Return the bill of materials of an output, as JSON of CycloneDX 1.6.

    Args:
        name: of the output.
        steps: how it was made; the last one made it.

    Raises:
        MissingDependencyError: cyclonedx-python-lib is not installed.
        OptionError: `SOURCE_DATE_EPOCH` is no number of seconds.
    """
    try:
        from cyclonedx.model.bom import Bom
        from cyclonedx.output.json import JsonV1Dot6
    except ImportError as error:
        raise MissingDependencyError(
            "a bill of materials needs cyclonedx-python-lib", hint="pip install 'loratools[sbom]'"
        ) from error
    from cyclonedx.model.component import Component, ComponentType

    bom = Bom(serial_number=uuid.uuid5(_SPACE, repr((name, steps))))
    names = {one.step: one.given for step in steps for one in step.inputs if one.step}
    names[steps[-1].number] = name
    made = {step.number: _made(step, names.get(step.number)) for step in steps}
    originals: dict[str, Component] = {}
    for step in steps:
        needed = [made[each.step] for each in step.inputs if each.step is not None]
        for several in _originals(step):
            key = json.dumps([(each.name, sorted(each.digest.items())) for each in several])
            needed.append(originals.setdefault(key, _original(several, key)))
        bom.register_dependency(made[step.number], dict.fromkeys(needed))
    others = [*list(made.values())[:-1], *originals.values()]
    for component in others:
        bom.components.add(component)
    bom.metadata.component = made[steps[-1].number]
    tool = Component(name="loratools", version=steps[-1].version, type=ComponentType.APPLICATION)
    bom.metadata.tools.components.add(tool)
    text = json.loads(JsonV1Dot6(bom).output_as_string())
    _set_time(text)
    return json.dumps(text, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _set_time(text: dict[str, dict[str, str]]) -> None:
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    text["metadata"].pop("timestamp", None)
    if epoch is None:
        return
    try:
        text["metadata"]["timestamp"] = datetime.fromtimestamp(int(epoch), UTC).isoformat()
    except (ValueError, OverflowError, OSError) as error:
        raise OptionError(
            "SOURCE_DATE_EPOCH is not a time", got=epoch, expected="seconds since 1970"
        ) from error


def _made(step: ChainStep, name: str | None) -> Component:
    named = name or (step.files[-1].name if step.files else f"{step.operation} in memory")
    properties = {
        "operation": step.operation,
        "loratools": step.version,
        "options": json.dumps(dict(step.options), sort_keys=True, ensure_ascii=False),
        "told by": step.told_by,
        **({} if step.seed is None else {"seed": str(step.seed)}),
        **{f"environment:{key}": value for key, value in step.environment.items()},
    }
    files = [(one.name, one.digest) for one in step.files]
    return _component(named, f"step-{step.number}", files, properties)


def _originals(step: ChainStep) -> Iterable[list[ChainInput]]:
    """Return the inputs that nothing tells more of, the files of one adapter or model together."""
    found: dict[str, list[ChainInput]] = {}
    made = {each.role for each in step.inputs if each.step is not None}
    for each in step.inputs:
        if each.role not in made:
            found.setdefault(each.role, []).append(each)
    return found.values()


def _original(several: Sequence[ChainInput], key: str) -> Component:
    first = several[0]
    properties = {
        **({"reference": first.reference} if first.reference else {}),
        **({"commit": first.commit} if first.commit else {}),
    }
    files = [(each.name, each.digest) for each in several]
    reference = f"original-{uuid.uuid5(_SPACE, key)}"
    return _component(first.given or first.name, reference, files, properties)


def _component(
    name: str,
    reference: str,
    files: Sequence[tuple[str, Mapping[str, str]]],
    properties: Mapping[str, str],
) -> Component:
    """Return a model; the hash of its weights is the component's own where it has one file."""
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.component import Component, ComponentType

    hashes: Iterable[HashType] = ()
    weights = [digest for file, digest in files if file.endswith(WRITTEN_ENDINGS)]
    weights = weights or [digest for _, digest in files]
    if len(weights) == 1 and "sha256" in weights[0]:
        hashes = [HashType(alg=HashAlgorithm.SHA_256, content=weights[0]["sha256"])]
    digests = {
        f"file:{file}": json.dumps(dict(digest), sort_keys=True) for file, digest in files if digest
    }
    return Component(
        name=name,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=reference,
        hashes=hashes,
        properties=[
            Property(name=f"{_PREFIX}{key}", value=value)
            for key, value in {**properties, **digests}.items()
        ],
    )
