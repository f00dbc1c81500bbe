"""Runs one command and reports how it ended, as one JSON object on stdout.

A small process of its own, because the peak memory that Linux reports for a child includes what
the process that forked it used, and pytest may have torch loaded. The command inherits stderr.
"""

import json
import os
import resource
import signal
import sys
import threading
import time


def run(job):
    """Replace this process by the job's command, its streams and limits set."""
    os.setsid()
    if job["stdout"] == "closed":
        os.close(1)
    elif job["stdout"] == "without reader":
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
    else:
        os.dup2(os.open(job["stdout"], os.O_WRONLY), 1)
    os.closerange(3, 256)
    for name, limit in job["limits"].items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    command = [os.fsencode(part) for part in job["command"]]
    os.execve(command[0], command, job["environment"])


def main():
    """Run the job on stdin, kill it when its time is up, and report."""
    job = json.load(sys.stdin)
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            run(job)
        finally:
            os._exit(127)
    watch = threading.Timer(job["seconds"], os.killpg, (pid, signal.SIGKILL))
    watch.start()
    _, status, usage = os.wait4(pid, 0)
    watch.cancel()
    report = {
        "code": os.waitstatus_to_exitcode(status),
        "seconds": time.monotonic() - started,
        "peak_bytes": usage.ru_maxrss * 1024,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
