"""Merging adapters; `loratools.merge.operation.merge` is the operation."""
