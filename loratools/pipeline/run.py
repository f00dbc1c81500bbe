"""`run`: a recipe's steps, one after another, resumed where it was stopped."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from loratools.face.declare import public
from loratools.face.ran import Asked
from loratools.face.result import Result
from loratools.operations.reported import written_nbytes
from loratools.pipeline.functions import step_functions
from loratools.pipeline.recipe import Recipe, load_recipe
from loratools.pipeline.state import (
    STATE_FOLDER,
    StepState,
    content_key,
    digests,
    is_done,
    read_state,
    restore_state,
    write_state,
)
from loratools.pipeline.steps import Step, StepInput
from loratools.work.declared import option
from loratools.work.parallel import Workers
from loratools.work.requests import Progress
from loratools.work.spellings import key_value
from loratools_formats.contract.files import check_target
from loratools_formats.core.file_names import WRITTEN_ENDINGS
from loratools_formats.disk.errors import LoratoolsError, OptionError, OutputExistsError

State = Literal["made", "up to date", "passed", "failed", "planned", "not chosen", "not reached"]


@dataclass(frozen=True)
class Running:
    """How a recipe is run.

    Attributes:
        output: folder of results; by default one beside the recipe, with its name.
        only: run only this step; the results that it reads must exist.
        set_: a variable of the recipe and its value.
        dry_run: check, compute and report sizes, but write nothing.
        overwrite: replace results that no run of the recipe has made.
    """

    output: Path | None = option(None, heading="Output", short="-o")
    only: str | None = option(None, heading="Selection", metavar="STEP")
    set_: tuple[tuple[str, Any], ...] = option(
        (), heading="Input", metavar="NAME=VALUE", parse=key_value
    )
    dry_run: bool = option(False, heading="Output")
    overwrite: bool = option(False, heading="Output")


@dataclass(frozen=True)
class RanStep:
    """What became of a step.

    Attributes:
        name: its name.
        operation: what it does.
        state: whether it ran, and how it ended.
        output: its result; None if it makes none.
        bytes: size of the result's weights; None if it is not known yet.
        relative_error: ‖ΔW − ΔW'‖/‖ΔW‖ of what was made; None if it has none or did not run.
    """

    name: str
    operation: str
    state: State
    output: Path | None
    bytes: int | None
    relative_error: float | None


@dataclass(frozen=True, kw_only=True, repr=False)
class RunResult(Result):
    """What became of a recipe.

    Attributes:
        recipe: its file.
        folder: of the results.
        dry_run: whether nothing was written.
        passed: whether no check found anything.
        steps: every step, in order.
    """

    operation: ClassVar[str] = "run"

    recipe: Path
    folder: Path
    dry_run: bool
    passed: bool
    steps: tuple[RanStep, ...]

    def destination(self, asked: Asked) -> tuple[str | None, bool]:
        """Return the folder of the results, and whether steps wrote into it."""
        return str(self.folder), not asked.dry_run


@public()
def run(
    recipe: str | os.PathLike[str],
    *,
    options: Running,
    threads: Workers,
    progress: Progress | None = None,
) -> RunResult:
    r"""Run a recipe: operations one after another, resumed where a run stopped.

    The whole recipe is checked before the first step. A step is skipped if its options, what it
    reads and the version are those of an earlier run, and its result is still there.

    >>> import pathlib, tempfile
    >>> import loratools as lt
    >>> text = "version: 1\nsteps: [{name: small, do: squeeze, source: LORA, rank: 4}]"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     recipe = pathlib.Path(folder, "recipe.yaml")
    ...     lora = pathlib.Path("examples/tiny-llama/lora").absolute()
    ...     _ = recipe.write_text(text.replace("LORA", str(lora)))
    ...     [lt.run(recipe).steps[0].state for _ in range(2)]
    ['made', 'up to date']

    Args:
        recipe: its file.
        progress: called with (steps done, steps in all).

    Raises:
        OptionError: something in the recipe is not known or wrong; names the line and the key.
        AdapterError: the recipe is no plain YAML, or an operation met a malformed input.
        OutputExistsError: a result exists that no run of the recipe has made.
        LoratoolsError: as the operations raise.
    """
    path = Path(recipe)
    read = load_recipe(path, dict(options.set_))
    folder = options.output or path.with_suffix("")
    names = [step.name for step in read.steps]
    if options.only is not None and options.only not in names:
        raise OptionError(
            "the recipe has no such step", got=options.only, expected=", ".join(names)
        )
    if folder == path:
        raise OptionError("the recipe has no suffix", path=path, hint="Pass `output=FOLDER`")
    check_target(folder, [], overwrite=True)
    if os.path.lexists(folder) and not folder.is_dir():
        raise OutputExistsError("exists and is not a folder", path=folder)
    work = _Run(read, folder, options, threads.workers)
    work.check_outputs()
    work.fetch_inputs()
    steps: list[RanStep] = []
    with contextlib.nullcontext() if options.dry_run else _folder_of_results(folder):
        for step in read.steps:
            failed = any(one.state == "failed" for one in steps)
            steps.append(work.unreached(step) if failed else work.step(step))
            if progress is not None:
                progress(len(steps), len(read.steps))
    return RunResult(
        recipe=path,
        folder=folder,
        dry_run=options.dry_run,
        passed=all(one.state != "failed" for one in steps),
        steps=tuple(steps),
    )


@contextlib.contextmanager
def _folder_of_results(folder: Path) -> Iterator[None]:
    """Make the folder, unless it is there; remove it again if it stays empty."""
    is_new = not os.path.lexists(folder)
    folder.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):
                (folder / STATE_FOLDER).rmdir()
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


class _Run:
    """One run: where results are, and what was made in memory on a dry one."""

    def __init__(self, recipe: Recipe, folder: Path, options: Running, workers: int) -> None:
        self._recipe, self._folder = recipe, folder
        self._only, self._dry = options.only, options.dry_run
        self._overwrite, self._workers = options.overwrite, workers
        self._outputs = {step.name: step.output for step in recipe.steps}
        self._fresh: set[str] = set()
        self._places: dict[tuple[str, str], Path] = {}
        self._in_memory: dict[str, Any] = {}

    def check_outputs(self) -> None:
        """Refuse, before any step, results that exist and that no run has made.

        Raises:
            OutputExistsError: there is one, and `overwrite` is false.
        """
        for step in self._recipe.steps:
            output = self._output(step)
            is_chosen = self._only in (None, step.name)
            if output is None or not os.path.lexists(output) or self._overwrite or not is_chosen:
                continue
            if read_state(self._folder, step.name) is None:
                raise OutputExistsError(
                    f"the result of step {step.name} exists, and no run of a recipe made it",
                    path=output,
                    hint="Move it away, or pass `overwrite=True`",
                )

    def fetch_inputs(self) -> None:
        """Bring here, before any step, what the chosen steps read from the Hub.

        Raises:
            LoratoolsError: a reference cannot be resolved.
        """
        for step in self._recipe.steps:
            for one in step.inputs:
                if one.step is None and self._only in (None, step.name):
                    with _named(step):
                        self._path(one)

    def unreached(self, step: Step) -> RanStep:
        """Return what becomes of a step after a check that failed."""
        return RanStep(step.name, step.operation, "not reached", self._output(step), None, None)

    def step(self, step: Step) -> RanStep:
        """Run a step, unless it is done or not chosen."""
        output = self._output(step)
        key = self._key(step)
        state = read_state(self._folder, step.name)
        done = key is not None and step.operation != "push" and is_done(state, key, output)
        if done:
            self._fresh.add(step.name)
            size = None if output is None else _size(output)
            return RanStep(step.name, step.operation, "up to date", output, size, None)
        if self._only not in (None, step.name):
            return RanStep(step.name, step.operation, "not chosen", output, None, None)
        for one in step.inputs:
            if self._only is not None and one.step is not None and one.step not in self._fresh:
                raise OptionError(
                    f"step {step.name} reads the result of {one.step}, which is not up to date",
                    path=self._recipe.path,
                    hint=f"Run that first with `only={one.step}`, or the whole recipe",
                )
        return self._planned(step, output) if self._dry else self._made(step, output, key)

    def _made(self, step: Step, output: Path | None, key: str | None) -> RanStep:
        assert key is not None
        before, there = read_state(self._folder, step.name), _identity(output)
        write_state(self._folder, step.name, StepState(key, None))
        try:
            result = self._call(step, output)
        except BaseException:
            if _identity(output) == there:  # nothing of ours: a user's file stays a user's
                restore_state(self._folder, step.name, before)
            raise
        if result.to_dict().get("passed") is False:
            return RanStep(step.name, step.operation, "failed", None, None, None)
        files = {} if output is None else digests(output)
        write_state(self._folder, step.name, StepState(key, files))
        self._fresh.add(step.name)
        size = None if output is None else _size(output)
        error = getattr(result, "relative_error", None)
        return RanStep(
            step.name, step.operation, "passed" if output is None else "made", output, size, error
        )

    def _planned(self, step: Step, output: Path | None) -> RanStep:
        """Compute what a step would make, as far as what it reads is known."""
        unknown = any(one.step not in (None, *self._fresh, *self._in_memory) for one in step.inputs)
        if output is None or unknown:
            return RanStep(step.name, step.operation, "planned", output, None, None)
        result = self._call(step, None)
        adapter = getattr(result, "adapter", None)
        if adapter is not None:
            self._in_memory[step.name] = adapter
        size = getattr(result, "bytes_out", None)
        if size is None and adapter is not None:
            size = written_nbytes(adapter)
        error = getattr(result, "relative_error", None)
        return RanStep(step.name, step.operation, "planned", output, size, error)

    def _call(self, step: Step, output: Path | None) -> Any:
        function, declaration = step_functions()[step.operation.replace("-", "_")]
        arguments: dict[str, Any] = dict(step.plain)
        for one in step.inputs:
            value = self._given(one)
            if not one.is_list:
                arguments[one.parameter] = value
            else:
                item = value if one.weight is None else (value, one.weight)
                arguments.setdefault(one.parameter, []).append(item)
        options = dict(step.options)
        if "workers" in declaration.options:
            options["workers"] = self._workers
        if output is not None:
            options |= {"output": output, "overwrite": True}
        with _named(step):
            return function(**arguments, **options)

    def _given(self, one: StepInput) -> Any:
        if one.step is None:
            return self._path(one)
        if one.step in self._in_memory:
            return self._in_memory[one.step]
        return self._folder / str(self._outputs[one.step])

    def _key(self, step: Step) -> str | None:
        """Return the key of a step's content; None if it reads what is not made yet."""
        read = []
        for one in step.inputs:
            if one.step is not None and one.step not in self._fresh:
                return None
            path = Path(self._given(one)) if one.step is not None else self._path(one)
            read.append([one.parameter, one.weight, one.step, digests(path)])
        read += [["", None, None, found] for found in self._in_recipes(step)]
        values: Mapping[str, Any] = {
            "options": step.values,
            "plain": step.plain,
            "reads": read,
            "output": step.output,
        }
        return content_key(step.operation, values)

    def _path(self, one: StepInput) -> Path:
        """Return where a path of the recipe is, or what a reference to the Hub became."""
        key = (one.text, one.want)
        if key not in self._places:
            here = self._recipe.path.parent / one.text
            found = None
            if not here.exists():
                from loratools.hub.resolve import located

                want: Any = one.want
                found = located(one.text, want, beside="all" if want == "adapter" else "nothing")
            self._places[key] = found or here
        return self._places[key]

    def _in_recipes(self, step: Step) -> Iterator[dict[str, str]]:
        """Yield the digests of what a recipe of merge names, where a step merges by one."""
        if not step.merges_by_recipe:
            return
        from loratools.operations.merge.recipe import load_recipe as load_merge
        from loratools.operations.merge.recipe import with_local_paths

        for one in step.inputs:
            if one.parameter == "adapters" and not one.is_list:
                path = self._path(one)
                plan = with_local_paths(load_merge(path), path.parent)
                paths = [item.path for item in plan.adapters]
                for path in [*paths, *([] if plan.base is None else [plan.base])]:
                    yield digests(Path(path))

    def _output(self, step: Step) -> Path | None:
        return None if step.output is None else self._folder / step.output


@contextlib.contextmanager
def _named(step: Step) -> Iterator[None]:
    """Name the step in errors."""
    try:
        yield
    except LoratoolsError as error:
        error.message = f"step {step.name}: {error.message}"
        raise


def _identity(output: Path | None) -> tuple[int, ...] | None:
    """Return the identity of a result, which changes if it is replaced; None if none is there."""
    try:
        found = None if output is None else os.lstat(output)
    except OSError:
        return None
    return None if found is None else (found.st_dev, found.st_ino, found.st_mtime_ns)


def _size(output: Path) -> int:
    """Return the size of a result's weight files."""
    if not output.is_dir():
        return output.stat().st_size
    files = [path for path in output.rglob("*") if path.suffix in WRITTEN_ENDINGS]
    return sum(path.stat().st_size for path in files if STATE_FOLDER not in path.parts)
