"""A plugin that wants to end the process."""

raise SystemExit("not on this machine")
