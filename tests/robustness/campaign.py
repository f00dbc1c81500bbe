"""Campaigns against every command that writes: system calls that fail, and signals.

    python tests/robustness/campaign.py faults [--only squeeze] [--every 1]
    python tests/robustness/campaign.py signals [--only squeeze] [--count 200]
    python tests/robustness/campaign.py changes [--only squeeze] [--count 60]
    python tests/robustness/campaign.py writers [--only squeeze] [--count 40]

`faults` makes each system call on a file of the command fail in turn, with ENOSPC, EIO, EINTR, or
short, onto a new output and over an old one; `faults.c` is preloaded for it, which needs Linux and
a C compiler. `signals` sends SIGKILL, SIGTERM, SIGINT and SIGHUP at random moments. `changes`
truncates, extends or replaces an input at a random moment: a command that ends well has made what
it makes of the inputs as they were, or as they are. `writers` runs a command twice at once, onto
one output. What `push` publishes is looked at on the Hub of `tests/hub/hub_server.py`. `--only` is
a part of a command's name; `--every 1` and `--count 200` are the whole campaigns, and take hours.

After each case: the output is absent, the old or the new one, whole; inputs are bit for bit as they
were; nothing else is left, and after SIGKILL the next run removes what is; an error is one line of
ours with exit code 2. Exit code 1 if a case is otherwise; what it was is printed.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).parent
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EINTR": errno.EINTR, "short": 0}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
CLOCK_SECONDS = 600
"""When a command counts as hanging; on a busy machine one needs minutes."""

Tree = dict[str, bytes | None]


def library() -> Path:
    """Compile the calls that fail, and return the library."""
    target = Path(tempfile.mkdtemp(prefix="faults-")) / "faults.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", target, HERE / "faults.c", "-ldl"]
    subprocess.run(command, check=True)
    return target


def tree(folder: Path) -> Tree:
    """Return the bytes of all files in a folder, and None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative, of a signal) and what it printed."""

    code: int
    text: str
    calls: int = 0
    name: str = ""


class Command:
    """One command with its old and its new output, in a folder of its own.

    `done` has the exit codes after which the new output is there.
    """

    done = (0, 1)

    def __init__(self, name: str, words: str, root: Path, *, overwrite: bool) -> None:
        import campaign_commands as table

        self.name, self.root, self.out = name, root, root / "out"
        self.in_parts = table.IN_PARTS.get(name, 0)
        self._words, self._overwrite = words, overwrite
        self._old: Path | None = None
        self.given = tree(root / "in")
        if overwrite:
            self.clear()
            self._checked(1)
            self.keep()
        self.before = self.state() if overwrite else {}
        self.after = self.made(2)
        assert self.after != self.before, name

    def words(self, n: int) -> list[str]:
        """Return the command line that makes the old output, 1, or the new one, 2."""
        return [*self._words.format(n=n).split(), "-q", *["--overwrite"] * self._overwrite]

    def state(self) -> Tree:
        """Return what the output is now."""
        return tree(self.out)

    def keep(self) -> None:
        """Take the output for the old one."""
        self._old = self.root.parent / f"{self.root.name}-old"
        shutil.copytree(self.out, self._old, symlinks=True)

    def clear(self) -> None:
        """Leave an empty output folder."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        shutil.rmtree(self.root / "tmp", ignore_errors=True)
        (self.root / "tmp").mkdir()

    def restore(self) -> None:
        """Leave the old output, or none."""
        self.clear()
        if self._old is not None:
            shutil.rmtree(self.out)
            shutil.copytree(self._old, self.out, symlinks=True)

    def made(self, n: int) -> Tree:
        """Return the output of one or the other run; what is there goes."""
        self.restore()
        self._checked(n)
        return self.state()

    def _checked(self, n: int) -> None:
        ended = forked(self.words(n))
        assert ended.code in (0, 1), f"{self.name}: {ended}"

    def problems(
        self, ended: Ended, *, left: bool = False, now: Tree | None = None
    ) -> Iterator[str]:
        """Yield what is wrong after a case.

        Args:
            ended: how it ended.
            left: whether temporaries may be left.
            now: the output that it left; None to look.
        """
        now = self.state() if now is None else now
        if left:
            now = {path: data for path, data in now.items() if ".loratools-" not in path}
        done = ended.code in self.done
        if not (now == self.after if done else self._is_whole(now)):
            yield f"the output is partial: {describe(now, self.before, self.after)}"
        if tree(self.root / "in") != self.given:
            yield "an input changed"
        others = sorted(set(os.listdir(self.root)) - {"in", "out", "tmp"})
        if others or (not left and os.listdir(self.root / "tmp")):
            yield f"something is left: {others} {os.listdir(self.root / 'tmp')}"
        lines = ended.text.splitlines()
        if "Traceback" in ended.text or "--traceback" in ended.text:
            yield "an exception that is not ours"
        elif ended.code == 2 and sum(line.startswith("error: ") for line in lines) != 1:
            yield "not one line of error"
        elif ended.code not in (0, 1, 2, 3) and ended.code not in _OF_SIGNALS:
            yield f"exit code {ended.code}"

    def _is_whole(self, now: Tree) -> bool:
        if not self.in_parts:
            return now in (self.before, self.after)
        # Each file and folder of results by itself, and what `run` keeps about them.
        paths = [Path(path).parts for path in now]
        parts = {path[: self.in_parts] for path in paths if len(path) >= self.in_parts}
        return all(
            part[-1].startswith(".")
            or any(_part(now, part) == _part(of, part) for of in (self.before, self.after))
            for part in parts
        )


