"""Factors of experts in the layout that is asked for, or that a program reads.

`groups` sorts an adapter's modules by their experts, `stacked`, `each` and `apart` make the modules
of a layout, and `choice` says which layout a program reads. `layouts` is the entry.
"""
