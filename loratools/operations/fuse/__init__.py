"""Fusing adapters into base weights; `operation.fuse` is the operation."""
