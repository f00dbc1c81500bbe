"""A third-party plugin whose import fails."""

raise ImportError("a library this plugin needs is missing")
