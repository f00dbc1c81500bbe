"""`SqueezeCallback`: a schedule of squeezes under transformers' Trainer.

The Trainer calls it after each optimizer step, so that gradient accumulation and mixed precision
need nothing of it. A checkpoint holds the schedule and the ranks. When training is resumed, layers
take the ranks of the checkpoint before its tensors are loaded, and the optimizer is made later.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from loratools.operations.schedule import SqueezeSchedule
from loratools.training.layers import LiveLayer, live_layers, unwrapped
from loratools.training.live import AlphaPolicy, SqueezedModel, alpha_at, reshape, squeeze_model
from loratools.work.provenance import operation_record
from loratools_formats.disk.errors import OptionError, UnsupportedError
from loratools_formats.disk.provenance import PROVENANCE_FILE, statement

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


class SqueezeCallback(TrainerCallback, ExportableState):
    """Squeezes the adapter that a Trainer trains, at the boundaries of a schedule.

    What each squeeze did goes into the Trainer's history and, beside every checkpoint, into the
    adapter's statement of provenance; call `write_provenance` for a folder that you save yourself.

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
        self.settings: dict[str, list[Any]] = {}
        self._pending: dict[str, float] = {}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the schedule, and what was done so far."""
        return {
            "args": {"schedule": self.schedule.to_dict(), "alpha": self.alpha},
            "attributes": {"squeezes": self.squeezes, "settings": self.settings},
        }

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let layers take the ranks of a checkpoint that is about to be loaded."""
        del state, control
        if args.world_size > 1:
            raise UnsupportedError(
                "squeezing in training works in one process only",
                got=f"{args.world_size} processes",
            )
        model = unwrapped(kwargs["model"])
        for each in live_layers(model, model.active_adapters[0]):
            hook = partial(self._fit, model, each)
            each.module.register_load_state_dict_pre_hook(hook)

    def _fit(
        self, model: Any, layer: LiveLayer, _: Any, tensors: Any, prefix: str, *__: Any
    ) -> None:
        side = "lora_embedding_A" if layer.is_embedding else "lora_A"
        end = "" if layer.is_embedding else ".weight"
        tensor = tensors.get(f"{prefix}{side}.{layer.adapter}{end}")
        if tensor is None or len(tensor) == layer.rank:
            return
        new, layers = len(tensor), live_layers(model, layer.adapter)
        alpha = alpha_at(self.alpha, layer.alpha, layer.rank, new, rslora=layer.is_rslora)
        settings = {each.name: (each.rank, each.alpha) for each in layers}
        reshape(model, layers, {**settings, layer.name: (new, alpha)})

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that schedule, model and checkpoint belong together."""
        del args, control
        model = unwrapped(kwargs["model"])
        layers = live_layers(model, model.active_adapters[0])
        last = self.schedule.boundaries[-1:]
        if last and last[0] >= state.max_steps:
            raise OptionError(
                "training ends before the last squeeze",
                got=f"{state.max_steps} steps",
                expected=f"more than {last[0]}",
            )
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and saved:
            self._resume(saved[0] if isinstance(saved, list) else saved)
            reshape(model, layers, {name: (int(r), a) for name, (r, a) in self.settings.items()})
            return
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        highest = max(each.rank for each in layers)
        if state.global_step == 0 and self.schedule.start not in (None, highest):
            raise OptionError(
                "the schedule starts with another rank than the model has",
                got=self.schedule.start,
                expected=highest,
            )
        self.settings = {each.name: [each.rank, each.alpha] for each in layers}

    def _resume(self, saved: Mapping[str, Any]) -> None:
        mine = self.state()["args"]
        if saved["args"] != mine:
            raise OptionError(
                "the checkpoint was trained by another schedule", got=mine, expected=saved["args"]
            )
        self.squeezes, self.settings = (
            saved["attributes"]["squeezes"],
            saved["attributes"]["settings"],
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Squeeze if the schedule says so."""
        del args
        rule = self.schedule.rule_after(state.global_step)
        if rule is None:
            return control
        done = squeeze_model(
            kwargs["model"], rule=rule, optimizer=kwargs["optimizer"], alpha=self.alpha
        )
        self._note(done, state.global_step)
        if self.log is not None:
            self.log(dict(done.metrics()))
        else:
            self._pending, control.should_log = done.metrics(), True
        return control

    def _note(self, done: SqueezedModel, step: int) -> None:
        self.settings = {name: [rank, done.alphas[name]] for name, rank in done.ranks.items()}
        self.squeezes.append(
            {
                "step": step,
                "ranks": dict(done.ranks),
                "relative_error": done.relative_error,
                "parameters": done.parameters,
                "optimizer": done.optimizer,
                "options": dict(done.record),
            }
        )

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

    def write_provenance(self, folder: str | os.PathLike[str]) -> None:
        """Write beside a saved adapter how it was squeezed; nothing if it was not, or is not there.

        Args:
            folder: what `save_pretrained` or `Trainer.save_model` wrote.
        """
        place = Path(folder)
        files = [place / name for name in _WEIGHTS if (place / name).is_file()]
        if not files or not self.squeezes:
            return
        options = {**self.state()["args"], "squeezes": self.squeezes}
        text = statement(operation_record("squeeze-model", {}, options), files)
        scratch = place / f".{PROVENANCE_FILE}"
        scratch.write_bytes(text)
        scratch.replace(place / PROVENANCE_FILE)
