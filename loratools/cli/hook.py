"""`check` for pre-commit, which names files: a file that is part of a folder means its folder.

python -m loratools.cli.hook [OPTION...] FILE...
"""

from __future__ import annotations

import sys
from pathlib import Path

from loratools_formats.core.file_names import ADAPTER_CONFIG, WEIGHTS_OF_ADAPTERS


def arguments(given: list[str]) -> list[str]:
    """Return the arguments of `check` for those of a hook.

    >>> arguments(["--target=vllm", "a/adapter_config.json", "a/adapter_model.safetensors"])
    ['check', '--target=vllm', 'a']
    """
    options = [text for text in given if text.startswith("-")]
    paths: dict[str, None] = {}
    for text in given:
        if not text.startswith("-"):
            path = Path(text)
            is_part = path.name in (ADAPTER_CONFIG, *WEIGHTS_OF_ADAPTERS)
            paths[str(path.parent if is_part else path)] = None
    return ["check", *options, *paths]


def main() -> None:
    """Run `check` on the adapters that the files belong to, and exit with its code."""
    given = arguments(sys.argv[1:])
    if all(text.startswith("-") for text in given[1:]):
        sys.exit(0)
    from loratools.cli import main as run

    sys.argv = [sys.argv[0], *given]
    run()


if __name__ == "__main__":
    main()
