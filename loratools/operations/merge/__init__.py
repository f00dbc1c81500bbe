"""Merging adapters; `operation.merge` is the operation."""
