"""A schedule of squeezes from a few numbers, and the configuration of a trainer for it.

The snippets are whole: the code that makes the schedule, and what names it in the configuration of
axolotl or LLaMA-Factory. Sources: `add_callbacks_pre_trainer` and `post_train` of axolotl's
BasePlugin (0.19), and the `callbacks` of LLaMA-Factory's `run_exp` (0.9.5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loratools.operations.schedule import LEAST_STEPS, SqueezeSchedule, geometric_ranks
from loratools.work.declared import option
from loratools.work.typed import check_options
from loratools_formats.disk.errors import OptionError

Allot = Literal["equal", "rank"]
TrainerName = Literal["transformers", "axolotl", "llama-factory"]


@dataclass(frozen=True)
class Planning:
    """What a schedule is to be like.

    Attributes:
        start: the rank that training starts with.
        target: the rank that it ends with.
        stages: number of ranks; by default each is about half of the one before.
        steps: optimizer steps of the whole run.
        allot: how the steps are divided among stages: equal, or rank (in proportion to the ranks).
        least_steps: the least number of steps of a stage, if steps are divided by rank.
        trainer: the trainer whose configuration is shown: transformers, axolotl or llama-factory.

    Raises:
        OptionError: a value out of range, or of the wrong type.
    """

    start: int | None = option(None, heading="Input", name="from_", metavar="RANK", word="start")
    target: int | None = option(None, heading="Output", name="to", metavar="RANK", word="target")
    stages: int | None = option(None, heading="Rank")
    steps: int | None = option(None, heading="Method")
    allot: Allot = option("equal", heading="Method")
    least_steps: int = option(LEAST_STEPS, heading="Method")
    trainer: TrainerName = option("transformers", heading="Report")

    def __post_init__(self) -> None:
        check_options(self)

    def schedule(self) -> SqueezeSchedule:
        """Return the schedule.

        Raises:
            OptionError: a number is missing, or there is no such schedule.
        """
        for name, value in (("start", self.start), ("target", self.target), ("steps", self.steps)):
            if value is None:
                raise OptionError(f"no `{name}` given", hint="Give `start`, `target` and `steps`")
        ranks = geometric_ranks(self.start or 0, self.target or 0, self.stages)
        if self.allot == "rank":
            return SqueezeSchedule.by_rank(ranks, self.steps or 0, least_steps=self.least_steps)
        return SqueezeSchedule.equal_steps(ranks, self.steps or 0)


@dataclass(frozen=True)
class StagePlan:
    """One stage of a schedule.

    Attributes:
        rank: of all modules.
        steps: how many.
        first: number of its first step, counted from 1.
        last: number of its last step.
    """

    rank: int
    steps: int
    first: int
    last: int


def stages_of(schedule: SqueezeSchedule) -> tuple[StagePlan, ...]:
    """Return the stages of a schedule whose ranks are numbers."""
    found: list[StagePlan] = []
    for rank, steps in zip(schedule.ranks, schedule.steps, strict=True):
        done = found[-1].last if found else 0
        found.append(StagePlan(rank if isinstance(rank, int) else 0, steps, done + 1, done + steps))
    return tuple(found)


def snippet(schedule: SqueezeSchedule, trainer: TrainerName) -> str:
    """Return what to write so that a trainer squeezes by a schedule."""
    made = f"SqueezeSchedule(ranks={schedule.ranks}, steps={schedule.steps})"
    return _SNIPPETS[trainer].format(
        made=made, rank=schedule.ranks[0], steps=schedule.total, imports=_IMPORTS
    )


_IMPORTS = "from loratools.training import SqueezeCallback, SqueezeSchedule"
_SNIPPETS: dict[TrainerName, str] = {
    "transformers": """\
# LoraConfig(r={rank}, ...), TrainingArguments(max_steps={steps}, ...)
{imports}

schedule = {made}
trainer = Trainer(model, args, ..., callbacks=[SqueezeCallback(schedule)])
""",
    "axolotl": """\
# squeeze_plugin.py, run as: PYTHONPATH=. axolotl train config.yaml
# (axolotl trains on without a plugin that it cannot import: see that its log says
# "Plugin loaded successfully")
from axolotl.integrations.base import BasePlugin
{imports}


class SqueezePlugin(BasePlugin):
    def add_callbacks_pre_trainer(self, cfg, model):
        schedule = {made}
        self.callback = SqueezeCallback(schedule)
        return [self.callback]

    def post_train(self, cfg, model):
        self.callback.write_provenance(cfg.output_dir)


# in the configuration, which is YAML:
#   adapter: lora
#   lora_r: {rank}
#   max_steps: {steps}
#   plugins:
#     - squeeze_plugin.SqueezePlugin
""",
    "llama-factory": """\
# train_squeezed.py, run as: python train_squeezed.py config.yaml
from llamafactory.train.tuner import run_exp
{imports}

schedule = {made}
callback = SqueezeCallback(schedule)
run_exp(callbacks=[callback])
callback.write_provenance()

# in config.yaml:
#   finetuning_type: lora
#   lora_rank: {rank}
#   max_steps: {steps}
""",
}
