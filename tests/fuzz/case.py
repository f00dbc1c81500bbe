"""One mutated input, given to loratools in a child process with bounded memory and time.

It must be done, or be refused by an error of ours. What the `safetensors` and `gguf` packages
refuse must not be read: we may be stricter, never looser.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from seeds import Seed

import loratools
from loratools_formats.disk.errors import LoratoolsError

CPU_SECONDS, CLOCK_SECONDS = 20, 180
MEMORY_BYTES = 1 << 30


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Attributes:
        kind: done, refused, or what must not happen: an error, hang, memory or looser.
        text: the error's text.
        place: for an error, the last line of ours that it passed.
    """

    kind: str
    text: str = ""
    place: str = ""

    @property
    def is_fault(self) -> bool:
        return self.kind not in ("done", "refused")


def tried(seed: Seed, room: Path) -> Outcome:
    """Return what becomes of an input.

    Args:
        seed: whose file was changed.
        room: an empty folder for outputs.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            outcome = _bounded(seed, room)
            os.write(writer, json.dumps(outcome).encode("utf-8", "backslashreplace"))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    shutil.rmtree(room, ignore_errors=True)
    if told:
        return Outcome(*json.loads(told))
    if os.WIFSIGNALED(status):
        return Outcome("hang", signal.Signals(os.WTERMSIG(status)).name)
    return Outcome("died", f"status {status}")


def truncated(seed: Seed, lengths: list[int]) -> list[tuple[Outcome, int]]:
    """Return what becomes of prefixes of a seed's file that are only read, all in one child.

    A prefix may be read only if it lacks nothing that counts, as JSON without its last newline.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
            with os.fdopen(writer, "w") as pipe:
                _read_prefixes(seed, lengths, pipe)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        found = [json.loads(line) for line in pipe]
    _, status = os.waitpid(child, 0)
    told = [(Outcome(*words), length) for length, words in found]
    if len(told) < len(lengths):
        told.append((Outcome("died", f"status {status}"), lengths[len(told)]))
    return told


def _read_prefixes(seed: Seed, lengths: list[int], pipe: IO[str]) -> None:
    data = seed.mutated.read_bytes()
    room = Path(tempfile.mkdtemp())
    try:
        for length in lengths:
            seed.mutated.write_bytes(data[:length])
            words = ("done", "", "")
            signal.alarm(CLOCK_SECONDS)
            try:
                if seed.role == "adapter":
                    loratools.read(seed.path, format=seed.given)
                elif seed.role == "base":
                    loratools.info_base(seed.path)
                else:
                    use(seed, room)
                looser = others_refuse(seed.mutated)
                words = ("looser", looser, "") if looser else words
            except LoratoolsError as error:
                words = ("refused", str(error)[:300], "")
            except Exception as error:  # noqa: BLE001 - that is what is looked for
                words = ("error", f"{type(error).__name__}: {error}"[:300], place_of(error))
            print(json.dumps([length, words]), file=pipe)
    finally:
        seed.mutated.write_bytes(data)
        shutil.rmtree(room)


def warmed(seed: Seed, room: Path) -> None:
    """Use a sound input here, so that children find every module imported."""
    room.mkdir()
    with contextlib.suppress(LoratoolsError):
        use(seed, room)
    shutil.rmtree(room)


def _bounded(seed: Seed, room: Path) -> tuple[str, str, str]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(CLOCK_SECONDS)
    room.mkdir()
    try:
        use(seed, room)
    except LoratoolsError as error:
        return "refused", str(error)[:300], ""
    except BaseException as error:  # noqa: BLE001 - that is what is looked for
        text = f"{type(error).__name__}: {error}"[:300]
        return "error", text, place_of(error)
    looser = others_refuse(seed.mutated)
    return ("looser", looser, "") if looser else ("done", "", "")


def use(seed: Seed, room: Path) -> None:
    """Give an input to the commands that take it, as its role says; outputs go to a folder."""
    role, path = seed.role, seed.path
    if role == "names":
        from loratools.naming.tables import find_table

        find_table(os.fspath(path)).locate("input_blocks.1.1.q", flat=False, schemes=("original",))
    elif role == "recipe":
        _merged(path)
    elif role == "base":
        two = next(p / "two" for p in path.parents if (p / "two").is_dir())
        with contextlib.suppress(LoratoolsError):
            loratools.info_base(path).to_dict()
        fused = room / (path.name if path.suffix else "fused")
        loratools.fuse(path, two, output=fused, allow_lossy=True)
    elif role == "steps":
        loratools.run(path, dry_run=True, output=room / "steps")
    elif role == "statement":
        loratools.provenance(path)
        loratools.replay(path, output=room / "again")
    elif role == "baseline":
        loratools.check(path.parent / "one", baseline=path)
    elif role == "set":
        _taken_apart(path, room)
    elif role == "shelf":
        shared = room / "shared.safetensors"
        adapters = sorted(path.iterdir())
        loratools.fleet_share(adapters, rank=1, allow_missing=True, workers=1, output=shared)
        loratools.fleet_unshare(shared, all=True, workers=1, output=room / "out")
    else:
        loratools.info(path, format=seed.given).to_dict()
        how = {"format": seed.given, "workers": 1}
        for command in (
            lambda: loratools.check(path, format=seed.given, workers=1),
            lambda: loratools.squeeze(path, rank=1, output=room / path.name, **how),
            lambda: loratools.merge([path, path], output=room / "merged.safetensors", **how),
        ):
            with contextlib.suppress(LoratoolsError):
                command()


def _merged(path: Path) -> None:
    from loratools.operations.merge.recipe import load_recipe

    recipe = load_recipe(path)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"):
        recipe.options.rule.override(name)


def _taken_apart(path: Path, room: Path) -> None:
    """Take the adapters out of a shared set, and add one; what is written must be sound."""
    loratools.info(path).to_dict()
    more = room / "more.safetensors"
    with contextlib.suppress(LoratoolsError):
        loratools.fleet_add(path, path.parent / "two", name="more", workers=1, output=more)
    if more.exists():
        loratools.fleet_unshare(more, name="more", workers=1)
    loratools.fleet_unshare(path, all=True, workers=1, output=room / "out")
    for one in sorted((room / "out").iterdir()):
        _sound(one)


def _sound(path: Path) -> None:
    """Use what was written; keys that are not known are those that the set's members had."""
    try:
        keys = [f.where for f in loratools.read(path).findings if f.code == "unknown-config-key"]
        loratools.squeeze(path, rank=1, workers=1, ignore_key=[key for key in keys if key])
    except LoratoolsError as error:
        raise AssertionError(f"what was written is refused: {error}") from error


def others_refuse(path: Path) -> str:
    """Return why the package of a container's authors cannot open a file, nothing if it can."""
    if path.suffix == ".safetensors":
        import safetensors

        try:
            with safetensors.safe_open(path, "numpy") as file:
                list(file.keys())
        except Exception as error:  # noqa: BLE001 - whatever it is
            return f"safetensors: {error}"
    if path.suffix == ".gguf":
        import gguf

        try:
            gguf.GGUFReader(path)
        except Exception as error:  # noqa: BLE001 - whatever it is
            return f"gguf: {error!r}"
    return ""


def place_of(error: BaseException) -> str:
    """Return the last line of ours that an exception passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/loratools" in f.filename and "/tests/" not in f.filename]
    last = (ours or frames)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"
