"""Make what is published, `make dist`: sdist, wheel, and a bill of what the wheel needs.

The wheel is built from the sdist, by the hatchling that is installed, and both must pass
`twine check`. The bill is CycloneDX 1.6: the wheel with its hash, and each package that it needs,
directly or through another, in the version installed here, which is the one that the tests ran
with. Extras are left out: the bill is that of `pip install loratools` on this platform. It holds no
time and no random number, so that equal wheels and versions make equal bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import uuid
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path
from zipfile import Path as ZipPath

from cyclonedx.factory.license import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SPACE = uuid.UUID("b1f1f9b4-0f0c-5d0e-8a55-3a2f1a3c6f27")


def main() -> None:
    """Make all files in a folder that holds none of them yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    python = [sys.executable, "-m"]
    # In this environment, whose versions are pinned, and not in one that pip fills anew.
    build = [*python, "build", "--no-isolation", "--outdir", folder, ROOT]
    subprocess.run(build, check=True)
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    subprocess.run([*python, "twine", "check", "--strict", wheel, sdist], check=True)
    bill = folder / f"{wheel.name.removesuffix('.whl')}.cdx.json"
    bill.write_text(bill_of(wheel), encoding="utf-8")
    print(f"wrote {bill}")


def bill_of(wheel: Path) -> str:
    """Return the bill of materials of a wheel as JSON."""
    whole = metadata_of(wheel)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    needed = closure(whole)
    components = {name: component(found) for name, found in needed.items()}
    top = component(whole, digest)
    bom = Bom(components=components.values())
    bom.metadata.component = top
    for found, made in [(whole, top), *((needed[name], components[name]) for name in needed)]:
        bom.register_dependency(made, [components[name] for name in requirements(found)])
    text = json.loads(JsonV1Dot6(bom).output_as_string())
    del text["metadata"]["timestamp"], text["serialNumber"]
    content = json.dumps(text, sort_keys=True)
    text["serialNumber"] = uuid.uuid5(SPACE, content).urn
    return json.dumps(text, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def metadata_of(wheel: Path) -> Distribution:
    """Return the metadata inside a wheel."""
    (folder,) = (each for each in ZipPath(wheel).iterdir() if each.name.endswith(".dist-info"))
    return PathDistribution(folder)


def closure(whole: Distribution) -> dict[str, Distribution]:
    """Return all that a package needs, as installed here, by normalised name and in its order."""
    found: dict[str, Distribution] = {}
    waiting = requirements(whole)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = distribution(name)
            waiting += requirements(found[name])
    return dict(sorted(found.items()))


def requirements(of: Distribution) -> list[str]:
    """Return the names of the packages that one needs here without extras."""
    parsed = [Requirement(line) for line in of.requires or ()]
    return sorted(
        normalised(each.name)
        for each in parsed
        if each.marker is None or each.marker.evaluate({"extra": ""})
    )


def normalised(name: str) -> str:
    """Return the one spelling of a package's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def component(of: Distribution, digest: str | None = None) -> Component:
    """Return a package as a component; digest is the SHA-256 of its wheel, if it is at hand."""
    name = normalised(of.metadata["Name"])
    purl = PackageURL("pypi", None, name, of.version)
    return Component(
        name=name,
        version=of.version,
        type=ComponentType.LIBRARY,
        purl=purl,
        bom_ref=str(purl),
        description=of.metadata.get("Summary"),
        licenses=[LicenseFactory().make_from_string(text)] if (text := license_of(of)) else [],
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest)] if digest else [],
    )


def license_of(of: Distribution) -> str | None:
    """Return the licence that a package's metadata names: as an expression, in words, or not."""
    for field in ("License-Expression", "License"):
        text = (of.metadata.get(field) or "").strip()
        if text and "\n" not in text:
            return text
    names = [line for line in of.metadata.get_all("Classifier", []) if line[:9] == "License :"]
    return names[0].rpartition(" :: ")[2] if names else None


if __name__ == "__main__":
    main()
