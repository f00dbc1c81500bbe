"""Checks adapters: rules with stable codes, each a small function over one adapter.

`rules` says what a rule is and lists all of them; the files named after groups hold the functions.
What a reader finds or refuses is a finding here too. What serving programs accept is data:
`targets.toml`, with versions, dates and sources. `runner` checks many adapters.

No rule calls an adapter safe. A finding says what was read, and no finding says no more than that
the rules which ran met nothing.
"""
