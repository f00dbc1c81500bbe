"""One pair of factors: loading, resizing, rescaling, its true rank and its dense product."""