_OF_SIGNALS = {128 + number for number in SIGNALS} | {-number for number in SIGNALS}


def _part(of: Tree, part: tuple[str, ...]) -> Tree:
    whole = len(part)
    return {path: data for path, data in of.items() if Path(path).parts[:whole] == part}


def describe(now: Tree, before: Tree, after: Tree) -> str:
    """Return which files differ from the old and from the new output."""
    names = sorted({*now, *before, *after})
    told = [
        f"{name}: {'old' if now.get(name, 0) == before.get(name, 0) else ''}"
        f"{'new' if now.get(name, 0) == after.get(name, 0) else ''}"
        for name in names
    ]
    return ", ".join(text if text[-2:] != ": " else text + "neither" for text in told)[:600]


def forked(words: list[str], fault: tuple[Path, int, int] | None = None) -> Ended:
    """Run a command in a fork of this process and wait for it.

    Args:
        words: the command line.
        fault: the folder whose files count, the number of the call that fails, and the error.
    """
    ended = _ended(*started(words, fault))
    if "\0" not in ended.text:
        return ended
    text, _, told = ended.text.rpartition("\0")
    calls, _, name = told.partition(" ")
    return Ended(ended.code, text, int(calls), name)


def started(words: list[str], fault: tuple[Path, int, int] | None = None) -> tuple[int, IO[bytes]]:
    """Start a command in a fork; returns its process and the file that it prints to.

    Signals wait until the command begins: what Python does after a fork is not under test.
    """
    printed = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    held = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        return pid, printed
    code = 99
    try:
        signal.alarm(CLOCK_SECONDS)
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
        code = _run(words, fault)
    except KeyboardInterrupt:
        code = 130  # before the command began: Python itself ends so
    finally:
        os._exit(code)


def _run(words: list[str], fault: tuple[Path, int, int] | None) -> int:
    from loratools.cli import main

    sys.argv = ["loratools", *words]
    calls = None
    if fault is not None:
        calls = ctypes.CDLL(os.environ["LD_PRELOAD"])
        calls.fault_name.restype = ctypes.c_char_p
        calls.fault_count.restype = ctypes.c_long
        calls.fault_arm(os.fsencode(fault[0]), ctypes.c_long(fault[1]), fault[2])
    code = 99
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    sys.stdout.flush()
    sys.stderr.flush()
    if calls is not None:
        name = calls.fault_name().decode()
        os.write(2, f"\0{calls.fault_count()} {name}".encode())
    return code


def faults(command: Command, every: int) -> Iterator[tuple[str, str]]:
    """Yield (kind of fault, problem or nothing) for each call and error."""
    for index, (kind, error) in enumerate(ERRORS.items()):
        place = index * every // len(ERRORS)
        while True:
            command.restore()
            ended = forked(command.words(2), (command.root, place, error))
            if not ended.name:
                break  # there was no such call any more
            found = "; ".join(command.problems(ended))
            yield kind, f"call {place}, {ended.name}: {found}\n  {ended.text}" if found else ""
            place += every


def signals(command: Command, count: int, draw: random.Random) -> Iterator[tuple[str, str]]:
    """Yield (signal, problem or nothing) for signals at random moments of the command."""
    from loratools_formats.disk.temporaries import temporary_beside

    duration = _duration(command)
    for index in range(count):
        command.restore()
        number = SIGNALS[index % len(SIGNALS)]
        pid, printed = started(command.words(2))
        time.sleep(draw.uniform(0, duration))
        os.kill(pid, number)
        ended = _ended(pid, printed)
        killed = ended.code == -signal.SIGKILL
        if killed:  # what the next run in the folder does first, whatever it makes
            temporary_beside(command.out / "another")
        found = list(command.problems(ended, left=killed))
        if killed and not found:
            # What a killed run leaves, the next one removes, and makes the whole output.
            after = forked(command.words(2))
            found = [] if after.code == 2 else list(command.problems(after))
        told = "; ".join(found)
        yield number.name, f"{ended.code}: {told}\n  {ended.text}" if told else ""


