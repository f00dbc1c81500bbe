"""The Hub that `push` publishes to in campaigns: its repository is the command's output."""

from __future__ import annotations

import contextlib
import copy
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPO = "me/made"


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Any]:
    """Run a Hub, and send every command to it; the folder holds its cache, which no fault meets."""
    sys.path.insert(0, os.fspath(Path(__file__).parents[1] / "hub"))
    import hub_server

    with hub_server.running() as hub:
        os.environ.update(hub_server.environment(hub, folder / "home"))
        os.environ.pop("HF_HUB_OFFLINE", None)
        from loratools.face import push
        from loratools.hub import upload

        upload.FIRST_WAIT_SECONDS = 0.01
        push.picture_of = _drawn  # drawing takes longer than all the rest
        yield hub


def _drawn(adapter: Any, name: str, folder: Path) -> Path:
    (folder / "spectrum.png").write_bytes(f"{name} {len(adapter.modules)}".encode())
    return folder / "spectrum.png"


class OnTheHub:
    """What a command whose output is a repository does otherwise; `hub` is the server."""

    hub: Any
    done = (0,)
    _repo: Any = None

    def words(self, n: int) -> list[str]:
        """Return the command line, which has no --overwrite."""
        return [word for word in super().words(n) if word != "--overwrite"]

    def state(self) -> dict[str, bytes]:
        """Return the files of the repository; none where there is none."""
        repo = self.hub.repos.get(REPO)
        files = {} if repo is None else repo.files()
        return {name: data for name, data in files.items() if name != ".gitattributes"}

    def keep(self) -> None:
        """Take the repository for the old one."""
        self._repo = copy.deepcopy(self.hub.repos[REPO])

    def clear(self) -> None:
        """Leave no repository."""
        super().clear()
        self.hub.repos.pop(REPO, None)

    def restore(self) -> None:
        """Leave the old repository, or none."""
        self.clear()
        if self._repo is not None:
            self.hub.repos[REPO] = copy.deepcopy(self._repo)
