"""Fusing adapters into base weights; `loratools.fuse.operation.fuse` is the operation."""