def changes(command: Command, count: int, draw: random.Random) -> Iterator[tuple[str, str]]:
    """Yield (change, problem or nothing) for inputs that change at random moments."""
    duration = _duration(command)
    given = command.root / "in"
    # Those that the command is given, and not what others are.
    words = [given.parent / word.partition(":")[0] for word in command.words(2) if "in/" in word]
    files = sorted(
        path for word in words for path in ([word] if word.is_file() else word.iterdir())
    )
    for index in range(count):
        command.restore()
        kind = ("truncated", "extended", "replaced")[index % 3]
        path = draw.choice(files)
        sound, times = path.read_bytes(), path.stat()
        pid, printed = started(command.words(2))
        time.sleep(draw.uniform(0, duration))
        if kind == "truncated":
            os.truncate(path, draw.randrange(len(sound)))
        elif kind == "extended":
            with path.open("ab") as file:
                file.write(b" " * 64)
        else:
            other = path.with_name("other")
            other.write_bytes(bytes(reversed(sound)))
            other.replace(path)
        ended = _ended(pid, printed)
        now, as_changed = command.state(), None
        if ended.code in (0, 1) and now != command.after:
            # It began after the change: the output is that of the input as it is now.
            command.restore()
            forked(command.words(2))
            as_changed = command.state()
        path.write_bytes(sound)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        found = "; ".join(command.problems(ended, now=now)) if now != as_changed else ""
        yield kind, f"{path.name}, {ended.code}: {found}\n  {ended.text}" if found else ""


def writers(command: Command, count: int, draw: random.Random) -> Iterator[tuple[str, str]]:
    """Yield (who won, problem or nothing) for the old and the new output written at once."""
    duration = _duration(command)
    for _ in range(count):
        command.restore()
        running = []
        for n in (1, 2):
            running.append(started(command.words(n)))
            time.sleep(draw.uniform(0, duration / 2))
        ended = [_ended(*one) for one in running]
        now = command.state()
        first = command.before or command.made(1)
        found = [
            problem
            for one in ended
            for problem in command.problems(Ended(2 if one.code else 0, one.text))
            if "partial" not in problem
        ]
        allowed = [of for of, one in ((first, ended[0]), (command.after, ended[1])) if not one.code]
        if now not in allowed and not (command.in_parts and all(not one.code for one in ended)):
            found.append(f"neither: {describe(now, first, command.after)}")
        told = "; ".join(found)
        text = " | ".join(one.text for one in ended)
        yield f"{sum(not one.code for one in ended)} done", f"{told}\n  {text}" if told else ""


def _duration(command: Command) -> float:
    command.restore()
    begun = time.monotonic()
    forked(command.words(2))
    return time.monotonic() - begun


def _ended(pid: int, printed: IO[bytes]) -> Ended:
    _, status = os.waitpid(pid, 0)
    printed.seek(0)
    text = printed.read().decode("utf-8", "replace")
    printed.close()
    return Ended(os.waitstatus_to_exitcode(status), text)


CAMPAIGNS = {"signals": signals, "changes": changes, "writers": writers}


def main() -> int:
    """Run a campaign and print its figures."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("what", choices=["faults", *CAMPAIGNS])
    options.add_argument("--only", default="")
    options.add_argument("--every", type=int, default=1, help="only each n-th call fails")
    options.add_argument("--count", type=int, default=200, help="cases for each command")
    given = options.parse_args()
    if given.what == "faults" and "LD_PRELOAD" not in os.environ:
        environment = os.environ | {"LD_PRELOAD": str(library())}
        return subprocess.run([sys.executable, __file__, *sys.argv[1:]], env=environment).returncode
    sys.path.insert(0, os.fspath(HERE))
    import campaign_commands as table
    import campaign_hub

    folder = Path(tempfile.mkdtemp(prefix="campaign-", dir=_memory())).resolve()
    root, bad = folder / "work", 0
    tempfile.tempdir = os.fspath(folder)
    try:
        table.make_inputs(root, os.chdir)
        (root / "tmp").mkdir()
        with campaign_hub.running(folder) as hub:
            for name, words in table.COMMANDS.items():
                if given.only not in name:
                    continue
                for overwrite in (False, True) if name not in table.NEVER_REPLACES else (False,):
                    bad += _campaign(name, words, root, given, hub, overwrite=overwrite)
    finally:
        os.chdir("/")
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if bad else 0


def _campaign(
    name: str, words: str, root: Path, given: argparse.Namespace, hub: Any, *, overwrite: bool
) -> int:
    import campaign_hub

    tempfile.tempdir = os.fspath(root / "tmp")
    # Forks find every module imported and no thread running.
    (root / "out").mkdir(exist_ok=True)
    kind = Command
    if words.startswith("push "):
        kind = type("Publishing", (campaign_hub.OnTheHub, Command), {"hub": hub})
    command = kind(name, words, root, overwrite=overwrite)
    work = (
        faults(command, given.every)
        if given.what == "faults"
        else CAMPAIGNS[given.what](command, given.count, random.Random(f"{name} {overwrite}"))
    )
    done: Counter[str] = Counter()
    bad = 0
    for kind, problem in work:
        done[kind] += 1
        if problem:
            bad += 1
            print(f"!! {name}{' over an old output' * overwrite}, {kind}, {problem}", flush=True)
    told = ", ".join(f"{count} {kind}" for kind, count in done.items())
    onto = "over an old output" if overwrite else "new"
    print(f"{name}, {onto}: {sum(done.values())} cases ({told}), {bad} bad", flush=True)
    shutil.rmtree(root.parent / f"{root.name}-old", ignore_errors=True)
    return bad


def _memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


if __name__ == "__main__":
    sys.exit(main())
