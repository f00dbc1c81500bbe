"""Options that several commands share, each declared once, so that a flag means one thing."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from loratools_formats.disk.errors import OptionError

if TYPE_CHECKING:
    from loratools.operations.fuse.draft import FuseInput

Function = TypeVar("Function", bound=Callable[..., Any])
Decorator = Callable[[Function], Function]


class _Path(click.Path):
    """A path that is not empty: an unset variable of a shell is not the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not os.fspath(value):
            self.fail("is empty", param, ctx)
        return super().convert(value, param, ctx)


PATH = _Path(path_type=Path)

max_error_option = click.option(
    "--max-error", type=float, help="Write nothing, exit 1, if the error is above this."
)
from_option = click.option(
    "--from", "format_name", help="Read as this format instead of recognising it."
)
carry_unknown_option = click.option(
    "--carry-unknown", is_flag=True, help="Keep tensors that the format does not know."
)
base_option = click.option("--base", type=PATH, help="The base model: a folder or a file.")
initial_option = click.option(
    "--initial",
    type=PATH,
    help="The adapter as saved before training, for PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ.",
)
adapter_argument = click.argument("adapter", type=PATH)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
quiet_option = click.option(
    "-q", "--quiet", is_flag=True, help="Print no report, notes or progress; errors only."
)
base_argument = click.argument("base", type=PATH)


def weighted_path(text: str) -> tuple[Path, float]:
    """Read PATH or PATH:WEIGHT, the weight 1 by default; an existing path wins.

    Raises:
        OptionError: the path is empty, or what follows the colon is not a finite number.
    """
    path, separator, weight = text.rpartition(":")
    if not text or (separator and not path):
        raise OptionError("path of the adapter is empty", got=repr(text), expected="ADAPTER:NUMBER")
    if not separator or Path(text).exists():
        return Path(text), 1.0
    try:
        value = float(weight)
    except ValueError as error:
        raise OptionError("not a weight", got=weight, expected="ADAPTER:NUMBER") from error
    if not math.isfinite(value):
        raise OptionError("not a finite weight", got=weight)
    return Path(path), value


def fuse_input(text: str, format_name: str | None) -> FuseInput:
    """Read the adapter that PATH or PATH:WEIGHT names.

    Raises:
        LoratoolsError: not a weight, or not an adapter.
    """
    from loratools.operations.fuse.draft import FuseInput
    from loratools_formats import read_adapter

    path, weight = weighted_path(text)
    return FuseInput(read_adapter(path, format_name), weight, path.name or str(path))


