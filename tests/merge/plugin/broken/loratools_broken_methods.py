"""A plugin whose import fails."""

raise ImportError("a library these methods need is missing")
