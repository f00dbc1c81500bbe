"""Options of `spectrum`, `compare` and `repair`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from loratools.base.decompositions import IntruderOptions
from loratools.cli import options as shared
from loratools_formats.disk.errors import OptionError

FactorType = Literal["f32", "f16", "bf16"]
"""Types of new factors."""

setting_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="What the change depends on and neither the file nor the base's config.json tells. "
    "Repeatable.",
)


def parsed_setting(text: str) -> tuple[str, str]:
    """Return the name and value of NAME=VALUE.

    Raises:
        OptionError: there is no name or no value.
    """
    name, separator, value = text.partition("=")
    if not separator or not name or not value:
        raise OptionError("not a setting", got=text, expected="NAME=VALUE")
    return name, value


_INTRUDER_OPTIONS = [
    click.option(
        "--intruders",
        "count",
        type=int,
        default=10,
        show_default=True,
        help="Leading singular vectors of W + ΔW to examine; 0 for none.",
    ),
    click.option(
        "--epsilon",
        type=float,
        default=0.5,
        show_default=True,
        help="A vector intrudes if its |cos| with each of W's is below this.",
    ),
    click.option(
        "--exact-svd", is_flag=True, help="Decompose base weights of any size, which is slow."
    ),
    click.option(
        "--cache", type=shared.PATH, metavar="FOLDER", help="Keep SVDs of base weights here."
    ),
]


def intruder_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of intruder dimensions, passed as `IntruderOptions` named `intruders`."""

    @functools.wraps(function)
    def with_options(
        *args: Any, count: int, epsilon: float, exact_svd: bool, cache: Path | None, **kwargs: Any
    ) -> Any:
        intruders = IntruderOptions(count, epsilon, exact_svd, cache)
        return function(*args, intruders=intruders, **kwargs)

    command: Callable[..., Any] = with_options
    for option in reversed(_INTRUDER_OPTIONS):
        command = option(command)
    return command


def html_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of the page: `html`, and `overwrite` for it."""
    page = click.option(
        "--html",
        type=shared.PATH,
        metavar="FILE",
        help="Also write a page that needs no network and no other file.",
    )
    overwrite = click.option("--overwrite", is_flag=True, help="Replace the page if it exists.")
    command: Callable[..., Any] = page(overwrite(function))
    return command
