"""Converting adapters between formats; `operation.convert` is the operation."""