def parsed_size(text: str) -> int:
    """Return a size such as 5GB, 500MB or 4GiB in bytes.

    Raises:
        OptionError: it is no size, or not above zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B?", text)
    if match is None:
        raise OptionError("not a size", got=text, expected="such as 5GB, 500MB or 4GiB")
    power = " KMGT".index(match[2].upper() or " ")
    nbytes = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if nbytes <= 0:
        raise OptionError("not a size above zero", got=text)
    return nbytes


def _all(options: list[Callable[[Any], Any]]) -> Callable[[Function], Function]:
    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


output_options = _all(
    [
        click.option("-o", "--output", type=PATH, help="Where to write the result."),
        click.option("--overwrite", is_flag=True, help="Replace the output if it exists."),
        click.option("--dry-run", is_flag=True, help="Compute and report, but write nothing."),
    ]
)

_RANK_OPTIONS = [
    click.option("-r", "--rank", type=int, help="The same rank for every module."),
    click.option("--energy", type=float, help="Keep this share of ‖ΔW‖²_F, per module."),
    click.option("--sv-ratio", type=float, help="Keep singular values down to σ₁/RATIO."),
    click.option("--sv-fro", type=float, help="Keep this share of ‖ΔW‖_F, per module."),
    click.option("--sv-cumulative", type=float, help="Keep this share of the sum of σ."),
    click.option(
        "--threshold-rank", is_flag=True, help="Keep σ above the Gavish–Donoho threshold."
    ),
    click.option("--budget", help="Spread a size for the whole file, such as 25% or 12MB."),
    click.option("--max-rank", type=int, help="No rank above this."),
    click.option("--min-rank", type=int, help="No rank below this."),
    click.option(
        "--rank-pattern",
        multiple=True,
        metavar="REGEX=N",
        help="Rank of modules whose path matches; the first match decides. Repeatable.",
    ),
    click.option("--uniform", is_flag=True, help="Give all modules the largest rank chosen."),
    click.option("--serve-ranks", is_flag=True, help="Use only ranks that vLLM accepts."),
]


def rank_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that choose ranks, and pass the `RankRule` they make as `rule`."""

    @functools.wraps(function)
    def with_rule(
        *args: Any,
        rank: int | None,
        energy: float | None,
        sv_ratio: float | None,
        sv_fro: float | None,
        sv_cumulative: float | None,
        threshold_rank: bool,
        budget: str | None,
        max_rank: int | None,
        min_rank: int | None,
        rank_pattern: tuple[str, ...],
        uniform: bool,
        serve_ranks: bool,
        **kwargs: Any,
    ) -> Any:
        from loratools.algebra.ranks import Budget, RankRule, pattern_rank

        rule = RankRule(
            rank=rank,
            energy=energy,
            sv_ratio=sv_ratio,
            sv_fro=sv_fro,
            sv_cumulative=sv_cumulative,
            threshold=threshold_rank,
            budget=None if budget is None else Budget.parse(budget),
            max_rank=max_rank,
            min_rank=min_rank,
            patterns=tuple(map(pattern_rank, rank_pattern)),
            uniform=uniform,
            serve=serve_ranks,
        )
        return function(*args, rule=rule, **kwargs)

    return _all(_RANK_OPTIONS)(with_rule)


device_option = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda", "mps"]),
    default="cpu",
    show_default=True,
    help="Where to compute; cuda and mps need torch.",
)
workers_option = click.option(
    "--workers",
    type=click.IntRange(1, 64),
    default=2,
    show_default=True,
    help="Threads over tensors (CPU).",
)
max_shard_size_option = click.option(
    "--max-shard-size", metavar="SIZE", help="Split weights into files of this size, such as 5GB."
)


_COMPUTE_OPTIONS = [
    click.option("--dtype", type=click.Choice(["f32", "f16", "bf16"]), help="Type of new factors."),
    click.option("--oversample", type=int, default=10, show_default=True, help="Of rsvd."),
    click.option("--power-iterations", type=int, default=2, show_default=True, help="Of rsvd."),
    click.option("--seed", type=int, default=0, show_default=True, help="Of all that is random."),
    device_option,
    click.option("--keep-alpha", is_flag=True, help="Keep lora_alpha instead of alpha = rank."),
    click.option(
        "--workers", type=int, default=2, show_default=True, help="Threads over modules (CPU)."
    ),
]


def compute_options(svd_flag: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the options of how to compute and store, passed as a `ComputeOptions` named `compute`.

    Args:
        svd_flag: name of the option that chooses the SVD; `--method` where nothing else has it.
    """
    svd = click.option(
        svd_flag,
        "svd",
        type=click.Choice(["exact", "rsvd"]),
        default="exact",
        show_default=True,
        help="exact, or a randomised SVD as in the LoRA-Squeeze paper.",
    )
    return lambda function: _all([svd, *_COMPUTE_OPTIONS])(_with_compute(function))


def _with_compute(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def with_options(
        *args: Any,
        dtype: Any,
        svd: Any,
        oversample: int,
        power_iterations: int,
        seed: int,
        device: Any,
        keep_alpha: bool,
        workers: int,
        **kwargs: Any,
    ) -> Any:
        from loratools.factors.resize import ComputeOptions

        compute = ComputeOptions(
            dtype=dtype,
            method=svd,
            oversample=oversample,
            power_iterations=power_iterations,
            seed=seed,
            device=device,
            keep_alpha=keep_alpha,
            workers=workers,
        )
        return function(*args, compute=compute, **kwargs)

    return with_options


selection_options = _all(
    [
        click.option("--include", metavar="REGEX", help="Touch only modules whose path matches."),
        click.option("--exclude", metavar="REGEX", help="Leave modules whose path matches alone."),
    ]
)
