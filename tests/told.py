"""What commands print with `--json`, without what may differ between runs that did the same."""

import json


def found(text, *others):
    """Return the object without `seconds`, and without other keys."""
    told = json.loads(text)
    return {key: value for key, value in told.items() if key not in ("seconds", *others)}
