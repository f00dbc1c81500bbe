"""System calls that fail on demand, and a record of those made."""

import errno
import os

from loratools_formats.disk import renames

CALLS = ("open", "write", "fsync", "chmod", "mkdir", "rename", "replace")


def watch(patch, fail_at=None):
    """Wrap the calls of `os` that writers use; returns the growing list of their names.

    The call number `fail_at`, from 0, raises as on a full disk.
    """
    made = []

    def wrapped(name, original):
        def call(*arguments, **options):
            made.append(name)
            if len(made) - 1 == fail_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
            return original(*arguments, **options)

        return call

    for name in CALLS:
        patch.setattr(os, name, wrapped(name, getattr(os, name)))
    patch.setattr(renames, "_renamed", wrapped("rename", renames._renamed))
    return made


def each_failure(monkeypatch, action):
    """Run `action` with its first call failing, then its second ...; yields what it raised.

    Yields (name of the call, error) after each run; ends after the run in which nothing fails.
    """
    for fail_at in range(1000):
        error = None
        with monkeypatch.context() as patch:
            made = watch(patch, fail_at)
            try:
                action()
            except Exception as raised:  # noqa: BLE001 - the test looks at it
                error = raised
        if len(made) <= fail_at:
            assert error is None
            return
        yield made[fail_at], error
    raise AssertionError("the action never ends")
