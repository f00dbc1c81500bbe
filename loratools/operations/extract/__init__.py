"""Extracting adapters from two checkpoints; `operation.extract` is the operation."""
