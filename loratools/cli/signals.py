"""Signals that stop a command: they unwind the stack like Ctrl-C, where that is safe.

A handler's exception may be raised between any two steps of Python code. There are places where it
does harm: inside the locks of `threading` and `concurrent.futures`, which are taken in Python code
and then never given back, so that a thread waits for ever; while a thread starts, for which nobody
would wait; and inside a destructor, where Python throws it away. If a signal arrives in such a
place, it is sent again a moment later.

Source: "Signal handlers and exceptions" in the documentation of `signal`, and the code of these
modules.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from loratools.cli.exits import EXIT_INTERRUPTED, EXIT_SIGNAL

_UNSAFE_MODULES = frozenset(
    {"threading", "queue", "concurrent.futures._base", "concurrent.futures.thread",
     "importlib._bootstrap"}
)  # fmt: skip
_WAITING = ("threading", "wait")
"""Where the main thread stands while it waits for others, for as long as they work."""

_UNSAFE_CALLERS = frozenset({("threading", "start"), (__name__, "stop"), (__name__, "unraisable")})
_AGAIN_SECONDS = 0.005
_LAST_SECONDS = 30.0


def stop_on_signals() -> list[int]:
    """Let signals unwind the stack, so that outputs are cleared away; return those that arrived.

    SIGTERM and SIGHUP do as Ctrl-C, unless whoever started this process ignores them. Should the
    process still be there half a minute later, it ends as by SIGKILL: outputs are whole or absent
    then, too, and the next run removes what was begun.
    """
    arrived: list[int] = []
    told = sys.unraisablehook

    def stop(number: int, frame: FrameType | None) -> None:
        if number not in arrived:
            arrived.append(number)
            _in_a_thread(_end, number, _LAST_SECONDS)
        if is_unsafe(frame) and _in_a_thread(_send, number, _AGAIN_SECONDS):
            return
        raise KeyboardInterrupt

    def unraisable(thrown: sys.UnraisableHookArgs) -> None:
        if arrived and issubclass(thrown.exc_type, KeyboardInterrupt):
            _in_a_thread(_send, arrived[0], _AGAIN_SECONDS)
        else:
            told(thrown)

    sys.unraisablehook = unraisable
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        usual = (signal.SIG_DFL, signal.default_int_handler)
        if number is not None and signal.getsignal(number) in usual:
            signal.signal(number, stop)
    return arrived


def code_of(number: int) -> int:
    """Return the exit code of a command that a signal has stopped."""
    return EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_SIGNAL + number


def is_unsafe(frame: FrameType | None) -> bool:
    """Return whether an exception that is raised in a frame may be lost, or leave a lock taken."""
    if frame is None:
        return False
    module, name = _place(frame)
    if name in ("__enter__", "__exit__"):
        return True
    if module in _UNSAFE_MODULES and (module, name) != _WAITING:
        return True
    caller: FrameType | None = frame
    while caller is not None:
        if caller.f_code.co_name == "__del__" or _place(caller) in _UNSAFE_CALLERS:
            return True
        caller = caller.f_back
    return False


def _place(frame: FrameType) -> tuple[str, str]:
    return str(frame.f_globals.get("__name__")), frame.f_code.co_name


def _in_a_thread(function: Callable[[int, float], None], number: int, seconds: float) -> bool:
    """Call a function beside; returns whether that is possible.

    `threading` has a lock that the interrupted code may hold; `_thread` has none.
    """
    try:
        _thread.start_new_thread(function, (number, seconds))
    except RuntimeError:  # no further thread
        return False
    return True


def _send(number: int, seconds: float) -> None:
    """Send the main thread a signal; where the system can, it wakes the thread from a call."""
    time.sleep(seconds)
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:
        signal.pthread_kill(main, number)
    else:  # Windows
        signal.raise_signal(number)


def _end(number: int, seconds: float) -> None:
    time.sleep(seconds)
    with contextlib.suppress(OSError):
        os.write(2, b"error: stopped without clearing away; the next run does that\n")
    os._exit(code_of(number))
