"""The exit codes of every command. `docs/reference/exit-codes.md` is made from `MEANINGS`."""

from __future__ import annotations

EXIT_FOUND = 1
EXIT_ERROR = 2
EXIT_UNCHECKED = 3
EXIT_INTERRUPTED = 130
EXIT_SIGNAL = 128

MEANINGS = {
    "0": "Done. `check` found nothing, `verify` found the adapter, `replay` made equal bytes.",
    "1": "Found or failed: `check` found something, `verify` found a difference, `replay` made "
    "other bytes, an error is above `--max-error`, or one of several adapters failed.",
    "2": "Usage or bad input: an option, a path or a file is wrong. Nothing was written; "
    "a fleet keeps what it had finished.",
    "3": "Could not be checked: `check`, also that of `push`, could not look at an adapter, "
    "`verify` cannot tell, or `replay` lacks an input.",
    "130": "Interrupted with Ctrl-C. No output is half written; those that were finished, as of "
    "a fleet, stay.",
    "143": "Terminated by SIGTERM; 129 by SIGHUP. Outputs are as after Ctrl-C.",
}
"""What each code means, as one sentence or two."""
