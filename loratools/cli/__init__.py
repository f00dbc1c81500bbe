"""The `loratools` command: parse, call one library function, render its result.

Commands are loaded when used, so that `loratools --help` imports nothing but click.
"""

from __future__ import annotations

import os

import click

from loratools import __version__
from loratools.cli import errors
from loratools.cli.lazy_group import LazyGroup

_COMMANDS = {
    "check": "loratools.cli.check",
    "compare": "loratools.cli.compare",
    "convert": "loratools.cli.convert",
    "dequantize": "loratools.cli.dequantize",
    "extract": "loratools.cli.extract",
    "fleet": "loratools.cli.fleet",
    "formats": "loratools.cli.formats",
    "fuse": "loratools.cli.fuse",
    "info": "loratools.cli.info",
    "merge": "loratools.cli.merge",
    "methods": "loratools.cli.methods",
    "plan-squeeze": "loratools.cli.plan_squeeze",
    "provenance": "loratools.cli.provenance",
    "push": "loratools.cli.push",
    "quantize": "loratools.cli.quantize",
    "repair": "loratools.cli.repair",
    "replay": "loratools.cli.replay",
    "rule": "loratools.cli.rule",
    "run": "loratools.cli.run",
    "spectrum": "loratools.cli.spectrum",
    "squeeze": "loratools.cli.squeeze",
    "to-dora": "loratools.cli.to_dora",
    "to-lora": "loratools.cli.to_lora",
    "verify": "loratools.cli.verify",
}

_SUMMARIES = {
    "check": "Check adapters for parts that do nothing, that programs refuse, or that are missing.",
    "compare": "Compare adapters: angles, shared spaces, signs, families; or two bases.",
    "convert": "Convert an adapter to another format, and check what was written.",
    "dequantize": "Turn a checkpoint's quantised weights back into 16 or 32 bits.",
    "extract": "Extract the LoRA between two checkpoints.",
    "fleet": "Run one operation over thousands of adapters, here, in shards or on a cluster.",
    "formats": "List the adapter formats, broken plugins included.",
    "fuse": "Fuse adapters into base weights, streamed, without loading a model.",
    "info": "Show what an adapter or a base model is, from its headers alone.",
    "merge": "Merge adapters of any rank, scale and type into one.",
    "methods": "List the merge methods with their parameters, broken plugins included.",
    "plan-squeeze": "Plan a training run whose rank falls in stages.",
    "provenance": "Show how an output was made, back to the originals.",
    "push": "Publish an adapter or a model on the Hub, checked, with a card, in one commit.",
    "quantize": "Quantise a checkpoint to four bits, byte for byte as bitsandbytes does.",
    "repair": "Shrink an adapter's intruder dimensions, drop dead modules, balance factors.",
    "replay": "Repeat the call that made an output, and compare the bytes.",
    "rule": "Explain a rule of `check`.",
    "run": "Run a recipe: operations one after another, resumed where a run stopped.",
    "spectrum": "Measure what is in an adapter: spectra, ranks, strength, and what stands out.",
    "verify": "Check whether a checkpoint is a base with adapters fused in.",
    "squeeze": "Compress an adapter's ranks with the smallest possible error.",
    "to-dora": "Turn a LoRA into a DoRA that makes the same change.",
    "to-lora": "Turn an adapter of any kind into a plain LoRA.",
}


@click.command(
    cls=LazyGroup,
    places=_COMMANDS,
    summaries=_SUMMARIES,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, "-V", "--version", prog_name="loratools")
@click.option("--traceback", is_flag=True, help="Show Python tracebacks of errors.")
@click.pass_context
def cli(context: click.Context, /, traceback: bool) -> None:
    """Exact, fast and safe operations on LoRA adapter files.

    Every operation works on the true weight change, says what error it made, never changes its
    inputs, and writes its output whole or not at all.

    \b
    loratools info my-adapter
    loratools squeeze my-adapter -o smaller --rank 16
    """  # noqa: D301 - click reads the backspace
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main() -> None:
    """Run the command line and exit."""
    # Threads go over modules and BLAS is held to one everywhere; its own, started with NumPy, would
    # only wait in a loop and take a core from ours.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    errors.run(cli)
