"""`loratools plan-squeeze`."""

from __future__ import annotations

from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.output import print_table, say
from loratools.cli.perform import report
from loratools.face.plan_squeeze import PlanSqueezeResult, plan_squeeze
from loratools.operations.plan_squeeze import Planning
from loratools.work.requests import Reporting


@named_command("plan-squeeze")
@shared.takes(Planning, into="planning")
@shared.reports()
def command(planning: Planning, reporting: Reporting) -> None:
    """Plan a training run whose rank falls in stages.

    It also prints what the trainer needs, ready to paste.

    \b
    loratools plan-squeeze --from 64 --to 8 --steps 3000
    loratools plan-squeeze --from 64 --to 2 --steps 3000 --allot rank --trainer axolotl
    """  # noqa: D301 - click reads the backspace
    report(plan_squeeze(planning=planning), _show, reporting)


def _show(result: PlanSqueezeResult) -> None:
    rows = [
        [str(place), str(stage.rank), str(stage.steps), str(stage.first), str(stage.last)]
        for place, stage in enumerate(result.stages, 1)
    ]
    print_table(["stage", "rank", "steps", "from step", "to step"], ">>>>>", rows)
    say(f"mean rank: {result.mean_rank:.1f}")
    say(f"\n{result.snippet.rstrip()}")
