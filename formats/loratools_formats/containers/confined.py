"""Taking everything from a process that it does not need to read a file it holds open.

Memory and processor time are bounded, and where the system has seccomp (Linux on x86-64 and 64-bit
ARM) only calls stay that read, write to what is open, take memory, and end: no file is opened, no
socket made, no program started. Other calls fail with EPERM. There is no way back.

Source: `linux/seccomp.h`, `linux/filter.h`, and the tables of system calls of both processors.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import struct
import sys

_SET_SECCOMP, _FILTER, _NO_NEW_PRIVILEGES = 22, 2, 38
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | 1  # EPERM
_NUMBER_AT, _PROCESSOR_AT = 0, 4
# In this order: read write close fstat lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask
# rt_sigreturn pread64 sched_yield mremap madvise getpid exit futex clock_gettime exit_group
# getrandom.
_CALLS = {
    "x86_64": (
        0xC000003E,
        (0, 1, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 17, 24, 25, 28, 39, 60, 202, 228, 231, 318),
    ),
    "aarch64": (
        0xC00000B7,
        (63, 64, 57, 80, 62, 222, 226, 215, 214, 134, 135, 139, 67, 124, 216, 233, 172, 93, 98,
         113, 94, 278),
    ),
}  # fmt: skip


def confine(memory_bytes: int, cpu_seconds: int) -> None:
    """Bound what this process may do from here on, as far as the system can.

    Args:
        memory_bytes: most memory that it may take, what it has included.
        cpu_seconds: most processor time from now on.
    """
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + cpu_seconds
        for limit, value in (
            (resource.RLIMIT_DATA, memory_bytes),
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_FSIZE, 0),
            (resource.RLIMIT_CORE, 0),
        ):
            _, hard = resource.getrlimit(limit)
            ceiling = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(limit, (ceiling, hard))
    refuse_calls()


def refuse_calls() -> bool:
    """Keep this process to the calls above; False where the system cannot do that."""
    known = _CALLS.get(platform.machine()) if sys.platform == "linux" else None
    if known is None or struct.calcsize("P") != 8:
        return False
    processor, calls = known
    steps = [(_LOAD, 0, 0, _PROCESSOR_AT), (_EQUAL, 1, 0, processor), (_RETURN, 0, 0, _REFUSE)]
    steps += [(_LOAD, 0, 0, _NUMBER_AT)]
    steps += [(_EQUAL, len(calls) - place, 0, call) for place, call in enumerate(calls)]
    steps += [(_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBL", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(code)))
    library = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if library.prctl(_NO_NEW_PRIVILEGES, ctypes.c_ulong(1), zero, zero, zero) != 0:
        return False
    status: int = library.prctl(_SET_SECCOMP, ctypes.c_ulong(_FILTER), program, zero, zero)
    return status == 0
