"""`SqueezeCallback`: a schedule of squeezes under transformers' Trainer.

The Trainer calls it after each optimizer step, so that gradient accumulation and mixed precision
need nothing of it. A checkpoint holds the schedule and what each squeeze did. When training is
resumed, layers take the ranks of the checkpoint before its tensors are loaded, and the optimizer is
made later.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from loratools.operations.schedule import SqueezeSchedule
from loratools.training.layers import AlphaPolicy, LiveAdapter
from loratools.training.live import squeeze_model
from loratools.training.transport import trainer_of
from loratools.work.provenance import operation_record
from loratools_formats.core.file_names import WEIGHTS_OF_PEFT
from loratools_formats.disk.errors import OptionError, UnsupportedError
from loratools_formats.disk.provenance import PROVENANCE_FILE, statement
from loratools_formats.disk.publish import publish_file

_KEPT = ("ranks", "alphas", "relative_error", "parameters", "optimizer")
# Where the Trainer's state keeps ours. Under the name of a class it would make another callback of
# it, which the user does not hold.
_KEY = "loratools"


class SqueezeCallback(TrainerCallback):
    """Squeezes the adapter that a Trainer trains, at the boundaries of a schedule.

    Hand it over as `Trainer(..., callbacks=[callback])`. `Trainer.add_callback` is too late: layers
    could not take the ranks of a checkpoint, so training is refused then.

    What each squeeze did goes into the Trainer's history and, beside every checkpoint, into the
    adapter's statement of provenance; call `write_provenance` for what is saved after training.

    Args:
        schedule: ranks and steps; the values of `to_dict` are taken, too.
        alpha: as for `squeeze_model`.
        log: called with the numbers of each squeeze, such as `trainer.log`, which hands them to
            every reporter; without it they are added to what the Trainer logs at that step.
    """

    def __init__(
        self,
        schedule: SqueezeSchedule | Mapping[str, Any],
        alpha: AlphaPolicy = "keep-scale",
        log: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        if not isinstance(schedule, SqueezeSchedule):
            schedule = SqueezeSchedule.from_dict(schedule)
        self.schedule = schedule
        self.alpha = alpha
        self.log = log
        self.squeezes: list[dict[str, Any]] = []
        self._output: str | os.PathLike[str] | None = None
        self._fitted: Any = None
        self._loaded = False
        self._pending: dict[str, float] = {}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let layers take the ranks of a checkpoint that is about to be loaded."""
        live = LiveAdapter.of(kwargs["model"]).check()
        if self._fitted is not live.model:
            self._fitted = live.model
            self._fitted.register_load_state_dict_pre_hook(partial(self._fit, live.name))

    def _fit(self, adapter: str, model: Any, tensors: Any, prefix: str, *_: Any) -> None:
        self._loaded = True
        live = LiveAdapter.of(model, adapter)
        names = {parameter: prefix + name for name, parameter in model.named_parameters()}
        alphas: dict[str, float] = {}
        for each in live.layers.values():
            a, b, rank = each.a, each.b, len(tensors.get(names[each.a], each.a))
            if rank != each.rank:  # zeros, which the checkpoint's tensors replace
                alphas[each.name] = each.alpha_at(rank, self.alpha)
                each.put(a.new_zeros(rank, a[0].numel()), b.new_zeros(len(b), rank))
        if alphas:
            live.settle(alphas)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that schedule, model, optimizer and checkpoint belong together."""
        is_late, self._output, self._loaded = self._fitted is None, args.output_dir, False
        self.on_init_end(args, state, control, **kwargs)  # the Trainer may have another model now
        live = LiveAdapter.of(kwargs["model"])
        start, last = self.schedule.start, sum(self.schedule.steps[:-1])
        highest = max(each.rank for each in live.layers.values())
        made_by = {"schedule": self.schedule.to_dict(), "alpha": self.alpha}
        saved = state.stateful_callbacks.get(_KEY, {"made by": None, "squeezes": []})
        is_fresh = saved["made by"] is None and not self.schedule.stage_after(state.global_step)
        for error, problem, applies, got, expected in (
            (UnsupportedError, "the callback was added to a Trainer that was made before",
             is_late, "Trainer.add_callback", "Trainer(..., callbacks=[callback])"),
            (UnsupportedError, "several processes train the model, and hold no copies of it",
             args.world_size > 1 and not live.copies, f"{args.world_size} processes",
             "one process, or DistributedDataParallel"),
            (OptionError, "training ends before the last squeeze",
             last >= state.max_steps, f"{state.max_steps} steps", f"more than {last}"),
            (OptionError, "the checkpoint was trained by another schedule, or without a schedule",
             not is_fresh and saved["made by"] != made_by, made_by, saved["made by"]),
            (OptionError, "the schedule starts with another rank than the model has",
             is_fresh and start not in (None, highest), start, highest),
        ):  # fmt: skip
            if applies:
                raise error(problem, got=got, expected=expected)
        trainer_of(live, kwargs.get("optimizer"))  # which refuses what it cannot follow
        if not is_fresh:
            self.squeezes = saved["squeezes"]
        if saved["squeezes"]:  # alphas to the last bit, which one step may round otherwise
            live.settle(saved["squeezes"][-1]["alphas"])
        state.stateful_callbacks[_KEY] = {"made by": made_by, "squeezes": self.squeezes}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Squeeze if the schedule says so."""
        self._loaded = False
        rule = self.schedule.rule_after(state.global_step)
        if rule is None:
            return
        optimizer = kwargs["optimizer"]
        done = squeeze_model(kwargs["model"], rule=rule, optimizer=optimizer, alpha=self.alpha)
        kept = {name: getattr(done, name) for name in _KEPT}
        self.squeezes.append({"step": state.global_step, **kept, "options": done.record})
        if self.log is None:
            self._pending, control.should_log = done.metrics(), True
        else:
            self.log(done.metrics())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the numbers of a squeeze to what the Trainer logs."""
        if self._pending and logs is not None and state.log_history:
            logs.update(self._pending)
            state.log_history[-1].update(self._pending)
            self._pending = {}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the provenance of a checkpoint's adapter."""
        if args.should_save:
            self.write_provenance(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the squeezes that came after the best checkpoint, if that is in the model now."""
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None and self._loaded:
            step = int(Path(best).name.rpartition("-")[2])  # the Trainer names it checkpoint-STEP
            self.squeezes = [each for each in self.squeezes if each["step"] <= step]

    def write_provenance(self, folder: str | os.PathLike[str] | None = None) -> None:
        """Write beside a saved adapter how it was squeezed; nothing if it was not, or is not there.

        Args:
            folder: what `save_pretrained` or `Trainer.save_model` wrote; by default the Trainer's
                output folder.

        Raises:
            OptionError: an adapter is there, and no Trainer has trained with this callback.
        """
        place = Path((self._output or ".") if folder is None else folder)
        files = [place / name for name in WEIGHTS_OF_PEFT if (place / name).is_file()]
        if files and self._output is None:
            raise OptionError(
                "no Trainer has trained with this callback, so that it cannot tell of an adapter",
                path=place,
                hint="Call write_provenance on the callback that the Trainer was made with",
            )
        if files and self.squeezes:
            options = {
                "schedule": self.schedule.to_dict(), "alpha": self.alpha, "squeezes": self.squeezes,
            }  # fmt: skip
            text = statement(operation_record("squeeze-model", {}, options), files)
            with publish_file(place / PROVENANCE_FILE, overwrite=True) as temporary:
                temporary.write_bytes(text)
