"""`loratools fleet`: operations over whole collections of adapters.

A subcommand is a row of `_TABLE`: its name, the module whose `command` it is, and its sentence in
help. Modules are imported when their command is called.
"""

from __future__ import annotations

import click

from loratools.cli.lazy_group import LazyGroup

_VERBS = "loratools.cli.fleet.verbs"
_TABLE: dict[str, tuple[str, str]] = {
    "add": ("loratools.cli.fleet.add", "Add an adapter to a shared set."),
    "check": (f"{_VERBS}:check", "Check every adapter."),
    "convert": (f"{_VERBS}:convert", "Convert every adapter to another format."),
    "dedup": ("loratools.cli.fleet.dedup", "Find near-duplicates among indexed adapters."),
    "dequantize": (f"{_VERBS}:dequantize", "Turn quantised weights of every checkpoint back."),
    "extract": (f"{_VERBS}:extract", "Extract the LoRA of every checkpoint over one base."),
    "fuse": (f"{_VERBS}:fuse", "Fuse every adapter into its own copy of a base."),
    "index": ("loratools.cli.fleet.index", "Index adapters by sketches of their changes."),
    "info": (f"{_VERBS}:info", "Show what every adapter is."),
    "quantize": (f"{_VERBS}:quantize", "Quantise every checkpoint to four bits."),
    "repair": (f"{_VERBS}:repair", "Repair every adapter."),
    "share": ("loratools.cli.fleet.share", "Bring adapters of one base into shared bases."),
    "similar": ("loratools.cli.fleet.similar", "Find the indexed adapters nearest to one."),
    "spectrum": (f"{_VERBS}:spectrum", "Measure what is in every adapter."),
    "squeeze": (f"{_VERBS}:squeeze", "Compress the ranks of every adapter."),
    "to-dora": (f"{_VERBS}:to_dora", "Turn every LoRA into a DoRA."),
    "to-lora": (f"{_VERBS}:to_lora", "Turn every adapter into a plain LoRA."),
    "unshare": ("loratools.cli.fleet.unshare", "Take adapters out of a shared set."),
    "verify": (f"{_VERBS}:verify", "Check whether every checkpoint is a base with an adapter."),
}


@click.command(
    "fleet",
    cls=LazyGroup,
    places={name: place for name, (place, _) in _TABLE.items()},
    summaries={name: text for name, (_, text) in _TABLE.items()},
    page="commands/fleet.md",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.pass_context
def command(context: click.Context) -> None:
    """Run one operation over thousands of adapters, here, in shards or on a cluster.

    Finished work is recognised by its content and skipped. A run can therefore be stopped, started
    again, or started twice at once.

    \b
    loratools fleet squeeze 'adapters/*' -o small -- --rank 16
    loratools fleet check 'adapters/*' --shard 3/8 -o reports
    """  # noqa: D301 - click reads the backspace
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
