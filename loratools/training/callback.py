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
from weakref import WeakValueDictionary

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from loratools.operations.schedule import SqueezeSchedule
from loratools.training.layers import LiveLayer, live_layers, reshape, unwrapped
from loratools.training.live import AlphaPolicy, alpha_at, squeeze_model
from loratools.training.transport import check_held, inner
from loratools.work.provenance import operation_record
from loratools_formats.disk.errors import OptionError, UnsupportedError
from loratools_formats.disk.provenance import PROVENANCE_FILE, statement

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

# By the identity of a Trainer's arguments, which the callback holds, so that it stays its own. A
# Trainer that restores the states of callbacks makes new ones, and tells neither of the other.
_GIVEN: WeakValueDictionary[int, SqueezeCallback] = WeakValueDictionary()


class SqueezeCallback(TrainerCallback, ExportableState):
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
        given = schedule if isinstance(schedule, SqueezeSchedule) else None
        self.schedule = given or SqueezeSchedule.from_dict(schedule)  # type: ignore[arg-type]
        self.alpha = alpha
        self.log = log
        self.squeezes: list[dict[str, Any]] = []
        self._output: str | os.PathLike[str] | None = None
        self._given: Any = None
        self._fitted: Any = None
        self._loaded = False
        self._pending: dict[str, float] = {}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the schedule, and what was done so far."""
        return {
            "args": {"schedule": self.schedule.to_dict(), "alpha": self.alpha},
            "attributes": {"squeezes": self.squeezes},
        }

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let layers take the ranks of a checkpoint that is about to be loaded."""
        del state, control
        _check_processes(args)
        self._given = args
        _GIVEN[id(args)] = self
        self._fit_to_what_is_loaded(unwrapped(kwargs["model"]))

    def _fit_to_what_is_loaded(self, model: Any) -> None:
        if self._fitted is model:
            return
        names = {parameter: name for name, parameter in model.named_parameters()}
        layers = {names[each.a]: each for each in live_layers(model)}
        model.register_load_state_dict_pre_hook(partial(self._fit, layers))
        self._fitted = model

    def _fit(
        self, layers: Mapping[str, LiveLayer], model: Any, tensors: Any, prefix: str, *_: Any
    ) -> None:
        self._loaded = True
        settings: dict[str, tuple[int, float]] = {}
        for name, each in layers.items():
            if prefix + name in tensors and (rank := len(tensors[prefix + name])) != each.rank:
                alpha = alpha_at(self.alpha, each, each.alpha, each.rank, rank)
                settings[each.name] = rank, alpha
        if settings:
            reshape(model, list(layers.values()), settings)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that schedule, model, optimizer and checkpoint belong together."""
        del control
        if self._given is None:
            given = _GIVEN.get(id(args))
            if given is None:
                raise UnsupportedError(
                    "the callback was added to a Trainer that was made before",
                    got="Trainer.add_callback",
                    expected="Trainer(..., callbacks=[callback])",
                    hint="Make the Trainer with callbacks=[callback]",
                )
            self.__dict__ = given.__dict__  # the Trainer restored it: the user's stays in step
        _check_processes(args)
        self._output, self._loaded = args.output_dir, False
        model, boundaries = unwrapped(kwargs["model"]), self.schedule.boundaries
        self._fit_to_what_is_loaded(model)  # the Trainer may have made another model
        layers = live_layers(model)
        if boundaries and boundaries[-1] >= state.max_steps:
            raise OptionError(
                "training ends before the last squeeze",
                got=f"{state.max_steps} steps",
                expected=f"more than {boundaries[-1]}",
            )
        saved = state.stateful_callbacks.get(type(self).__name__)
        saved = saved[0] if isinstance(saved, list) else saved
        if state.global_step and saved:
            if saved["args"] != (mine := self.state()["args"]):
                raise OptionError(
                    "the checkpoint was trained by another schedule",
                    got=mine,
                    expected=saved["args"],
                )
            self.squeezes = saved["attributes"]["squeezes"]
            if self.squeezes:  # alphas to the last bit, which a policy may find by another way
                last = self.squeezes[-1]
                reshape(
                    model, layers, {n: (r, last["alphas"][n]) for n, r in last["ranks"].items()}
                )
        elif boundaries and boundaries[0] <= state.global_step:
            raise OptionError(
                "the checkpoint is behind the first squeeze, and was trained without a schedule",
                got=f"step {state.global_step}",
                expected=f"at most {boundaries[0] - 1}",
            )
        else:
            highest = max(each.rank for each in layers)
            if self.schedule.start not in (None, highest):
                raise OptionError(
                    "the schedule starts with another rank than the model has",
                    got=self.schedule.start,
                    expected=highest,
                )
            state.stateful_callbacks[type(self).__name__] = self.state()
        check_held(inner(kwargs.get("optimizer")), layers)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Squeeze if the schedule says so."""
        del args
        self._loaded = False
        rule = self.schedule.rule_after(state.global_step)
        if rule is None:
            return control
        done = squeeze_model(
            kwargs["model"], rule=rule, optimizer=kwargs["optimizer"], alpha=self.alpha
        )
        self.squeezes.append(
            {
                "step": state.global_step,
                "ranks": dict(done.ranks),
                "alphas": dict(done.alphas),
                "relative_error": done.relative_error,
                "parameters": done.parameters,
                "optimizer": done.optimizer,
                "options": dict(done.record),
            }
        )
        if self.log is not None:
            self.log(done.metrics())
        else:
            self._pending, control.should_log = done.metrics(), True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Add the numbers of a squeeze to what the Trainer logs."""
        del args, control
        if self._pending and logs is not None and state.log_history:
            logs.update(self._pending)
            state.log_history[-1].update(self._pending)
            self._pending = {}

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the provenance of a checkpoint's adapter."""
        del control
        self.write_provenance(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget the squeezes that came after the best checkpoint, if that is in the model now."""
        del control
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
        files = [place / name for name in _WEIGHTS if (place / name).is_file()]
        if files and self._output is None:
            raise OptionError(
                "no Trainer has trained with this callback, so that it cannot tell of an adapter",
                path=place,
                hint="Call write_provenance on the callback that the Trainer was made with",
            )
        if not files or not self.squeezes:
            return
        options = {**self.state()["args"], "squeezes": self.squeezes}
        text = statement(operation_record("squeeze-model", {}, options), files)
        scratch = place / f".{PROVENANCE_FILE}"
        scratch.write_bytes(text)
        scratch.replace(place / PROVENANCE_FILE)


def _check_processes(args: Any) -> None:
    if args.world_size > 1:
        raise UnsupportedError(
            "squeezing in training works in one process only",
            got=f"{args.world_size} processes",
        )
