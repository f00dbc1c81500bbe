"""A format for tests of fleets: names an adapter, takes its time, and may end its process.

A folder with slow.json: `source`, and any of `seconds`, `dies` (each time) and `dies_once` (a path
that is made first, so that it happens once).
"""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

from loratools_formats import Adapter, Format, read_adapter
from loratools_formats.disk.files import RegularFile


class Slow(Format):
    name = "slow"
    description = "Adapters that take their time"
    is_folder = True

    def sniff(self, path: Path) -> bool:
        return (path / "slow.json").is_file()

    def read(self, path: Path) -> Adapter:
        told = json.loads((path / "slow.json").read_text())
        once = told.get("dies_once")
        if told.get("dies") or (once and not os.path.exists(once)):
            if once:
                Path(once).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(told.get("seconds", 0))
        own = RegularFile(path / "slow.json")
        return replace(read_adapter(told["source"]), source=path, inputs=(own,))


FORMAT = Slow()
