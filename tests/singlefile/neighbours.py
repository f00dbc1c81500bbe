"""What diffusers calls the modules of architectures that have no table of names.

Run as a program, it writes the file that the tables compete with:

    python tests/singlefile/neighbours.py > loratools/naming/data/neighbours.toml
"""

from __future__ import annotations

import inspect
import json
import re

from loratools.naming.tables import bundled_tables

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def built_classes(package):
    """Return the models of a package of diffusers that build without arguments, by class name."""
    import diffusers
    import torch

    found = {}
    for name, kind in sorted(vars(package).items()):
        if not inspect.isclass(kind) or not issubclass(kind, diffusers.ModelMixin):
            continue
        try:
            with torch.device("meta"):
                found[name] = kind()
        except (TypeError, ValueError):
            continue  # it has no defaults
    return found


def weights(model):
    """Return the shapes of a model's linear and convolutional weights, by path."""
    import torch

    kinds = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return {
        path: tuple(module.weight.shape)
        for path, module in model.named_modules()
        if isinstance(module, kinds)
    }


def patterns(paths):
    """Return the patterns of some paths, and how many blocks each list of blocks has."""
    blocks: dict[str, int] = {}
    found = set()
    for path in paths:
        pattern = _NUMBER.sub("{}", path)
        found.add(pattern)
        stack, is_in_one, _ = pattern.partition(".{}.")
        if is_in_one:
            number = int(_NUMBER.findall(path)[0])
            blocks[stack] = max(blocks.get(stack, 0), number + 1)
    return sorted(found), blocks


def main():
    from diffusers.models import transformers

    known = {name for table in bundled_tables() for name in table.classes}
    print(
        "# What diffusers calls the linear and convolutional modules of transformers that have no"
    )
    print("# table here, and how many blocks they have by default. Written by")
    print("# tests/singlefile/neighbours.py.")
    for name, model in built_classes(transformers).items():
        if name in known:
            continue
        paths, blocks = patterns(weights(model))
        print(f"\n[{name}]\nblocks = {{ ", end="")
        print(", ".join(f"{json.dumps(stack)} = [{n}]" for stack, n in sorted(blocks.items())), "}")
        print("paths = [", *(f"    {json.dumps(path)}," for path in paths), "]", sep="\n")


if __name__ == "__main__":
    main()
