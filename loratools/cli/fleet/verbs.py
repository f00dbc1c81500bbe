"""`loratools fleet VERB`: the commands of one adapter, over all of them."""

from __future__ import annotations

from typing import Any

import click


def __getattr__(name: str) -> Any:
    """Return the command of a verb."""

    @click.command(name.replace("_", "-"))
    def command() -> int:
        """Not there yet."""
        raise NotImplementedError

    return command
