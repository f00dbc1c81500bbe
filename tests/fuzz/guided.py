"""Coverage-guided fuzzing of the readers, where atheris is installed; `make fuzz` runs it.

    python tests/fuzz/guided.py --minutes 10 [--only gguf]

libFuzzer keeps inputs that reach new lines of loratools, and mutates them further, by itself and by
`mutate.py`. A process for each format; it reads, describes and checks each input in the process
itself, so that a case takes milliseconds. What is no error of ours is kept in `found/`, as `run.py`
does. Formats that are read in a child of their own, which tells no coverage, are left to `run.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, os.fspath(Path(__file__).parent))

IN_CHILDREN = {"nemo", "state dicts"}
SECONDS_FOR_A_CASE, MEGABYTES = 60, 2048


def fuzz(format_name: str, seconds: int) -> None:
    """Fuzz one format; libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["loratools", "loratools_formats"]):
        import loratools
        from loratools_formats.disk.errors import LoratoolsError
    from case import Outcome, others_refuse, place_of, use
    from mutate import mutated
    from run import keep
    from seeds import make

    root = Path(tempfile.mkdtemp(prefix="guided-"))
    seeds = [seed for seed in make(root) if seed.format == format_name]
    room, faults, cases = root / "room", set(), 0
    corpus = root / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        # The first byte says whose file it is.
        (corpus / f"{number}").write_bytes(bytes([number]) + seed.mutated.read_bytes())

    def one(data: bytes) -> None:
        nonlocal cases
        cases += 1
        seed = seeds[data[0] % len(seeds)] if data else seeds[0]
        sound = seed.mutated.read_bytes()
        seed.mutated.write_bytes(data[1:])
        room.mkdir()
        outcome = None
        try:
            with contextlib.suppress(LoratoolsError):
                if seed.role == "adapter":
                    loratools.info(seed.path, format=seed.given).to_dict()
                    loratools.check(seed.path, format=seed.given, workers=1)
                else:
                    use(seed, room)
                looser = others_refuse(seed.mutated)
                outcome = Outcome("looser", looser) if looser else None
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            outcome = Outcome("error", f"{type(error).__name__}: {error}"[:300], place_of(error))
        finally:
            shutil.rmtree(room, ignore_errors=True)
            seed.mutated.write_bytes(sound)
        if outcome is not None and (outcome.kind, outcome.place) not in faults:
            faults.add((outcome.kind, outcome.place))
            keep(seed, data[1:], outcome)
            print(f"{seed.name}: {outcome}", file=sys.stderr, flush=True)

    def mutate(data: bytes, most: int, number: int) -> bytes:
        if number % 2 or not data:
            changed: bytes = atheris.Mutate(data, most)
            return changed
        seed = seeds[data[0] % len(seeds)]
        name = f"{seed.name}{'' if seed.mutated.suffix in seed.name else seed.mutated.suffix}"
        return (data[:1] + mutated(data[1:], name, number))[:most]

    flags = [
        f"-max_total_time={seconds}", f"-timeout={SECONDS_FOR_A_CASE}",
        f"-rss_limit_mb={MEGABYTES}", "-print_final_stats=1", "-verbosity=0",
        f"-artifact_prefix={root}/", "-max_len=100000", os.fspath(corpus),
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *flags], one, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> int:
    """Fuzz each format in a process of its own for its share of the time, and print figures."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--minutes", type=float, default=10)
    options.add_argument("--only", default="")
    options.add_argument("--here", action="store_true", help="fuzz in this process; for itself")
    given = options.parse_args()
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed here: no coverage-guided fuzzing")
        return 0
    if given.here:
        fuzz(given.only, int(60 * given.minutes))
        return 0
    before = set((Path(__file__).parent / "found").glob("*.json"))
    formats = [given.only] if given.only else _formats()
    minutes = given.minutes / len(formats)
    broken = 0
    for name in formats:
        command = [sys.executable, __file__, "--here", "--only", name, "--minutes", f"{minutes}"]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
        told = [line for line in done.stderr.splitlines() if "stat::" in line and "units" in line]
        print(f"{name}: {'; '.join(told)}, exit code {done.returncode}", flush=True)
        if done.returncode:
            broken += 1
            print(done.stderr[-2000:])
    found = set((Path(__file__).parent / "found").glob("*.json")) - before
    for path in sorted(found):
        print(path.read_text())
    return 1 if found or broken else 0


def _formats() -> list[str]:
    from seeds import make

    with tempfile.TemporaryDirectory() as folder:
        names = {seed.format for seed in make(Path(folder) / "all")}
    return sorted(names - IN_CHILDREN)


if __name__ == "__main__":
    sys.exit(main())
